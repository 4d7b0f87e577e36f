"use strict";
// The page: which graph, stage and node is shown, kept in the address after the #.

const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const HIDDEN_KINDS = ["weight"];

const state = {
  graph: 0, stage: data.graphs[0].stages.length - 1, node: null, tab: "graph",
  side: false, removed: false, weights: false,
};
const toggled = new Map(); // path of a group -> whether it was unfolded or folded by hand
let everything = null; // true: all was unfolded at once

const isOpen = (group) => toggled.get(group.path) ?? everything ?? holdsBlocks(group);
const views = {
  before: new GraphView(at("before"), isOpen, toggle, select),
  after: new GraphView(at("after"), isOpen, toggle, select),
};

// ---- data

const stages = () => data.graphs[state.graph].stages;
const nodesOf = (stage) => stages()[stage].nodes.map((position) => data.graphs[state.graph].nodes[position]);

const known = new Map();

/** Name -> its record at a stage. */
function recordsAt(stage) {
  const key = `${state.graph} ${stage}`;
  if (!known.has(key)) known.set(key, new Map(nodesOf(stage).map((record) => [record.name, record])));
  return known.get(key);
}

/** Name -> what the stage did to it; of what it removed, how that shows in the stage before. */
function changesOf(stage) {
  const { added, removed, changed, merged } = stages()[stage];
  const marks = new Map();
  for (const name of added) marks.set(name, "added");
  for (const name of changed) marks.set(name, "changed");
  for (const group of merged) for (const name of group.into) marks.set(name, "merged");
  for (const name of removed) marks.set(name, "removed");
  return marks;
}

const isShown = (record) => state.weights || !HIDDEN_KINDS.includes(record.kind);

/** What the stage left, its changes marked, with what it removed if asked for. */
function afterTree() {
  const marks = changesOf(state.stage);
  const records = nodesOf(state.stage).map((record) => ({ ...record, change: marks.get(record.name) }));
  const gone = state.stage ? nodesOf(state.stage - 1).filter((record) => marks.get(record.name) === "removed") : [];
  const names = new Set(gone.map((record) => record.name));
  if (state.removed && state.stage) {
    const before = recordsAt(state.stage - 1);
    for (const record of records)
      record.before = (before.get(record.name)?.inputs || []).filter((name) => names.has(name));
    records.push(...gone.map((record) => ({ ...record, change: "removed", inputs: [], before: record.inputs })));
  }
  const tree = buildTree(records.filter(isShown));
  if (!state.removed) countGone(tree.root, gone.filter(isShown));
  return tree;
}

/** Folded groups count what was removed from them. */
function countGone(group, gone) {
  for (const child of group.children.filter((one) => one.children)) {
    const inside = gone.filter((record) => (record.module + ".").startsWith(child.path + "."));
    child.gone = inside.map(() => "removed");
    countGone(child, inside);
  }
}

function beforeTree() {
  const marks = changesOf(state.stage);
  for (const [name, mark] of marks) if (mark === "added" || mark === "merged") marks.delete(name);
  const records = nodesOf(state.stage - 1).map((record) => ({ ...record, change: marks.get(record.name) }));
  return buildTree(records.filter(isShown));
}

// ---- the graph

function showGraph() {
  const stage = stages()[state.stage];
  const side = state.side && state.stage > 0;
  at("before").hidden = !side;
  if (side) views.before.show(beforeTree(), `before: ${stages()[state.stage - 1].stage}`);
  views.after.show(afterTree(), side ? `after: ${stage.stage}` : stage.stage);
}

function shownViews() {
  return at("before").hidden ? [views.after] : [views.before, views.after];
}

function toggle(group) {
  toggled.set(group.path, !isOpen(group));
  for (const view of shownViews()) {
    const same = view.groupOf(group.id);
    if (same) view.redraw(same);
  }
  showDetails(group);
}

function toggleAll(open) {
  toggled.clear();
  everything = open;
  showGraph();
}

/** Selects a node by name, unfolding what it lies in, in the nearest stage that has it. */
function select(name) {
  state.stage = stageWith(name);
  const { record } = lifeOf(name);
  if (record && !isShown(record)) state.weights = true;
  state.node = name;
  state.tab = "graph";
  refresh();
}

/** The stage shown if it has the node, else the nearest that has. */
function stageWith(name) {
  const having = stages().flatMap((_, stage) => (recordsAt(stage).has(name) ? [stage] : []));
  const away = (stage) => Math.abs(stage - state.stage);
  return having.length ? having.reduce((best, stage) => (away(stage) < away(best) ? stage : best)) : state.stage;
}

