"""A model that is served: loaded while callers are told to wait, answered from by many, drained at the end."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import kvbank
from kvbank.serving.clients import Clients
from model_worker.errors import WorkerError
from model_worker.model import MemoryModel
from model_worker.serve.answering import START_S, Decoding, Question, Reply, add, answer
from model_worker.serve.background import Background
from model_worker.serve.completing import Prompt, complete, conversation_prompt, text_prompt
from model_worker.serve.conversations import Conversations
from model_worker.serve.engine import Engine, Job, Stopping, Turn
from model_worker.serve.history import Exchange
from model_worker.serve.places import Place

# Connections of a host beside those of its requests: of browsers, probes, and clients that keep theirs.
_SPARE_CONNECTIONS = 32


class Loading(WorkerError):
    """The model is not there yet."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a worker takes on. running, waiting: requests that are answered at a time, and that wait besides.

    new_tokens: of the longest answer. body: bytes of the longest request. patience: seconds in which the head of a
    request has to come, and then its body.
    """

    running: int = 8
    waiting: int = 64
    new_tokens: int = 1024
    body: int = 4 * 1024 * 1024
    patience: float = 30.0

    @property
    def connections(self) -> int:
        """Return how many connections one host may have: one for each request, and some that ask for nothing."""
        return self.running + self.waiting + _SPARE_CONNECTIONS


class Served:
    """A model by its name for callers, over the memory service at `target`.

    needs_key: whether callers without a key are refused. own_only: whether they have to call the worker by an address
    of this machine. window, recent: of sessions; None for the model's own. why: one in so many tokens of an answer is
    looked at, to keep with its turn why it came; 0: nothing is kept.
    """

    def __init__(
        self,
        name: str,
        target: str,
        *,
        bounds: Bounds | None = None,
        needs_key: bool = False,
        own_only: bool = False,
        window: int | None = None,
        recent: int | None = None,
        why: int = 8,
    ) -> None:
        self.name, self.bounds, self.created = name, bounds or Bounds(), int(time.time())
        self.needs_key, self.own_only = needs_key, own_only
        self.clients = Clients(target)
        self.engine = Engine(most_running=self.bounds.running, most_waiting=self.bounds.waiting)
        self.background = Background(self.clients, self.engine)
        self._window, self._recent, self._why = window, recent, why
        self._model: MemoryModel | None = None
        self._conversations: Conversations | None = None
        self._stopping = False

    def begin(self, model: MemoryModel) -> None:
        """Answer from a model, which was made for this worker and is closed with it."""
        self._conversations = Conversations(model, self.name, window=self._window, recent=self._recent, why=self._why)
        self._model = model

    @property
    def ready(self) -> bool:
        """Tell whether requests are answered."""
        return self._model is not None and not self._stopping

    def check_ready(self) -> None:
        """Raise Stopping or Loading where requests are not answered."""
        if self._stopping:
            raise Stopping
        if self._model is None:
            raise Loading("the model is being loaded; ask again in a few seconds")

    def answer(
        self, key: str, place: Place, question: Question, on_text: Callable[[str], None], *, store: bool = True
    ) -> Job[Reply]:
        """Answer a question at its place.

        key: with which the service is asked. store: whether anything is kept of it; the whole conversation is read
        where nothing is. Raises Loading, Stopping and Busy.
        """
        model, conversations = self._loaded()
        if not store:
            history, decoding = question.history, question.decoding
            return self._complete(
                key, lambda client: conversation_prompt(model, place.whole(client, history)), decoding, on_text
            )

        def work(turn: Turn) -> Reply:
            with self.clients.client(key) as client:
                return answer(conversations, client, turn, place=place, question=question, on_text=on_text)

        return self.engine.submit(key, place.line, work)

    def answer_in_background(self, key: str, place: Place, question: Question) -> Job[Reply]:
        """Answer a question without a caller that waits; see `Background.begin`. Raises Loading and Stopping too."""
        return self.background.begin(self._loaded()[1], key, place, question)

    def begun(self, key: str, system: str, metadata: Mapping[str, str]) -> kvbank.Session:
        """Make a session without turns, and return it. Others: as in `Conversations.begun`. Raises Loading and
        Stopping."""
        conversations = self._loaded()[1]
        with self.clients.client(key) as client:
            return conversations.begun(client, system, metadata)

    def add(self, key: str, session_id: str, exchanges: Sequence[Exchange]) -> Job[list[kvbank.Turn]]:
        """Add exchanges that took place elsewhere to a session. Raises what `answer` raises."""
        conversations = self._loaded()[1]

        def work(turn: Turn) -> list[kvbank.Turn]:
            with self.clients.client(key) as client:
                return add(conversations, client, turn, session_id=session_id, exchanges=exchanges)

        return self.engine.submit(key, session_id, work)

    def complete(
        self, key: str, text: str | Sequence[int], decoding: Decoding, on_text: Callable[[str], None]
    ) -> Job[Reply]:
        """Go on with a text, or with token ids, as they stand; see `answer`."""
        model = self._loaded()[0]
        return self._complete(key, lambda _: text_prompt(model, text), decoding, on_text)

    def _complete(
        self, key: str, prompt: Callable[[kvbank.Client], Prompt], decoding: Decoding, on_text: Callable[[str], None]
    ) -> Job[Reply]:
        model = self._loaded()[0]

        def work(turn: Turn) -> Reply:
            with self.clients.client(key) as client:
                return complete(model, client, turn, prompt=prompt(client), decoding=decoding, on_text=on_text)

        return self.engine.submit(key, object(), work)

    def check(self, key: str) -> None:
        """Ask the service whether it takes a key. Raises what the service says."""
        with self.clients.client(key) as client:
            client.server_info(timeout=START_S)

    def stop(self) -> None:
        """Take nothing new from now on; what has begun is answered."""
        self._stopping = True
        self.engine.stop()

    def close(self) -> None:
        """End what still runs, and let the model go."""
        self.stop()
        self.engine.close()
        if self._model is not None:
            self._model.close()
        self.clients.close()

    def _loaded(self) -> tuple[MemoryModel, Conversations]:
        self.check_ready()
        assert self._model is not None
        assert self._conversations is not None
        return self._model, self._conversations
