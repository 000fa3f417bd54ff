// Whether answers can be had: what the page says while the model loads or the memory is away, and when it tries again.

import { ApiError, get } from "./api.js";
import { byId } from "./dom.js";

const AGAIN_MS = 2000;
// What ends by itself, and how the page looks until then.
const STATES = { model_loading: "loading", worker_stopping: "loading", memory_unavailable: "away", worker_away: "away" };
const SAYS = {
  model_loading: "The model is being loaded. This page goes on by itself.",
  worker_stopping: "The worker is being stopped. This page goes on when it is back.",
  memory_unavailable: "The memory service is away. Nothing is lost; this page goes on when it is back.",
  worker_away: "The worker does not answer. This page goes on when it is back.",
  invalid_api_key: "This worker asks for a key.",
  permission_denied: "The key does not allow this.",
};

export const connection = new EventTarget();
let waiting = null;

/** Ask whether all is there; dispatch "ready" with the model's name, or "key" where one is needed. */
export async function probe() {
  clearTimeout(waiting);
  waiting = null;
  try {
    await get("/readyz");
    const { data } = await get("/v1/models");
    // What was said of something else stays until the reader goes on.
    if (document.body.dataset.state !== "ready") tell("ready", "");
    byId("model").textContent = data[0].id;
    connection.dispatchEvent(new CustomEvent("ready", { detail: data[0].id }));
  } catch (error) {
    report(error);
  }
}

/** Say what went wrong, and go on by itself where that helps. Return whether it was about the connection. */
export function report(error) {
  if (!(error instanceof ApiError)) throw error;
  if (error.code === "invalid_api_key") {
    tell("key", SAYS.invalid_api_key);
    connection.dispatchEvent(new Event("key"));
    return true;
  }
  if (!(error.code in STATES)) {
    tell("ready", SAYS[error.code] ?? sentence(error.message));
    return false;
  }
  tell(STATES[error.code], SAYS[error.code]);
  waiting ??= setTimeout(probe, AGAIN_MS);
  return true;
}

/** Take away what was said of an error. */
export function calm() {
  if (!waiting) tell("ready", "");
}

function tell(state, text) {
  document.body.dataset.state = state;
  if (state !== "ready") byId("model").textContent = { loading: "loading", away: "away", key: "locked" }[state];
  byId("banner").hidden = !text;
  byId("banner").textContent = text;
}

const sentence = (text) => `${text.charAt(0).toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;
