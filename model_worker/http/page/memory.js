// Right: why the chosen answer came, what the session has in its memory, and what became of it over time.

import { get } from "./api.js";
import { bar, byId, el, wordButton } from "./dom.js";
import { ago, counted, listed, moment, originOf, percent, plain, reasonOf } from "./words.js";

const SPAN = 2048;
const TABS = ["why", "kept", "timeline"];
const state = { session: null, turn: null, tab: "why" };
let on = {};

/** Begin. listeners: `forget(turn)`, `forgetDocument(bank, source)`, `choose(turn)`, `report(error)`. */
export function begin(listeners) {
  on = listeners;
  for (const [at, name] of TABS.entries()) {
    const tab = byId(`tab-${name}`);
    tab.addEventListener("click", () => select(name));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const next = TABS[(at + step + TABS.length) % TABS.length];
      select(next);
      byId(`tab-${next}`).focus();
    });
  }
}

/** Show the memory of a session, and why the answer of a turn came; both may be null. */
export function show(session, turn) {
  Object.assign(state, { session, turn });
  return select(state.tab);
}

/** Show what is shown anew, because it has changed. */
export const again = () => select(state.tab);

export function select(name) {
  state.tab = name;
  for (const each of TABS) {
    byId(`tab-${each}`).setAttribute("aria-selected", String(each === name));
    byId(`tab-${each}`).tabIndex = each === name ? 0 : -1;
    byId(each).hidden = each !== name;
  }
  return fill(name);
}

async function fill(name) {
  const panel = byId(name);
  const wanted = { ...state };
  try {
    const content = await { why, kept, timeline }[name](wanted.session, wanted.turn);
    if (wanted.session === state.session && wanted.turn === state.turn) panel.replaceChildren(...[content].flat());
  } catch (error) {
    if (error.code === "no_trace") panel.replaceChildren(hint("Of this answer it was not kept why it came."));
    else {
      panel.replaceChildren(hint("This cannot be shown now."));
      on.report(error);
    }
  }
}

const hint = (text) => el("p", { class: "hint" }, text);

// -- why ----------------------------------------------------------------------------------------------------------

async function why(session, turn) {
  if (!session || !turn) return hint("When there is an answer, this says what it attended to.");
  const trace = await get(`/v1/kvbank/responses/${turn.id}/trace`);
  const fromMemory = trace.chunks.reduce((sum, chunk) => sum + chunk.share, trace.others.share);
  const count = trace.chunks.length + trace.others.chunks;
  const lead = count
    ? `${percent(fromMemory)} of its attention went to ${counted(count, "passage")} of the memory.`
    : "It attended to its window alone; nothing was recalled.";
  return [
    el("h3", {}, `Answer ${trace.turn}`),
    el("p", { class: "lead" }, lead),
    shares(trace, fromMemory),
    trace.query ? el("p", { class: "asked" }, "Asked for: ", el("q", {}, trace.query)) : null,
    el("ol", { class: "cards" }, trace.chunks.map(card)),
    trace.others.chunks ? hint(`${counted(trace.others.chunks, "more passage")}: ${percent(trace.others.share)}.`) : null,
    hint(`Shares are means over ${counted(trace.layers.length, "layer")} and ${counted(trace.tokens, "token")}. A large share says that a passage was read, not that the answer hangs on it.`),
  ].filter(Boolean);
}

function shares(trace, fromMemory) {
  const parts = [["Memory", fromMemory, "chunk"], ["Window", trace.window.share, "window"], ["First tokens", trace.sinks.share, "sinks"]];
  return el("dl", { class: "shares" }, parts.map(([name, share, kind]) => el("div", {}, el("dt", {}, name), el("dd", {}, bar(share, kind), percent(share)))));
}

function card(chunk) {
  const gone = chunk.text === null;
  const details = [
    chunk.score === null ? "among the last that left the window" : `score ${chunk.score.toFixed(2)}`,
    chunk.created_at === null ? null : ago(chunk.created_at),
    chunk.retrievals ? `recalled ${counted(chunk.retrievals, "time")}` : null,
  ].filter(Boolean);
  return el(
    "li",
    { class: gone ? "card gone" : "card" },
    el("p", { class: "top" }, el("strong", {}, percent(chunk.share)), el("span", {}, gone ? "no longer in the memory" : originOf(chunk))),
    bar(chunk.share),
    gone ? null : quote(chunk.text),
    el("p", { class: "fine" }, details.join(", ")),
    layers(chunk),
    gone ? null : actions(chunk),
  );
}

