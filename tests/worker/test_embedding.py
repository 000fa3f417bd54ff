"""Embedders compute the same unit vectors everywhere."""

import json
import os
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)

import kvbank
from model_worker.embed import EncoderEmbedder, LexicalEmbedder, embedder, of_bank
from model_worker.errors import BankMismatch, InputError, ModelNotFound
from model_worker.model import MemoryModel
from tests.worker.tiny import bank, build, sharpen, tokenizer

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
from model_worker.embed import LexicalEmbedder
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
    """Hash seeds of strings differ from process to process."""
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


@pytest.mark.parametrize("text", ["café naïve", "Trần Hưng Đạo", "서울 기차", "ÅNGSTRÖM ﬁne"])
def test_lexical_does_not_see_how_an_accent_was_typed(text: str) -> None:
    composed, decomposed = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    assert composed != decomposed
    vectors = LexicalEmbedder().embed([composed, decomposed, unicodedata.normalize("NFKD", text)])
    assert np.array_equal(vectors[0], vectors[1])
    assert np.array_equal(vectors[0], vectors[2])
    assert not np.array_equal(*LexicalEmbedder(version=1).embed([composed, decomposed]))


def test_lexical_of_before_is_the_same_where_there_was_one_form() -> None:
    assert np.array_equal(LexicalEmbedder().embed(TEXTS[:4]), LexicalEmbedder(version=1).embed(TEXTS[:4]))


def test_a_bank_keeps_the_embedder_that_it_was_written_with(client: kvbank.Client) -> None:
    """Written by an older version: opened as ever, searched and written on under its digest."""
    name, old = bank(), LexicalEmbedder(version=1)
    settings = {"memory": client, "bank": name, "chunk": 8, "window": 16, "top_k": 2, "min_share": 0.0}
    with MemoryModel(build("llama_gqa"), tokenizer(), embed=old, **settings) as model:
        model.read("w5 w6 w7")
    with MemoryModel(build("llama_gqa"), tokenizer(), **settings) as model:
        model.read("w8 w9")
        assert client.get_bank(name).embedding.embedder_digest == old.digest == model.memory.embedder.digest
        assert len(model.memory.recall([[5, 6]])[0]) == 2  # type: ignore[index]
        other = model.with_bank(bank())
        assert other.embedder.digest == LexicalEmbedder().digest != old.digest
        with pytest.raises(BankMismatch, match="another embedder"):
            model.with_bank(name, embedder=LexicalEmbedder(8))


@pytest.mark.parametrize("embed", [5, b"lexical", object(), ["lexical"]])
def test_embed_options_that_are_none(client: kvbank.Client, embed: object) -> None:
    net = build("llama_gqa")
    with pytest.raises(InputError, match="embed is a string, a path or an embedder"):
        MemoryModel(net, tokenizer(), memory=client, bank=bank(), chunk=8, window=16, top_k=2, embed=embed)
    assert net.config._attn_implementation == "sdpa"


def test_specs() -> None:
    assert embedder("lexical").digest == LexicalEmbedder(1024).digest
    assert embedder("lexical:d=64").dimension == 64
    assert embedder("lexical:d=64").digest != embedder("lexical").digest
    for wrong in ("lexical:d=0", "lexical:64", "lexical:d=9999999"):
        with pytest.raises(InputError, match="lexical:d=DIMENSION"):
            embedder(wrong)
    with pytest.raises(ModelNotFound, match="no model folder"):
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


Change = Callable[..., Path]


@pytest.fixture
def changed(encoder: Path, tmp_path: Path) -> Change:
    """Return the encoder with another model, tokenizer settings or files."""

    def make(net: PreTrainedModel | None = None, pooling: object = None, **settings: object) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(encoder, folder, dirs_exist_ok=True)
        if net is not None:
            net.save_pretrained(folder)
        if settings:
            words = PreTrainedTokenizerFast.from_pretrained(encoder)
            for name, value in settings.items():
                setattr(words, name, value)
            words.save_pretrained(folder)
        if pooling is not None:
            (folder / "1_Pooling").mkdir()
            text = pooling if isinstance(pooling, str) else json.dumps(pooling)
            (folder / "1_Pooling" / "config.json").write_text(text)
        return folder

    return make


SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}


def test_an_encoder_without_a_pad_token_serves(encoder: Path, changed: Change) -> None:
    texts = ["w3 w4 w5", "w9", "w7 " * 200, ""]
    made = embedder(changed(pad_token=None))
    assert np.allclose(made.embed(texts), embedder(encoder).embed(texts), atol=2e-6)
    assert not made.embed(texts)[3].any()
    assert not made.embed([""]).any()


