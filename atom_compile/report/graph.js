"use strict";
// Draws a tree of modules as SVG. Each open group is laid out by dagre on its own and kept until
// something inside it folds or unfolds, so that an unfold costs one group and those around it.

const SIGNS = {
  untouched: "·", reorder: "⇄", quantize: "▤", int4: "◆", fused: "⊕", attention: "◎",
  weight: "w", input: "▷", output: "◁",
};
const CHANGES = { added: "+", merged: "∪", changed: "~", removed: "−" };
const CHANGE_NAMES = {
  added: "added by this stage", merged: "added in place of several", changed: "changed by this stage",
  removed: "removed by this stage",
};
const CHARACTER = 7.3, SMALL_CHARACTER = 6.1, HEAD = 26, NODE_HEIGHT = 38, PORT_HEIGHT = 18;

function svg(tag, attributes, parent, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const name in attributes) element.setAttribute(name, attributes[name]);
  if (text !== undefined) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

function clipped(text, length) {
  return text.length > length ? text.slice(0, length - 1) + "…" : text;
}

function describeOutputs(record) {
  return record.outputs.map((one) => `${one.dtype} ${one.shape.join("x") || "scalar"}`).join(", ");
}

function drawSign(kind, change, width, parent) {
  svg("text", { x: 8, y: 16, class: "kind" }, parent, SIGNS[kind]);
  if (change) svg("text", { x: width - 14, y: 16, class: "sign" }, parent, CHANGES[change]);
}

class GraphView {
  /** isOpen(group) says what is unfolded; onToggle(group) and onSelect(name) say what was clicked. */
  constructor(pane, isOpen, onToggle, onSelect) {
    Object.assign(this, { pane, isOpen, onSelect, onToggle, scale: 1, cursor: null });
    pane.tabIndex = 0;
    pane.setAttribute("role", "application");
    pane.addEventListener("click", (event) => this.click(event));
    pane.addEventListener("keydown", (event) => this.key(event));
    pane.addEventListener("wheel", (event) => {
      if (!event.ctrlKey) return;
      event.preventDefault();
      this.zoom(event.deltaY < 0 ? 1.1 : 1 / 1.1);
    }, { passive: false });
    this.title = pane.appendChild(document.createElement("h2"));
    this.svg = svg("svg", {}, pane);
    const marker = svg("marker", {
      id: "arrow-" + pane.id, class: "arrow", viewBox: "0 0 8 8", refX: 8, refY: 4,
      markerWidth: 7, markerHeight: 7, orient: "auto",
    }, svg("defs", {}, this.svg));
    svg("path", { d: "M0 0L8 4L0 8z" }, marker);
  }

  show(tree, title) {
    this.tree = tree;
    this.title.textContent = title;
    this.pane.setAttribute("aria-label", title);
    this.draw();
  }

  draw() {
    const drawn = this.drawGroup(this.tree.root);
    this.size = drawn;
    if (this.content !== drawn.element) {
      if (this.content) this.content.remove();
      this.content = this.svg.appendChild(drawn.element);
    }
    this.svg.setAttribute("viewBox", `0 0 ${drawn.width} ${drawn.height}`);
    this.applyScale();
  }

  zoom(factor) {
    this.scale = Math.min(3, Math.max(0.1, this.scale * factor));
    this.applyScale();
  }

  applyScale() {
    this.svg.setAttribute("width", this.size.width * this.scale);
    this.svg.setAttribute("height", this.size.height * this.scale);
  }

  /** Draws a group again, and those around it. */
  redraw(group) {
    for (let one = group; one; one = one.parent) one.drawn = null;
    this.draw();
  }

  /** Draws anew whatever was folded or unfolded since it was drawn. */
  refold() {
    this.forgetStale(this.tree.root);
    this.draw();
  }

  forgetStale(group) {
    const open = !group.parent || this.isOpen(group);
    const inside = open ? group.children.filter((child) => child.children) : [];
    const stale = inside.map((child) => this.forgetStale(child)).some(Boolean);
    if (stale || group.drawn?.open !== open) group.drawn = null;
    return !group.drawn;
  }

