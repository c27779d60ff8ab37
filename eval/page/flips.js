// The browser of answers that flipped.
const flipList = find("#flips-list"), flipTask = find("#flips-task"), flipKind = find("#flips-kind"), flipFilter = find("#flips-filter");
let flipsOf = null;

function drawFlips() {
  const [n, negative, positive, p, examples] = data.flips[flipsOf][flipTask.value];
  const words = flipFilter.value.trim().toLowerCase();
  const cards = [];
  for (const [index, isNegative, before, after] of examples) {
    const [prompt, choices, gold] = data.documents[flipTask.value][index];
    if (flipKind.value !== "" && +flipKind.value !== isNegative) continue;
    if (words && ![prompt, ...choices, gold, before, after].join("\n").toLowerCase().includes(words)) continue;
    const said = text => [...(text === before ? ["base"] : []), ...(text === after ? ["this model"] : [])].map(name => html("span", { class: "tag" }, name));
    const listed = [...new Set([...choices, gold, before, after])];
    cards.push(html("article", { class: "flip" },
      html("header", {}, html("span", { class: isNegative ? "negative" : "positive" }, isNegative ? "− right to wrong" : "+ wrong to right"),
        html("span", {}, `document ${index}`)),
      html("p", { class: "prompt" }, prompt),
      html("ul", {}, ...listed.map(choice => html("li", choice === gold ? { class: "gold" } : {}, choice, ...said(choice))))));
  }
  flipList.replaceChildren(...cards);
  const few = negative + positive > examples.length ? ` Examples are the first ${data.n_examples} of each kind.` : "";
  find("#flips-note").textContent = `${data.points[flipsOf].label} on ${flipTask.value}: of ${n} documents ${negative} flipped from right to wrong and ${positive} `
    + `from wrong to right; p = ${figures(p, 2)}. ${cards.length} shown.${few}`;
}

function chooseFlips(number) {
  flipsOf = number;
  const before = flipTask.value, tasks = Object.keys(data.flips[number]);
  flipTask.replaceChildren(...tasks.map(task => html("option", { value: task }, task)));
  if (tasks.includes(before)) flipTask.value = before;
  drawFlips();
}

if (flipList) {
  chooser(find("#flips-model"), Object.keys(data.flips).map(Number), chooseFlips);
  for (const node of [flipTask, flipKind]) node.addEventListener("change", drawFlips);
  flipFilter.addEventListener("input", drawFlips);
}
