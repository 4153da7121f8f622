// The verdict: the difference of each held-out item, and their mean.

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
