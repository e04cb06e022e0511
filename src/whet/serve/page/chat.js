// The page: who answers, what was asked, and the keys. Each column has a history of its own.

import { Answer } from "./answer.js";
import { chatModels, hasKey, Refusal, useKey } from "./api.js";
import { $, element, follow, hide, tell, toEnd } from "./dom.js";
import { settings, systemPrompt } from "./settings.js";

const PLACES = ["first", "second"];
const RETRY = 5; // s

let served = []; // the models, as the API lists them
let turns = []; // { prompt, answers: { first, second } }

const running = () => turns.at(-1) ? Object.values(turns.at(-1).answers).filter((answer) => answer.running) : [];

// ---------------------------------------------------------------- coming in

// The list of models is the first thing that needs a key, so it says whether one is wanted.
async function enter() {
  try {
    served = await chatModels();
  } catch (refusal) {
    if (!(refusal instanceof Refusal)) throw refusal;
    return [401, 403].includes(refusal.status) ? ask(refusal) : wait(refusal);
  }
  tell($("notice"), served.length ? "" : "This server has no model that chats.");
  $("door").hidden = true;
  $("signed-in").hidden = !hasKey();
  for (const id of ["skip", "menu", "models", "composer"]) $(id).hidden = !served.length;
  if (served.length) offer();
  settle();
  $("prompt").focus();
}

// A first visit is no fault; a key that was given and is refused, or may not see the models, is one.
function ask(refusal) {
  tell($("door-fault"), hasKey() ? refusal.message : "");
  tell($("notice"), "");
  $("welcome").hidden = true;
  $("composer").hidden = $("skip").hidden = true;
  $("door").hidden = false;
  $("key").focus();
}

// A server that comes up, goes down or is busy: it is asked again, and no sooner than it says.
function wait(refusal) {
  const seconds = refusal.wait || RETRY;
  tell($("notice"), `${refusal.message} Trying again every ${seconds} s.`);
  setTimeout(enter, seconds * 1000);
}

function unlock(event) {
  event.preventDefault();
  const given = $("key").value.trim();
  $("key").value = "";
  try {
    useKey(given);
  } catch (refusal) {
    return tell($("door-fault"), refusal.message);
  }
  enter();
}

function forget() {
  stop();
  useKey("");
  clear();
  served = [];
  for (const place of PLACES) $(place).replaceChildren();
  $("menu").open = false;
  for (const id of ["menu", "models"]) $(id).hidden = true;
  enter();
}

// ---------------------------------------------------------------- who answers

// A base beside the first adapter on it; else the first model alone. What was chosen stays chosen.
function offer() {
  const names = served.map((model) => model.id);
  const tuned = served.find((model) => names.includes(model.parent));
  const [first, second] = $("first").length ? [$("first").value, $("second").value] : [tuned?.parent ?? names[0], tuned?.id ?? ""];
  fill($("first"), names, first);
  fill($("second"), ["", ...names], second);
  describe();
}

function fill(select, names, chosen) {
  const gone = names.includes(chosen) ? [] : [chosen];
  const option = (name) => element("option", { value: name }, name || "no other model");
  select.replaceChildren(...[...names, ...gone].map(option));
  select.value = chosen;
}

function describe() {
  const parents = new Set(served.map((model) => model.parent));
  for (const place of PLACES) {
    const model = served.find(({ id }) => id === $(place).value);
    const kind = model?.parent ? `adapter on ${model.parent}` : parents.has(model?.id) ? "base" : "";
    $(`${place}-kind`).textContent = $(place).value && !model ? "not served any more" : kind;
  }
  document.body.classList.toggle("alone", !$("second").value);
}

// ---------------------------------------------------------------- asking

