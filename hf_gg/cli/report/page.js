"use strict";
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const fixed = [...body.rows].filter((row) => row.classList.contains("total"));
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => {
        const cell = row.cells[column];
        if (!cell || cell.colSpan > 1) return null;
        return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
      };
      const rows = [...body.rows].filter((row) => !fixed.includes(row)).map((row) => [key(row), row]);
      rows.sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null); // without a figure: last, either way
        const order = typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
        return down ? -order : order;
      });
      body.append(...rows.map(([, row]) => row), ...fixed);
    });
  });
}
const tools = document.querySelector(".tools"), filter = document.getElementById("filter");
const fitted = document.getElementById("fitted"), shown = document.getElementById("shown");
const rows = [...document.getElementById("tensor-table").tBodies[0].rows];
function choose() {
  const wanted = filter.value.trim().toLowerCase();
  let count = 0;
  for (const row of rows) {
    const text = `${row.cells[0].textContent} ${row.cells[1].textContent}`.toLowerCase();
    row.hidden = !text.includes(wanted) || (fitted.checked && row.classList.contains("unfitted"));
    count += !row.hidden;
  }
  shown.textContent = `${count} of ${rows.length} tensors`;
}
filter.addEventListener("input", choose);
fitted.addEventListener("change", choose);
tools.hidden = false;
choose();
