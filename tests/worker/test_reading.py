"""A text that is read: where its chunks end, and in which context they are stored."""

from collections.abc import Callable

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import kvbank
from model_worker.model import MemoryModel
from model_worker.model_settings import ModelOptions
from model_worker.window.chunking import chunks
from tests.worker.tiny import VOCABULARY, bank, tokens, worst

Models = Callable[[str], PreTrainedModel]
STOPS = range(3, VOCABULARY, 5)  # the tokens that end a sentence


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
