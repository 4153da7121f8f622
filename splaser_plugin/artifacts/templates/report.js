"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const NARROW = 640;
const OUTSIDE = "–";
const HISTOGRAM_BINS = 60;

const state = { edge: data.edges.indexOf(data.edge), matrix: 0, isNarrow: innerWidth < NARROW };

// Plotly reads some HTML in every text it draws.
const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const number = (value) => (value === 0 ? "0" : Number(value.toPrecision(4)).toString());
const fit = (matrix, edge = state.edge) => {
  const [sigma, threshold, rank, snr, reason] = matrix.edges[edge];
  return { sigma, threshold, rank, snr, reason };
};
const snrText = ({ snr, reason }) => (snr === null ? `none: ${reason}` : number(snr));
const everything = data.matrices.map((_, index) => index);
const fullRank = (matrix) => Math.min(...matrix.shape);

/* ---------- colours ---------- */

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const edgeColors = () => [color("edge-1"), color("edge-2"), color("edge-3")];
const DASHES = ["solid", "dash", "dot"];

function layout(extra) {
  const axis = { gridcolor: color("line"), zerolinecolor: color("line"), linecolor: color("line"), automargin: true, fixedrange: true };
  const { xaxis, yaxis, ...rest } = extra;
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 12, color: color("text") },
    hoverlabel: { bgcolor: color("raised"), bordercolor: color("line"), font: { family: "system-ui, sans-serif", color: color("text") }, align: "left" },
    margin: { l: 10, r: 10, t: 10, b: 10 },
    dragmode: false,
    showlegend: false,
    xaxis: { ...axis, ...xaxis },
    yaxis: { ...axis, ...yaxis },
    ...rest,
  };
}
const CONFIG = { displayModeBar: false, responsive: true };

