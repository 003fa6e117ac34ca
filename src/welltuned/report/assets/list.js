"use strict";
(() => {
  const table = document.getElementById("list");
  if (!table) return;
  const body = table.tBodies[0];
  const value = (row, column) => row.cells[column]?.dataset.value ?? row.cells[column]?.textContent ?? "";
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = head.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      [...table.tHead.rows[0].cells].forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [value(a, column), value(b, column)];
        if ((x === "") !== (y === "")) return x === "" ? 1 : -1; // what has none comes last
        const numbers = x !== "" && Number.isFinite(Number(x)) && Number.isFinite(Number(y));
        return (up ? 1 : -1) * (numbers ? Number(x) - Number(y) : x.localeCompare(y));
      });
      body.replaceChildren(...rows);
    });
  });
  const compare = document.getElementById("compare");
  const enough = () => { compare.disabled = table.querySelectorAll("input:checked").length < 2; };
  table.addEventListener("change", enough);
  addEventListener("pageshow", enough);
})();
