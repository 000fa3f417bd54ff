"""The bodies of requests, with the names and meanings of OpenAI's API.

This file owns that a request is refused, by the name of the field, where a field asks for what this worker does not do;
a value that asks for nothing, such as `n: 1` or `tools: null`, is taken.
"""

from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from model_worker.serve.answering import Decoding
from model_worker.serve.history import History, Message

# Values of fields that this worker does not have, with which these ask for nothing. None is one for every field.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "tool_calls": ([],),
    "refusal": ("",),
    "prompt_cache_retention": ("in_memory", "24h"),
    "include": ([], ["reasoning.encrypted_content"]),
    "text": ({}, {"format": {"type": "text"}}, {"verbosity": "medium"}),
    "reasoning": ({}, {"effort": "none"}),
    "context_management": ([],),
    "max_tool_calls": (0,),
    "annotations": ([],),
    "phase": ("final_answer",),
}
# The kinds of values that a field may have, which are no part of its name.
TAGS = frozenset(("as text", "as parts", "as texts", "as ids"))
# What nothing is done with: it is for the books of the caller.
Ignored = Any
_MOST_STOPS, _LONGEST_STOP = 4, 200


class Body(BaseModel):
    """A body, or a part of one, of known fields alone."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"additionalProperties": {"type": "null"}})

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, data: Any) -> Any:
        """Leave out fields that ask for nothing."""
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if not _asks_for_nothing(name, value, cls.model_fields)}


def _asks_for_nothing(name: str, value: Any, fields: dict[str, Any]) -> bool:
    if name in fields:
        return value is None and not fields[name].is_required()
    alike = (value == each for each in _NEUTRAL.get(name, ()) if isinstance(value, bool) == isinstance(each, bool))
    return value is None or any(alike)


class TextPart(Body):
    """A part of a message: text, the only kind that this worker reads."""

    type: Literal["text"]
    text: str


def _kind_of_content(content: Any) -> str:
    return "as parts" if isinstance(content, list) else "as text"


Content = Annotated[
    Annotated[str, Tag("as text")] | Annotated[list[TextPart], Field(min_length=1), Tag("as parts")],
    Discriminator(_kind_of_content),
]


class ChatMessage(Body):
    """A message of a conversation. name: not looked at."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None

    def plain(self) -> Message:
        """Return the message as one text."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class StreamOptions(Body):
    """How an answer is streamed. include_usage: with a last chunk that says the tokens."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


Stop = Annotated[str, Field(max_length=_LONGEST_STOP)]
Stops = Annotated[
    Annotated[Stop, Tag("as text")] | Annotated[list[Stop], Field(max_length=_MOST_STOPS), Tag("as parts")],
    Discriminator(_kind_of_content),
]
Seed = Annotated[int, Field(ge=-(2**62), le=2**62)]


class _Generates(Body):
    """What every request for a text can say."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Seed | None = None
    stop: Stops | None = None
    user: Ignored = None

    def decoding(self, most: int) -> Decoding:
        """Return how the answer is decoded. most: tokens of the longest answer that there is."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Decoding(
            max_new_tokens=min(most, self.wanted_tokens or most),
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=tuple(stop for stop in stops if stop),
        )

    @property
    def wanted_tokens(self) -> int | None:
        """Return the tokens of the longest answer that the caller wants."""
        return self.max_tokens

    @property
    def with_usage(self) -> bool:
        """Tell whether a stream ends with the tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(_Generates):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: Ignored = None
    safety_identifier: Ignored = None

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def history(self) -> History:
        """Return the conversation that the messages are. Raises HistoryError where the messages are none."""
        return History.of([message.plain() for message in self.messages])


def _kind_of_prompt(prompt: Any) -> str:
    if not isinstance(prompt, list):
        return "as text"
    return "as texts" if prompt and isinstance(prompt[0], str) else "as ids"


Prompt = Annotated[str, Field(min_length=1)]
Token = Annotated[int, Field(ge=0)]


class CompletionRequest(_Generates):
    """The body of `POST /v1/completions`. prompt: a text, also as a list of one, or its token ids."""

    prompt: Annotated[
        Annotated[Prompt, Tag("as text")]
        | Annotated[list[Prompt], Field(min_length=1, max_length=1), Tag("as texts")]
        | Annotated[list[Token], Field(min_length=1), Tag("as ids")],
        Discriminator(_kind_of_prompt),
    ]

    @property
    def only_prompt(self) -> str | list[int]:
        """Return the prompt, which is one."""
        first = self.prompt[0]
        return first if isinstance(first, str) and not isinstance(self.prompt, str) else cast(Any, self.prompt)