/** Unfolds what a node lies in and scrolls to it; in the stage before, to what it came from. */
function reveal(name) {
  const ancestors = replacedBy(name);
  const targets = shownViews().map((view) => {
    const names = view === views.before ? [name, ...ancestors] : [name];
    return [view, names.map((one) => view.tree.nodes.get(one)).find(Boolean)];
  });
  for (const [, node] of targets)
    if (node) for (const group of chain(node).slice(1, -1)) if (!isOpen(group)) toggled.set(group.path, true);
  for (const [view, node] of targets) {
    if (!node) continue;
    view.refold();
    view.select(node.id, true);
  }
}

// ---- details

function link(name) {
  return make("a", { href: fragment({ node: name, tab: "graph", stage: stageWith(name) }) }, name);
}

function links(names) {
  if (!names.length) return "–";
  return make("ul", {}, ...names.slice(0, 40).map((name) => make("li", {}, link(name))),
    names.length > 40 ? make("li", {}, `and ${names.length - 40} more`) : null);
}

function facts(pairs) {
  const list = make("dl");
  for (const [term, value] of pairs)
    if (value !== null && value !== undefined && value !== "")
      list.append(make("dt", {}, term), make("dd", {}, value));
  return list;
}

function withUnit(count, unit) {
  if (count === null) return "not known";
  for (const [size, prefix] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (count >= size) return `${(count / size).toPrecision(3)} ${prefix}${unit}`;
  return `${count} ${unit}`;
}

/** The record to show, the stage that made it, those that changed it, the one that removed it. */
function lifeOf(name) {
  const life = { record: null, made: null, changed: [], removed: null };
  stages().forEach((stage, index) => {
    const record = recordsAt(index).get(name);
    if (record && life.made === null) life.made = stage.stage;
    if (record && index <= state.stage) life.record = record;
    if (stage.changed.includes(name)) life.changed.push(stage.stage);
    if (stage.removed.includes(name)) life.removed = index;
  });
  return life;
}

/** The nodes in whose place some stage put this one. */
function replacedBy(name) {
  return stages().flatMap((stage) => stage.merged).find((one) => one.into.includes(name))?.from || [];
}

function replacement(name, stage) {
  const group = stages()[stage].merged.find((one) => one.from.includes(name));
  return group ? group.into : [];
}

function nodeDetails(name) {
  const { record, made, changed, removed } = lifeOf(name);
  if (!record) return [];
  const users = nodesOf(state.stage).filter((one) => one.inputs.includes(name)).map((one) => one.name);
  const replaces = replacedBy(name);
  const { source } = record;
  const said = record.remarks.filter((remark) => record.reason !== remark);
  return [
    make("h2", {}, record.name),
    record.reason && make("p", { class: "reason" }, make("strong", {}, "left as it was: "), record.reason),
    facts([
      ["target", make("code", {}, record.target)],
      ["kind", `${SIGNS[record.kind]} ${data.shown.kinds[record.kind]}`],
      ["module", record.module],
      ["result", record.outputs.map((one) => `${one.dtype} ${one.shape.join(" x ")}`).join("; ")],
      ["bytes", withUnit(record.bytes, "B")],
      ["operations", withUnit(record.operations, "op")],
      ["linears", record.linears.join(", ")],
      ["source", source && make("span", {}, `${source.file}:${source.line} in ${source.function}`, make("br"), make("code", {}, source.code))],
      ["made by", made],
      ["changed by", changed.join(", ")],
      ["removed by", removed === null ? null : stages()[removed].stage],
      ["replaced by", removed === null || !replacement(name, removed).length ? null : links(replacement(name, removed))],
      ["replaces", replaces.length ? links(replaces) : null],
      ["remarks", said.length ? make("ul", {}, ...said.map((one) => make("li", {}, one))) : null],
      ["reads", links(record.inputs)],
      ["read by", links(users)],
    ]),
  ];
}

function groupDetails(group) {
  const records = leaves(group).map((one) => one.record);
  const sum = (field) => records.reduce((total, one) => total + (one[field] || 0), 0);
  const counts = Object.entries(tally(records.map((one) => one.operator))).sort((a, b) => b[1] - a[1]);
  return [
    make("h2", {}, group.path),
    facts([["nodes", String(records.length)], ["operations", withUnit(sum("operations"), "op")],
      ["bytes of results", withUnit(sum("bytes"), "B")]]),
    make("ul", {}, ...counts.map(([operator, count]) => make("li", {}, `${count} ${operator}`))),
  ];
}

function stageDetails() {
  const stage = stages()[state.stage];
  const kinds = new Map(nodesOf(state.stage).map((record) => [record.name, record.kind]));
  const merged = stage.merged.flatMap((one) => one.into).filter((name) => kinds.get(name) !== "untouched");
  return [
    make("h2", {}, stage.stage),
    make("p", {}, stage.why),
    facts([
      ["time", `${stage.milliseconds.toFixed(1)} ms`],
      ["nodes", String(stage.nodes.length)],
      ["calls", String(data.shown.stages[state.graph][state.stage].calls)],
      ["added +", String(stage.added.length)],
      ["removed −", String(stage.removed.length)],
      ["changed ~", String(stage.changed.length)],
      ["merged ∪", String(stage.merged.length)],
      ["in their place", merged.length ? links(merged) : null],
      ["removed", stage.removed.length ? links(stage.removed) : null],
    ]),
    stage.messages.length ? make("ul", {}, ...stage.messages.map((one) => make("li", {}, one))) : null,
  ];
}

function showDetails(group) {
  const shown = group ? groupDetails(group) : state.node ? nodeDetails(state.node) : stageDetails();
  at("details").replaceChildren(...shown.filter(Boolean));
}

// ---- layers

/** As `numbers_of` in tables.py, without the outliers. */
function numbers(row) {
  const bits = `w${row.weight_bits}a${row.activation_bits}`;
  const named = (format) => format && format !== "int";
  if (named(row.weight_format) && row.weight_format === row.activation_format) return `${bits} ${row.weight_format}`;
  const formats = [["weights", row.weight_format], ["activations", row.activation_format]];
  return [bits, ...formats.filter(([, one]) => named(one)).map(([what, one]) => `${one} ${what}`)].join(", ");
}

const COLUMNS = [
  ["linear", (row) => row.name], ["N", (row) => row.out_features], ["K", (row) => row.in_features],
  ["operator", (row) => row.operator || "left as it was"], ["quantized by", (row) => row.quantized_by || "–"],
  ["bits", (row) => (row.operator ? numbers(row) : "–")], ["outliers", (row) => row.outlier_channels],
  ["bytes before", (row) => row.weight_bytes_before], ["bytes after", (row) => row.weight_bytes_after],
  ...(data.layers.some((row) => row.error !== null) ? [["error", (row) => row.error]] : []),
  ["remarks", (row) => row.remarks.join("\n")],
];
const rows = data.layers;
const order = { column: null, descending: false };

function layerCell(row, read, index) {
  const value = read(row);
  if (index === 0) return make("th", { scope: "row" }, linkToLinear(row.name));
  const text = value === null ? "–" : Number.isInteger(value) ? value.toLocaleString("en") : String(value);
  const isNumber = typeof value === "number";
  return make("td", { class: isNumber ? "number" : undefined, "data-value": isNumber ? String(value) : undefined }, text);
}

/** To the node that computes a linear in the last stage. */
function linkToLinear(name) {
  for (const [graph, { stages: all, nodes }] of data.graphs.entries()) {
    const last = all.length - 1;
    const found = all[last].nodes.map((position) => nodes[position]).find((one) => one.linears.includes(name));
    if (found) return make("a", { href: fragment({ graph, stage: last, node: found.name, tab: "graph" }) }, name);
  }
  return name;
}

function total(field, list = rows) {
  return list.reduce((sum, row) => sum + row[field], 0);
}

function showLayers() {
  const head = COLUMNS.map(([title]) => make("th", { scope: "col" }, title));
  const body = rows.map((row) => make("tr", { class: row.operator ? undefined : "left" },
    ...COLUMNS.map(([, read], index) => layerCell(row, read, index))));
  const rewritten = rows.filter((row) => row.operator).length;
  const foot = make("tr", {}, make("th", { scope: "row", colspan: 7 }, `${rewritten} of ${rows.length} linears rewritten`),
    ...["weight_bytes_before", "weight_bytes_after"].map((field) => make("td", { class: "number" }, total(field).toLocaleString("en"))),
    make("td", { colspan: COLUMNS.length - 9 }));
  const table = make("table", { class: "rows", id: "layers" }, make("thead", {}, make("tr", {}, ...head)),
    make("tbody", {}, ...body), make("tfoot", {}, foot));
  makeSortable(table, order);
  at("view-layers").replaceChildren(byteBars(), table, ...attentionTable());
}

function byteBars() {
  const rewritten = rows.filter((row) => row.operator), left = rows.filter((row) => !row.operator);
  const bar = (when, index) => {
    const field = "weight_bytes_" + when, all = data[field];
    const parts = [["int4", "rewritten", total(field, rewritten)], ["left", "left", total(field, left)]];
    parts.push(["other", "other", Math.max(0, all - parts[0][2] - parts[1][2])]);
    return [make("span", {}, `weights ${when}`),
      make("div", { class: "stack" }, ...parts.map(([kind, name, bytes]) => make("i", {
        class: kind, style: `width: ${(100 * bytes) / data.weight_bytes_before}%`,
        title: `${name}: ${bytes.toLocaleString("en")} bytes`,
      }, name))),
      make("span", {}, data.shown.bytes[index])];
  };
  return make("div", { class: "bytes", role: "group", "aria-label": "Bytes of weights" }, ...bar("before", 0), ...bar("after", 1));
}

function attentionTable() {
  if (!data.attentions.length) return [];
  const titles = ["attention", "heads", "cache", "bytes / token", "operator", "remarks"];
  const body = data.attentions.map((one) => make("tr", { class: one.operator ? undefined : "left" },
    make("th", { scope: "row" }, one.name),
    ...[one.heads ? `${one.heads[0]} on ${one.heads[1]} x ${one.heads[2]}` : "–", one.cache || "–",
      one.cache_bytes_per_token ?? "–", one.operator || "left to PyTorch", one.remarks.join("\n")]
      .map((value) => make("td", {}, String(value)))));
  return [make("h2", {}, "Attentions"), make("table", { class: "rows", id: "attentions" },
    make("thead", {}, make("tr", {}, ...titles.map((title) => make("th", { scope: "col" }, title)))),
    make("tbody", {}, ...body))];
}

// ---- search

function matches(text) {
  const wanted = text.toLowerCase();
  const here = recordsAt(state.stage);
  const seen = new Map();
  for (const record of [...here.values(), ...data.graphs[state.graph].nodes]) {
    const fields = [record.name, record.operator, record.module, ...record.linears];
    if (!seen.has(record.name) && fields.some((field) => field.toLowerCase().includes(wanted)))
      seen.set(record.name, record);
    if (seen.size >= 50) break;
  }
  return [...seen.values()].map((record) => ({ record, here: here.has(record.name) }));
}

function search() {
  const text = at("search").value.trim();
  const found = text ? matches(text) : [];
  const items = found.map(({ record, here }) => make("li", {}, make("button", {
    type: "button", onclick: () => { at("results").hidden = true; select(record.name); },
  }, `${SIGNS[record.kind]} ${record.name} · ${record.operator}${here ? "" : " · in another stage"}`,
  make("small", {}, record.module ? ` ${record.module}` : ""))));
  if (text && !items.length) items.push(make("li", {}, "nothing found"));
  at("results").replaceChildren(...items);
  at("results").hidden = !text;
}

function searchKey(event) {
  const buttons = [...at("results").querySelectorAll("button")];
  const here = buttons.indexOf(document.activeElement);
  if (event.key === "Enter" && here < 0 && buttons.length) buttons[0].click();
  else if (event.key === "ArrowDown") buttons[Math.min(here + 1, buttons.length - 1)]?.focus();
  else if (event.key === "ArrowUp") (buttons[here - 1] || at("search")).focus();
  else if (event.key === "Escape") { at("results").hidden = true; at("search").blur(); }
  else return;
  event.preventDefault();
}

// ---- address, keys, page

function fragment(changes) {
  const shown = { ...state, ...changes };
  const parts = new URLSearchParams({ stage: data.graphs[shown.graph].stages[shown.stage].stage });
  if (shown.graph) parts.set("graph", shown.graph);
  if (shown.node) parts.set("node", shown.node);
  if (shown.tab !== "graph") parts.set("tab", shown.tab);
  for (const option of ["side", "removed", "weights"]) if (shown[option]) parts.set(option, 1);
  return "#" + parts;
}

function readFragment() {
  const parts = new URLSearchParams(location.hash.slice(1));
  const graph = Number(parts.get("graph"));
  state.graph = data.graphs[graph] ? graph : 0;
  const stage = stages().findIndex((one) => one.stage === parts.get("stage"));
  state.stage = stage < 0 ? stages().length - 1 : stage;
  state.node = parts.get("node");
  if (state.node) state.stage = stageWith(state.node);
  state.tab = parts.get("tab") === "layers" ? "layers" : "graph";
  for (const option of ["side", "removed", "weights"]) state[option] = parts.has(option);
}

function refresh() {
  const wanted = fragment({});
  if (location.hash !== wanted) history.pushState(null, "", wanted);
  for (const tab of ["graph", "layers"]) {
    at("tab-" + tab).setAttribute("aria-selected", state.tab === tab);
    at("view-" + tab).hidden = state.tab !== tab;
  }
  at("options").hidden = state.tab !== "graph";
  document.body.classList.toggle("wide", state.tab === "layers");
  for (const option of ["side", "removed", "weights"]) at(option).setAttribute("aria-pressed", state[option]);
  at("slider").max = stages().length - 1;
  at("slider").value = state.stage;
  at("slider").setAttribute("aria-valuetext", stages()[state.stage].stage);
  showStages();
  if (state.tab === "layers") showLayers();
  else {
    showGraph();
    if (state.node) reveal(state.node);
    else for (const view of shownViews()) view.select(null);
  }
  showDetails();
}

function showStages() {
  at("stages").replaceChildren(...stages().map((stage, index) => {
    const calls = data.shown.stages[state.graph][index].calls;
    const changes = [["+", stage.added], ["−", stage.removed], ["~", stage.changed], ["∪", stage.merged]]
      .filter(([, names]) => names.length).map(([sign, names]) => sign + names.length);
    return make("li", {}, make("button", {
      type: "button", title: stage.why, "aria-current": index === state.stage ? "step" : undefined,
      onclick: () => set({ stage: index, node: null }),
    }, stage.stage, make("small", {}, `${calls} calls ${changes.join(" ")}`)));
  }));
}

function set(changes) {
  Object.assign(state, changes);
  refresh();
}

function step(by) {
  set({ stage: Math.min(Math.max(state.stage + by, 0), stages().length - 1), node: null });
}

const zoom = (factor) => shownViews().forEach((view) => view.zoom(factor));
const KEYS = {
  "[": () => step(-1), "]": () => step(1), "/": () => at("search").focus(), t: switchTheme,
  s: () => set({ side: !state.side }), r: () => set({ removed: !state.removed }),
  w: () => set({ weights: !state.weights }), g: () => set({ tab: "graph" }), l: () => set({ tab: "layers" }),
  "+": () => zoom(1.2), "-": () => zoom(1 / 1.2), 0: () => shownViews().forEach((view) => view.zoom(1 / view.scale)),
  Escape: () => set({ node: null }),
};

function documentKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT)$/.test(event.target.tagName)) return;
  const act = KEYS[event.key];
  if (!act) return;
  event.preventDefault();
  act();
}

