// The heat map: snr of each block and module type, and how a matrix is picked in it.

const blocks = [...new Set(data.matrices.map((matrix) => matrix.block))].sort((a, b) => (a ?? Infinity) - (b ?? Infinity));

// A cell holds the matrices of one block and type: one, or the experts of a block.
const cells = data.types.map(() => blocks.map(() => []));
data.matrices.forEach((matrix, index) => cells[matrix.type][blocks.indexOf(matrix.block)].push(index));

function noisiestOf(indices) {
  const rank = (index) => fit(data.matrices[index]).snr ?? Infinity;
  return [...indices].sort((a, b) => rank(a) - rank(b) || a - b);
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

function cellText(indices) {
  if (!indices.length) return "";
  const order = noisiestOf(indices);
  const matrix = data.matrices[order[0]];
  const found = fit(matrix);
  const many = order.length > 1 ? `${order.length} matrices here; the noisiest:<br>` : "";
  const chosen = matrix.chosen ? "<br>chosen to be trained" : "";
  const tried = `${matrix.tried ? `<br>tried by the search: ${plain(matrix.tried)}` : ""}${chosen}`;
  return (
    `${many}<b>${plain(matrix.name)}</b><br>${matrix.shape.join(" x ")}, snr ${plain(snrText(found))}` +
    `<br>rank ${found.rank} of ${fullRank(matrix)}, threshold ${number(found.threshold)}${tried}`
  );
}

const across = (x, y) => (state.isNarrow ? { x: y, y: x } : { x, y });
const transposed = (rows) => (state.isNarrow ? rows[0].map((_, column) => rows.map((row) => row[column])) : rows);

function drawHeatMap() {
  const snrs = cells.map((row) => row.map((cell) => cell.map((index) => fit(data.matrices[index]).snr).filter((snr) => snr !== null)));
  const positive = snrs.flat(2).filter((snr) => snr > 0);
  const low = positive.length ? Math.min(...positive) : 0.1;
  // One matrix far above the others would leave these a single colour.
  const high = positive.length ? positive.sort((a, b) => a - b)[Math.floor(0.97 * (positive.length - 1))] : 1;
  const z = snrs.map((row) => row.map((cell) => (cell.length ? Math.log10(Math.max(median(cell), low)) : null)));
  const ends = [Math.log10(low), Math.log10(high) > Math.log10(low) ? Math.log10(high) : Math.log10(low) + 1];
  const ticks = [0, 0.25, 0.5, 0.75, 1].map((share) => ends[0] + share * (ends[1] - ends[0]));

  const heat = {
    type: "heatmap",
    z: transposed(z),
    text: transposed(cells.map((row) => row.map(cellText))),
    hoverinfo: "text",
    xgap: 1,
    ygap: 1,
    zmin: ends[0],
    zmax: ends[1],
    colorscale: [0, 1, 2, 3, 4].map((step) => [step / 4, color(`heat-${step}`)]),
    colorbar: {
      title: { text: "snr", side: state.isNarrow ? "top" : "right" },
      tickvals: ticks,
      ticktext: ticks.map((tick, place) => (place === 4 ? "≥ " : "") + Number((10 ** tick).toPrecision(2))),
      thickness: 10,
      outlinewidth: 0,
      ...(state.isNarrow ? { orientation: "h", y: 1, yanchor: "bottom", x: 0.5 } : {}),
    },
  };

  const marks = { x: [], y: [], symbol: [] };
  const noRatio = { x: [], y: [] };
  const chosen = { x: [], y: [] };
  cells.forEach((row, type) =>
    row.forEach((cell, block) => {
      const { x, y } = across(block, type);
      const outcomes = cell.map((index) => data.matrices[index].tried).filter(Boolean);
      if (outcomes.length) {
        marks.x.push(x);
        marks.y.push(y);
        marks.symbol.push(outcomes.includes("kept") ? "circle" : "circle-open");
      }
      if (cell.some((index) => data.matrices[index].chosen)) {
        chosen.x.push(x);
        chosen.y.push(y);
      }
      if (cell.length && z[type][block] === null) {
        noRatio.x.push(x);
        noRatio.y.push(y);
      }
    })
  );
  const over = { type: "scatter", mode: "markers", hoverinfo: "skip" };
  const traces = [
    heat,
    { ...over, x: marks.x, y: marks.y, marker: { symbol: marks.symbol, size: 7, color: color("mark"), line: { width: 1.5, color: color("mark") } } },
    { ...over, x: noRatio.x, y: noRatio.y, marker: { symbol: "x-thin", size: 6, line: { width: 1.5, color: color("muted") } } },
    { ...over, x: chosen.x, y: chosen.y, marker: { symbol: "square-open", size: state.isNarrow ? 10 : 16, line: { width: 1 }, color: color("mark") } },
  ];

  const types = { tickvals: data.types.map((_, index) => index), ticktext: data.types.map(plain), showgrid: false, zeroline: false };
  const step = Math.ceil(blocks.length / (state.isNarrow ? 40 : 24));
  const shownBlocks = blocks.map((_, index) => index).filter((index) => index % step === 0 || blocks[index] === null);
  const numbers = {
    tickvals: shownBlocks,
    ticktext: shownBlocks.map((index) => (blocks[index] === null ? OUTSIDE : String(blocks[index]))),
    showgrid: false,
    zeroline: false,
    title: { text: "block", standoff: 6 },
  };
  const ofTypes = { ...types, range: [data.types.length - 0.5, -0.5] };
  const heatMap = byId("heat-map");
  heatMap.style.height = state.isNarrow
    ? `${Math.min(1400, 230 + 12 * Math.max(blocks.length, 8))}px`
    : `${70 + 34 * Math.max(data.types.length, 3)}px`;
  Plotly.react(
    heatMap,
    traces,
    layout({
      ...(state.isNarrow
        ? { xaxis: { ...types, range: [-0.5, data.types.length - 0.5], tickangle: -60 }, yaxis: { ...numbers, range: [blocks.length - 0.5, -0.5] } }
        : { xaxis: { ...numbers, range: [-0.5, blocks.length - 0.5] }, yaxis: ofTypes }),
      shapes: [outline()],
    }),
    CONFIG
  );
}

function outline() {
  const matrix = data.matrices[state.matrix];
  const { x, y } = across(blocks.indexOf(matrix.block), matrix.type);
  return { type: "rect", x0: x - 0.5, x1: x + 0.5, y0: y - 0.5, y1: y + 0.5, line: { color: color("text"), width: 2.5 } };
}

// Plotly tells of no click when the mouse moved right before a short press.
function selectByPointer() {
  let pressed;
  byId("heat-map").addEventListener("pointerdown", (event) => (pressed = event.button === 0 ? cellAt(event) : undefined));
  addEventListener("pointerup", (event) => {
    if (pressed?.length && cellAt(event) === pressed) select(noisiestOf(pressed)[0]);
    pressed = undefined;
  });
}

function cellAt({ clientX, clientY }) {
  const area = byId("heat-map").querySelector(".nsewdrag").getBoundingClientRect();
  const size = across(blocks.length, data.types.length);
  const column = Math.floor((size.x * (clientX - area.x)) / area.width);
  const row = Math.floor((size.y * (clientY - area.y)) / area.height);
  const { x, y } = across(column, row);
  return cells[y]?.[x];
}

function moveOnHeatMap(event) {
  const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!step) return;
  event.preventDefault();
  const moved = across(...step);
  const matrix = data.matrices[state.matrix];
  let type = matrix.type;
  let block = blocks.indexOf(matrix.block);
  do {
    type += moved.y;
    block += moved.x;
  } while (cells[type]?.[block]?.length === 0);
  const found = cells[type]?.[block];
  if (found) select(noisiestOf(found)[0]);
}
