// Middle: the conversation that is open, and the answer while it is written.

import { ApiError, get, post, streamed } from "./api.js";
import { report } from "./connection.js";
import { byId, el, wordButton } from "./dom.js";
import { marked } from "./markup.js";
import { moment, titleOf } from "./words.js";

const TURNS = 50;
// Less of chance than the API's own 1: small models keep to the matter.
const TEMPERATURE = 0.6;
const state = { session: null, turns: [], first: 0, chosen: null, running: null, model: "" };
let on = {};
// Counts what was opened, so that an answer which comes late does not show what the reader has left.
let opened = 0;

/** Begin. listeners: `chosen(turn)` of an answer, `open(id)` of another session, `changed()` of the list
 * of sessions, `forget(turn)`, `fork(turn)`, `rewind(turn)`. */
export function begin(listeners) {
  on = listeners;
  const message = byId("message");
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    say(message.value.trim());
  });
  message.addEventListener("input", grow);
  message.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    byId("composer").requestSubmit();
  });
  byId("stop").addEventListener("click", stop);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && state.running && !byId("dialog").open) stop();
  });
  byId("earlier").addEventListener("click", () => earlier().catch(report));
}

export const session = () => state.session;
export const setModel = (name) => (state.model = name);

/** Open a session by its id; null is a new one. Return whether it is open: another may have been asked for since. */
export async function open(id) {
  stop();
  opened += 1;
  const own = opened;
  const found = id === null ? null : await get(`/v1/kvbank/sessions/${encodeURIComponent(id)}?limit=${TURNS}`);
  if (own !== opened) return false;
  state.session = found;
  state.turns = found?.data ?? [];
  state.first = found?.after ?? 0;
  byId("turns").replaceChildren(...state.turns.map(turnItem));
  headed();
  toEnd();
  const last = state.turns.findLast((turn) => turn.traced);
  choose(last ?? null);
  return true;
}

async function earlier() {
  const own = opened;
  const last = state.first;
  const first = Math.max(0, last - TURNS);
  const found = await get(`/v1/kvbank/sessions/${state.session.id}?after=${first}&limit=${last - first}`);
  if (own !== opened || last !== state.first) return;
  state.first = first;
  state.turns = [...found.data, ...state.turns];
  byId("turns").prepend(...found.data.map(turnItem));
  headed();
}

function headed() {
  const { session: open } = state;
  const title = open ? titleOf({ ...open, title: open.title || firstWords() }) : "New conversation";
  byId("title").textContent = title;
  document.title = open ? `${title} - kvbank` : "kvbank";
  byId("session-actions").hidden = !open;
  byId("earlier").hidden = state.first === 0;
  byId("welcome").hidden = byId("turns").childElementCount > 0;
  const fork = open?.forked_from;
  byId("origin").hidden = !fork;
  byId("fork").hidden = !open?.turns;
  if (fork) {
    const parent = wordButton("Open the conversation that it was forked from", () => on.open(fork.session));
    byId("origin").replaceChildren(`Forked behind turn ${fork.turn}. `, parent);
  }
}

const firstWords = () => textOf(state.turns.find((turn) => textOf(turn, "user")) ?? { items: [] }, "user").slice(0, 80);

function textOf(turn, role) {
  return turn.items.filter((item) => item.role === role).map((item) => item.text).join("\n");
}

function turnItem(turn) {
  if (turn.status === "part") return el("li", { class: "turn part" });
  if (turn.status === "forgotten") {
    return el("li", { class: "turn forgotten" }, el("p", {}, `Turn ${turn.number} was forgotten.`));
  }
  const why = turn.traced
    ? el("button", { type: "button", class: "word why", "data-turn": turn.number, "aria-pressed": "false", onclick: () => choose(turn, true) }, "Why this answer")
    : null;
  return el(
    "li",
    { class: "turn", id: `turn-${turn.number}` },
    el("p", { class: "said" }, el("span", { class: "hidden" }, "You: "), textOf(turn, "user")),
    el("div", { class: "answer" }, el("span", { class: "hidden" }, "Answer: "), marked(textOf(turn, "assistant") || "(no answer)")),
    el(
      "p",
      { class: "foot" },
      el("span", { class: "fine" }, `Turn ${turn.number}, ${moment(turn.created_at)}${turn.status === "incomplete" ? ", cut off" : ""}`),
      why,
      wordButton("Fork", () => on.fork(turn.number), `Fork behind turn ${turn.number}`),
      turn.number < state.session.turns ? wordButton("Rewind", () => on.rewind(turn.number), `Rewind to turn ${turn.number}`) : null,
      wordButton("Forget", () => on.forget(turn.number), `Forget turn ${turn.number}`),
    ),
  );
}

