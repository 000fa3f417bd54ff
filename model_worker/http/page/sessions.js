// Left: the sessions as a tree, in which a fork stands below the one that it was forked from.

import { get } from "./api.js";
import { report } from "./connection.js";
import { byId, el } from "./dom.js";
import { ago, counted, titleOf } from "./words.js";

const LIMIT = 30;
let known = [];
let chosen = null;
let choose = () => {};

/** Begin. onchoose: called with the id of a session that was chosen. */
export function begin(onchoose) {
  choose = onchoose;
  byId("more-sessions").addEventListener("click", () => load(known.at(-1)?.id).catch(report));
}

/** Read sessions. after: the last one that is shown already; none: all anew. */
export async function load(after = null) {
  const page = await get(`/v1/kvbank/sessions?limit=${LIMIT}${after ? `&after=${after}` : ""}`);
  const ids = new Set(page.data.map((session) => session.id));
  known = after ? [...known.filter((session) => !ids.has(session.id)), ...page.data] : page.data;
  byId("more-sessions").hidden = !page.has_more;
  show();
}

/** Show which session is open. */
export function mark(id) {
  chosen = id;
  show();
}

function show() {
  const focused = document.activeElement?.dataset?.session;
  const ids = new Set(known.map((session) => session.id));
  const parent = (session) => (ids.has(session.forked_from?.session) ? session.forked_from.session : "");
  const below = Map.groupBy ? Map.groupBy(known, parent) : grouped(known, parent);
  byId("sessions").replaceChildren(...(below.get("") ?? []).map((session) => item(session, below)));
  byId("no-sessions").hidden = known.length > 0;
  if (focused) byId("sessions").querySelector(`[data-session="${focused}"]`)?.focus();
}

function grouped(values, keyOf) {
  const groups = new Map();
  for (const value of values) groups.set(keyOf(value), [...(groups.get(keyOf(value)) ?? []), value]);
  return groups;
}

function item(session, below) {
  const forks = below.get(session.id) ?? [];
  const fork = session.forked_from ? `fork at turn ${session.forked_from.turn}, ` : "";
  const button = el(
    "button",
    {
      type: "button",
      "data-session": session.id,
      "aria-current": session.id === chosen ? "page" : null,
      onclick: () => choose(session.id),
    },
    el("span", { class: "name" }, titleOf(session)),
    el("span", { class: "fine" }, `${fork}${counted(session.turns, "turn")}, ${ago(session.updated_at)}`),
  );
  return el("li", {}, button, forks.length ? el("ul", {}, forks.map((each) => item(each, below))) : null);
}
