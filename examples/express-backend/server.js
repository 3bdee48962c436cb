// A backend of one's own before `mlx-qlora serve`: it keeps the key, picks the adapter and passes the answer on as
// plain text while it is made. A browser never talks to the model server itself.
//
//   MLX_QLORA_URL=http://127.0.0.1:8080 ADAPTER=farense npm start
//   curl -N localhost:3000/ask -H 'Content-Type: application/json' -d '{"question": "Quem fundou o clube?"}'

import express from "express";

const url = process.env.MLX_QLORA_URL ?? "http://127.0.0.1:8080";
const key = process.env.MLX_QLORA_API_KEY;
const adapter = process.env.ADAPTER ?? "base";
const MAX_TOKENS = 256;
const MAX_CHARACTERS = 4000;

const app = express();
app.disable("x-powered-by");
app.use(express.json({ limit: "32kb" }));

app.post("/ask", async (request, response) => {
  const question = request.body?.question;
  if (typeof question !== "string" || !question.trim() || question.length > MAX_CHARACTERS) {
    return response.status(422).json({ error: `question: a text of at most ${MAX_CHARACTERS} characters` });
  }
  // a visitor who leaves ends the generation, too
  const left = new AbortController();
  response.on("close", () => left.abort());
  try {
    const answer = await fetch(`${url}/v1/chat/completions`, {
      method: "POST",
      signal: left.signal,
      headers: { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) },
      body: JSON.stringify({
        model: adapter,
        messages: [{ role: "user", content: question }],
        max_tokens: MAX_TOKENS,
        stream: true,
      }),
    });
    if (!answer.ok) return passOn(answer, response);
    response.type("text/plain; charset=utf-8").set("Cache-Control", "no-store");
    for await (const piece of textsOf(answer.body)) {
      // a slow visitor slows this loop, not this server's memory
      if (!response.write(piece)) await new Promise((resolve) => response.once("drain", resolve).once("close", resolve));
    }
    response.end();
  } catch (error) {
    if (left.signal.aborted) return;
    console.error(error.message);
    if (response.headersSent) response.destroy(); // the visitor sees that the answer is not whole
    else response.status(502).json({ error: "The model server does not answer." });
  }
});

// Too busy is worth another try; what else the model server refuses is this program's mistake, not the visitor's.
async function passOn(answer, response) {
  const { error } = await answer.json();
  console.error(`${answer.status}: ${error.message}`);
  const isBusy = answer.status === 429 || answer.status === 503;
  if (isBusy) response.set("Retry-After", answer.headers.get("retry-after") ?? "1");
  response.status(isBusy ? 503 : 502).json({ error: isBusy ? "Too many questions; try again." : "No answer." });
}

// The texts of a stream of server-sent events.
async function* textsOf(body) {
  let waiting = "";
  for await (const part of body.pipeThrough(new TextDecoderStream())) {
    const blocks = (waiting + part).split("\n\n");
    waiting = blocks.pop();
    for (const block of blocks) {
      if (!block.startsWith("data: ")) continue;
      if (block === "data: [DONE]") return;
      const chunk = JSON.parse(block.slice(6));
      if (chunk.error) throw new Error(chunk.error.message);
      const text = chunk.choices[0]?.delta.content;
      if (text) yield text;
    }
  }
  throw new Error("the answer broke off");
}

const server = app.listen(Number(process.env.PORT ?? 3000), "127.0.0.1", (error) => {
  if (error) throw error;
  console.log(`http://127.0.0.1:${server.address().port} asks ${adapter} at ${url}`);
});
process.on("SIGTERM", () => server.close());