/** Choose the answer whose memory is shown. shown: whether the reader has asked for it. */
function choose(turn, shown = false) {
  state.chosen = turn?.number ?? null;
  mark();
  on.chosen(turn, shown);
}

export function chooseNumber(number) {
  const turn = state.turns.find((each) => each.number === number);
  if (!turn) return;
  choose(turn, true);
  byId(`turn-${number}`)?.scrollIntoView({ block: "center" });
}

function mark() {
  for (const item of byId("turns").children) {
    const chosen = item.id === `turn-${state.chosen}`;
    item.classList.toggle("chosen", chosen);
    item.querySelector(".why")?.setAttribute("aria-pressed", String(chosen));
  }
}

// -- an answer ----------------------------------------------------------------------------------------------------

async function say(text) {
  if (!text || state.running) return;
  const running = new AbortController();
  state.running = running;
  busy(true);
  const answer = el("div", { class: "answer writing" }, el("span", { class: "caret", "aria-hidden": "true" }));
  const item = el("li", { class: "turn" }, el("p", { class: "said" }, text), answer);
  byId("turns").append(item);
  byId("welcome").hidden = true;
  byId("message").value = "";
  grow();
  toEnd();
  spoken("The model is answering.");
  try {
    await ensureSession();
    await written(text, answer, running.signal);
    spoken(`The answer: ${answer.textContent}`);
  } catch (error) {
    failed(error, text, item, running.signal.aborted);
  } finally {
    if (state.running === running) state.running = null;
    busy(false);
  }
  if (item.isConnected && state.session) await refreshed(running, text);
}

/** Begin a session where none is open, unless the reader opens another one meanwhile. */
async function ensureSession() {
  if (state.session) return;
  const own = opened;
  const made = await post("/v1/conversations", {});
  if (own !== opened) throw new DOMException("another conversation was opened", "AbortError");
  state.session = { id: made.id.replace(/^conv_/, ""), name: "", title: "", turns: 0, forked_from: null };
}

async function written(text, answer, signal) {
  const conversation = `conv_${state.session.id}`;
  const body = { model: state.model, conversation, input: text, stream: true, temperature: TEMPERATURE };
  for await (const event of streamed("/v1/responses", body, signal)) {
    if (event.type === "response.output_text.delta") {
      const near = isAtEnd();
      answer.lastChild.before(event.delta);
      if (near) toEnd();
    } else if (event.type === "response.failed" || event.error) {
      const said = event.response?.error ?? event.error;
      throw new ApiError(503, said.code, said.message);
    }
  }
}

/** Say that an answer has failed; what was typed comes back. aborted: the reader has stopped it. */
function failed(error, text, item, aborted) {
  if (aborted) {
    spoken("The answer was stopped.");
    return;
  }
  item.remove();
  byId("message").value ||= text;
  grow();
  byId("welcome").hidden = byId("turns").childElementCount > 0;
  report(error);
  spoken(byId("banner").textContent);
}

/** Show the session as it is now, behind a turn. text: comes back where it was stopped before its turn came. */
async function refreshed(running, text) {
  const { turns } = state.session;
  const own = opened;
  try {
    if (running.signal.aborted) await untilKept();
    const focused = document.activeElement;
    if (own !== opened || !(await open(state.session.id))) return;
    if (running.signal.aborted && state.session.turns === turns) {
      byId("message").value ||= text;
      grow();
    }
    if (focused === byId("message") || focused === byId("stop")) byId("message").focus();
    await on.changed();
  } catch (error) {
    report(error);
  }
}

/** Wait until an answer that was stopped is kept as far as it went, which is at the model's next token. */
async function untilKept() {
  const before = state.session.turns;
  for (let tries = 0; tries < 20; tries += 1) {
    const found = await get(`/v1/kvbank/sessions/${state.session.id}?limit=1`);
    if (found.turns > before && !found.in_use) return;
    await new Promise((resolve) => setTimeout(resolve, 200));
  }
}

function stop() {
  state.running?.abort();
}

function busy(writing) {
  byId("send").hidden = writing;
  byId("stop").hidden = !writing;
  byId("scroll").setAttribute("aria-busy", String(writing));
  if (writing && document.activeElement === byId("send")) byId("stop").focus();
}

const spoken = (text) => (byId("spoken").textContent = text);

function grow() {
  const message = byId("message");
  message.style.height = "auto";
  message.style.height = `${Math.min(message.scrollHeight, 200)}px`;
}

function isAtEnd() {
  const scroll = byId("scroll");
  return scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 80;
}

function toEnd() {
  const scroll = byId("scroll");
  scroll.scrollTop = scroll.scrollHeight;
}
