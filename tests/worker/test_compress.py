"""Compressors by name, and TOVA's rule on its own (its numbers are checked in tests/golden)."""

from collections.abc import Callable

import pytest
import torch
from tiny import attached, tokens
from transformers import PreTrainedModel

from model_worker.compress import REGISTRY, compressor, usage
from model_worker.compress.tova import Tova, kept_positions
from model_worker.errors import InputError
from model_worker.memory import encode

Models = Callable[[str], PreTrainedModel]


@pytest.mark.parametrize("family", ["llama_gqa", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("method", ["none", "tova:m=3", "tova:m=12", "tova:m=100"])
def test_every_method(model: Models, method: str, family: str) -> None:
    """Budget, ascending offsets, the chunk's own K-V at them, and a name under which it can be asked for again."""
    made, size = compressor(method), 12
    with attached(model(family)) as attachment:
        chunk = encode(attachment, tokens(size)[0].tolist(), needs_queries=made.needs_queries)
        payload = made.compress(chunk, attachment)
    assert compressor(payload.method) == made
    assert payload.layers.keys() == chunk.layers.keys()
    for layer, (keys, values, offsets) in payload.layers.items():
        kept = offsets.long()
        assert offsets.dtype == torch.int32
        assert len(kept) == min(getattr(made, "m", size), size)
        assert bool((kept.diff() > 0).all())
        assert 0 <= int(kept[0]) <= int(kept[-1]) < size
        assert torch.equal(keys, chunk.layers[layer].keys[:, kept])
        assert torch.equal(values, chunk.layers[layer].values[:, kept])


def test_short_chunk_is_unchanged(model: Models) -> None:
    with attached(model("llama_gqa")) as attachment:
        chunk = encode(attachment, [5], needs_queries=True)
        for keys, _, offsets in Tova(4).compress(chunk, attachment).layers.values():
            assert offsets.tolist() == [0]
            assert keys.shape[1] == 1


def test_among_equal_scores_the_later_token_stays() -> None:
    assert kept_positions(torch.tensor([0.2, 0.2, 0.2, 0.2, 0.2]), 2).tolist() == [3, 4]
    assert kept_positions(torch.tensor([0.3, 0.1, 0.2, 0.1, 0.1]), 4).tolist() == [0, 2, 3, 4]
    assert kept_positions(torch.tensor([0.1, 0.4, 0.1, 0.3, 0.1]), 3).tolist() == [1, 3, 4]
    assert kept_positions(torch.tensor([0.5, 0.5]), 7).tolist() == [0, 1]


@pytest.mark.parametrize("spec", ["tova", "tova:", "tova:m=x", "tova:m=-1", "tova:k=3", "tova:m=1,m=2", "none:m=1"])
def test_wrong_parameters_say_how_to_write_it(spec: str) -> None:
    with pytest.raises(InputError, match=usage(spec.partition(":")[0])):
        compressor(spec)


def test_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"(?s)zip.*tova:m=N"):
        compressor("zip:m=2")
    with pytest.raises(InputError, match="at least 1"):
        compressor("tova:m=0")
    assert set(REGISTRY) >= {"none", "tova"}
