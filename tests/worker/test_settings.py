"""Settings are described, typed, and checked once; keywords and settings objects say the same."""

import re
from dataclasses import fields
from typing import Any, get_type_hints

import pytest

import kvbank
from model_worker.embed import LexicalEmbedder
from model_worker.errors import InputError, ModelNotFound
from model_worker.model import MemoryModel
from model_worker.model_settings import ModelOptions, ModelSettings
from model_worker.remember.memory import Memory
from model_worker.remember.settings import MemoryOptions, MemorySettings, changed
from tests.worker.settings_table import DOCS, MARKS, descriptions, table
from tests.worker.tiny import attached, bank, build, tokenizer


@pytest.mark.parametrize(("options", "settings"), [(MemoryOptions, MemorySettings), (ModelOptions, ModelSettings)])
def test_keywords_are_the_fields(options: Any, settings: type) -> None:
    typed = get_type_hints(options)
    assert typed.pop("embed", str) is not None
    assert typed == get_type_hints(settings)


def test_the_way_to_load_a_model_names_every_setting() -> None:
    words = set(re.findall(r"\w+", MemoryModel.from_pretrained.__doc__ or ""))
    assert words >= {field.name for field in fields(ModelSettings)}
    with pytest.raises(InputError, match="no setting 'topk'; the nearest is 'top_k'"):
        MemoryModel.from_pretrained("/no/model", memory="/no/memory", topk=3)  # type: ignore[call-arg]


@pytest.mark.parametrize("settings", [MemorySettings, ModelSettings])
def test_every_field_is_described(settings: type) -> None:
    own = settings.__annotations__
    assert descriptions(settings).keys() == own.keys()
    assert all(text.endswith(".") for text in descriptions(settings).values())


def test_the_table_in_the_docs_is_that_of_the_fields() -> None:
    """`python -m tests.worker.settings_table` writes it."""
    assert DOCS.read_text().split(MARKS[0])[1].split(MARKS[1])[0] == table()


@pytest.mark.parametrize(
    ("name", "nearest"), [("topk", "top_k"), ("embedding", "embedder"), ("stric", "strict"), ("", "")]
)
def test_an_unknown_name_ends_in_the_nearest(client: kvbank.Client, name: str, nearest: str) -> None:
    net = build("llama_gqa")
    with pytest.raises(InputError, match=f"no setting '{name}'; the nearest is '{nearest}"):
        MemoryModel(net, tokenizer(), memory=client, bank=bank(), **{name: 3})  # type: ignore[misc]
    assert net.config._attn_implementation == "sdpa"
    with pytest.raises(InputError, match=f"no setting '{name}'"):
        changed(MemorySettings(), {name: 3})


def test_settings_and_keywords_say_the_same(client: kvbank.Client) -> None:
    """Keywords replace what the settings say; what neither says is what the model was made for."""
    net = build("llama_gqa")
    net.config.kvbank = {"chunk": 4, "top_k": 3, "window": 12}
    given = MemorySettings(top_k=2, query="past", embedder="lexical:d=8")
    with MemoryModel(net, tokenizer(), memory=client, bank=bank(), settings=given, query="with_input") as model:
        assert (model.chunk, model.window, model.memory.top_k) == (4, 12, 2)
        assert (model.memory.query, model.memory.embedder.dimension) == ("with_input", 8)
        other = model.with_bank(bank(), query="past", embedder=LexicalEmbedder(16))
        assert (other.query, other.chunk, other.embedder.dimension) == ("past", 4, 16)
    with MemoryModel(net, tokenizer(), memory=client, bank=bank(), embed="lexical:d=8") as model:
        assert (model.memory.top_k, model.memory.embedder.dimension) == (3, 8)


def test_the_least_score_of_a_model_holds_for_its_embedder_alone(client: kvbank.Client) -> None:
    net = build("llama_gqa")
    net.config.kvbank = {"chunk": 4, "window": 12, "embed": "lexical:d=8", "min_score": 0.25}
    for given, expected in (
        ({}, 0.25),
        ({"embed": "lexical:d=8"}, 0.25),
        ({"embed": "lexical:d=16"}, None),
        ({"min_score": 0.0}, 0.0),
        ({"settings": MemorySettings(min_score=0.5)}, 0.5),
    ):
        with MemoryModel(net, tokenizer(), memory=client, bank=bank(), **given) as model:  # type: ignore[arg-type]
            assert model.settings.min_score == expected


def test_a_model_whose_embedder_is_not_there_is_used_with_another_one(client: kvbank.Client) -> None:
    net = build("llama_gqa")
    net.config.kvbank = {"chunk": 4, "window": 12, "embed": "/nowhere/encoder", "min_score": 0.25}
    with MemoryModel(net, tokenizer(), memory=client, bank=bank(), embed="lexical:d=16") as model:
        assert (model.memory.embedder.dimension, model.settings.min_score) == (16, None)
    with pytest.raises(ModelNotFound, match="/nowhere/encoder"):
        MemoryModel(net, tokenizer(), memory=client, bank=bank())


def test_a_memory_of_its_own_follows_no_model(client: kvbank.Client) -> None:
    net = build("llama_gqa")
    net.config.kvbank = {"chunk": 4, "mode": "per_layer"}
    with attached(net) as attachment:
        memory = Memory(attachment, client, bank(), tokenizer(), MemorySettings(cadence=7), top_k=1)
        assert (memory.chunk, memory.top_k, memory.cadence, memory.query_tokens) == (64, 1, 7, 64)
        assert (memory.context, memory.link.patience) == ("window", 2.0)
        assert Memory(attachment, client, bank(), tokenizer(), strict=True).link.patience == 10.0
        with pytest.raises(InputError, match="settings is a MemorySettings, not a dict"):
            Memory(attachment, client, bank(), tokenizer(), {})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "option", [{"capacity": kvbank.Capacity(chunks=5)}, {"window": 4}, {"store_dtype": "fp16"}, {"local": "tova:m=4"}]
)
def test_a_memory_refuses_settings_of_a_model(client: kvbank.Client, option: dict[str, Any]) -> None:
    """Refuse a setting that a second memory would not heed: it has no window and makes no bank with bounds."""
    with MemoryModel(build("llama_gqa"), tokenizer(), memory=client, bank=bank(), chunk=4, window=8) as model:
        with pytest.raises(InputError, match="there is no setting"):
            model.with_bank(bank(), **option)
        with pytest.raises(InputError, match="there is no setting"):
            Memory(model.attachment, client, bank(), tokenizer(), model.settings, **option)  # type: ignore[misc]
