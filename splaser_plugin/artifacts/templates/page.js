"use strict";

// The data of the page, what is shown now, and how all charts look.

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
