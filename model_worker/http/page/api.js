// Everything that the page asks of its worker. A key is kept in sessionStorage alone: it goes with the tab.

const KEY = "kvbank-key";

/** What the worker has refused, or that it is away (status 0). code: a word for programs. */
export class ApiError extends Error {
  constructor(status, code, message) {
    super(message);
    Object.assign(this, { status, code });
  }
}

export const key = () => sessionStorage.getItem(KEY) ?? "";

export function setKey(value) {
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
}

async function answered(method, path, body, signal) {
  const headers = {};
  if (key()) headers.authorization = `Bearer ${key()}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let answer;
  try {
    const data = body === undefined ? undefined : JSON.stringify(body);
    answer = await fetch(path, { method, headers, signal, body: data, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "worker_away", "the worker does not answer");
  }
  if (answer.ok) return answer;
  const document = await answer.json().catch(() => null);
  const said = document?.error ?? { code: "", message: answer.statusText };
  throw new ApiError(answer.status, said.code, said.message);
}

export const get = async (path) => (await answered("GET", path)).json();
export const post = async (path, body) => (await answered("POST", path, body)).json();
export const remove = async (path) => (await answered("DELETE", path)).json();

/** Yield the events of a stream, each a JSON document. signal: ends it, and the answer with it. */
export async function* streamed(path, body, signal) {
  const answer = await answered("POST", path, body, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await read(reader);
    if (done) return;
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "worker_away", "the worker has gone away while it answered");
  }
}
