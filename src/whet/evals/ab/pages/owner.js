// The owner's page: links for graders, and the study's end.

import { ask } from "./api.js";

const $ = (id) => document.getElementById(id);

async function attempt(work) {
  $("fault").textContent = "";
  try {
    await work();
  } catch (refusal) {
    $("fault").textContent = refusal.message;
  }
}

function addGrader(event) {
  event.preventDefault();
  attempt(async () => {
    const { name, token } = await ask("POST", "/api/owner/links", { name: $("name").value });
    $("link").hidden = false;
    $("link-name").textContent = name;
    $("link-text").textContent = `${location.origin}/join#${token}`;
    $("name").value = "";
  });
}

async function copy() {
  try {
    await navigator.clipboard.writeText($("link-text").textContent);
    $("copy").textContent = "Copied";
  } catch {
    getSelection().selectAllChildren($("link-text")); // browsers keep the clipboard from pages without TLS
  }
}

function close() {
  $("sure").close();
  attempt(async () => {
    await ask("POST", "/api/owner/close", {});
    scrollTo(0, 0);
    location.reload();
  });
}

if ($("add")) {
  $("add").addEventListener("submit", addGrader);
  $("copy").addEventListener("click", copy);
  $("ask").addEventListener("click", () => $("sure").showModal());
  $("no").addEventListener("click", () => $("sure").close());
  $("yes").addEventListener("click", close);
  $("ask").disabled = false; // a click before this would do nothing
}
