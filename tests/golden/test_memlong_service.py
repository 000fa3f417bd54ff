"""MemLong's recorded logits once more, through a real memory service: written, searched, read back, attended to.

Cases whose chunks are all full and unpadded, one row a bank; the release's embeddings come from each case's table.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

import kvbank
from model_worker.model import MemoryModel
from tests.golden.vectors import memlong_case, memlong_folders, memlong_model, worst


class TableEmbedder:
    """The vectors which the release used, by text."""

    digest = "recorded"

    def __init__(self, folder: Path):
        self._table = json.loads((folder / "embeddings_by_text.json").read_text())
        self.dimension = len(next(iter(self._table.values())))

    def embed(self, texts: list[str]) -> NDArray[np.float32]:
        return np.array([self._table[text] for text in texts], dtype=np.float32)


def usable(folder: Path) -> bool:
    about = json.loads((folder / "case.json").read_text())
    config = about["config"]
    return (
        about["matching_would_be_wrong"] is False
        and "forwards" in about
        and about.get("attention_mask") is None
        and config["last_context_length"] == config["mem_group_size"]
        and config["mem_dtype"] == "float32"  # a bf16 bank may round one value to the other side of a boundary
        and len(about["input_ids"][0]) % config["mem_group_size"] == 0
    )


@pytest.mark.parametrize("folder", [f for f in memlong_folders() if usable(f)], ids=lambda f: f.name)
def test_logits_through_the_service(folder: Path, tmp_path: Path) -> None:
    case = memlong_case(folder)
    config = case.about["config"]
    model, gates = memlong_model(case)
    backend = Tokenizer(WordLevel({str(i): i for i in range(config["vocab_size"])}, unk_token="0"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
    ids, chunk = torch.tensor(case.about["input_ids"]), config["mem_group_size"]
    names = [f"row{row}" for row in range(len(ids))]
    with (
        kvbank.connect(tmp_path) as client,
        MemoryModel(
            model,
            tokenizer,
            memory=client,
            bank=names,
            embed=TableEmbedder(folder),
            chunk=chunk,
            window=chunk,
            top_k=config["ret_group_size"],
            strict=True,
            attach_options={
                "mode": "memlong",
                "positions": config["position_type"].lower(),
                "memory_layers": [config["mem_layer"]],
                "retrieval_layers": config["ret_attn_layers"],
                "gates": gates,
            },
        ) as reader,
        torch.no_grad(),
    ):
        cache = reader.cache()
        logits = torch.cat([model(part, past_key_values=cache).logits for part in ids.split(chunk, dim=1)], dim=1)
        cache.flush()
        retrieved = [0] * (ids.shape[1] // chunk)
        for row, name in enumerate(names):
            stored = sorted(client.list_chunks(name), key=lambda c: c.chunk_id)
            assert [c.token_ids for c in stored] == [tuple(part.tolist()) for part in ids[row].split(chunk)]
            for forward in case.about["forwards"]:
                for number in forward.get("chunk_ids_in_concat_order", [[]] * len(ids))[row]:
                    retrieved[number] += 1
            assert [c.retrieval_count for c in stored] == retrieved
            retrieved = [0] * len(retrieved)
    error = worst(logits, case.tensors["logits"])
    print(f"{case.name}: {error:.1e}")
    assert error <= 1e-5
