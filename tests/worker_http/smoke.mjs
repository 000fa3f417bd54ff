// The npm client of OpenAI at a worker: BASE_URL and MODEL in the environment; prints one JSON document.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: "none", maxRetries: 0 });
const options = { model: process.env.MODEL, max_output_tokens: 8, temperature: 0 };

const chat = await client.chat.completions.create({
  model: options.model,
  max_completion_tokens: 8,
  messages: [{ role: "user", content: "the sea is wide" }],
});
const first = await client.responses.create({ ...options, input: "the sea is wide" });
const second = await client.responses.create({ ...options, input: "go on", previous_response_id: first.id });
const found = await client.responses.retrieve(second.id);
const kinds = [];
let streamed = "";
for await (const event of await client.responses.create({ ...options, input: "the sea is wide", stream: true })) {
  kinds.push(event.type);
  if (event.type === "response.output_text.delta") streamed += event.delta;
}
const conversation = await client.conversations.create({ items: [{ role: "user", content: "the sea is wide" }] });
await client.responses.create({ ...options, input: "go on", conversation: conversation.id });
const items = [];
for await (const item of client.conversations.items.list(conversation.id, { order: "asc", limit: 2 })) items.push(item.role);
let missing;
try {
  await client.responses.retrieve("resp_none");
} catch (error) {
  missing = error.status;
}
console.log(JSON.stringify({
  chat: chat.choices[0].message.content,
  first: first.output_text,
  second: second.output_text,
  found: found.output_text,
  cached: second.usage.input_tokens_details.cached_tokens,
  last: kinds.at(-1),
  streamed,
  items,
  missing,
}));