function legend() {
  const entry = (classes, sign, text) => {
    const picture = svg("svg", { width: 30, height: 20, "aria-hidden": "true" });
    const item = svg("g", { class: "node " + classes }, picture);
    svg("rect", { x: 2, y: 2, width: 26, height: 16, rx: classes === "untouched" ? 2 : 7 }, item);
    svg("text", { x: 11, y: 14, class: CHANGES[classes] ? "sign" : "" }, item, sign);
    return make("li", {}, picture, text);
  };
  at("legend").replaceChildren(
    ...Object.entries(data.shown.kinds).map(([kind, text]) => entry(kind, SIGNS[kind], text)),
    ...Object.entries(CHANGES).map(([change, sign]) => entry(change, sign, CHANGE_NAMES[change])));
}

function start() {
  at("summary").textContent = data.shown.summary;
  legend();
  at("graphs").hidden = data.graphs.length < 2;
  at("graph").replaceChildren(...data.graphs.map((_, index) => make("option", { value: index }, String(index))));
  at("graph").addEventListener("change", () => set({ graph: Number(at("graph").value), stage: 0, node: null }));
  at("slider").addEventListener("input", () => set({ stage: Number(at("slider").value), node: null }));
  at("search").addEventListener("input", search);
  document.querySelector(".search").addEventListener("keydown", searchKey);
  document.addEventListener("click", (event) => { if (!event.target.closest(".search")) at("results").hidden = true; });
  document.addEventListener("keydown", documentKey);
  for (const option of ["side", "removed", "weights"]) at(option).addEventListener("click", () => set({ [option]: !state[option] }));
  for (const tab of ["graph", "layers"]) at("tab-" + tab).addEventListener("click", () => set({ tab }));
  at("theme").addEventListener("click", switchTheme);
  at("unfold").addEventListener("click", () => toggleAll(true));
  at("fold").addEventListener("click", () => toggleAll(null));
  at("zoom-in").addEventListener("click", () => zoom(1.2));
  at("zoom-out").addEventListener("click", () => zoom(1 / 1.2));
  window.addEventListener("hashchange", () => { readFragment(); refresh(); });
  window.addEventListener("popstate", () => { readFragment(); refresh(); });
  readFragment();
  refresh();
  if (!state.node) for (const view of shownViews()) view.centre();
}

start();
