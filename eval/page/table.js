// Sorting by a column's head, and filtering of the models.
for (const button of findAll(".sort")) button.addEventListener("click", () => {
  const head = button.parentNode, column = head.cellIndex, body = head.closest("table").tBodies[0];
  const up = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up > 0 ? "ascending" : "descending");
  const order = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b, undefined, { numeric: true }) : a - b;
  const rows = [...body.rows].map(row => [row.cells[column].dataset.value, row]);
  rows.sort(([a], [b]) => a === undefined || b === undefined ? (a === undefined) - (b === undefined) : up * order(a, b));
  body.append(...rows.map(([, row]) => row));
});

const filter = find("#filter"), onlyFront = find("#only-front"), modelRows = findAll("#models tbody tr");
function filterRows() {
  const words = filter.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
  let n = 0;
  for (const row of modelRows) {
    const text = row.cells[0].textContent.toLowerCase();
    const fits = words.every(word => text.includes(word)) && (!onlyFront.checked || row.dataset.front === "1");
    row.hidden = !fits;
    n += fits;
  }
  find("#n-shown").textContent = n === modelRows.length ? "" : `${n} of ${modelRows.length}`;
}
filter.addEventListener("input", filterRows);
onlyFront.addEventListener("change", filterRows);
document.documentElement.dataset.ready = Math.round(performance.now());
