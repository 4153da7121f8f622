// Lists of matrices: all of them to pick from, and the noisiest.

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
    const text = `snr ${found.snr === null ? "none" : number(found.snr)}, rank ${found.rank} of ${fullRank(matrix)}`;
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
