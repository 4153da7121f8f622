// What the reader does: pick a matrix or an edge, change the theme, copy; and the start of it all.

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

  filterAnswers();
  byId("answer-filter")?.addEventListener("change", filterAnswers);
  byId("answer-words")?.addEventListener("input", filterAnswers);

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
    Plotly.purge("heat-map"); // or the colour bar's old place stays reserved
    drawHeatMap();
  });
}

start();
performance.mark("drawn");
