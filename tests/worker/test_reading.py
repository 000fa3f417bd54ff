"""A text that is read: where its chunks end, and in which context they are stored."""

import signal
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import kvbank
from kvbank.embed.lexical import LexicalEmbedder
from model_worker.errors import InputError
from model_worker.model import MemoryModel
from model_worker.model_settings import ModelOptions
from model_worker.remember.reading import run
from model_worker.window.cache import MemoryCache
from model_worker.window.chunking import chunks
from tests.support.waiting import wait_until
from tests.worker.tiny import VOCABULARY, bank, tokens, worst

Models = Callable[[str], PreTrainedModel]
STOPS = range(3, VOCABULARY, 5)  # the tokens that end a sentence
# Nothing that is recalled changes what is stored.
BELOW = {"mode": "memlong", "memory_layers": [2], "retrieval_layers": [2, 3]}


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer some of whose words end a sentence."""
    words = {f"w{i}" + "." * (i in STOPS): i for i in range(VOCABULARY)}
    made = Tokenizer(WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0", pad_token="w0")


def projected(net: PreTrainedModel, ids: torch.Tensor, layer: int) -> torch.Tensor:
    """Return what the plain model projects to values in a layer, `[T, Hkv * D]`."""
    found: list[torch.Tensor] = []
    hook = net.model.layers[layer].self_attn.v_proj.register_forward_hook(lambda *args: found.append(args[2][0]))
    with torch.no_grad():
        net(ids)
    hook.remove()
    return found[0]


def test_chunks_are_stored_as_they_stand_behind_the_text_before_them(client: kvbank.Client, model: Models) -> None:
    """Test a text that fits into the window: its chunks are what the plain model computes of the whole text."""
    net, ids = model("llama_gqa"), tokens(30)
    plain = projected(net, ids, 3)
    with MemoryModel(net, tokenizer(), memory=client, bank=bank(), chunk=6, window=32) as reader:
        reader.read(ids[0].tolist())
        listed = list(client.list_chunks(str(reader.memory.bank)))
        digest = reader.attachment.reader.digest
        found = client.fetch(str(reader.memory.bank), [chunk.chunk_id for chunk in listed], reader_digest=digest)
        assert [token for chunk in found for token in chunk.token_ids] == ids[0].tolist()
        assert {chunk.producer.context for chunk in found if chunk.producer} == {"window"}
        assert reader.memory.stats.recalls == 0
        for chunk in found:
            assert chunk.tensors is not None
            values = torch.from_numpy(chunk.tensors["v.3"]).transpose(0, 1).flatten(1)
            assert worst(values, plain[chunk.start : chunk.start + len(values)]) <= 1e-5


def test_chunks_of_a_stream_end_at_sentences(client: kvbank.Client, model: Models) -> None:
    """Test that chunks which leave a full window are cut where a text alone would be cut."""
    ids = tokens(100)[0].tolist()
    cut = [len(chunk) for chunk in chunks(ids, 8, frozenset(STOPS))]
    assert len(set(cut)) > 2  # chunks of several lengths
    with MemoryModel(model("llama_gqa"), tokenizer(), memory=client, bank=bank(), chunk=8, window=16) as reader:
        told: list[tuple[int, int]] = []
        assert reader.read(ids, lambda done, total: told.append((done, total))) == 100
        listed = sorted(client.list_chunks(str(reader.memory.bank)), key=lambda chunk: chunk.start)
        assert [chunk.original_length for chunk in listed] == cut
        assert [token for chunk in listed for token in chunk.token_ids] == ids
        assert (told[-1], len(told)) == ((100, 100), len(cut))


def test_reading_recalls_as_memlong_does(client: kvbank.Client, model: Models) -> None:
    """Test that only chunks which are encoded alone are read with what they recall."""
    ids = tokens(40)[0].tolist()
    with MemoryModel(model("llama_gqa"), tokenizer(), memory=client, bank=bank(), chunk=8, window=16) as reader:
        reader.read(ids)
        alone = reader.with_bank(bank(), context="isolated")
        reader.read(ids, memory=alone)
        assert (reader.memory.stats.recalls, alone.stats.recalls > 0) == (0, True)
        of_all = [[chunk.original_length for chunk in client.list_chunks(str(m.bank))] for m in (reader.memory, alone)]
        assert of_all[0] == of_all[1]


def test_a_compressor_that_runs_the_model_reads_chunks_alone(client: kvbank.Client, model: Models) -> None:
    options: ModelOptions = {"chunk": 8, "window": 16, "compressor": "tova:m=4,block=4"}
    with MemoryModel(model("llama_gqa"), tokenizer(), memory=client, bank=bank(), **options) as reader:
        reader.read(tokens(20)[0].tolist())
        chunk = next(iter(client.list_chunks(str(reader.memory.bank))))
        assert chunk.producer is not None
        assert chunk.producer.context == "isolated"


class Refusing(LexicalEmbedder):
    """The lexical embedder, which gives the text `never` no vector."""

    never = ""

    def embed(self, texts: list[str]) -> NDArray[np.float32]:
        """Embed the texts, with numbers that are none for the one that is refused."""
        return super().embed(texts) if self.never not in texts else np.full((len(texts), self.dimension), np.nan)


def test_what_was_read_is_stored_where_reading_on_fails(client: kvbank.Client, model: Models) -> None:
    """Let the caller end a reading between two chunks: those that have left the window are in the bank, in order."""

    class Enough(Exception):
        pass

    def tell(done: int, total: int) -> None:
        if done >= 48:
            raise Enough

    ids = tokens(80)[0].tolist()
    with MemoryModel(model("llama_gqa"), tokenizer(), memory=client, bank=bank(), chunk=8, window=16) as reader:
        with pytest.raises(Enough):
            reader.read(ids, tell)
        listed = list(client.list_chunks(str(reader.memory.bank)))
        stored = [token for chunk in listed for token in chunk.token_ids]
        assert stored == ids[: len(stored)]
        assert len(stored) >= 48 - 16 - 8


def test_chunks_that_wait_for_others_are_stored_where_reading_on_fails(client: kvbank.Client, model: Models) -> None:
    """Let the caller end a reading whose chunks are encoded together: all that was told as read is in the bank."""

    class Enough(Exception):
        pass

    def tell(done: int, total: int) -> None:
        if done >= 24:
            raise Enough

    ids = tokens(60)[0].tolist()
    options: ModelOptions = {"chunk": 8, "window": 16, "attach_options": BELOW}
    with MemoryModel(model("llama_gqa"), tokenizer(), memory=client, bank=bank(), **options) as reader:
        with pytest.raises(Enough):
            reader.read(ids, tell)
        stored = [token for chunk in client.list_chunks(str(reader.memory.bank)) for token in chunk.token_ids]
        assert stored == ids[: len(stored)]
        assert len(stored) >= 24


def test_chunks_whose_forward_is_interrupted_are_stored(client: kvbank.Client, model: Models) -> None:
    told: list[int] = []

    def interrupt(module: object, args: object) -> None:
        if told:
            hook.remove()
            raise KeyboardInterrupt

    ids = tokens(60)[0].tolist()
    options: ModelOptions = {"chunk": 8, "window": 16, "together": 24, "attach_options": BELOW}
    with MemoryModel(model("llama_gqa"), tokenizer(), memory=client, bank=bank(), **options) as reader:
        hook = reader.attachment.decoder.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            reader.read(ids, lambda done, total: told.append(done))
        stored = [token for chunk in client.list_chunks(str(reader.memory.bank)) for token in chunk.token_ids]
        assert stored == ids[: len(stored)]
        assert len(stored) >= told[-1] > 8


class Interrupting(LexicalEmbedder):
    """The lexical embedder, which interrupts the main thread once, where that waits for what is embedded."""

    interrupted = False

    @staticmethod
    def _waits(thread: int) -> bool:
        """Tell whether a thread waits for what another one is to do, and not for that to begin."""
        code = [frame.f_code for frame, _ in traceback.walk_stack(sys._current_frames()[thread])]
        return code[0].co_name == "wait" and Future.result.__code__.co_filename in {each.co_filename for each in code}

    def embed(self, texts: list[str]) -> NDArray[np.float32]:
        """Embed the texts, the first of them behind the interrupt."""
        main = threading.main_thread().ident
        if threading.get_ident() != main and main is not None and not self.interrupted:
            self.interrupted = True
            wait_until(lambda: self._waits(main))
            signal.pthread_kill(main, signal.SIGINT)
        return super().embed(texts)


@pytest.mark.parametrize(("plan", "local"), [(BELOW, 0), ({}, 128)])
def test_what_was_read_is_stored_where_the_wait_for_earlier_chunks_is_interrupted(
    client: kvbank.Client, model: Models, plan: dict[str, object], local: int
) -> None:
    """Interrupt a reading in both contexts. local: tokens that stand in the window."""
    ids, told = tokens(1400)[0].tolist(), [0]
    options: ModelOptions = {"chunk": 64, "window": 128, "top_k": 1, "attach_options": plan, "embedder": Interrupting()}
    with MemoryModel(model("llama_gqa"), tokenizer(), memory=client, bank=bank(), **options) as reader:
        with pytest.raises(KeyboardInterrupt):
            reader.read(ids, lambda done, total: told.append(done))
        stored = [token for chunk in client.list_chunks(str(reader.memory.bank)) for token in chunk.token_ids]
        assert stored == ids[: len(stored)]
        assert len(stored) >= told[-1] - local > 512


@pytest.mark.parametrize(("below", "window"), [(True, 0), (False, 16)], ids=["isolated", "window"])
def test_a_caller_who_is_told_how_far_a_reading_is_can_wait_for_its_chunks(
    client: kvbank.Client, model: Models, below: bool, window: int
) -> None:
    """Ask the bank between two chunks: it has all that was told, but for what stands in the window."""
    ids, seen = tokens(80)[0].tolist(), []
    options: ModelOptions = {"chunk": 8, "window": 16}
    if below:
        options["attach_options"] = BELOW
    with MemoryModel(model("llama_gqa"), tokenizer(), memory=client, bank=bank(), **options) as reader:

        def tell(done: int, total: int) -> None:
            reader.settle()
            listed = client.list_chunks(str(reader.memory.bank))
            seen.append((done, sum(len(chunk.token_ids) for chunk in listed)))

        reader.settle()  # nothing is being read
        reader.read(ids, tell)
    assert len(seen) >= 8
    assert all(done - window <= stored <= done for done, stored in seen)


def test_nothing_is_stored_behind_a_chunk_that_cannot_be(client: kvbank.Client, model: Models) -> None:
    ids, embedder = tokens(1200)[0].tolist(), Refusing()
    options: ModelOptions = {"chunk": 8, "window": 16, "embedder": embedder, "context": "window"}
    with MemoryModel(model("llama_gqa"), tokenizer(), memory=client, bank=bank(), **options) as reader:
        cut = list(chunks(ids, 8, frozenset(STOPS)))
        embedder.never = reader.memory.text(cut[5])
        with pytest.raises(InputError, match="finite"):
            reader.read(ids)
        stored = [list(chunk.token_ids) for chunk in client.list_chunks(str(reader.memory.bank))]
        assert stored == cut[:5]


@pytest.mark.parametrize("retrieval", [[2, 3], [1, 2, 3]])
def test_reading_alone_goes_on_in_the_middle_of_a_text(
    client: kvbank.Client, model: Models, retrieval: list[int]
) -> None:
    """Read a text at once, and in two parts: its chunks stand at the same places, and were recalled as often. What a
    chunk recalls changes what is stored of it where a layer below the memory layer recalls."""
    ids = tokens(40)[0].tolist()
    plan = {"mode": "memlong", "memory_layers": [2], "retrieval_layers": retrieval}
    options: ModelOptions = {"chunk": 8, "window": 16, "attach_options": plan, "top_k": 2}
    with MemoryModel(model("llama_gqa"), tokenizer(), memory=client, bank=bank(), **options) as reader:
        begin = len(next(iter(chunks(ids, 8, reader.ends))))
        parts = reader.with_bank(bank())
        reader.read(ids)
        reader.read(ids[:begin], memory=parts)
        reader.read(ids, memory=parts, begin=begin)
        of_all = [
            [(chunk.start, chunk.token_ids, chunk.retrieval_count) for chunk in client.list_chunks(str(memory.bank))]
            for memory in (reader.memory, parts)
        ]
        assert of_all[0] == of_all[1]
        assert reader.memory.stats.recalls == parts.stats.recalls == len(of_all[0])


@pytest.mark.parametrize(("recent", "together"), [(0, 8), (2, 24), (2, 512)])
def test_chunks_below_all_recall_are_stored_as_without_it(
    client: kvbank.Client, model: Models, recent: int, together: int
) -> None:
    """Compare what is read of chunks that are encoded together, while the memory recalls in its own thread, with what
    the window stores of chunks which were read one by one with what they attend to besides: K-V, order and counts."""
    ids = tokens(60)[0].tolist()
    options: ModelOptions = {"chunk": 8, "window": 8, "attach_options": BELOW, "top_k": 2, "recent": recent}
    with MemoryModel(model("llama_gqa"), tokenizer(), memory=client, bank=bank(), **options) as reader:
        recalling = reader.with_bank(bank())
        fed = forwards(
            reader, lambda: reader.read(ids, memory=reader.with_bank(str(reader.memory.bank), together=together))
        )
        assert max(fed) == (together // 8 if together < 60 else len(list(chunks(ids, 8, reader.ends))))
        cache = MemoryCache(reader.attachment, recalling, window=8, sinks=0)
        for block in chunks(ids, 8, reader.ends):
            run(cache, block)
            cache.flush()
        digest = reader.attachment.reader.digest
        stored = []
        for memory in (reader.memory, recalling):
            names = [chunk.chunk_id for chunk in client.list_chunks(str(memory.bank))]
            stored.append(client.fetch(str(memory.bank), names, reader_digest=digest, tensors="torch"))
        assert sum(chunk.retrieval_count for chunk in stored[0]) > 0
        for one, other in zip(*stored, strict=True):
            assert one.tensors is not None
            assert other.tensors is not None
            assert one.token_ids == other.token_ids
            assert one.producer == other.producer
            assert all(worst(one.tensors[name], other.tensors[name]) <= 1e-5 for name in other.tensors)
            assert one.retrieval_count == other.retrieval_count


def forwards(reader: MemoryModel, work: Callable[[], object]) -> list[int]:
    """Do some work, and return how many rows each forward of it had."""
    rows: list[int] = []
    hook = reader.attachment.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    work()
    hook.remove()
    return rows
