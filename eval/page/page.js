// What the parts share: the data, small makers of elements, the selected model, the tooltip and the copy buttons.
const data = JSON.parse(document.getElementById("data").textContent);
const find = (selector, root = document) => root.querySelector(selector);
const findAll = (selector, root = document) => [...root.querySelectorAll(selector)];

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) if (value !== null) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
const html = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const figures = (value, n = 3) => value === 0 ? "0"
  : Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3 ? value.toExponential(n - 1) : String(+value.toPrecision(n));
const units = {
  bytes: value => {
    for (const [unit, size] of [["TB", 1e12], ["GB", 1e9], ["MB", 1e6], ["kB", 1e3]])
      if (value >= 0.9995 * size) return `${figures(value / size)} ${unit}`;
    return `${value} B`;
  },
  share: value => `${+(100 * value).toFixed(1)} %`,
  ms: value => `${figures(value)} ms`,
  bits: value => `${figures(value)} bits`,
  number: value => figures(value, 4),
  nats: value => figures(value, 2),
};

// The selected model: every part that shows it registers here.
const selection = { point: null, listeners: [] };
function select(point) {
  selection.point = point;
  for (const listener of selection.listeners) listener(point);
}

// One tab stop for a set of elements; arrow keys go from one to another. step: key -> change of place, or null.
function rove(elements, step, activate) {
  elements.forEach((element, place) => {
    element.setAttribute("tabindex", place === 0 ? "0" : "-1");
    element.addEventListener("keydown", event => {
      if (activate && (event.key === "Enter" || event.key === " ")) { event.preventDefault(); activate(place); return; }
      const next = elements[place + (step[event.key] ?? NaN)];
      if (!next) return;
      event.preventDefault();
      element.setAttribute("tabindex", "-1");
      next.setAttribute("tabindex", "0");
      next.focus();
    });
  });
}

const tip = find("#tip");
let placeTip = null, tipOwner = null;
// Show rows of [name, value] beside an element while it is pointed at or has the focus.
function explain(element, title, rows) {
  const show = () => {
    const list = html("dl");
    for (const [name, value] of rows()) list.append(html("dt", {}, name), html("dd", {}, value));
    tip.replaceChildren(html("b", {}, title), list);
    tip.hidden = false;
    tipOwner = element;
    placeTip = place;
    place();
  };
  const place = () => {
    const at = element.getBoundingClientRect(), own = tip.getBoundingClientRect();
    tip.hidden = at.bottom < 0 || at.top > innerHeight;
    const x = at.right + 10 + own.width < innerWidth ? at.right + 10 : Math.max(8, at.left - 10 - own.width);
    const y = Math.min(Math.max(8, at.top + at.height / 2 - own.height / 2), innerHeight - own.height - 8);
    tip.style.transform = `translate(${Math.round(x)}px, ${Math.round(y)}px)`;
  };
  const hide = () => { tip.hidden = true; };
  for (const name of ["pointerenter", "focus"]) element.addEventListener(name, show);
  for (const name of ["pointerleave", "blur"]) element.addEventListener(name, hide);
}
document.addEventListener("keydown", event => { if (event.key === "Escape") { tip.hidden = true; select(null); } });
document.addEventListener("scroll", () => {
  if (tipOwner === document.activeElement) placeTip?.(); else tip.hidden = true;
}, { passive: true, capture: true });

const mark = leaf => svg("use", { href: `#mark-${leaf}`, x: -10, y: -10, width: 20, height: 20 });
const icon = leaf => svg("svg", { class: `icon leaf-${leaf}`, viewBox: "-10 -10 20 20", "aria-hidden": "true" },
  mark(leaf));
const shown = (axis, values) => {
  const [value, error] = [values[axis.position]].flat();
  if (value == null) return null;
  return error ? `${units[axis.unit](value)} ± ${axis.unit === "share" ? units.share(error) : figures(error, 2)}` : units[axis.unit](value);
};
const facts = (point, sides = ["x", "y"]) => sides.flatMap(side =>
  data[side].filter(axis => !axis.estimate).map(axis => [axis.name, shown(axis, point[side])]).filter(row => row[1] !== null));

// A choice of models for a part that shows one: it follows the selection where it can.
function chooser(node, numbers, render) {
  for (const number of numbers) node.append(html("option", { value: number }, data.points[number].label));
  node.addEventListener("change", () => select(+node.value));
  selection.listeners.push(point => {
    if (point === null || !numbers.includes(point) || +node.value === point) return;
    node.value = point;
  });
  selection.listeners.push(point => { if (numbers.includes(point)) render(point); });
  render(numbers[0]);
}

const bar = find("#selected");
selection.listeners.push(point => {
  bar.hidden = point === null;
  if (point === null) return;
  const model = data.points[point], clear = html("button", { type: "button" }, "Clear");
  clear.addEventListener("click", () => select(null));
  const main = [data.x[0], data.y[0]].map((axis, side) => axis && [axis, shown(axis, side ? model.y : model.x)]);
  const links = [["Chart", "size"], ["Row", `model-${point}`]];
  if (data.layers[point]) links.push(["Layers", "layers"]);
  if (data.flips[point]) links.push(["Flips", "flips"]);
  if (find(`#command-${point}`)) links.push(["Command", `command-${point}`]);
  bar.replaceChildren(html("b", {}, icon(model.leaf), model.label),
    ...main.filter(pair => pair && pair[1] !== null).map(([axis, text]) => html("span", {}, `${text} ${axis.name}`)),
    ...links.map(([name, id]) => html("a", { href: `#${id}` }, name)), clear);
});

for (const button of findAll("[data-select]")) {
  button.addEventListener("click", () => select(selection.point === +button.dataset.select ? null : +button.dataset.select));
}
selection.listeners.push(point => {
  for (const row of findAll("tr[data-point]")) {
    row.classList.toggle("chosen", +row.dataset.point === point);
    if (+row.dataset.point === point) row.setAttribute("aria-current", "true"); else row.removeAttribute("aria-current");
  }
});

for (const button of findAll(".copy")) {
  button.addEventListener("click", async () => {
    const text = find("code", button.parentNode);
    try { await navigator.clipboard.writeText(text.textContent); button.textContent = "Copied"; }
    catch { getSelection().selectAllChildren(text); button.textContent = "Selected"; }
    setTimeout(() => { button.textContent = "Copy"; }, 1600);
  });
}

// On paper nothing can be opened.
addEventListener("beforeprint", () => {
  for (const details of findAll("details:not([open])")) { details.open = true; details.dataset.closed = ""; }
});
addEventListener("afterprint", () => {
  for (const details of findAll("details[data-closed]")) { details.open = false; delete details.dataset.closed; }
});