/* ---------- heat map ---------- */

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
  const tried = matrix.tried ? `<br>tried by the search: ${plain(matrix.tried)}` : "";
  return (
    `${many}<b>${plain(matrix.name)}</b><br>${matrix.shape.join(" x ")}, SNR ${plain(snrText(found))}` +
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
      title: { text: "SNR", side: state.isNarrow ? "top" : "right" },
      tickvals: ticks,
      ticktext: ticks.map((tick, place) => (place === 4 ? "≥ " : "") + Number((10 ** tick).toPrecision(2))),
      thickness: 10,
      outlinewidth: 0,
      ...(state.isNarrow ? { orientation: "h", y: 1, yanchor: "bottom", x: 0.5 } : {}),
    },
  };

  const marks = { x: [], y: [], symbol: [] };
  const noRatio = { x: [], y: [] };
  cells.forEach((row, type) =>
    row.forEach((cell, block) => {
      const { x, y } = across(block, type);
      const verdicts = cell.map((index) => data.matrices[index].tried).filter(Boolean);
      if (verdicts.length) {
        marks.x.push(x);
        marks.y.push(y);
        marks.symbol.push(verdicts.includes("kept") ? "circle" : "circle-open");
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

/* ---------- spectrum ---------- */

// How many singular values each stored one stands for: they are evenly spaced by order, and the ends are exact.
function weights(count, full) {
  if (count < 2) return Array(count).fill(full);
  const spacing = (full - 1) / (count - 1);
  return Array.from({ length: count }, (_, index) => (index === 0 || index === count - 1 ? 0.5 + spacing / 2 : spacing));
}

function histogram(values, full) {
  const [high, low] = [values[0], values[values.length - 1]];
  const bins = Math.min(HISTOGRAM_BINS, Math.max(8, Math.round(values.length / 3)));
  const width = (high - low) / bins || Math.abs(high) / bins || 1;
  const counts = Array(bins).fill(0);
  const each = weights(values.length, full);
  values.forEach((value, index) => (counts[Math.min(bins - 1, Math.floor((value - low) / width))] += each[index]));
  return { x: counts.map((_, bin) => low + (bin + 0.5) * width), counts, width };
}

function drawSpectrum() {
  const matrix = data.matrices[state.matrix];
  const full = fullRank(matrix);
  const note = byId("spectrum-note");
  fillFits(matrix);
  if (!matrix.spectrum.length) {
    Plotly.purge("spectrum");
    byId("spectrum").style.height = "0";
    note.textContent = "This scan holds no spectrum of it. Scan again with splaser scan.";
    return;
  }
  byId("spectrum").style.height = "320px";
  const { x, counts, width } = histogram(matrix.spectrum, full);
  const top = Math.max(...counts);
  const bars = {
    type: "bar",
    x,
    y: counts,
    width,
    name: "singular values",
    marker: { color: color("bar"), line: { width: 0 } },
    text: x.map((middle, bin) => `${number(middle - width / 2)} to ${number(middle + width / 2)}: about ${Math.round(counts[bin])}`),
    textposition: "none",
    hoverinfo: "text",
  };
  const traces = [bars];
  const { sigma } = fit(matrix, data.edges.indexOf("mp"));
  if (sigma > 0 && full > 1) {
    const [noiseX, density] = data.noise[matrix.shape.join("x")];
    traces.push({
      type: "scatter",
      mode: "lines",
      x: noiseX.map((value) => value * sigma),
      y: density.map((value) => (value / sigma) * full * width),
      name: "pure noise (Marchenko-Pastur)",
      line: { color: color("noise"), width: 2 },
      hoverinfo: "skip",
    });
  }
  data.edges.forEach((edge, index) => {
    const found = fit(matrix, index);
    traces.push({
      type: "scatter",
      mode: "lines",
      x: [found.threshold, found.threshold],
      y: [0, top * 1.05],
      name: `${edge}: ${found.rank} above`,
      line: { color: edgeColors()[index], width: index === state.edge ? 3 : 1.5, dash: DASHES[index] },
      hoverinfo: "skip",
    });
  });
  Plotly.react(
    "spectrum",
    traces,
    layout({
      showlegend: true,
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
      bargap: 0,
      xaxis: { title: { text: "singular value", standoff: 6 }, rangemode: "tozero" },
      yaxis: { title: { text: "how many", standoff: 6 }, range: [0, top * 1.08] },
    }),
    CONFIG
  );
  const shown = matrix.spectrum.length < full ? `${matrix.spectrum.length} of its ${full} singular values` : `all of its ${full} singular values`;
  note.textContent = `${matrix.shape.join(" x ")}; drawn from ${shown}. Bars right of the curve are what noise of this scale doesn't reach.`;
}

function fillFits(matrix) {
  const rows = data.edges.map((edge, index) => {
    const found = fit(matrix, index);
    const row = document.createElement("tr");
    row.className = index === state.edge ? "current" : "";
    for (const text of [edge, number(found.threshold), `${found.rank} of ${fullRank(matrix)}`, snrText(found)]) {
      row.append(Object.assign(document.createElement("td"), { textContent: text }));
    }
    return row;
  });
  byId("fits").tBodies[0].replaceChildren(...rows);
}

/* ---------- verdict ---------- */

function drawVerdict() {
  const verdict = data.verdict;
  if (!verdict) return;
  // Spread without chance, so that the page looks the same each time.
  const height = (index) => 0.35 * (((index * 0.618034) % 1) * 2 - 1);
  const dots = {
    type: "scatter",
    mode: "markers",
    x: verdict.differences,
    y: verdict.differences.map((_, index) => height(index)),
    text: verdict.differences.map((each, index) => {
      const prompt = verdict.prompts[index];
      return prompt === undefined ? number(each) : `${number(each)}<br>${plain(prompt.length > 80 ? prompt.slice(0, 80) + "…" : prompt)}`;
    }),
    hoverinfo: "text",
    marker: { size: 7, opacity: 0.75, color: verdict.differences.map((each) => (each > 0 ? color("up") : each < 0 ? color("down") : color("muted"))) },
  };
  const mean = {
    type: "scatter",
    mode: "markers",
    x: [verdict.difference],
    y: [1],
    error_x: {
      type: "data",
      symmetric: false,
      array: [verdict.interval[1] - verdict.difference],
      arrayminus: [verdict.difference - verdict.interval[0]],
      thickness: 2.5,
      width: 7,
      color: color("text"),
    },
    marker: { size: 11, symbol: "diamond", color: color("text") },
    text: [`mean ${number(verdict.difference)}, 95 % interval ${number(verdict.interval[0])} to ${number(verdict.interval[1])}`],
    hoverinfo: "text",
  };
  byId("verdict-chart").style.height = "190px";
  Plotly.react(
    "verdict-chart",
    [dots, mean],
    layout({
      xaxis: { title: { text: "score after minus before", standoff: 6 }, zeroline: true, zerolinewidth: 2, zerolinecolor: color("muted") },
      yaxis: { tickvals: [0, 1], ticktext: [verdict.unit, "mean"], range: [-0.6, 1.5], showgrid: false, zeroline: false },
    }),
    CONFIG
  );
}

/* ---------- lists ---------- */

function fillPicker() {
  const picker = byId("matrix");
  data.types.forEach((type, typeIndex) => {
    const group = Object.assign(document.createElement("optgroup"), { label: type });
    cells[typeIndex].flat().forEach((index) => {
      group.append(Object.assign(document.createElement("option"), { value: index, textContent: data.matrices[index].name }));
    });
    picker.append(group);
  });
}

function fillNoisiest() {
  const list = noisiestOf(everything).slice(0, 10);
  const items = list.map((index) => {
    const matrix = data.matrices[index];
    const found = fit(matrix);
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.matrix = index;
    const name = Object.assign(document.createElement("span"), { className: "name", textContent: matrix.name });
    const text = `SNR ${found.snr === null ? "none" : number(found.snr)}, rank ${found.rank} of ${fullRank(matrix)}`;
    button.append(name, Object.assign(document.createElement("span"), { className: "rank", textContent: text }));
    button.addEventListener("click", () => select(index));
    const item = document.createElement("li");
    item.append(button);
    return item;
  });
  byId("noisiest").replaceChildren(...items);
}

function showCurrent() {
  byId("matrix").value = state.matrix;
  for (const button of byId("noisiest").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", Number(button.dataset.matrix) === state.matrix);
  }
}

/* ---------- what the reader does ---------- */

function select(index) {
  state.matrix = index;
  showCurrent();
  Plotly.relayout("heat-map", { shapes: [outline()] });
  drawSpectrum();
}

function drawAll() {
  drawHeatMap();
  fillNoisiest();
  showCurrent();
  drawSpectrum();
  drawVerdict();
}

const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme ?? (prefersDark.matches ? "dark" : "light")) === "dark";

function showTheme() {
  const other = isDark() ? "light" : "dark";
  byId("theme").textContent = other === "dark" ? "Dark" : "Light";
  byId("theme").setAttribute("aria-label", `Switch to ${other} colours`);
}

function copy(button) {
  const pre = byId(button.dataset.for);
  const done = (isCopied) => {
    button.textContent = isCopied ? "Copied" : "Selected: press Ctrl+C";
    byId("copied").textContent = button.textContent;
    setTimeout(() => (button.textContent = "Copy"), 2000);
  };
  const bySelection = () => {
    getSelection().selectAllChildren(pre);
    done(document.execCommand("copy"));
  };
  if (!navigator.clipboard) return bySelection();
  navigator.clipboard.writeText(pre.textContent).then(() => done(true), bySelection);
}

function start() {
  fillPicker();
  state.matrix = noisiestOf(everything)[0];
  showTheme();
  drawAll();

  selectByPointer();
  byId("heat-map").addEventListener("keydown", moveOnHeatMap);
  byId("edges").addEventListener("change", (event) => {
    state.edge = data.edges.indexOf(event.target.value);
    drawAll();
  });
  byId("matrix").addEventListener("change", (event) => select(Number(event.target.value)));
  const order = [...byId("matrix").options].map((option) => Number(option.value));
  const neighbour = (step) => select(order[(order.indexOf(state.matrix) + step + order.length) % order.length]);
  byId("previous").addEventListener("click", () => neighbour(-1));
  byId("next").addEventListener("click", () => neighbour(1));
  for (const button of document.querySelectorAll(".copy")) button.addEventListener("click", () => copy(button));

  byId("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    showTheme();
    drawAll();
  });
  prefersDark.addEventListener("change", () => {
    showTheme();
    drawAll();
  });
  matchMedia(`(max-width: ${NARROW - 1}px)`).addEventListener("change", (event) => {
    state.isNarrow = event.matches;
    drawHeatMap();
  });
}

start();
performance.mark("drawn");
