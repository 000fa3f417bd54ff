// Figures and times in words.

const UNITS = [["year", 31536000], ["month", 2592000], ["day", 86400], ["hour", 3600], ["minute", 60]];

/** Return how long ago a time was. seconds: since 1970. */
export function ago(seconds) {
  const passed = Date.now() / 1000 - seconds;
  for (const [unit, length] of UNITS) {
    const count = Math.floor(passed / length);
    if (count >= 1) return `${counted(count, unit)} ago`;
  }
  return "just now";
}

/** Return a time of the day, with the date where that is another day. */
export function moment(seconds) {
  const time = new Date(seconds * 1000);
  const clock = time.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  if (time.toDateString() === new Date().toDateString()) return clock;
  return `${time.toLocaleDateString([], { day: "numeric", month: "short", year: "numeric" })}, ${clock}`;
}

export const percent = (share) => `${(share * 100).toFixed(share < 0.0995 ? 1 : 0)} %`;

export const counted = (count, what) => `${count.toLocaleString("en")} ${what}${count === 1 ? "" : "s"}`;

/** Return names as a list in a sentence. */
export function listed(names) {
  return names.length < 2 ? names.join("") : `${names.slice(0, -1).join(", ")} and ${names.at(-1)}`;
}

/** Return how a session is called. */
export const titleOf = (session) => session.name || session.title || "Untitled";

const SPEAKERS = { user: "you", assistant: "the model", "user+assistant": "you and the model" };

/** Return where a chunk comes from, in words. */
export function originOf(chunk) {
  if (chunk.source) return chunk.source;
  if (chunk.turn === null || chunk.turn === undefined) return chunk.start >= 0 ? `token ${chunk.start}` : "the window";
  return `turn ${chunk.turn}${chunk.role in SPEAKERS ? `, ${SPEAKERS[chunk.role]}` : ""}`;
}

const REASONS = {
  oldest: "it was among the oldest",
  least_retrieved: "it was recalled least often",
  least_recent: "it had not been recalled for the longest time",
  oldest_half: "it was in the older half",
  room: "there was no room otherwise",
};

/** Return why a chunk was evicted, in words. */
export const reasonOf = (reason) => REASONS[reason] ?? reason;

const CONTROL = /<\|[^<>|\n]{1,40}\|>(?:(?:system|user|assistant)\n)?/g;

/** Return the text of a passage without the words with which a chat template marks who speaks. */
export const plain = (text) => text.replace(CONTROL, "\n").replace(/\n\s*\n/g, "\n").trim();
