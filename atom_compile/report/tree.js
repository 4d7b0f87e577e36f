"use strict";
// A stage's nodes as a tree of the model's modules, and at which level of it each edge shows.
//
// An item is a node or a group of items. An edge shows in the innermost group that holds both ends,
// between the two children that the ends are in. Groups in between get a port: a small item that
// stands for what lies outside.

const MANY_READERS = 6, MANY_READ = 12;

/** records: a stage's nodes, each perhaps with `change` and with `before`, inputs it had before. */
function buildTree(records) {
  const root = newGroup("", null);
  const groups = new Map([["", root]]);
  const nodes = new Map();
  for (const record of records) {
    const parent = groupAt(record.module, groups);
    const node = { id: record.name, record, parent };
    parent.children.push(node);
    nodes.set(record.name, node);
  }
  simplify(root);
  for (const node of nodes.values()) {
    connect(node, node.record.inputs, "", nodes);
    connect(node, node.record.before || [], "removed", nodes);
  }
  thin(root);
  return { root, nodes };
}

function newGroup(path, parent) {
  return { id: "module:" + path, path, parent, children: [], edges: new Map(), ports: new Map(), drawn: null };
}

function groupAt(path, groups) {
  if (!groups.has(path)) {
    const cut = path.lastIndexOf(".");
    const parent = groupAt(cut < 0 ? "" : path.slice(0, cut), groups);
    const group = newGroup(path, parent);
    parent.children.push(group);
    groups.set(path, group);
  }
  return groups.get(path);
}

/** A list of decoder layers, or a group of one item, says nothing: its children move up. */
function simplify(group) {
  group.children = group.children.flatMap((child) => {
    if (!child.children) return [child];
    simplify(child);
    const hollow = child.children.length === 1 || child.children.every((one) => one.children && isBlock(one));
    return hollow ? child.children : [child];
  });
  for (const child of group.children) child.parent = group;
}

function isBlock(group) {
  return /(^|\.)\d+$/.test(group.path);
}

/** What is open at first: whatever decoder layers lie in. */
function holdsBlocks(group) {
  return group.children.some((child) => child.children && (isBlock(child) || holdsBlocks(child)));
}

function label(item) {
  if (!item.children) return item.id;
  const outer = item.parent.path;
  return outer ? item.path.slice(outer.length + 1) : item.path;
}

function chain(item) {
  const found = [];
  for (let one = item; one; one = one.parent) found.push(one);
  return found.reverse();
}

function connect(node, inputs, change, nodes) {
  for (const name of inputs) {
    const source = nodes.get(name);
    if (!source) continue;
    const edge = { change, source: name, target: node.id };
    const from = chain(source), to = chain(node);
    let depth = 0;
    while (from[depth + 1] === to[depth + 1]) depth++;
    const a = from[depth + 1], b = to[depth + 1];
    addEdge(from[depth], a.id, b.id, edge);
    for (let at = depth + 1; at < to.length - 1; at++)
      addEdge(to[at], port(to[at], "from", a, source), to[at + 1].id, edge);
    for (let at = depth + 1; at < from.length - 1; at++)
      addEdge(from[at], from[at + 1].id, port(from[at], "to", b, node), edge);
  }
}

/** edge: its `change`, and the nodes at its ends. */
function addEdge(group, from, to, edge) {
  const key = from + "\n" + to;
  if (!group.edges.has(key) || !edge.change) group.edges.set(key, { ...edge, from, to });
}

function port(group, direction, outside, node) {
  const id = `port:${direction}:${outside.id}`;
  if (!group.ports.has(id)) group.ports.set(id, { id, direction, text: label(outside), target: node.id });
  return id;
}

/** Of the edges of an item that many others read, such as a mask, or that reads many, such as the
 * output, one stays and a port counts the others: edges across 32 decoder layers would hide the
 * graph and take most of the time of its layout.
 */
function thin(group) {
  const ends = new Map();
  for (const [key, edge] of group.edges) {
    for (const id of ["out of " + edge.from, "into " + edge.to]) {
      if (!ends.has(id)) ends.set(id, []);
      ends.get(id).push([key, edge]);
    }
  }
  for (const [end, edges] of ends) {
    const left = edges.filter(([key]) => group.edges.has(key));
    const outward = end.startsWith("out of ");
    if (left.length <= (outward ? MANY_READERS : MANY_READ)) continue;
    const dropped = outward ? left.slice(1) : left.slice(0, -1);
    for (const [key] of dropped) group.edges.delete(key);
    const { from, to, source, target } = dropped[0][1];
    const id = "port:" + end;
    group.ports.set(id, { id, direction: "and", text: `${dropped.length} more`, target: outward ? source : target });
    if (outward) addEdge(group, from, id, { change: "" });
    else addEdge(group, id, to, { change: "" });
  }
  for (const child of group.children) if (child.children) thin(child);
}

/** All nodes below an item. */
function leaves(item) {
  return item.children ? item.children.flatMap(leaves) : [item];
}
