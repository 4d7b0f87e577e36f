"use strict";
// What every page shares: elements, tables that sort, light and dark.

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {}))
    if (name === "onclick") element.addEventListener("click", value);
    else if (value !== undefined && value !== false) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** What a row sorts by in a column: a number, a text, or null for nothing. */
function sortKey(row, column) {
  const cell = row.cells[column];
  if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
  return cell.textContent === "–" ? null : cell.textContent;
}

function compareKeys(x, y, sign) {
  if (x === null || y === null) return (x === null) - (y === null);
  if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1;
  return sign * (typeof x === "number" ? x - y : x.localeCompare(y, "en", { numeric: true }));
}

/** Makes a button of each heading; `order` remembers what was pressed. */
function makeSortable(table, order = { column: null, descending: false }) {
  const heads = [...table.tHead.rows[0].cells];
  const names = heads.map((head) => head.textContent);
  const show = () => {
    heads.forEach((head, index) => {
      const sorts = order.column === index;
      head.setAttribute("aria-sort", sorts ? (order.descending ? "descending" : "ascending") : "none");
      head.firstChild.textContent = names[index] + (sorts ? (order.descending ? " ▾" : " ▴") : "");
    });
    if (order.column === null) return;
    const [body] = table.tBodies, sign = order.descending ? -1 : 1;
    const keyed = [...body.rows].map((row) => [sortKey(row, order.column), row]);
    body.append(...keyed.sort(([x], [y]) => compareKeys(x, y, sign)).map(([, row]) => row));
  };
  heads.forEach((head, index) => {
    const press = () => {
      order.descending = order.column === index && !order.descending;
      order.column = index;
      show();
    };
    head.replaceChildren(make("button", { type: "button", onclick: press }, names[index]));
  });
  show();
}

function switchTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
}
