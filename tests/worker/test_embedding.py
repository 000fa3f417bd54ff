"""Embedders compute the same unit vectors everywhere."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import sharpen, tokenizer
from transformers import BertConfig, BertModel

from model_worker.embedding import EncoderEmbedder, LexicalEmbedder, embedder
from model_worker.errors import InputError, ModelNotFound

TEXTS = [
    "The number of Torvel Makin is 4711.",
    "철수는 어제 서울에서 기차를 탔다",
    "你好,世界",
    "a",
    "x " * 5000,
    "🙂 naïve café",
]
PRINT_HASH = """
import sys, hashlib
from model_worker.embedding import LexicalEmbedder
sys.stdout.write(hashlib.sha256(LexicalEmbedder(256).embed(sys.argv[1:]).tobytes()).hexdigest())
"""


def test_lexical_vectors_are_unit_and_finite() -> None:
    vectors = LexicalEmbedder().embed(TEXTS)
    assert vectors.shape == (len(TEXTS), 1024)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert not LexicalEmbedder().embed(["", " \n ", "?!"]).any()
    assert LexicalEmbedder(8).embed([]).shape == (0, 8)


def test_lexical_is_the_same_in_every_process() -> None:
    """Other processes hash strings with other seeds."""
    found = {
        subprocess.run(
            [sys.executable, "-c", PRINT_HASH, *TEXTS[:4]],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


def test_lexical_finds_shared_wording() -> None:
    queries = LexicalEmbedder().embed(["What is the number of Torvel Makin?", "서울 기차"])
    scores = queries @ LexicalEmbedder().embed(TEXTS).T
    assert scores.argmax(axis=1).tolist() == [0, 1]


def test_specs() -> None:
    assert embedder("lexical").digest == LexicalEmbedder(1024).digest
    assert embedder("lexical:d=64").dimension == 64
    assert embedder("lexical:d=64").digest != embedder("lexical").digest
    for wrong in ("lexical:d=0", "lexical:64", "lexical:d=9999999"):
        with pytest.raises(InputError, match="lexical:d=DIMENSION"):
            embedder(wrong)
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        embedder("/nonexistent/encoder")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    net = BertModel(
        BertConfig(
            vocab_size=97,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=64,
        )
    )
    sharpen(net, 3)
    net.save_pretrained(folder)
    words = tokenizer()
    words.model_max_length = 64
    words.save_pretrained(folder)
    return folder


def test_encoder_folder(encoder: Path) -> None:
    """Rows do not depend on what else is in the batch, and long texts are cut."""
    made = embedder(str(encoder))
    texts = ["w3 w4 w5", "w9", "w7 " * 200]
    vectors = made.embed(texts)
    assert vectors.shape == (3, made.dimension) == (3, 32)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert np.allclose(np.concatenate([made.embed([text]) for text in texts]), vectors, atol=2e-6)
    assert EncoderEmbedder(encoder).digest == made.digest
    net = BertModel.from_pretrained(encoder)
    with torch.no_grad():
        net.embeddings.word_embeddings.weight.add_(0.01)
    net.save_pretrained(encoder.parent / "other")
    tokenizer().save_pretrained(encoder.parent / "other")
    assert EncoderEmbedder(encoder.parent / "other").digest != made.digest
