// A link is /join#TOKEN. The token goes to the server in a body, never in an address, and out of the history.

import { ask } from "./api.js";

const message = document.getElementById("message");
const token = location.hash.slice(1);
history.replaceState(null, "", location.pathname);

if (!token) {
  message.textContent = "Open the link you were given.";
} else {
  try {
    const { role } = await ask("POST", "/api/join", { token });
    location.replace(role === "owner" ? "/owner" : "/");
  } catch (refusal) {
    message.textContent = refusal.message;
  }
}
