"use strict";

const TEXTS = {
  en: {
    key: "Key",
    model: "Adapter",
    system: "System prompt",
    systemHint: "Left empty: the adapter's own",
    temperature: "Temperature",
    maxTokens: "Tokens at most",
    turns: "Conversation",
    empty: "Nothing has been asked yet.",
    question: "Your message",
    send: "Send",
    stop: "Stop",
    reset: "New conversation",
    base: "base, without an adapter",
    ready: "ready",
    needsKey: "This server needs its key.",
    unreachable: "The server does not answer.",
    cut: "The answer is not complete.",
    speed: (tokens, perSecond) => `${tokens} tokens · ${perSecond} tokens/s`,
  },
  pt: {
    key: "Chave",
    model: "Adaptador",
    system: "Instrução de sistema",
    systemHint: "Vazia: a do próprio adaptador",
    temperature: "Temperatura",
    maxTokens: "Tokens, no máximo",
    turns: "Conversa",
    empty: "Ainda não há perguntas.",
    question: "A sua mensagem",
    send: "Enviar",
    stop: "Parar",
    reset: "Nova conversa",
    base: "base, sem adaptador",
    ready: "pronto",
    needsKey: "Este servidor precisa da chave.",
    unreachable: "O servidor não responde.",
    cut: "A resposta não está completa.",
    speed: (tokens, perSecond) => `${tokens} tokens · ${perSecond} tokens/s`,
  },
};

const language = navigator.language.toLowerCase().startsWith("pt") ? "pt" : "en";
const text = TEXTS[language];
const at = (id) => document.getElementById(id);
const number = new Intl.NumberFormat(language, { maximumFractionDigits: 1 });

let turns = [];
let running = null;

function translate() {
  document.documentElement.lang = language;
  for (const each of document.querySelectorAll("[data-text]")) each.textContent = text[each.dataset.text];
  for (const each of document.querySelectorAll("[data-hint]")) each.placeholder = text[each.dataset.hint];
  for (const each of document.querySelectorAll("[data-label]")) each.setAttribute("aria-label", text[each.dataset.label]);
}

function say(message, isWrong = false) {
  at("state").textContent = message;
  at("state").classList.toggle("wrong", isWrong);
}

function headers() {
  const key = at("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

// A message of the server's own, or what little is known.
async function problemOf(response) {
  if (response.status === 401) {
    at("key-row").hidden = false;
    at("key").focus();
    return text.needsKey;
  }
  try {
    return (await response.json()).error.message;
  } catch {
    return `HTTP ${response.status}`;
  }
}

async function loadModels() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (!response.ok) return say(await problemOf(response), response.status !== 401 || at("key").value !== "");
    const models = (await response.json()).data;
    // an adapter has a parent; the base is there twice, under both its names
    const adapters = models.filter((model) => model.parent).map((model) => new Option(model.id, model.id));
    const base = models.filter((model) => !model.parent).map((model) => model.id);
    at("model").replaceChildren(...adapters, new Option(`${text.base} (${base.at(-1)})`, base[0]));
    say(text.ready);
  } catch {
    say(text.unreachable, true);
  }
}

function addTurn(role, content) {
  const item = document.createElement("li");
  item.className = role;
  item.textContent = content;
  at("turns").append(item);
  at("empty").hidden = true;
  item.scrollIntoView({ block: "end" });
  return item;
}

// Server-sent events: blocks of lines that end with an empty one; a data line holds one JSON object.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (waiting + value).split("\n\n");
    waiting = blocks.pop();
    for (const block of blocks) if (block.startsWith("data: ")) yield block.slice(6);
  }
}

async function answer(messages, signal, onText) {
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: headers(),
    signal,
    body: JSON.stringify({
      model: at("model").value,
      messages,
      temperature: at("temperature").valueAsNumber || 0,
      max_tokens: at("max-tokens").valueAsNumber || 256,
      stream: true,
      stream_options: { include_usage: true },
    }),
  });
  if (!response.ok) throw new Error(await problemOf(response));
  let firstAt = null;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    const piece = chunk.choices[0]?.delta.content;
    if (piece) {
      firstAt ??= performance.now();
      onText(piece);
    }
    if (chunk.usage) {
      const seconds = (performance.now() - firstAt) / 1000;
      const tokens = chunk.usage.completion_tokens;
      at("speed").textContent = text.speed(tokens, seconds > 0 && firstAt ? number.format((tokens - 1) / seconds) : "–");
    }
  }
  throw new Error(text.cut);
}

function setRunning(controller) {
  running = controller;
  at("send").disabled = running !== null;
  at("stop").hidden = running === null;
  at("turns").setAttribute("aria-busy", String(running !== null));
}

async function ask(event) {
  event.preventDefault();
  const question = at("question").value.trim();
  if (!question || running) return;
  at("question").value = "";
  const conversation = turns; // a new one may begin before this answer ends
  conversation.push({ role: "user", content: question });
  addTurn("user", question);
  const system = at("system").value.trim();
  const messages = system ? [{ role: "system", content: system }, ...conversation] : conversation;
  const item = addTurn("assistant", "");
  const controller = new AbortController();
  setRunning(controller);
  at("speed").textContent = "";
  let said = "";
  try {
    await answer(messages, controller.signal, (piece) => {
      said += piece;
      item.textContent = said;
      item.scrollIntoView({ block: "end" });
    });
    say(text.ready);
  } catch (error) {
    if (error.name !== "AbortError") say(error.message || text.unreachable, true);
  }
  setRunning(null);
  if (said) conversation.push({ role: "assistant", content: said });
  else {
    // an unanswered question would stand twice in the next prompt
    conversation.pop();
    item.remove();
  }
  at("question").focus();
}

translate();
at("ask").addEventListener("submit", ask);
at("settings").addEventListener("submit", (event) => event.preventDefault());
at("stop").addEventListener("click", () => running?.abort());
at("reset").addEventListener("click", () => {
  running?.abort();
  turns = [];
  at("turns").replaceChildren();
  at("speed").textContent = "";
  at("empty").hidden = false;
});
at("key").addEventListener("change", loadModels);
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
loadModels();
