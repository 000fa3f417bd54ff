"""A memory that is read again as tokens: what the plain model says behind the same chunks, for any model."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

import kvbank
from memory_service.api.embedded import LocalServer
from model_worker.errors import BankMismatch, InputError, UnsupportedModel
from model_worker.model import MemoryModel
from model_worker.model_settings import ModelOptions
from model_worker.remember.spool import Spool
from model_worker.session.session import Session
from tests.worker.tiny import VOCABULARY, bank, build, sharpen, tokenizer, tokens

Models = Callable[[str], PreTrainedModel]
CHUNK = 8
GREEDY: dict[str, Any] = {"do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6}


def gpt2() -> GPT2LMHeadModel:
    """Make a model without rotary positions, which `attach` refuses."""
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    )
    sharpen(model, 0)
    return model.eval()


def plainly(model: Any, ids: list[int]) -> str:
    """Return what the model writes behind `ids` without anything of ours."""
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **GREEDY)
    return str(tokenizer().decode(out[0, len(ids) :]))


TEXT = tokens(40)[0].tolist()
PROMPT = [*TEXT[20:24], *TEXT[28:32]]  # of two chunks


def ids_of(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


@pytest.fixture(params=["llama_gqa", "gpt2"])
def model(request: pytest.FixtureRequest, client: kvbank.Client) -> Iterator[MemoryModel]:
    net = gpt2() if request.param == "gpt2" else build(request.param)
    with MemoryModel(
        net, tokenizer(), memory=client, bank=bank(), chunk=CHUNK, window=16, top_k=2, order="time", recall="reread"
    ) as model:
        assert model.read(TEXT) == 40
        yield model


def test_it_is_what_the_plain_model_writes_behind_the_same_chunks(model: MemoryModel) -> None:
    found = model.passages.find([PROMPT])[0]
    assert [passage.start for passage in found] == [16, 24]
    assert [list(passage.token_ids) for passage in found] == [TEXT[16:24], TEXT[24:32]]
    before = model.passages.stats.reread_tokens
    written = model.generate(PROMPT, **GREEDY)
    assert model.passages.stats.reread_tokens - before == 2 * CHUNK
    assert model.client.get_bank(str(model.passages.bank)).usage.chunks == 5  # generate stores nothing
    model.close()
    assert written == plainly(model.model, TEXT[16:32] + PROMPT)
    assert written != plainly(model.model, PROMPT)


def test_several_prompts_with_questions(model: MemoryModel) -> None:
    """Rows of other lengths are padded before what is read again."""
    rows, questions = [PROMPT, [3, 4, 5]], [TEXT[:6], TEXT[34:40]]
    written = model.generate(rows, question=questions, **GREEDY)
    found = [[token for passage in row for token in passage.token_ids] for row in model.passages.find(questions)]
    model.close()
    assert written == [plainly(model.model, again + row) for again, row in zip(found, rows, strict=True)]


def test_the_same_chunks_as_attention_gets(client: kvbank.Client) -> None:
    """Banks that were read for attention are read again, by the same model and by any other."""
    name = bank()
    with MemoryModel(build("llama_gqa"), tokenizer(), memory=client, bank=name, chunk=CHUNK, window=16, top_k=2) as one:
        one.read(TEXT)
        [attended] = one.memory.recall([PROMPT]) or [[]]
        with pytest.raises(InputError, match="this model attends to its memory"):
            _ = one.passages
    with MemoryModel(
        build("llama_gqa"), tokenizer(), memory=client, bank=name, chunk=CHUNK, window=16, top_k=2, recall="reread"
    ) as two:
        [again] = two.passages.find([PROMPT])
    assert [chunk.token_ids for chunk in attended] == [passage.token_ids for passage in again]
    assert [chunk.chunk_id for chunk in attended] == [passage.chunk_id for passage in again]
    with MemoryModel(gpt2(), tokenizer(), memory=client, bank=name, chunk=CHUNK, top_k=2, recall="reread") as three:
        assert three.passages.find([PROMPT]) == [again]
        with pytest.raises(BankMismatch, match="holds K-V of a model; it is only read here"):
            three.read(TEXT)


def test_the_best_chunk_stands_next_to_the_prompt(client: kvbank.Client) -> None:
    """Chunks stand in the order of their scores by default."""
    options: ModelOptions = {"chunk": CHUNK, "top_k": 2, "min_share": 0.0, "recall": "reread"}
    with MemoryModel(gpt2(), tokenizer(), memory=client, bank=bank(), **options) as model:
        model.read(TEXT)
        for prompt, best in (([*TEXT[16:21], *TEXT[25:28]], 16), ([*TEXT[16:19], *TEXT[25:30]], 24)):
            [found] = model.passages.find([prompt])
            assert [passage.start for passage in found] == [40 - best, best]


def test_another_tokenizer_reads_the_text(client: kvbank.Client) -> None:
    name, other = bank(), tokenizer()
    with MemoryModel(gpt2(), tokenizer(), memory=client, bank=name, chunk=CHUNK, top_k=1, recall="reread") as one:
        one.read(TEXT)
    other.add_tokens(["w500"])
    with MemoryModel(gpt2(), other, memory=client, bank=name, chunk=CHUNK, top_k=1, recall="reread") as two:
        [[passage]] = two.passages.find([TEXT[8:12]])
        assert list(passage.token_ids) == TEXT[8:16]
        with pytest.raises(BankMismatch, match="another tokenizer"):
            two.read(TEXT)


def test_what_needs_attention_is_refused(client: kvbank.Client) -> None:
    with pytest.raises(UnsupportedModel, match="no rotary positions"):
        MemoryModel(gpt2(), tokenizer(), memory=client, bank=bank())
    options: ModelOptions = {"chunk": CHUNK, "min_share": 0.0, "recall": "reread"}
    with MemoryModel(gpt2(), tokenizer(), memory=client, bank=bank(), **options) as model:
        for needs in (lambda: model.memory, model.cache, lambda: model.losses(TEXT, memory=None)):
            with pytest.raises(UnsupportedModel, match=r"attends to none: .*no rotary positions"):
                needs()
        with pytest.raises(InputError, match='there is none with recall="reread"'):
            model.generate(PROMPT, cache=object())  # type: ignore[arg-type]
        with pytest.raises(InputError, match="for generate"):
            Session.open(model, name="one")
        model.read(TEXT)
        with pytest.raises(InputError, match=r"a prompt of 72 tokens, 32 of them read again, leaves no room in the 64"):
            model.generate(TEXT, **GREEDY)
    with MemoryModel(
        build("llama_gqa"), tokenizer(), memory=client, bank=bank(), window=64, top_k=1, recall="reread"
    ) as model:
        with pytest.raises(InputError, match='losses attend to a memory; make the model with recall="attend"'):
            model.losses(TEXT, memory=model.memory)
        assert len(model.losses(TEXT, memory=None).nll) == 39
    with pytest.raises(InputError, match="recall is one of attend, reread, not 'again'"):
        MemoryModel(gpt2(), tokenizer(), memory=client, recall="again")  # type: ignore[arg-type]


def test_the_service_is_away(tmp_path: Path) -> None:
    """Chunks wait for the service and are found once it is back; answers go on without it."""
    folder, name = tmp_path / "data", bank()
    server = LocalServer(folder)
    options: dict[str, Any] = {
        "bank": name,
        "chunk": CHUNK,
        "top_k": 2,
        "recall": "reread",
        "patience": 1.0,
        "order": "time",
    }
    options["spool"] = Spool(tmp_path / "spool")
    with kvbank.connect(server.address) as client:
        model = MemoryModel(gpt2(), tokenizer(), memory=client, **options)
        server.stop()
        with pytest.warns(RuntimeWarning, match="away"):
            model.read(TEXT)
        assert model.passages.stats.spooled == 5
        assert model.generate(PROMPT, **GREEDY) == plainly(model.model, PROMPT)
        assert model.passages.stats.failed_recalls == 1
    with MemoryModel(gpt2(), tokenizer(), memory=str(folder), **options) as again:
        assert again.passages.deliver_spooled()
        assert [passage.start for passage in again.passages.find([PROMPT])[0]] == [16, 24]


def test_a_source_is_stored_once(client: kvbank.Client) -> None:
    with MemoryModel(
        gpt2(), tokenizer(), memory=client, bank=bank(), chunk=CHUNK, recall="reread", source="book"
    ) as model:
        model.read(TEXT)
        model.read(TEXT)
        assert (model.passages.stats.written, model.passages.stats.tokens) == (5, 80)
