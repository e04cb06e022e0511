// The grader's page. It knows positions and sides; the server knows what they stand for.
// It goes on only after the server has said that a vote is saved.

import { ask } from "./api.js";
import { show } from "./answer.js";

const $ = (id) => document.getElementById(id);
const choices = [...document.querySelectorAll("[data-choice]")];
const KEYS = {
  ArrowLeft: "left", 1: "left", ArrowRight: "right", 2: "right", t: "tie", 0: "tie", s: "skip",
  u: "undo", n: "next", Enter: "next", p: "previous", c: "comment",
};
const SETTLE = 250; // ms after a comparison appears in which keys do not vote: a double press is for the one before

let study;
let shown = null; // the comparison on the page, as the server gave it
let busy = false;
let since = 0;

// ---------------------------------------------------------------- what is on the page

function report(text, alarm = false) {
  $("status").textContent = text;
  $("status").classList.toggle("alarm", alarm);
}

function tell(title, text, review = false) {
  for (const id of ["skip", "work", "dock"]) $(id).hidden = true;
  $("message").hidden = false;
  $("message-title").textContent = title;
  $("message-text").textContent = text;
  $("review").hidden = !review;
  shown = null;
  $("message-title").focus();
}

function count() {
  const done = study.votes.filter((vote) => vote !== null).length;
  $("progress").hidden = false;
  $("bar").max = study.votes.length;
  $("bar").value = done;
  $("count").textContent = `${done} of ${study.votes.length} done`;
  $("undo").disabled = study.last === null;
  return done;
}

function draw() {
  $("prompt").textContent = shown.prompt;
  $("reference").hidden = shown.reference === null;
  $("reference-text").textContent = shown.reference ?? "";
  for (const side of ["left", "right"]) show($(side), shown[side], $("formatted").checked);
}

function press() {
  for (const button of choices) button.setAttribute("aria-pressed", String(button.dataset.choice === shown.vote));
}

async function open(position, said = "") {
  shown = await ask("GET", `/api/comparisons/${position}`);
  history.replaceState(null, "", `#${position}`);
  draw();
  press();
  $("comment").value = drafts.get(position) ?? shown.comment;
  $("message").hidden = true;
  for (const id of ["skip", "work", "dock", "menu"]) $(id).hidden = false;
  $("prompt-title").textContent = `Prompt ${position} of ${study.votes.length}`;
  $("previous").disabled = position === 1;
  scrollTo(0, 0);
  $("prompt-title").focus({ preventScroll: true });
  report(`${said} Comparison ${position} of ${study.votes.length}.`.trim());
  since = performance.now();
}

// ---------------------------------------------------------------- comments that are not yet with a vote

const drafts = {
  key: (position) => `whet-ab-${study.id}-${study.grader}-${position}`,
  get: (position) => sessionStorage.getItem(drafts.key(position)),
  keep: () => shown && sessionStorage.setItem(drafts.key(shown.position), $("comment").value),
  drop: (position) => sessionStorage.removeItem(drafts.key(position)),
};

// ---------------------------------------------------------------- what a grader does

// One thing at a time; a refusal is shown, and nothing moves.
async function doing(work) {
  if (busy) return;
  busy = true;
  document.body.classList.add("busy");
  try {
    await work();
  } catch (refusal) {
    if (refusal.status === 401) tell("Not signed in", refusal.message);
    else if (refusal.status === 409) tell("The study is closed", "No more votes are taken. Thank you.");
    else report(refusal.message, true);
  } finally {
    busy = false;
    document.body.classList.remove("busy");
  }
}

async function vote(choice) {
  const { position } = shown;
  const comment = $("comment").value.trim();
  await ask("PUT", `/api/comparisons/${position}/vote`, { choice, comment });
  drafts.drop(position);
  study.votes[position - 1] = choice;
  study.last = position;
  Object.assign(shown, { vote: choice, comment });
  press();
  count();
  if ($("onward").checked) await onward("Saved.");
  else report("Saved.");
}

