// What is asked of both models beside the prompt.

import { $ } from "./dom.js";

// The fields of a request. null where one is out of its bounds: then the sheet is open, and the browser says which.
export function settings() {
  const form = $("settings");
  if (!form.checkValidity()) {
    $("menu").open = true;
    form.reportValidity();
    return null;
  }
  const asked = { temperature: $("temperature").valueAsNumber };
  if ($("max-tokens").value) asked.max_tokens = $("max-tokens").valueAsNumber;
  if ($("seed").value) asked.seed = $("seed").valueAsNumber;
  return asked;
}

export const systemPrompt = () => $("system").value.trim();
