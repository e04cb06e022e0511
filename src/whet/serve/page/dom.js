// The few words of the DOM that the page uses. Text goes in as text: nothing here reads markup.

export const $ = (id) => document.getElementById(id);

// element("p", { class: "note" }, "text", other) -> <p class="note">text<other></p>
export function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// The text of an element, which is hidden while there is none.
export function tell(shown, text) {
  shown.textContent = text;
  shown.hidden = !text;
}

// Hide or show a part. The focus is not lost with it: it goes to the prompt.
export function hide(part, hidden) {
  if (hidden && part.contains(document.activeElement)) $("prompt").focus();
  part.hidden = hidden;
}

let following = true;
let before = 0; // where the page was scrolled to, px
const atEnd = () => innerHeight + scrollY > document.documentElement.scrollHeight - 48;

// Keep the end of `grows` in sight, until the reader scrolls up from it.
export function follow(grows) {
  addEventListener("scroll", () => {
    following = atEnd() || (following && scrollY >= before);
    before = scrollY;
  }, { passive: true });
  new ResizeObserver(() => { if (following) toEnd(); }).observe(grows);
}

export function toEnd() {
  following = true;
  scrollTo(0, document.documentElement.scrollHeight);
}