  drawGroup(group) {
    if (group.drawn) return group.drawn;
    const top = group.parent ? HEAD : 0;
    const graph = new dagre.graphlib.Graph();
    graph.setGraph({ rankdir: "TB", nodesep: 16, ranksep: 24, marginx: 12, marginy: 12 });
    graph.setDefaultEdgeLabel(() => ({}));
    const parts = new Map();
    for (const child of group.children) parts.set(child.id, this.drawItem(child));
    for (const one of group.ports.values()) parts.set(one.id, this.drawPort(one));
    for (const [id, part] of parts) graph.setNode(id, { width: part.width, height: part.height });
    for (const edge of group.edges.values()) graph.setEdge(edge.from, edge.to);
    dagre.layout(graph);
    const { width = 0, height = 0 } = graph.graph();
    const shell = this.shellOf(group, width, height + top);
    shell.edges.replaceChildren(...[...group.edges.values()].map((edge) => this.drawEdge(graph.edge(edge.from, edge.to), edge)));
    const kept = new Set();
    for (const [id, part] of parts) {
      const { x, y } = corner(graph.node(id));
      part.element.setAttribute("transform", `translate(${x} ${y})`);
      if (part.element.parentNode !== shell.items) shell.items.append(part.element);
      kept.add(part.element);
    }
    for (const element of [...shell.items.children]) if (!kept.has(element)) element.remove();
    group.drawn = { element: shell.element, width, height: height + top, open: true };
    return group.drawn;
  }

  /** The elements of an open group. They stay: to take a subtree out and put it back costs most. */
  shellOf(group, width, height) {
    if (!group.shell) {
      const element = svg("g", { "data-id": group.id, class: group.parent ? "group open" : "" });
      const frame = group.parent && svg("rect", { rx: 6 }, element);
      const head = group.parent && svg("g", { class: "group-head", role: "button", "aria-expanded": "true", "aria-label": `${group.path}, unfolded` }, element);
      const inside = svg("g", { transform: `translate(0 ${head ? HEAD : 0})` }, element);
      group.shell = { element, frame, head, edges: svg("g", {}, inside), items: svg("g", {}, inside) };
    }
    const { frame, head } = group.shell;
    if (head) {
      frame.setAttribute("width", width);
      frame.setAttribute("height", height);
      head.replaceChildren();
      svg("rect", { width, height: HEAD, rx: 6 }, head);
      svg("text", { x: 8, y: 17, class: "title" }, head, `▾ ${clipped(label(group), Math.max(8, width / CHARACTER - 4))}`);
    }
    return group.shell;
  }

  drawItem(item) {
    if (item.drawn) return item.drawn;
    if (item.children) return this.isOpen(item) ? this.drawGroup(item) : this.drawFolded(item);
    item.drawn = this.drawNode(item);
    return item.drawn;
  }

  drawNode(item) {
    const { record } = item, { kind, change } = record;
    const first = clipped(record.op === "call_function" || record.op === "call_method" ? record.operator : record.name, 30);
    const second = clipped(describeOutputs(record) || record.name, 34);
    const width = Math.max(first.length * CHARACTER + 44, second.length * SMALL_CHARACTER + 34);
    const element = svg("g", {
      class: `item node ${kind} ${change || ""} ${item.id === this.selected ? "selected" : ""}`,
      "data-id": item.id, "data-kind": kind, role: "button",
      "aria-label": `${record.name}: ${record.operator}, ${kind}${change ? ", " + CHANGE_NAMES[change] : ""}`,
    });
    svg("rect", { width, height: NODE_HEIGHT, rx: kind === "untouched" ? 3 : 12 }, element);
    drawSign(kind, change, width, element);
    svg("text", { x: 24, y: 16 }, element, first);
    svg("text", { x: 24, y: 30, class: "faint" }, element, second);
    svg("title", {}, element, record.name);
    return { element, width, height: NODE_HEIGHT };
  }

  drawFolded(group) {
    const inside = leaves(group);
    const counts = tally(inside.map((one) => one.record.kind).filter((kind) => kind !== "weight"));
    const kinds = Object.entries(counts).map(([kind, count]) => `${SIGNS[kind]} ${count}`).join("  ");
    const changes = tally([...inside.map((one) => one.record.change), ...(group.gone || [])].filter(Boolean));
    const marks = Object.entries(changes).map(([change, count]) => `${CHANGES[change]}${count}`).join(" ");
    const text = label(group);
    const width = Math.max((text.length + marks.length) * CHARACTER + 60, kinds.length * SMALL_CHARACTER + 40);
    const element = svg("g", {
      class: "item group folded", "data-id": group.id, role: "button", "aria-expanded": "false",
      "aria-label": `${group.path}, ${inside.length} nodes, folded`,
    });
    svg("rect", { width, height: NODE_HEIGHT, rx: 6 }, element);
    const head = svg("g", { class: "group-head" }, element);
    svg("rect", { width, height: NODE_HEIGHT, rx: 6 }, head);
    svg("text", { x: 8, y: 16, class: "title" }, head, `▸ ${text}`);
    svg("text", { x: 24, y: 30, class: "faint" }, head, kinds);
    svg("text", { x: width - 8, y: 16, "text-anchor": "end", class: "sign" }, head, marks);
    group.drawn = { element, width, height: NODE_HEIGHT, open: false };
    return group.drawn;
  }

