// The chart: any cost across, any quality down; up and left is better.
const plot = find("#plot"), axisX = find("#axis-x"), axisY = find("#axis-y"), logX = find("#log-x"), logY = find("#log-y");
const hidden = new Set(), parts = new Set(["front", "errors", "lineage", "labels"]);
const ruler = document.createElement("canvas").getContext("2d");
let marks = new Map();

for (const [node, axes] of [[axisX, data.x], [axisY, data.y]]) {
  axes.forEach((axis, place) => node.append(html("option", { value: place }, axis.name)));
}
const numberAt = (point, side, axis) => [point[side][axis.position]].flat()[0] ?? null;

function drawChart() {
  const x = data.x[axisX.value], y = data.y[axisY.value], width = plot.clientWidth, height = plot.clientHeight;
  const note = find("#plot-note");
  marks = new Map();
  if (!x || !y || !width) { plot.replaceChildren(); note.textContent = "No model has a score to chart."; return; }
  const sign = y.better === "higher" ? 1 : -1;
  const all = data.points.map((model, number) => {
    const [value, error] = model.y[y.position];
    return { number, model, x: numberAt(model, "x", x), y: value, error };
  });
  const placeable = all.filter(point => point.x !== null && point.y !== null
    && (point.x > 0 || !logX.checked) && (point.y > 0 || !logY.checked));
  const points = placeable.filter(point => !hidden.has(point.model.leaf));
  const without = all.filter(point => !placeable.includes(point)).map(point => point.model.short);
  note.textContent = without.length ? `Without a place on these axes: ${without.slice(0, 6).join(", ")}${without.length > 6 ? ` and ${without.length - 6} more` : ""}.` : "";
  if (!points.length) { plot.replaceChildren(); note.textContent ||= "Every series is hidden."; return; }

  const area = { left: 58, right: width - 14, top: 44, bottom: height - 46 };
  const low = point => Math.max(point.y - (point.error ?? 0), logY.checked ? point.y / 3 : -Infinity);
  const atX = scale(points.map(point => point.x), logX.checked, area.left, area.right, width < 600 ? 0.12 : 0.09);
  const [bottom, top] = sign > 0 ? [area.bottom, area.top] : [area.top, area.bottom];
  const atY = scale(points.flatMap(point => [low(point), point.y + (point.error ?? 0)]), logY.checked, bottom, top, 0.08);
  for (const point of points) [point.px, point.py] = [atX(point.x), atY(point.y)];

  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "presentation" });
  drawAxes(picture, area, x, y, atX, atY, sign);
  const lines = [], line = (...corners) => {
    corners.slice(1).forEach(([x1, y1], place) => {
      const [x0, y0] = corners[place], n = Math.max(1, Math.ceil(Math.hypot(x1 - x0, y1 - y0) / 9));
      for (let k = 0; k <= n; k++) lines.push(around(x0 + (x1 - x0) * k / n, y0 + (y1 - y0) * k / n, 3));
    });
  };
  const best = front(points, sign);
  if (parts.has("front") && best.length > 1) {
    picture.append(svg("path", { class: "front-line", d: "M" + best.map(point => `${point.px} ${point.py}`).join("L") }));
    line(...best.map(point => [point.px, point.py]));
  }
  if (parts.has("lineage")) drawLineage(picture, points, line);
  if (parts.has("errors")) for (const point of points.filter(each => each.error)) {
    const [a, b] = [atY(low(point)), atY(point.y + point.error)];
    picture.append(svg("path", { class: `error-line leaf-${point.model.leaf}`, d: `M${point.px} ${a}V${b}M${point.px - 3} ${a}h6M${point.px - 3} ${b}h6` }));
    line([point.px, a], [point.px, b]);
  }
  if (parts.has("labels")) drawLabels(picture, area, points, best, lines);
  drawPoints(picture, points, marks, facts);
  plot.replaceChildren(picture);
  choose(marks, selection.point);
}

// Lines and numbers of two scales, and the names of what they measure.
function gridOf(area, x, y, atX, atY, name) {
  const grid = svg("g", { "aria-hidden": "true" });
  for (const tick of ticks(atX, area.right < 600 ? 4 : 8)) {
    grid.append(svg("line", { class: "grid", x1: atX(tick), x2: atX(tick), y1: area.top, y2: area.bottom }),
      svg("text", { x: atX(tick), y: area.bottom + 18, "text-anchor": "middle" }, units[x.unit](tick)));
  }
  for (const tick of ticks(atY, 6)) {
    grid.append(svg("line", { class: "grid", x1: area.left, x2: area.right, y1: atY(tick), y2: atY(tick) }),
      svg("text", { x: area.left - 9, y: atY(tick) + 4, "text-anchor": "end" }, units[y.unit](tick)));
  }
  grid.append(svg("text", { class: "axis-name", x: 0, y: 12 }, name),
    svg("text", { class: "axis-name", x: area.right, y: area.bottom + 40, "text-anchor": "end" }, x.name + (atX.log ? ", log scale" : "")));
  return grid;
}

function drawAxes(picture, area, x, y, atX, atY, sign) {
  const grid = gridOf(area, x, y, atX, atY, y.name + (sign > 0 ? "" : " (lower is better: axis turned round)"));
  const whole = numberAt(data.points[0], "y", y);
  if (whole !== null && whole >= atY.low && whole <= atY.high && (whole > 0 || !atY.log))
    grid.append(svg("line", { class: "hundred", x1: area.left, x2: area.right, y1: atY(whole), y2: atY(whole) }));
  const base = numberAt(data.points[0], "x", x);
  if (base) for (const ratio of [1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32, 64]) {
    const value = base / ratio;
    if (value > atX.low && value < atX.high && (atX.log || ratio <= 4))
      grid.append(svg("text", { x: atX(value), y: area.top - 8, "text-anchor": "middle" }, `${ratio}×`));
  }
  picture.append(grid);
}