// A comment that changed after its vote is saved with that vote.
async function keepComment() {
  const comment = $("comment").value.trim();
  if (!shown?.vote || comment === shown.comment) return;
  await ask("PUT", `/api/comparisons/${shown.position}/vote`, { choice: shown.vote, comment });
  drafts.drop(shown.position);
  shown.comment = comment;
}

async function onward(said) {
  await keepComment();
  const total = study.votes.length;
  const from = shown.position;
  for (let step = 1; step <= total; step++) {
    const position = ((from + step - 1) % total) + 1;
    if (study.votes[position - 1] === null) return open(position, said);
  }
  finished();
}

function finished() {
  tell("All done. Thank you.", "You have been through every comparison. Until the study is closed you can change your votes.", true);
}

async function undo() {
  const position = study.last;
  if (position === null) return;
  await ask("DELETE", `/api/comparisons/${position}/vote`);
  study = await ask("GET", "/api/study");
  count();
  await open(position, "Taken back.");
}

async function previous() {
  await keepComment();
  if (shown.position > 1) await open(shown.position - 1);
}

async function next() {
  const total = study.votes.length;
  const unvoted = study.votes.filter((vote) => vote === null).length;
  if (unvoted > (shown.vote === null ? 1 : 0)) return onward("");
  await keepComment(); // all are seen: leaf through them
  if (shown.position < total) await open(shown.position + 1);
  else if (unvoted === 0) finished();
  else report("This is the last one left.");
}

const acts = { undo, next, previous, comment: async () => $("comment").focus() };

function act(name) {
  if (!shown && name !== "undo") return;
  doing(() => (name in acts ? acts[name]() : vote(name)));
}

// ---------------------------------------------------------------- keys, buttons, settings

function pressed(event) {
  if (event.altKey || event.ctrlKey || event.metaKey || event.repeat || !$("keys").checked) return;
  if (event.target.closest("textarea, input, summary")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (event.key === "Enter" && event.target.closest("button, a")) return;
  if (event.key.startsWith("Arrow") && event.target.closest("pre, table")) return; // these scroll with arrows
  const name = KEYS[event.key] ?? KEYS[event.key.toLowerCase()];
  if (name === undefined) return;
  event.preventDefault();
  if (!(name in acts) && performance.now() - since < SETTLE) return;
  act(name);
}

function settings() {
  for (const id of ["formatted", "onward", "keys"]) {
    const kept = localStorage.getItem(`whet-ab-${id}`);
    if (kept !== null) $(id).checked = kept === "true";
    $(id).addEventListener("change", () => {
      localStorage.setItem(`whet-ab-${id}`, String($(id).checked));
      document.body.classList.toggle("keyless", !$("keys").checked);
      if (shown) draw();
    });
  }
  document.body.classList.toggle("keyless", !$("keys").checked);
}

function listen() {
  addEventListener("keydown", pressed);
  for (const button of choices) button.addEventListener("click", () => act(button.dataset.choice));
  for (const id of ["undo", "next", "previous"]) $(id).addEventListener("click", () => act(id));
  $("review").addEventListener("click", () => doing(() => open(1)));
  $("comment").addEventListener("input", drafts.keep);
  addEventListener("click", (event) => {
    if (!event.target.closest("#menu")) $("menu").open = false;
  });
}

async function start() {
  study = await ask("GET", "/api/study");
  document.title = study.title;
  $("title").textContent = study.title;
  $("question").textContent = study.question;
  $("grader").textContent = study.grader;
  $("comment").maxLength = study.comment_length;
  const done = count();
  if (study.closed) return tell("The study is closed", "No more votes are taken. Thank you.");
  const asked = Number(location.hash.slice(1));
  const first = study.votes.indexOf(null) + 1;
  if (Number.isInteger(asked) && asked >= 1 && asked <= study.votes.length) return open(asked);
  if (first === 0) return finished();
  await open(first, done ? "Welcome back." : "");
}

settings();
listen();
doing(start);