  drawPort(one) {
    if (one.drawn) return one.drawn;
    const text = clipped(`${one.direction} ${one.text}`, 34);
    const width = text.length * SMALL_CHARACTER + 14;
    const element = svg("g", { class: "port", "data-target": one.target });
    svg("rect", { width, height: PORT_HEIGHT, rx: 9 }, element);
    svg("text", { x: 7, y: 12, class: "faint" }, element, text);
    one.drawn = { element, width, height: PORT_HEIGHT };
    return one.drawn;
  }

  drawEdge({ points }, { change }) {
    const path = points.map(({ x, y }, index) => `${index ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
    return svg("path", { d: path, class: `edge ${change}`, "marker-end": `url(#arrow-${this.pane.id})` });
  }

  find(id) {
    return this.content.querySelector(`[data-id="${CSS.escape(id)}"]`);
  }

  /** Marks a node and brings it into view; its groups must be open. */
  select(id, scroll) {
    this.selected = id;
    for (const one of this.content.querySelectorAll(".selected")) one.classList.remove("selected");
    const element = id && this.find(id);
    if (!element) return;
    element.classList.add("selected");
    this.setCursor(element, scroll);
  }

  setCursor(element, scroll) {
    if (this.cursor) this.cursor.classList.remove("cursor");
    this.cursor = element;
    element.classList.add("cursor");
    element.id = `${this.pane.id}-cursor`;
    this.pane.setAttribute("aria-activedescendant", element.id);
    if (scroll) this.bringIntoView(element);
  }

  bringIntoView(element) {
    const box = element.getBoundingClientRect(), pane = this.pane.getBoundingClientRect();
    const aside = box.left < pane.left || box.right > pane.right;
    const above = box.top < pane.top + 40 || box.bottom > pane.bottom;
    this.pane.scrollBy(
      aside ? (box.left + box.right - pane.left - pane.right) / 2 : 0,
      above ? (Math.min(box.bottom, box.top + pane.height / 2) + box.top - pane.top - pane.bottom) / 2 : 0,
    );
  }

  centre() {
    this.pane.scrollLeft = (this.pane.scrollWidth - this.pane.clientWidth) / 2;
  }

  click(event) {
    const port = event.target.closest(".port");
    if (port) return this.onSelect(port.dataset.target);
    const element = event.target.closest("[data-id]");
    if (!element || element.dataset.id === this.tree.root.id) return;
    const head = event.target.closest(".group-head");
    if (head || element.classList.contains("node")) this.activate(element);
  }

  activate(element) {
    const { id } = element.dataset;
    if (!id.startsWith("module:")) return this.onSelect(id);
    const group = this.groupOf(id);
    this.onToggle(group);
    this.setCursor(this.find(id), true);
  }

  groupOf(id, from = this.tree.root) {
    for (const child of from.children) {
      if (child.id === id) return child;
      const found = child.children && (child.path === "" || id.startsWith(child.id)) && this.groupOf(id, child);
      if (found) return found;
    }
    return null;
  }

  /** Arrows go to the nearest item in their direction, Enter does what a click does. */
  key(event) {
    if (event.target !== this.pane) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      if (this.cursor && this.cursor.isConnected) this.activate(this.cursor);
      return;
    }
    const directions = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };
    const direction = directions[event.key];
    if (!direction) return;
    event.preventDefault();
    this.move(...direction);
  }

  move(right, down) {
    const items = [...this.content.querySelectorAll(".item, .group.open")];
    if (!this.cursor || !this.cursor.isConnected) return items.length && this.setCursor(items[0], true);
    const here = anchor(this.cursor);
    let best = null, least = Infinity;
    for (const item of items) {
      if (item === this.cursor) continue;
      const there = anchor(item);
      const dx = there.x - here.x, dy = there.y - here.y;
      const along = dx * right + dy * down, across = Math.abs(dx * down) + Math.abs(dy * right);
      if (along < 1 || (right && across > 60)) continue;
      const cost = along + 2 * across;
      if (cost < least) [best, least] = [item, cost];
    }
    if (best) this.setCursor(best, true);
  }
}

function anchor(element) {
  const box = element.getBoundingClientRect();
  return { x: (box.left + box.right) / 2, y: element.classList.contains("open") ? box.top + 10 : (box.top + box.bottom) / 2 };
}

function corner({ x, y, width, height }) {
  return { x: x - width / 2, y: y - height / 2 };
}

function tally(values) {
  const counts = {};
  for (const value of values) counts[value] = (counts[value] || 0) + 1;
  return counts;
}
