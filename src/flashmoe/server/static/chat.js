// The chat box: a conversation over /v1/chat/completions, streamed.

import { events, request } from "./server.js";

const log = document.getElementById("log");
const form = document.getElementById("ask");
const prompt = document.getElementById("prompt");
const send = document.getElementById("send");
const empty = log.firstElementChild;

let messages = [];
let running = null; // AbortController of the answer under way

function say(role, text) {
  empty.remove();
  const element = document.createElement("p");
  element.className = role;
  element.textContent = text;
  log.append(element);
  log.scrollTop = log.scrollHeight;
  return element;
}

/** Adds to an element, and stays at the end of the log where the reader is there. */
function append(element, text) {
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  element.append(text);
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function figures(usage) {
  const { flashmoe } = usage;
  const parts = [`${usage.completion_tokens} tokens`];
  if (flashmoe?.tokens_per_s) parts.push(`${flashmoe.tokens_per_s.toFixed(1)} tokens/s`);
  if (flashmoe?.hit_rate) parts.push(`hit rate ${(100 * flashmoe.hit_rate).toFixed(1)} %`);
  return parts.join(" · ");
}

async function answer(messages, signal) {
  const element = say("assistant", "");
  element.setAttribute("aria-busy", "true");
  const body = { messages, stream: true, stream_options: { include_usage: true } };
  let text = "";
  try {
    const response = await request("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal,
    });
    for await (const data of events(response)) {
      if (data === "[DONE]") break;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      const piece = event.choices[0]?.delta.content ?? "";
      text += piece;
      append(element, piece);
      if (event.usage) say("figures", figures(event.usage));
    }
  } catch (error) {
    say(signal.aborted ? "figures" : "error", signal.aborted ? "stopped" : error.message);
  }
  element.removeAttribute("aria-busy");
  if (text) messages.push({ role: "assistant", content: text });
  else {
    messages.pop(); // a question without an answer would be a wrong turn in the next request
    element.remove();
  }
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (running) return running.abort();
  const text = prompt.value.trim();
  if (!text) return;
  prompt.value = "";
  messages.push({ role: "user", content: text });
  say("user", text);
  running = new AbortController();
  send.textContent = "Stop";
  prompt.required = false;
  const own = messages;
  await answer(own, running.signal);
  running = null;
  send.textContent = "Send";
  prompt.required = true;
  if (own !== messages) log.replaceChildren(empty); // a new chat was begun meanwhile
});

prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) form.requestSubmit();
  }
});

document.getElementById("new").addEventListener("click", () => {
  running?.abort();
  messages = [];
  log.replaceChildren(empty);
  prompt.focus();
});
