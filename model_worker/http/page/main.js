// The page: sessions left, the conversation in the middle, the memory of the chosen answer right.

import { post, remove } from "./api.js";
import { calm, connection, probe, report } from "./connection.js";
import * as conversation from "./conversation.js";
import { askForKey, askToForget, askToFork, askToRewind } from "./dialogs.js";
import { byId } from "./dom.js";
import * as memory from "./memory.js";
import * as sessions from "./sessions.js";
import { counted, titleOf } from "./words.js";

/** Return a function that does what `act` does, and says what went wrong. */
const told = (act) => async (...given) => {
  try {
    calm();
    return await act(...given);
  } catch (error) {
    report(error);
    return null;
  }
};

/** Open a session; null is a new one. asked: whether the reader has asked for it, and goes there. */
const openSession = told(async (id, asked = true) => {
  if (!(await conversation.open(id))) return;
  sessions.mark(id);
  history.replaceState(null, "", id ? `#${id}` : location.pathname);
  if (!asked) return;
  view("talk");
  if (id === null) byId("message").focus();
  else byId("title").focus();
});

const changed = told(async () => {
  await sessions.load();
  sessions.mark(conversation.session()?.id ?? null);
});

const fork = told(async (turn) => {
  const { id } = conversation.session();
  const made = await askToFork(turn, (name) => post(`/v1/kvbank/sessions/${id}/fork`, { turn, name }));
  if (made) {
    await sessions.load();
    await openSession(made.id);
  }
});

const forgetTurn = told(async (turn) => {
  const { id } = conversation.session();
  const texts = [
    `What was said in turn ${turn}, its answer, and every passage of the memory that holds any of it will be deleted, here and in all forks.`,
    "Passages that had attended to it are made again without it. This cannot be taken back.",
  ];
  const forget = () => post(`/v1/kvbank/sessions/${id}/forget`, { first: turn });
  if (await askToForget(`Forget turn ${turn}?`, texts, forget)) {
    await conversation.open(id);
    byId("title").focus(); // what had the focus is gone
    await changed();
  }
});

const rewind = told(async (turn) => {
  const { id } = conversation.session();
  if (await askToRewind(turn, () => post(`/v1/kvbank/sessions/${id}/rewind`, { turn }))) {
    await conversation.open(id);
    byId("title").focus(); // what had the focus is gone
    await changed();
  }
});

const forgetDocument = told(async (bank, source) => {
  const texts = [
    `Every passage of ${source} in the bank ${bank} will be deleted, for all conversations that read it.`,
    "This cannot be taken back. What was said of it in conversations stays there.",
  ];
  const forget = () => post("/v1/kvbank/documents/forget", { bank, source });
  if (await askToForget("Forget this document?", texts, forget)) {
    memory.again();
    byId("memory-title").focus(); // what had the focus is gone
  }
});

const forgetSession = told(async () => {
  const open = conversation.session();
  const texts = [
    `${titleOf(open)}: ${counted(open.turns, "turn")}, with all passages of the memory that are its own, will be deleted. What forks have of it stays there.`,
    "This cannot be taken back.",
  ];
  const forget = () => remove(`/v1/kvbank/sessions/${open.id}`);
  if (await askToForget("Forget this conversation?", texts, forget)) {
    await openSession(null);
    await changed();
  }
});

/** Show one part of the page in a narrow window. */
function view(name) {
  document.body.dataset.view = name;
  for (const button of document.querySelectorAll(".views button")) {
    if (button.dataset.view === name) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
}

async function ready(model) {
  conversation.setModel(model);
  const open = conversation.session()?.id ?? (location.hash.slice(1) || null);
  await sessions.load().catch(report);
  if (!document.body.dataset.begun) {
    document.body.dataset.begun = "yes";
    await openSession(open, false);
  } else if (open) {
    memory.select("why");
  }
}

function begin() {
  sessions.begin(openSession);
  memory.begin({ forget: forgetTurn, forgetDocument, choose: conversation.chooseNumber, report });
  conversation.begin({
    chosen: (turn, shown) => {
      memory.show(conversation.session(), turn);
      if (!shown) return;
      memory.select("why");
      view("memory");
    },
    open: openSession,
    changed,
    fork,
    rewind,
    forget: forgetTurn,
  });
  byId("new").addEventListener("click", () => openSession(null));
  byId("fork").addEventListener("click", () => fork(conversation.session().turns));
  byId("delete").addEventListener("click", forgetSession);
  const askKey = () => {
    if (!byId("dialog").open) askForKey(probe);
  };
  byId("key-button").addEventListener("click", askKey);
  for (const button of document.querySelectorAll(".views button")) {
    button.addEventListener("click", () => view(button.dataset.view));
  }
  connection.addEventListener("key", askKey);
  connection.addEventListener("ready", (event) => ready(event.detail));
  view("talk");
  memory.show(null, null);
  probe();
}

begin();