// What a column has been through before a turn. A prompt without any answer is left out: templates want pairs.
function messages(turn, place) {
  const system = systemPrompt();
  const found = system ? [{ role: "system", content: system }] : [];
  for (const { prompt, answers } of turns.slice(0, turns.indexOf(turn))) {
    const answer = answers[place];
    if (!answer?.whole && !answer?.text) continue;
    found.push({ role: "user", content: prompt }, { role: "assistant", content: answer.text });
  }
  return [...found, { role: "user", content: turn.prompt }];
}

function send(event) {
  event?.preventDefault();
  const prompt = $("prompt").value.trim();
  if (!prompt || running().length) return;
  const asked = settings();
  if (!asked) return;
  $("menu").open = false;
  const turn = { prompt, answers: {} };
  for (const place of PLACES) {
    const model = $(place).value;
    if (model) turn.answers[place] = new Answer(model, place, () => again(turn, place));
  }
  turns.push(turn);
  $("turns").append(drawn(turn));
  $("prompt").value = "";
  $("said").replaceChildren();
  toEnd();
  for (const place of Object.keys(turn.answers)) run(turn, place, asked);
}

function drawn({ prompt, answers }) {
  const asked = element("div", { class: "asked" }, element("h2", { class: "unseen" }, "You"), element("div", { class: "text", dir: "auto" }, prompt));
  const cells = Object.values(answers).map((answer) => answer.element);
  return element("section", { class: "turn" }, asked, element("div", { class: "answers" }, ...cells));
}

function again(turn, place) {
  const asked = settings();
  if (asked) run(turn, place, asked);
}

async function run(turn, place, asked) {
  const answer = turn.answers[place];
  const done = answer.run({ ...asked, messages: messages(turn, place) });
  settle();
  const refusal = await done.finally(settle);
  if (!turns.includes(turn)) return; // cleared meanwhile
  if (!refusal) $("said").append(element("p", {}, answer.spoken));
  if (refusal?.status === 401) ask(refusal);
  if (refusal?.status === 404) await recount();
}

// A model is gone: the lists say so.
async function recount() {
  try {
    served = await chatModels();
    offer();
  } catch (refusal) {
    if (!(refusal instanceof Refusal)) throw refusal; // the answer's place has said what is wrong
  }
}

// The page as it is while answers run, and while none does.
function settle() {
  const busy = running();
  hide($("send"), busy.length > 0);
  hide($("stop"), busy.length === 0);
  hide($("clear"), turns.length === 0);
  $("welcome").hidden = turns.length > 0 || !served.length;
  if (busy.length) {
    $("status").textContent = `${busy.map((answer) => answer.model).join(" and ")} ${busy.length > 1 ? "are" : "is"} writing.`;
  } else {
    $("status").textContent = "";
  }
}

function stop() {
  for (const answer of running()) answer.stop();
  if ($("door").hidden) $("prompt").focus();
}

function clear() {
  for (const answer of running()) answer.stop();
  turns = [];
  $("turns").replaceChildren();
  $("said").replaceChildren();
  settle();
  if ($("door").hidden) $("prompt").focus();
}

// ---------------------------------------------------------------- keys and buttons

function pressed(event) {
  if (event.isComposing) return; // Enter ends a word there, Escape drops it
  if (event.key === "Escape") {
    if ($("menu").open) closeMenu();
    else stop();
  } else if (event.key === "Enter" && !event.shiftKey && event.target === $("prompt")) {
    event.preventDefault();
    send();
  }
}

function closeMenu() {
  $("menu").open = false;
  $("menu").querySelector("summary").focus();
}

addEventListener("keydown", pressed);
addEventListener("click", (event) => {
  if (!event.target.closest("#menu")) $("menu").open = false;
});
$("composer").addEventListener("submit", send);
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("door").addEventListener("submit", unlock);
$("stop").addEventListener("click", stop);
$("clear").addEventListener("click", clear);
$("forget").addEventListener("click", forget);
for (const place of PLACES) $(place).addEventListener("change", describe);
follow($("turns"));
enter();
