// The spectrum of the picked matrix, with its edges.

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
