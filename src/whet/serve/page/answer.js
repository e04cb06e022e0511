// One model's answer to one prompt: the request for it, and its place on the page.

import { chat, Refusal } from "./api.js";
import { $, element, hide, tell } from "./dom.js";

let count = 0;

export class Answer {
  text = "";
  whole = false; // the model came to an end, be it an empty one
  #tokens = 0;
  #reached = false; // the limit of tokens
  #ending = null; // ends the request, while one runs
  #waiting = 0; // the timer of a wait

  // place: "first" or "second". again: called by the button that asks once more.
  constructor(model, place, again) {
    this.model = model;
    const id = `answer-${++count}`;
    this.name = element("h3", { id }, model);
    this.words = document.createTextNode("");
    this.fault = element("p", { role: "alert" });
    this.again = element("button", { type: "button", class: "again" });
    this.refused = element("div", { class: "fault" }, this.fault, this.again);
    this.figures = element("p", { class: "figures" });
    this.copy = element("button", { type: "button", class: "quiet", "aria-label": `Copy the answer of ${model}` }, "Copy");
    this.stopped = element("button", { type: "button", class: "quiet", "aria-label": `Stop ${model}` }, "Stop");
    this.body = element("div", { class: "text", dir: "auto" }, this.words);
    const foot = element("footer", {}, this.figures, this.stopped, this.copy);
    this.element = element("article", { class: place, "aria-labelledby": id }, this.name, this.body, this.refused, foot);
    this.again.addEventListener("click", again);
    this.copy.addEventListener("click", () => this.#copy());
    this.stopped.addEventListener("click", () => this.stop());
  }

  get running() {
    return this.#ending !== null;
  }

  stop() {
    this.#ending?.abort();
  }

  // What a screen reader says when the answer has ended: word by word it would never come to an end.
  get spoken() {
    return `${this.model}, ${this.figures.textContent}: ${this.text}`;
  }

  // Ask, and show what comes. The Refusal, where there was one: it stands in the answer's place already.
  async run(body) {
    const ending = this.#begin();
    const start = performance.now();
    let refusal = null;
    try {
      for await (const chunk of chat({ ...body, model: this.model }, ending.signal)) this.#add(chunk);
      this.whole = true;
    } catch (error) {
      if (!ending.signal.aborted) {
        if (!(error instanceof Refusal)) throw error;
        refusal = error;
      }
    } finally {
      this.#end((performance.now() - start) / 1000, ending.signal.aborted);
    }
    if (refusal) this.#refuse(refusal);
    return refusal;
  }

  #begin() {
    clearInterval(this.#waiting);
    this.text = this.words.data = "";
    this.whole = this.#reached = false;
    this.#tokens = 0;
    this.#ending = new AbortController();
    this.#show("");
    tell(this.figures, "");
    return this.#ending;
  }

  #add(chunk) {
    const [choice] = chunk.choices;
    const piece = choice?.delta.content ?? "";
    if (piece) {
      this.text += piece;
      this.words.appendData(piece);
      this.#tokens += 1; // an engine sends a token at a time, or nearly
    }
    if (choice?.finish_reason === "length") this.#reached = true;
    if (chunk.usage) this.#tokens = chunk.usage.completion_tokens;
  }

  #end(seconds, stopped) {
    this.#ending = null;
    const parts = [];
    if (this.whole || this.text) {
      const about = this.whole ? "" : "about "; // the server counts at the end only
      parts.push(`${about}${this.#tokens} ${this.#tokens === 1 ? "token" : "tokens"}`, `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`);
    }
    if (stopped) parts.push("stopped");
    if (this.#reached) parts.push("cut at the limit of tokens");
    if (this.whole && !this.text) parts.push("an empty answer");
    tell(this.figures, parts.join(" · "));
    this.#show("");
  }

  #refuse(refusal) {
    this.#show(refusal.message);
    let left = Math.ceil(refusal.wait);
    const tick = () => {
      this.again.disabled = left > 0;
      this.again.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
      if (left-- <= 0) clearInterval(this.#waiting);
    };
    this.#waiting = setInterval(tick, 1000);
    tick();
  }

  #show(fault) {
    this.element.setAttribute("aria-busy", String(this.running));
    hide(this.stopped, !this.running);
    hide(this.copy, this.running || !this.text);
    hide(this.refused, !fault);
    this.fault.textContent = fault;
  }

  // Browsers give the clipboard to pages of https and of this machine; on others the text is selected for the reader.
  async #copy() {
    try {
      await navigator.clipboard.writeText(this.text);
      $("status").textContent = "Copied.";
    } catch {
      getSelection().selectAllChildren(this.body);
      $("status").textContent = "Selected: your browser's copy takes it.";
    }
  }
}
