// The answers: which of them are shown.

function filterAnswers() {
  const shown = byId("answers-shown");
  if (!shown) return;
  const kind = document.querySelector("#answer-filter input:checked").value;
  const words = byId("answer-words").value.trim().toLowerCase();
  const groups = [...document.querySelectorAll("#answers .group")].map((group) => {
    const articles = [...group.querySelectorAll(".exchange")];
    for (const article of articles) {
      const text = article.textContent.toLowerCase();
      const isOfKind = kind === "all" || article.classList.contains(kind);
      article.hidden = !isOfKind || !text.includes(words);
    }
    const left = articles.filter((article) => !article.hidden).length;
    return `${group.querySelector("h3").textContent.toLowerCase()}: ${left} of ${articles.length}`;
  });
  shown.textContent = `Shown ${groups.join("; ")}.`;
}