function drawLineage(picture, points, line) {
  const places = new Map(points.map(point => [point.number, point]));
  for (const child of points) {
    const parent = places.get(child.model.parent);
    if (!parent || parent === child) continue;
    const dx = child.px - parent.px, dy = child.py - parent.py, length = Math.hypot(dx, dy);
    if (length < 18) continue;
    const cx = (parent.px + child.px) / 2 - 0.12 * dy, cy = (parent.py + child.py) / 2 + 0.12 * dx;
    const away = Math.hypot(child.px - cx, child.py - cy), ux = (child.px - cx) / away, uy = (child.py - cy) / away;
    const ex = child.px - 11 * ux, ey = child.py - 11 * uy;
    picture.append(svg("path", { class: "lineage-line", d: `M${parent.px} ${parent.py}Q${cx} ${cy} ${ex} ${ey}` }),
      svg("path", { class: "lineage-head", d: `M${ex} ${ey}L${ex - 7 * ux + 3 * uy} ${ey - 7 * uy - 3 * ux}L${ex - 7 * ux - 3 * uy} ${ey - 7 * uy + 3 * ux}Z` }));
    line([parent.px, parent.py], [cx, cy], [child.px, child.py]);
  }
}

function drawLabels(picture, area, points, best, lines) {
  ruler.font = `12px ${getComputedStyle(plot).fontFamily}`;
  const rank = point => (point.number === selection.point ? -2 : point.number === 0 ? -1 : best.includes(point) ? 0 : 1);
  const order = [...points].sort((a, b) => rank(a) - rank(b) || a.number - b.number);
  const anchors = order.map(point => ({ x: point.px, y: point.py, width: ruler.measureText(point.model.short).width + 4 }));
  const bounds = { ...area, left: area.left + 2, top: area.top + 2 };
  placeLabels(anchors, 15, bounds, anchors, lines).forEach((box, place) => {
    if (!box) return;
    const { px, py, model } = order[place];
    const nearX = Math.min(Math.max(px, box.left), box.right), nearY = Math.min(Math.max(py, box.top), box.bottom);
    if (Math.hypot(nearX - px, nearY - py) > 15)
      picture.append(svg("line", { class: "leader", x1: px, y1: py, x2: nearX, y2: nearY }));
    picture.append(svg("text", { class: "label", x: box.left + 2, y: box.bottom - 3.5, "aria-hidden": "true" }, model.short));
  });
}

// points: {number, model, px, py}. known: a map to find their marks in by number. rows: a model's facts, as [name, value].
function drawPoints(picture, points, known, rows) {
  const order = [...points].sort((a, b) => a.px - b.px || a.py - b.py);
  const nodes = order.map(point => {
    const { model, number } = point;
    const node = svg("g", { class: `point leaf-${model.leaf}`, transform: `translate(${point.px} ${point.py})`, role: "button",
      "aria-pressed": "false", "data-point": number,
      "aria-label": [model.label, ...rows(model).map(([name, value]) => `${name} ${value}`)].join(", ") },
    svg("circle", { class: "hit", r: 13 }), svg("circle", { class: "halo", r: 12 }));
    if (model.chain) node.append(svg("circle", { class: "ring", r: 9 }));
    node.append(mark(model.leaf));
    node.addEventListener("click", () => select(selection.point === number ? null : number));
    explain(node, model.label, () => rows(model));
    known.set(number, node);
    return node;
  });
  rove(nodes, { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }, place => select(order[place].number));
  picture.append(...nodes);
}

function choose(known, number) {
  for (const [point, node] of known) {
    node.classList.toggle("chosen", point === number);
    node.setAttribute("aria-pressed", String(point === number));
  }
}
selection.listeners.push(number => choose(marks, number));

// Draw now, and again whenever the place for it is of another width; on paper it stays as it is.
function keepDrawn(node, draw) {
  let known = node.clientWidth;
  new ResizeObserver(() => {
    if (node.clientWidth === known || matchMedia("print").matches) return;
    known = node.clientWidth;
    draw();
  }).observe(node);
  draw();
}

function axesChanged(event) {
  if (event.target === axisX) logX.checked = data.x[axisX.value].log;
  if (event.target === axisY) logY.checked = data.y[axisY.value].log;
  drawChart();
}
for (const node of [axisX, axisY, logX, logY]) node.addEventListener("change", axesChanged);
for (const button of findAll("#legend button")) button.addEventListener("click", () => {
  const on = button.getAttribute("aria-pressed") === "false", { leaf, part } = button.dataset;
  button.setAttribute("aria-pressed", String(on));
  if (part) on ? parts.add(part) : parts.delete(part); else on ? hidden.delete(leaf) : hidden.add(leaf);
  drawChart();
});
// The first quality that has numbers of more than one model.
const telling = data.y.findIndex(axis => new Set(data.points.map(point => numberAt(point, "y", axis))).size > 2);
if (data.y.length) { axisY.value = Math.max(0, telling); logY.checked = data.y[axisY.value].log; }
logX.checked = data.x[0]?.log ?? false;
keepDrawn(plot, drawChart);
