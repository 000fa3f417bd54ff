"""Tensors of torch go in and come out, to the bit; a process without torch needs none."""

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kvbank
from tests.sdk.host import Host

KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Tensors = dict[str, torch.Tensor]


def tensors(dtype: str) -> Tensors:
    """Return tensors of layers 1 and 3, [2, 4, 8]: with a gradient, and not contiguous."""
    random = torch.Generator().manual_seed(1)
    made: Tensors = {}
    for layer in (1, 3):
        made[f"k.{layer}"] = torch.randn(2, 4, 8, generator=random).to(KINDS[dtype]).requires_grad_()
        made[f"v.{layer}"] = torch.randn(8, 4, 2, generator=random).to(KINDS[dtype]).permute(2, 1, 0)
        made[f"pos.{layer}"] = torch.arange(8, dtype=torch.int32)[::2] // 2
    return made


def assert_same(found: Any, made: Tensors) -> None:
    assert found.keys() == made.keys()
    for name, tensor in made.items():
        assert isinstance(found[name], torch.Tensor)
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("dtype", KINDS)
def test_what_goes_in_comes_out(
    client: kvbank.Client, make_bank: Callable[..., str], digests: dict[str, str], dtype: str
) -> None:
    bank, made = make_bank(dtype), tensors(dtype)
    embedding = torch.eye(16, dtype=torch.bfloat16)[3].requires_grad_()
    new = kvbank.NewChunk(embedding, made, token_ids=torch.arange(4))
    chunk_id = client.write(bank, new, **digests).chunk_id
    assert client.write(bank, new, **digests).replayed
    query = torch.eye(16, dtype=torch.float64, requires_grad=True)[3]
    found = client.retrieve(bank, query, tensors="torch", **digests)
    assert found.queries[0][0].score == 1
    assert_same(found.chunks[chunk_id].tensors, made)
    assert found.chunks[chunk_id].token_ids == (0, 1, 2, 3)
    reader = digests["reader_digest"]
    (chunk,) = client.fetch(bank, [chunk_id], tensors="torch", reader_digest=reader)
    assert_same(chunk.tensors, made)
    (plain,) = client.fetch(bank, torch.tensor([chunk_id]), reader_digest=reader)
    for name, array in (plain.tensors or {}).items():
        assert isinstance(array, np.ndarray)
        assert array.tobytes() == made[name].detach().contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("mapped", [False, True])
def test_tensors_out_of_files_may_be_written_to(host: Host, mapped: bool) -> None:
    """Also where the array is a view of a file, which is left as it is."""
    made, reader = tensors("bf16"), host.digests["reader_digest"]
    (chunk_id,) = host.write(kvbank.NewChunk(torch.ones(16), made))

    async def fetched() -> Any:
        async with kvbank.connect_async(host.address, mapped=mapped) as client:
            return (await client.fetch("b", [chunk_id], tensors="torch", reader_digest=reader))[0].tensors

    with kvbank.connect(host.address, mapped=mapped) as client:
        for found in (
            client.fetch("b", [chunk_id], tensors="torch", reader_digest=reader)[0].tensors,
            asyncio.run(fetched()),
        ):
            assert_same(found, made)
            for tensor in (found or {}).values():
                tensor.zero_()
    assert host.sent("file") > 0
    assert_same(host.fetch(chunk_id, tensors="torch")[0].tensors, made)


def test_a_tensor_that_has_no_bytes_is_refused_by_name(
    client: kvbank.Client, make_bank: Callable[..., str], digests: dict[str, str]
) -> None:
    for odd in (torch.empty(2, 4, 8, device="meta"), torch.eye(3).to_sparse(), torch.ones(2, dtype=torch.complex64)):
        with pytest.raises(kvbank.InvalidArgument, match=r"'k\.1'") as caught:
            client.write(make_bank(), kvbank.NewChunk(np.ones(16), tensors("bf16") | {"k.1": odd}), **digests)
        assert caught.value.reason == "TENSOR_MISMATCH"


def test_torch_is_imported_for_who_asks_for_it_alone(tmp_path: Path) -> None:
    script = f"""
import sys
import numpy as np
import kvbank
with kvbank.connect({str(tmp_path / "m")!r}) as client:
    client.create_bank("b", kv=kvbank.KVSpec("r", [0], 1, 2, "fp32"), embedding=kvbank.EmbeddingSpec("e", 1))
    part = np.ones((1, 1, 2), np.float32)
    chunk = kvbank.NewChunk([1.0], {{"k.0": part, "v.0": part, "pos.0": np.zeros(1, np.int32)}})
    ids = [client.write("b", chunk, reader_digest="r", embedder_digest="e").chunk_id]
    client.fetch("b", ids, reader_digest="r")
    print("torch" in sys.modules)
    sys.modules["torch"] = None  # as where it is not installed
    try:
        client.fetch("b", ids, tensors="torch", reader_digest="r")
    except kvbank.MissingExtra as error:
        print(error)
    client.fetch("b", ids, reader_digest="r")
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout.splitlines() == ["False", "tensors of torch need torch (no module 'torch')"]
