"use strict";
// The page of a benchmark: its tables sort, its theme switches.

document.querySelectorAll("table.rows").forEach((table) => makeSortable(table));
document.getElementById("theme").addEventListener("click", switchTheme);
document.addEventListener("keydown", (event) => {
  if (event.key === "t" && !event.ctrlKey && !event.metaKey && !event.altKey) switchTheme();
});
