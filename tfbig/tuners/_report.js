"use strict";
// Sorts and filters the table of trials, and finds the trial of a mark. Without it, all is shown.
(() => {
  const table = document.querySelector("table.trials");
  if (!table) return;
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const text = (row, i) => row.cells[i].dataset.value ?? row.cells[i].textContent.trim();
  const number = (value) =>
    value === "" ? NaN : Number(value.replace(/^(-?)inf$/, "$1Infinity"));

  const compare = (a, b) => {
    const x = number(a), y = number(b);
    return isNaN(x) || isNaN(y) ? a.localeCompare(b, undefined, {numeric: true}) : x - y;
  };
  heads.forEach((head, i) => head.querySelector("button").addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
    const keys = new Map(rows.map((row) => [row, text(row, i)]));
    // Empty cells are last in both orders.
    rows.sort((a, b) => (keys.get(a) === "") - (keys.get(b) === "")
      || sign * compare(keys.get(a), keys.get(b)));
    body.append(...rows);
  }));

  const names = heads.map((head) => head.textContent.trim());
  const OPERATORS = {
    "<": (c) => c < 0, "<=": (c) => c <= 0, ">": (c) => c > 0, ">=": (c) => c >= 0,
    "=": (c) => c === 0, "!=": (c) => c !== 0,
  };
  const condition = (word) => {
    const found = word.match(/^(.+?)(<=|>=|!=|<|>|=)(.*)$/);
    const i = found ? names.indexOf(found[1]) : -1;
    if (i < 0) return (row) => row.textContent.toLowerCase().includes(word.toLowerCase());
    return (row) => text(row, i) !== "" && OPERATORS[found[2]](compare(text(row, i), found[3]));
  };
  const input = document.querySelector(".filter input"), count = document.querySelector(".count");
  const filter = () => {
    const conditions = input.value.split(/\s+/).filter(Boolean).map(condition);
    let shown = 0;
    for (const row of rows) {
      row.hidden = !conditions.every((holds) => holds(row));
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length} trials`;
  };
  input.addEventListener("input", filter);
  document.querySelector(".filter").hidden = false;
  filter();

  document.addEventListener("click", (event) => {
    const title = event.target.closest("[role=img] *")?.querySelector(":scope > title");
    const id = title?.textContent.match(/^trial (\d+)/)?.[1];
    const row = id && rows.find((r) => r.cells[0].textContent.trim() === id);
    if (!row) return;
    rows.forEach((r) => r.classList.toggle("found", r === row));
    if (row.hidden) { input.value = ""; filter(); }
    row.scrollIntoView({block: "center"});
  });
})();
