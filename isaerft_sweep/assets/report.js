// Draws the page's figures, each from the JSON beside it, and sorts a table by the column whose header is clicked.
"use strict";

const options = {displaylogo: false, responsive: true, modeBarButtonsToRemove: ["sendDataToCloud"]};
for (const source of document.querySelectorAll("script.figure")) {
  const figure = JSON.parse(source.textContent);
  Plotly.newPlot(source.previousElementSibling, figure.data, figure.layout, options);
}

// Numbers before texts, texts before empty cells, whichever the direction.
function compared(a, b, sign) {
  const [x, y] = [parseFloat(a), parseFloat(b)];
  const [kindOfA, kindOfB] = [[a, x], [b, y]].map(([text, value]) => (text === "" ? 2 : Number.isNaN(value) ? 1 : 0));
  if (kindOfA !== kindOfB) return kindOfA - kindOfB;
  return sign * (kindOfA === 0 ? x - y : a.localeCompare(b));
}

function sortBy(header) {
  const headers = header.parentElement;
  const column = [...headers.children].indexOf(header);
  const sign = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of headers.children) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
  const text = (row) => row.children[column].textContent.trim().replace(/^[#(]/, "");
  const rows = [...headers.parentElement.children].slice(1);
  const last = (row) => row.classList.contains("fixed");
  rows.sort((a, b) => last(a) - last(b) || compared(text(a), text(b), sign));
  headers.parentElement.append(...rows);
}

for (const header of document.querySelectorAll("table.sortable th")) {
  header.tabIndex = 0;
  header.title = "sort by this column";
  header.addEventListener("click", () => sortBy(header));
  header.addEventListener("keydown", (event) => { if (event.key === "Enter") sortBy(header); });
}
