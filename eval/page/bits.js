// What low bits cost: the loss of the quantized models against their bits, the laws fitted to it, and the published one.
const bitPlot = find("#bits-plot");
let bitMarks = new Map();

function drawBits() {
  const { worth, runs, curves, rows } = data.bits, width = bitPlot.clientWidth, height = bitPlot.clientHeight;
  if (!width) return;
  bitMarks = new Map();
  const placed = runs.filter(run => run.loss > 0), corners = curves.flatMap(curve => curve.corners);
  const without = runs.filter(run => !placed.includes(run)).map(run => data.points[run.number].short);
  find("#bits-note").textContent = without.length ? `Without a place on a log scale, as they lose nothing: ${without.join(", ")}.` : "";
  const area = { left: 58, right: width - 14, top: 30, bottom: height - 46 };
  const x = { name: "bits per weight of the compressed layers", unit: "bits" }, y = { unit: "nats" };
  const atX = scale([...placed.map(run => run.bits), ...corners.map(corner => corner[0])], false, area.left, area.right, 0.06);
  const atY = scale([worth, ...placed.map(run => run.loss), ...corners.map(corner => corner[1])], true, area.bottom, area.top, 0.06);
  const points = placed.map(run => ({ ...run, model: data.points[run.number], px: atX(run.bits), py: atY(run.loss) }));

  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "presentation" });
  picture.append(gridOf(area, x, y, atX, atY, "loss above the base, nats per token, log scale"),
    svg("line", { class: "hundred", x1: area.left, x2: area.right, y1: atY(worth), y2: atY(worth) }));
  const lines = [];
  for (const curve of curves) {
    const path = curve.corners.map(([bits, loss]) => [atX(bits), atY(loss)]);
    picture.append(svg("path", { class: curve.leaf ? `curve-line leaf-${curve.leaf}` : "law-line", d: "M" + path.map(corner => corner.join(" ")).join("L") }));
    lines.push(...path.map(([px, py]) => around(px, py, 3)));
  }
  for (const run of points.filter(each => each.error)) {
    const [low, high] = [Math.max(run.loss - run.error, run.loss / 3), run.loss + run.error].map(loss => Math.min(atY(loss), area.bottom));
    picture.append(svg("path", { class: `error-line leaf-${run.model.leaf}`, d: `M${run.px} ${low}V${high}` }));
  }
  ruler.font = `12px ${getComputedStyle(bitPlot).fontFamily}`;
  const ends = curves.map(({ name, corners: [[bits, loss]] }) => ({ x: atX(bits), y: atY(loss), width: ruler.measureText(name).width + 4 }));
  placeLabels(ends, 15, { ...area, left: area.left + 2 }, points.map(run => ({ x: run.px, y: run.py })), lines).forEach((box, place) => {
    if (box) picture.append(svg("text", { class: "label", x: box.left + 2, y: box.bottom - 3.5, "aria-hidden": "true" }, curves[place].name));
  });
  const told = new Map(points.map(run => [run.model, rows[run.number]]));
  drawPoints(picture, points, bitMarks, model => told.get(model));
  bitPlot.replaceChildren(picture);
  choose(bitMarks, selection.point);
}

if (bitPlot) {
  selection.listeners.push(number => choose(bitMarks, number));
  keepDrawn(bitPlot, drawBits);
}