def test_longer_texts_than_an_encoder_has_positions_for(changed: Change) -> None:
    """Also where the tokenizer does not know it, and where positions begin behind the pad (RoBERTa)."""
    for net in (None, RobertaModel(RobertaConfig(vocab_size=97, max_position_embeddings=40, pad_token_id=0, **SIZES))):
        made = embedder(changed(net, model_max_length=10**30))
        assert np.isfinite(made.embed(["w7 " * 500, "w8"])).all()


def test_the_encoder_of_a_pair_is_used(changed: Change) -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    net = T5Model(T5Config(vocab_size=97, decoder_start_token_id=0, **sizes))
    assert embedder(changed(net)).embed(["w3 w4", "w9"]).shape == (2, 32)


def test_an_encoder_takes_lone_surrogates(encoder: Path) -> None:
    vectors = embedder(encoder).embed(["w3 \ud800 w4", "w3 \ufffd w4"])
    assert np.array_equal(vectors[0], vectors[1])


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "include_prompt": True}, "cls"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_lasttoken": True}, "last"),
    ],
)
def test_the_pooling_of_sentence_transformers(encoder: Path, changed: Change, pooling: object, expected: str) -> None:
    """Against the last hidden state, with another text in the batch; a bank of the mean is still searched by it."""
    made, mean = embedder(changed(pooling=pooling)), embedder(encoder)
    assert isinstance(made, EncoderEmbedder)
    net = BertModel.from_pretrained(encoder).eval()
    with torch.no_grad():
        hidden = net(input_ids=torch.tensor([[3, 4, 5]])).last_hidden_state[0]
    vector = {"mean": hidden.mean(0), "cls": hidden[0], "max": hidden.amax(0), "last": hidden[-1]}[expected]
    wanted = torch.nn.functional.normalize(vector, dim=0).numpy()
    assert np.allclose(made.embed(["w3 w4 w5", "w9 " * 9])[0], wanted, atol=1e-5)
    assert (made.digest == mean.digest) == (expected == "mean")
    assert of_bank(made, mean.digest).digest == mean.digest
    assert of_bank(made, "another") is made


@pytest.mark.parametrize(
    ("pooling", "reason"),
    [
        ({"pooling_mode_weightedmean_tokens": True}, "weightedmean_tokens"),
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, "cls_token, max_tokens"),
        ({}, "none"),
        ("{", "damaged"),
    ],
)
def test_poolings_that_there_are_not(changed: Change, pooling: object, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        embedder(changed(pooling=pooling))


def test_what_is_no_encoder_is_found_out_when_it_is_opened(changed: Change, encoder: Path, tmp_path: Path) -> None:
    images = ViTModel(ViTConfig(image_size=8, patch_size=4, **SIZES))
    broken = BertModel.from_pretrained(encoder)
    with torch.no_grad():
        broken.embeddings.word_embeddings.weight.fill_(float("nan"))
    small = BertModel(BertConfig(vocab_size=50, max_position_embeddings=64, **SIZES))
    for net, reason in (
        (images, "of no use as an embedder"),
        (broken, "no numbers"),
        (small, "97 tokens, and its model"),
    ):
        with pytest.raises(InputError, match=reason):
            embedder(changed(net))
    (tmp_path / "changed" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ModelNotFound, match="cannot be loaded"):
        embedder(tmp_path / "changed")
    (tmp_path / "changed" / "tokenizer.json").write_text("[]")
    with pytest.raises(ModelNotFound, match="cannot be loaded"):
        embedder(tmp_path / "changed")


@pytest.mark.parametrize("recall", ["attend", "reread"])
def test_the_banks_of_a_batch_are_searched_by_one_form(client: kvbank.Client, recall: str) -> None:
    """Else one of the banks would be asked, without success, by the form of another."""
    now, before = bank(), bank()
    settings = {"memory": client, "chunk": 8, "window": 16, "recall": recall}
    for name, embed in ((now, "lexical"), (before, LexicalEmbedder(version=1))):
        MemoryModel(build("llama_gqa"), tokenizer(), bank=name, embed=embed, **settings).close()
    for names in ([now, before], [before, now]):
        with pytest.raises(BankMismatch, match=now):
            MemoryModel(build("llama_gqa"), tokenizer(), bank=names, **settings)
