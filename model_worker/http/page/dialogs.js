// Dialogues: what cannot be taken back is asked for first, and a receipt is shown afterwards.

import { key, setKey } from "./api.js";
import { byId, el } from "./dom.js";
import { counted, moment } from "./words.js";

function opened(title, ...content) {
  const dialog = byId("dialog");
  dialog.replaceChildren(el("h2", { id: "dialog-title", tabindex: "-1" }, title), ...content);
  if (!dialog.open) dialog.showModal();
  return dialog;
}

/** Ask whether to do something that cannot be taken back at once. texts: what follows. words: of the button that does
 * it, before, meanwhile and once it has failed, and what is said then. act: does it; the dialogue stays open where it
 * returns true. Return whether it was done, once the dialogue is closed. */
function asked(title, texts, words, act) {
  return new Promise((resolve) => {
    let done = false;
    const problem = el("p", { class: "problem", role: "alert" });
    const cancel = el("button", { type: "button", class: "quiet", onclick: () => dialog.close() }, "Cancel");
    const go = el("button", { type: "button", class: words.kind ?? null }, words.go);
    go.addEventListener("click", async () => {
      go.disabled = true;
      go.textContent = words.meanwhile;
      try {
        const stays = await act();
        done = true;
        if (!stays) dialog.close();
      } catch (error) {
        problem.textContent = `${words.failed}: ${error.message}.`;
        go.disabled = false;
        go.textContent = "Try again";
      }
    });
    const paragraphs = texts.map((text) => el("p", {}, text));
    const dialog = opened(title, ...paragraphs, problem, el("div", { class: "buttons" }, cancel, go));
    cancel.focus();
    dialog.addEventListener("close", () => resolve(done), { once: true });
  });
}

/** Ask whether to forget something. texts: what will be gone. forget: does it, and returns the receipt. Return whether
 * it was forgotten, once the receipt was looked at. */
export function askToForget(title, texts, forget) {
  const words = { go: "Forget for good", meanwhile: "Forgetting", failed: "It was not forgotten", kind: "danger" };
  return asked(title, texts, words, async () => {
    showReceipt(await forget());
    return true;
  });
}

/** Ask whether a conversation goes on behind an earlier turn. rewind: does it. Return whether it was done. */
export function askToRewind(turn, rewind) {
  const texts = [
    `What was said after turn ${turn} is no part of this conversation any more, and what is said next follows turn ${turn}. Forks keep what they have.`,
    "It is not forgotten: for that, forget its turns first, or all of the conversation later. To keep both ways, fork.",
  ];
  const words = { go: "Rewind", meanwhile: "Rewinding", failed: "It was not rewound" };
  return asked(`Rewind to turn ${turn}?`, texts, words, async () => {
    await rewind();
    return false;
  });
}

function showReceipt(receipt) {
  const places = Object.entries(receipt.places).map(([place, count]) => `${place} ${count.toLocaleString("en")}`);
  const rows = [
    ["Receipt", receipt.id],
    ["When", moment(receipt.created_at)],
    ["By key", receipt.key_id || "the owner of the store"],
    ["Gone", `${counted(receipt.turns, "turn")}, ${counted(receipt.tokens, "token")}, ${counted(receipt.chunk_count, "passage")}`],
    ["Bytes", receipt.bytes.toLocaleString("en")],
    ["From", places.join(", ")],
    ["Kept", receipt.turns_kept ? `${counted(receipt.turns_kept, "turn")}, which forks have` : ""],
    ["Made again", receipt.chunks_to_make_again ? counted(receipt.chunks_to_make_again, "passage") : ""],
  ].filter(([, value]) => value);
  const sums = receipt.chunks.map((chunk) => el("li", {}, `${chunk.bank} ${chunk.chunk_id} ${chunk.checksum}`));
  const ok = el("button", { type: "button", onclick: () => byId("dialog").close() }, "Done");
  opened(
    "Forgotten",
    el("p", {}, receipt.remains ? `No answer can have it any more. ${receipt.remains}.` : "No file of the memory has a byte of it any more."),
    el("dl", { class: "receipt" }, rows.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])),
    sums.length ? el("details", {}, el("summary", {}, summed(receipt)), el("ul", { class: "sums" }, sums)) : null,
    el("div", { class: "buttons" }, saved(receipt), ok),
  );
  ok.focus();
}

function summed({ chunks, chunk_count: count }) {
  const first = chunks.length < count ? `the first ${chunks.length.toLocaleString("en")} of ` : "";
  return `Checksums of ${first}${counted(count, "passage")}`;
}

function saved(receipt) {
  const href = URL.createObjectURL(new Blob([`${JSON.stringify(receipt, null, 2)}\n`], { type: "application/json" }));
  byId("dialog").addEventListener("close", () => URL.revokeObjectURL(href), { once: true });
  return el("a", { class: "button quiet", href, download: `receipt-${receipt.id}.json` }, "Save the receipt");
}

/** Ask for one line of text, and do something with it. Return what `act` returns; null where nothing was done. */
function askForText(title, text, { label, value = "", type = "text", button, optional = true }, act) {
  return new Promise((resolve) => {
    let result = null;
    const input = el("input", { id: "dialog-input", type, value, autocomplete: "off", required: !optional, maxlength: 200 });
    const problem = el("p", { class: "problem", role: "alert" });
    const cancel = el("button", { type: "button", class: "quiet", onclick: () => dialog.close() }, "Cancel");
    const form = el(
      "form",
      {},
      el("label", { for: "dialog-input" }, label),
      input,
      problem,
      el("div", { class: "buttons" }, cancel, el("button", { type: "submit" }, button)),
    );
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      try {
        result = await act(input.value.trim());
        dialog.close();
      } catch (error) {
        problem.textContent = `That did not work: ${error.message}.`;
      }
    });
    const dialog = opened(title, el("p", {}, text), form);
    input.focus();
    dialog.addEventListener("close", () => resolve(result), { once: true });
  });
}

export function askToFork(turn, fork) {
  const text = `The fork has all that was said up to turn ${turn}, and goes its own way from there. Nothing is copied.`;
  return askForText("Fork this conversation", text, { label: "Name of the fork (may stay empty)", button: "Fork" }, fork);
}

export function askForKey(taken) {
  const text = "The key goes on to the memory service, and is kept in this tab alone until you close it.";
  const options = { label: "Key", type: "password", value: key(), button: "Use" };
  return askForText("Key of the memory service", text, options, (value) => {
    setKey(value);
    taken();
    return true;
  });
}
