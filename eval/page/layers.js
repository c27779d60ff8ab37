// The heat map: kinds of layers by blocks, shaded by an error or another number.
const heat = find("#heat"), fieldChoice = find("#layers-field");
const told = { weight_error: "error of the weights", output_error: "error of the outputs", nbytes: "bytes", dense_nbytes: "dense bytes" };
const title = key => told[key] ?? key.replaceAll("_", " ");
let layersOf = null;

const cellOf = (grid, key, cell) => Array.isArray(grid.fields[key]) ? grid.fields[key][cell] : grid.fields[key] ?? null;

function drawHeat(number) {
  layersOf = number;
  const grid = data.layers[number], n = grid.n.length;
  const numeric = Object.keys(grid.fields).filter(key => [].concat(grid.fields[key]).some(value => typeof value === "number"));
  const rank = key => { const place = ["output_error", "weight_error", "error", "bits", "rank", "sparsity"].indexOf(key); return place < 0 ? 9 : place; };
  numeric.sort((a, b) => rank(a) - rank(b));
  const before = fieldChoice.value;
  fieldChoice.replaceChildren(...numeric.map(key => html("option", { value: key }, title(key))));
  if (numeric.includes(before)) fieldChoice.value = before;
  if (!numeric.length) { heat.replaceChildren(); find("#heat-note").textContent = "No layer of this model has a number."; return; }
  const key = fieldChoice.value, values = [...Array(n).keys()].map(cell => cellOf(grid, key, cell));
  const numbers = values.filter(value => typeof value === "number"), low = Math.min(...numbers), high = Math.max(...numbers);
  const log = /error/.test(key) && low > 0 && high / low > 8, read = log ? Math.log : value => value;
  const depth = value => high > low ? (read(value) - read(low)) / (read(high) - read(low)) : 0.25;
  const compact = n / grid.kinds.length > 16, cells = [];

  const head = html("tr", {}, html("th", { scope: "col" }, "layer / block"), ...grid.blocks.map(block => html("th", { scope: "col" }, block || "–")));
  const rows = grid.kinds.map((kind, row) => html("tr", {}, html("th", { scope: "row" }, kind), ...grid.blocks.map((block, column) => {
    const cell = row * grid.blocks.length + column, value = values[cell];
    const node = html("td", {}, typeof value === "number" && !compact ? figures(value, 2) : "");
    if (!grid.n[cell]) return node;
    if (typeof value === "number") {
      node.style.setProperty("--t", (0.06 + 0.9 * depth(value)).toFixed(3));
      node.classList.toggle("deep", depth(value) > 0.62);
    }
    const name = block ? `block ${block}, ${kind}` : kind;
    const facts = () => [...(grid.n[cell] > 1 ? [["layers", `mean of ${grid.n[cell]}`]] : []), ...Object.keys(grid.fields)
      .map(field => [title(field), cellOf(grid, field, cell)]).filter(pair => pair[1] !== null)
      .map(([field, found]) => [field, typeof found === "number" ? (/bytes/.test(field) ? units.bytes(found) : figures(found, 4)) : String(found)])];
    node.setAttribute("aria-label", [name, ...facts().map(pair => pair.join(" "))].join(", "));
    explain(node, name, facts);
    cells.push(node);
    return node;
  })));
  heat.replaceChildren(html("table", { class: "heat" }, html("thead", {}, head), html("tbody", {}, ...rows)));
  const across = grid.blocks.length;
  rove(cells, { ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across });
  find("#heat-note").textContent = `${data.points[number].label}: ${title(key)} from ${figures(low)} (light) to ${figures(high)} (deep)${log ? ", shaded by its logarithm" : ""}.`
    + " Errors are relative: |change|² / |original|². Arrow keys go from layer to layer.";
}

if (heat) {
  const numbers = Object.keys(data.layers).map(Number);
  chooser(find("#layers-model"), numbers, drawHeat);
  fieldChoice.addEventListener("change", () => drawHeat(layersOf));
}