const quote = (text) => el("blockquote", {}, plain(text));

function layers(chunk) {
  const rows = chunk.mass.map((mass, at) => el("li", {}, bar(mass), percent(mass)));
  const query = chunk.query ? el("p", { class: "fine" }, "Found by: ", el("q", {}, chunk.query)) : null;
  return el("details", {}, el("summary", {}, `By layer, ${chunk.total.toFixed(2)} in all`), query, el("ol", { class: "layers", start: 1 }, rows));
}

function actions({ bank, source, turn }) {
  if (source) return el("p", { class: "foot" }, wordButton("Forget the document", () => on.forgetDocument(bank, source), `Forget the document ${source}`));
  if (!turn) return null;
  return el(
    "p",
    { class: "foot" },
    wordButton(`Go to turn ${turn}`, () => on.choose(turn)),
    wordButton(`Forget turn ${turn}`, () => on.forget(turn)),
  );
}

// -- what is kept ---------------------------------------------------------------------------------------------------

async function kept(session) {
  if (!session) return hint("What leaves the model's window is kept here.");
  const page = await get(`/v1/kvbank/sessions/${session.id}/memory?tokens=${SPAN}`);
  const list = el("ol", { class: "cards" }, page.data.map(passage));
  return [
    el("h3", {}, "In the memory"),
    page.data.length ? list : hint("Nothing yet: all that was said still stands in the model's window."),
    page.before ? more(session, list, page.before) : null,
    ...section("Evicted", page.evicted, (each) => `${ago(each.evicted_at)}: ${reasonOf(each.reason)}.`),
    ...section("Would go next", page.next, (each) => `The bank is full, and ${reasonOf(each.reason)}.`),
  ].filter(Boolean);
}

function passage(chunk) {
  const details = [ago(chunk.created_at), counted(chunk.tokens, "token"), chunk.retrievals ? `recalled ${counted(chunk.retrievals, "time")}` : "never recalled"];
  return el("li", { class: "card" }, el("p", { class: "top" }, el("span", {}, originOf(chunk))), quote(chunk.text), el("p", { class: "fine" }, details.join(", ")), actions(chunk));
}

function more(session, list, before) {
  const button = el("button", { type: "button", class: "quiet" }, "Show older ones");
  button.addEventListener("click", async () => {
    button.disabled = true; // else a second click shows the same ones again
    try {
      const page = await get(`/v1/kvbank/sessions/${session.id}/memory?tokens=${SPAN}&before=${before}`);
      list.append(...page.data.map(passage));
      before = page.before;
      if (!before) button.remove();
    } catch (error) {
      on.report(error);
    }
    button.disabled = false;
  });
  return button;
}

function section(title, entries, said) {
  if (!entries.length) return [];
  const rows = entries.map((each) => el("li", {}, el("span", {}, `Passage of ${originOf(each)}`), el("span", { class: "fine" }, said(each))));
  return [el("h3", {}, title), el("ul", { class: "plain" }, rows)];
}

// -- the time line --------------------------------------------------------------------------------------------------

async function timeline(session) {
  if (!session) return hint("What is written, recalled and forgotten stands here.");
  const { data } = await get(`/v1/kvbank/sessions/${session.id}/timeline`);
  if (!data.length) return hint("Nothing has happened yet.");
  return [el("h3", {}, "Time line"), el("ol", { class: "timeline" }, data.reverse().map(event))];
}

function event(each) {
  const told = {
    written: () => `Turn ${each.turn} was written, ${counted(each.tokens, "token")}`,
    recalled: () => `Answer ${each.turn} recalled ${counted(each.chunks, "passage")}${from(each.from_turns)}`,
    forgotten: () => `Turn ${each.turn} was forgotten`,
    evicted: () => `A passage of ${originOf(each)} was evicted: ${reasonOf(each.reason)}`,
  }[each.kind]();
  const text = each.kind === "recalled" || each.kind === "written" ? wordButton(told, () => on.choose(each.turn)) : told;
  return el("li", { class: each.kind }, text, each.at && each.kind !== "forgotten" ? el("span", { class: "fine" }, moment(each.at)) : null);
}

const from = (turns) => (turns.length ? ` of turn${turns.length === 1 ? "" : "s"}\u00a0${listed(turns.map(String))}` : "");
