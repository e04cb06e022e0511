// An answer on the page. Elements are made one by one from a short list of names, and texts are set as texts: nothing
// in an answer is ever read as HTML.

const NAMES = new Set([
  "p", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "em", "strong", "s", "hr", "br", "pre", "code",
  "table", "thead", "tbody", "tr", "th", "td",
]);

export function show(place, answer, formatted) {
  const drawn = formatted && answer.tree;
  place.classList.toggle("formatted", Boolean(drawn));
  place.replaceChildren(...(drawn ? answer.tree.map(element) : [answer.text]));
  if (!answer.text) place.replaceChildren(emptiness());
}

function element(tree) {
  if (typeof tree === "string") return document.createTextNode(tree);
  const [name, ...inside] = tree;
  const made = document.createElement(NAMES.has(name) ? name : "span");
  if (name === "ol") made.start = inside.shift();
  if (name === "pre" || name === "table") made.tabIndex = 0; // may be wider than the page, and is scrolled by keys
  made.append(...inside.map(element));
  return made;
}

function emptiness() {
  const note = document.createElement("em");
  note.className = "soft";
  note.textContent = "The answer is empty.";
  return note;
}
