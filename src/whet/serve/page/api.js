// Requests to the server that the page came from. The key is a variable of this module, and stands nowhere else.

let key = "";

export const hasKey = () => key !== "";

// Throws a Refusal for what can't stand in a header: a key has no other characters.
export function useKey(text) {
  if (!/^[\x21-\x7e]*$/.test(text)) throw new Refusal(401, "A key has neither spaces nor letters with accents.");
  key = text;
}

// What the server did not do, in its own words. status: of HTTP, 0 without one. wait: seconds until it may be asked again.
export class Refusal extends Error {
  constructor(status, message, wait = 0) {
    super(message);
    this.status = status;
    this.wait = wait;
  }
}

async function send(path, options = {}) {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  if (options.body) headers["content-type"] = "application/json";
  const asked = { ...options, headers, credentials: "omit", redirect: "error" };
  const response = await reached(fetch(path, asked), "The server cannot be reached.");
  if (response.ok) return response;
  const told = await response.json().catch(() => ({}));
  const wait = Number(response.headers.get("retry-after")) || 0;
  throw new Refusal(response.status, told.error?.message ?? `The server answered with ${response.status}.`, wait);
}

// The promise's value; a connection that fails is a Refusal. What the page itself ended stays an AbortError.
async function reached(promise, words) {
  try {
    return await promise;
  } catch (error) {
    throw error.name === "AbortError" ? error : new Refusal(0, words);
  }
}

// The models that chat, as the API lists them: id, parent, context.
export async function chatModels() {
  const list = await (await send("/v1/models")).json();
  return list.data.filter((model) => model.kind === "chat");
}

// The chunks of an answer as they come. Throws a Refusal, also in the middle: only [DONE] says that an answer is whole.
export async function* chat(body, signal) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await send("/v1/chat/completions", { method: "POST", body: JSON.stringify(asked), signal });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refusal(0, chunk.error.message);
    yield chunk;
  }
  throw new Refusal(0, "The connection ended in the middle of the answer.");
}

// The data of each event. The server's events are one line each, with an empty one after it.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reached(reader.read(), "The connection broke in the middle of the answer.");
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
    }
  } finally {
    reader.cancel().catch(() => {}); // a connection that is gone already can't be told
  }
}
