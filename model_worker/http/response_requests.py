"""The bodies of requests for responses and conversations, with the names and meanings of OpenAI's API."""

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from model_worker.http.requests import Body, Ignored
from model_worker.serve.answering import Decoding
from model_worker.serve.history import History, HistoryError, Message, joined

_MOST_ITEMS, _MOST_ADDED = 1000, 100

Metadata = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]


class ItemPart(Body):
    """A part of a message: text, the only kind that this worker reads."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    logprobs: Ignored = None


def _kind(content: Any) -> str:
    return "as parts" if isinstance(content, list) else "as text"


class MessageInput(Body):
    """A message of a conversation. id, status: of one that the API has answered; not looked at."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("as text")] | Annotated[list[ItemPart], Field(min_length=1), Tag("as parts")],
        Discriminator(_kind),
    ]
    id: Ignored = None
    status: Ignored = None

    def plain(self) -> Message:
        """Return the message as one text."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class ConversationName(Body):
    """A conversation by its id."""

    id: str


def _kind_of_conversation(value: Any) -> str:
    return "as text" if isinstance(value, str) else "as parts"


class StreamedResponse(Body):
    """How a response is streamed; nothing of it is used."""

    include_obfuscation: bool | None = None


class ResponseRequest(Body):
    """The body of `POST /v1/responses`."""

    model: str
    input: Annotated[
        Annotated[str, Tag("as text")]
        | Annotated[list[MessageInput], Field(min_length=1, max_length=_MOST_ITEMS), Tag("as parts")],
        Discriminator(_kind),
    ]
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: (
        Annotated[
            Annotated[str, Tag("as text")] | Annotated[ConversationName, Tag("as parts")],
            Discriminator(_kind_of_conversation),
        ]
        | None
    ) = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamedResponse | None = None
    background: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    metadata: Metadata | None = None
    truncation: Literal["auto", "disabled"] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: Ignored = None
    safety_identifier: Ignored = None
    user: Ignored = None

    def history(self) -> History:
        """Return what the request says. Raises HistoryError where it says nothing that can be answered."""
        if isinstance(self.input, str):
            try:
                found = History.of([Message("user", self.input)], "input")
            except HistoryError as error:
                raise HistoryError("input", str(error)) from None
        else:
            found = History.of([item.plain() for item in self.input], "input")
        return replace(found, system=joined((self.instructions or "").strip(), found.system))

    def decoding(self, most: int) -> Decoding:
        """Return how the answer is decoded. most: tokens of the longest answer that there is."""
        return Decoding(min(most, self.max_output_tokens or most), self.temperature_or_1, self.top_p_or_1)

    @property
    def temperature_or_1(self) -> float:
        """Return the temperature, which is 1 where none is given."""
        return 1.0 if self.temperature is None else self.temperature

    @property
    def top_p_or_1(self) -> float:
        """Return the share of the likeliest tokens, which is 1 where none is given."""
        return 1.0 if self.top_p is None else self.top_p

    @property
    def conversation_id(self) -> str:
        """Return the id of the conversation; "" for none."""
        named = self.conversation
        return named.id if isinstance(named, ConversationName) else named or ""


class ConversationRequest(Body):
    """The body of `POST /v1/conversations`."""

    items: Annotated[list[MessageInput], Field(max_length=_MOST_ADDED)] | None = None
    metadata: Metadata | None = None


class ConversationUpdate(Body):
    """The body of `POST /v1/conversations/{id}`."""

    metadata: Metadata | None


class ItemsRequest(Body):
    """The body of `POST /v1/conversations/{id}/items`."""

    items: Annotated[list[MessageInput], Field(min_length=1, max_length=_MOST_ADDED)]
