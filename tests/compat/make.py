"""Makes the fixtures of `test_release.py` with the code of a released version, which comes first on the path:

    git worktree add ../released 63eab45
    PYTHONPATH=../released:../released/clients/python python tests/compat/make.py tests/compat/63eab45

It writes `release.tar.gz` (the folders `data` and `model`) and `expected.json` (what the release answers). The fixtures
8a57d30 and 63eab45 were made by this file's versions of those times: a session was a folder of its own then.
"""

import json
import sys
import tarfile
import tempfile
from datetime import timedelta
from pathlib import Path

import answers  # beside this file
import ml_dtypes
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import kvbank
from model_worker.model import MemoryModel
from model_worker.session.session import Session

CHUNK, WINDOW, ANSWER = 8, 24, 6
WORDS = ["the sea is wide", "ships come and go"]
NEXT = "what did I say?"


def chunk(number: int, *, soft: bool = False, vectors: bool = False) -> kvbank.NewChunk:
    random = np.random.default_rng(number)

    def some(*shape: int) -> np.ndarray:
        return random.integers(0, 1 << 16, shape, np.uint16).view(ml_dtypes.bfloat16)

    tokens = 1 + number % 3
    if vectors:
        tensors = None
    elif soft:
        tensors = {"soft": some(tokens, answers.KV.hidden_size)}
    else:
        tensors = {}
        for layer in answers.KV.layers:
            tensors |= {f"{part}.{layer}": some(answers.KV.kv_heads, tokens, answers.KV.head_dim) for part in "kv"}
            tensors[f"pos.{layer}"] = np.arange(tokens, dtype=np.int32)
    return kvbank.NewChunk(
        random.standard_normal(answers.DIMENSION).astype(np.float32),
        tensors,
        start=number,
        original_length=tokens + 1,
        token_ids=range(tokens + 1),
        text=f"chunk {number} \u00fc\u20ac",
        metadata={"half": "odd" if number % 2 else "even"},
        producer=None if vectors else kvbank.Producer("none", "1", "isolated", measured_loss=0.5 if soft else None),
        pinned=number % 7 == 3,
        expiry=kvbank.Expiry(timedelta(days=36500), renew=True) if number % 5 == 1 else None,
        idempotency_key=number.to_bytes(16, "big"),
    )


def fill(client: kvbank.Client) -> None:
    """Make a bank of K-V and soft tokens that has evicted, one of vectors alone, and one that is deleted again."""
    policy = kvbank.Policy("lru", target=75)
    client.create_bank(
        "kv", kv=answers.KV, embedding=answers.EMBEDDING, capacity=kvbank.Capacity(chunks=12), policy=policy
    )
    for number in range(20):
        client.write("kv", chunk(number, soft=number % 4 == 0), **answers.DIGESTS)
        client.retrieve("kv", chunk(number // 2).embedding, top_k=2, **answers.DIGESTS)
    client.create_bank(
        "vectors",
        kv=None,
        embedding=answers.EMBEDDING,
        metadata={"of": "vectors"},
        quota=kvbank.Quota(chunks=1000),
        index="exact",
    )
    made = (chunk(number, vectors=True) for number in range(100, 140))
    ids = [
        each.chunk_id for each in client.write_many("vectors", made, reader_digest="", embedder_digest=answers.EMBEDDER)
    ]
    client.delete_chunks("vectors", ids[::9])
    client.update_chunk("vectors", ids[1], {"half": "even", "new": "1"})
    client.create_bank("gone", kv=None, embedding=answers.EMBEDDING)
    client.delete_bank("gone")


def save_model(folder: Path) -> None:
    """Save a tiny model with random weights and a byte tokenizer."""
    vocabulary = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.add_special_tokens(vocabulary[:4])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


def converse(model: MemoryModel, *texts: str) -> list[dict[str, object]]:
    with Session.open(model, name="old") as session:
        for text in texts:
            session.say(text, max_new_tokens=ANSWER)
        return [
            {"text": turn.text("user"), "answer": turn.text("assistant"), "ids": list(turn.token_ids)}
            for turn in session.turns
        ]


def main() -> None:
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        save_model(root / "model")
        options = {"bank": (), "chunk": CHUNK, "window": WINDOW}
        with kvbank.connect(root / "data") as client:
            fill(client)
            with MemoryModel.from_pretrained(str(root / "model"), memory=client, **options) as model:
                turns = converse(model, *WORDS)
        with kvbank.connect(root / "data") as client:
            expected = {"store": answers.of_store(client), "turns": turns}
        out.mkdir(parents=True, exist_ok=True)
        with tarfile.open(out / "release.tar.gz", "w:gz", compresslevel=9) as archive:
            for name in ("data", "model"):
                archive.add(
                    root / name, name, filter=lambda entry: None if entry.name.endswith("kvbank.lock") else entry
                )
        # What the release itself goes on to say.
        with (
            kvbank.connect(root / "data") as client,
            MemoryModel.from_pretrained(str(root / "model"), memory=client, **options) as model,
        ):
            expected["next"] = converse(model, NEXT)[-1]
        (out / "expected.json").write_text(json.dumps(expected, indent=0, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
