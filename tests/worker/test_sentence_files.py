"""Encoders compute what their files of Sentence Transformers say, compared with transformers used directly."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

import kvbank
from model_worker import EncoderEmbedder, MemoryModel
from model_worker.embed import HybridEmbedder, embedder, of_bank
from model_worker.errors import InputError, ModelNotFound
from tests.support.weights import weights
from tests.worker.tiny import bank, build, sharpen, tokenizer

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT, OTHER = "w3 w4 w5 w6", "w9 " * 9
FIRST = ("Transformer", "Pooling")
# The digest of all-MiniLM-L6-v2 in the release 8a57d30, which heeded the pooling of a folder and nothing else.
OF_MINILM = "615cbdf8764adda61634d2381c7b78f6"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a plain encoder."""
    folder = tmp_path_factory.mktemp("encoder")
    net = BertModel(BertConfig(**SIZES, max_position_embeddings=64))
    sharpen(net, 3)
    net.save_pretrained(folder)
    words = tokenizer()
    words.model_max_length = 64
    words.save_pretrained(folder)
    return folder


Make = Callable[..., Path]


@pytest.fixture
def made(plain: Path, tmp_path: Path) -> Make:
    """Return what writes an encoder of Sentence Transformers: its modules, and the contents of its files by name."""

    def make(*modules: str, **files: Any) -> Path:
        folder = tmp_path / "made"
        shutil.copytree(plain, folder, dirs_exist_ok=True)
        listed = [
            {"idx": place, "path": "" if kind == "Transformer" else f"{place}_{kind}", "type": f"x.models.{kind}"}
            for place, kind in enumerate(modules)
        ]
        (folder / "modules.json").write_text(json.dumps(listed))
        for name, content in files.items():
            path = folder / f"{name.replace('__', '/')}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return folder

    return make


def hidden(plain: Path, ids: list[int]) -> torch.Tensor:
    """Return the last hidden states of token ids, as transformers computes them."""
    with torch.no_grad():
        states: torch.Tensor = BertModel.from_pretrained(plain).eval()(torch.tensor([ids])).last_hidden_state[0]
    return states


def unit(vector: torch.Tensor) -> np.ndarray:
    return functional.normalize(vector, dim=0).numpy()


def test_texts_are_cut_where_the_files_say(plain: Path, made: Make) -> None:
    found = embedder(made(*FIRST, "Normalize", sentence_bert_config={"max_seq_length": 3})).embed([TEXT, OTHER])
    assert np.allclose(found[0], unit(hidden(plain, [3, 4, 5]).mean(0)), atol=1e-5)


def test_texts_are_in_lower_case_where_the_files_say(made: Make) -> None:
    lower = embedder(made(*FIRST, sentence_bert_config={"do_lower_case": True}))
    as_they_are = embedder(made(*FIRST, sentence_bert_config={"do_lower_case": False}))
    assert np.array_equal(lower.embed(["W3 W4"]), as_they_are.embed(["w3 w4"]))
    assert not np.array_equal(as_they_are.embed(["W3 W4"]), as_they_are.embed(["w3 w4"]))
    assert lower.digest != as_they_are.digest


def test_rows_are_as_long_as_the_files_say(plain: Path, made: Make) -> None:
    """Encoders for inner products have no Normalize; those for cosines get unit length."""
    vector = hidden(plain, [3, 4, 5, 6]).mean(0)
    dot = embedder(made(*FIRST, config_sentence_transformers={"similarity_fn_name": "dot"}))
    assert np.allclose(dot.embed([TEXT, OTHER])[0], vector.numpy(), atol=1e-5)
    for modules in (FIRST, (*FIRST, "Normalize")):
        for name in ("cosine", None):
            cosine = embedder(made(*modules, config_sentence_transformers={"similarity_fn_name": name}))
            assert np.allclose(cosine.embed([TEXT, OTHER])[0], unit(vector), atol=1e-5)
            assert cosine.digest != dot.digest
    assert np.allclose(np.linalg.norm(HybridEmbedder(dot, dot).embed([TEXT]), axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("activation", ["torch.nn.modules.activation.Tanh", "torch.nn.modules.linear.Identity"])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_dense_layers(plain: Path, made: Make, activation: str, file: str) -> None:
    said = {"in_features": 32, "out_features": 6, "bias": True, "activation_function": activation}
    folder = made(*FIRST, "Dense", "Normalize", **{"2_Dense__config": said})
    draw = torch.Generator().manual_seed(1)
    layer = {"linear.weight": torch.randn(6, 32, generator=draw), "linear.bias": torch.randn(6, generator=draw)}
    save = save_file if file.endswith("safetensors") else torch.save
    save(layer, folder / "2_Dense" / file)  # type: ignore[operator]
    found = embedder(folder)
    vector = layer["linear.weight"] @ hidden(plain, [3, 4, 5, 6]).mean(0) + layer["linear.bias"]
    wanted = vector.tanh() if activation.endswith("Tanh") else vector
    assert found.dimension == 6
    assert np.allclose(found.embed([TEXT, OTHER])[0], unit(wanted), atol=1e-5)
    save({**layer, "linear.bias": layer["linear.bias"] + 1}, folder / "2_Dense" / file)  # type: ignore[operator]
    assert embedder(folder).digest != found.digest


def test_the_first_numbers_are_kept_where_the_files_say(plain: Path, made: Make) -> None:
    found = embedder(made(*FIRST, config_sentence_transformers={"truncate_dim": 8}))
    assert np.allclose(found.embed([TEXT])[0], unit(hidden(plain, [3, 4, 5, 6]).mean(0)[:8]), atol=1e-5)


def test_a_mean_by_the_root_of_the_length(plain: Path, made: Make) -> None:
    """Rows without unit length are longer for longer texts."""
    pooling = {"pooling_mode_mean_sqrt_len_tokens": True}
    dot = embedder(
        made(*FIRST, config_sentence_transformers={"similarity_fn_name": "dot"}, **{"1_Pooling__config": pooling})
    )
    assert np.allclose(dot.embed([TEXT])[0], (hidden(plain, [3, 4, 5, 6]).sum(0) / 2).numpy(), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["mean_tokens", "max_tokens"])
def test_a_model_in_half_precision(plain: Path, made: Make, dtype: torch.dtype, mode: str) -> None:
    said = {"in_features": 32, "out_features": 6, "activation_function": "x.Tanh"}
    folder = made(*FIRST, "Dense", **{"2_Dense__config": said, "1_Pooling__config": {f"pooling_mode_{mode}": True}})
    draw = torch.Generator().manual_seed(1)
    layer = {"linear.weight": torch.randn(6, 32, generator=draw), "linear.bias": torch.zeros(6)}
    save_file(layer, folder / "2_Dense" / "model.safetensors")
    BertModel.from_pretrained(plain, dtype=dtype).save_pretrained(folder)
    states = hidden(plain, [3, 4, 5, 6])
    wanted = (layer["linear.weight"] @ (states.mean(0) if mode == "mean_tokens" else states.amax(0))).tanh()
    found = embedder(folder).embed([TEXT, OTHER])
    assert found.dtype == np.float32
    assert np.allclose(found[0], unit(wanted), atol=0.05)


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "last"])
def test_a_text_without_a_token_has_the_zero_vector_in_any_batch(plain: Path, pooling: str) -> None:
    found = EncoderEmbedder(plain, pooling)
    for texts in ([""], ["", TEXT], ["", ""]):
        assert not found.embed(texts)[0].any()
    assert np.allclose(found.embed(["", TEXT, OTHER])[1], found.embed([TEXT])[0], atol=1e-6)


def test_both_names_of_one_pooling(made: Make) -> None:
    folder = made(*FIRST, **{"1_Pooling__config": {"pooling_mode": "mean", "pooling_mode_mean_tokens": True}})
    assert EncoderEmbedder(folder).pooling == "mean"


def test_a_file_is_no_folder(plain: Path) -> None:
    with pytest.raises(ModelNotFound, match="is not the folder of an encoder"):
        EncoderEmbedder(plain / "config.json")


# -- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "query", "passage"),
    [
        ({"prompts": {"query": "w11 ", "passage": "w12 "}}, [11], [12]),
        ({"prompts": {"query": "w11 ", "document": "w12 ", "passage": "w7 "}}, [11], [12]),
        ({"prompts": {"query": "w11 "}}, [11], []),
        ({"prompts": {"query": "", "document": ""}}, [], []),
        ({"prompts": {"query": "w11 ", "all": "w12 "}, "default_prompt_name": "all"}, [11], [12]),
        ({"prompts": {"all": "w12 "}, "default_prompt_name": "all"}, [12], [12]),
        ({"prompts": {"all": "w12 "}, "default_prompt_name": None}, [], []),
    ],
)
def test_prompts_stand_before_queries_and_passages(
    plain: Path, made: Make, said: Any, query: list[int], passage: list[int]
) -> None:
    found = embedder(made(*FIRST, config_sentence_transformers=said))
    assert isinstance(found, EncoderEmbedder)
    for embed, prompt in ((found.embed, passage), (found.embed_queries, query)):
        assert np.allclose(embed([TEXT, OTHER])[0], unit(hidden(plain, [*prompt, 3, 4, 5, 6]).mean(0)), atol=1e-5)


def test_a_prompt_that_is_not_pooled(plain: Path, made: Make) -> None:
    said = {"prompts": {"query": "w11 w12 "}}
    pooling = {"pooling_mode_mean_tokens": True, "include_prompt": False}
    found = embedder(made(*FIRST, config_sentence_transformers=said, **{"1_Pooling__config": pooling}))
    assert isinstance(found, EncoderEmbedder)
    wanted = unit(hidden(plain, [11, 12, 3, 4, 5, 6])[2:].mean(0))
    assert np.allclose(found.embed_queries([TEXT, OTHER])[0], wanted, atol=1e-5)


def test_prompts_of_ones_own(plain: Path, client: kvbank.Client) -> None:
    """Prompts count when chunks are stored and when they are searched for, and a bank knows them."""
    own, name = {"query": "w11 ", "passage": "w12 "}, bank()
    found, without = EncoderEmbedder(plain, prompts=own), EncoderEmbedder(plain)
    assert np.allclose(found.embed([TEXT]), without.embed([f"w12 {TEXT}"]), atol=1e-6)
    assert np.allclose(found.embed_queries([TEXT]), without.embed([f"w11 {TEXT}"]), atol=1e-6)
    assert np.array_equal(EncoderEmbedder(plain, prompts={"query": ""}).embed_queries([TEXT]), without.embed([TEXT]))
    settings = {"memory": client, "bank": name, "chunk": 8, "window": 16, "top_k": 1}
    with MemoryModel(build("llama_gqa"), tokenizer(), embed=found, **settings) as model:
        model.read("w5 w6 w7")
        assert len(model.memory.recall([[5, 6]])[0]) == 1  # type: ignore[index]
    query, passage = without.embed(["w11 w5 w6"])[0], without.embed(["w12 w5 w6 w7"])[0]
    digests = {"embedder_digest": found.digest, "reader_digest": model.attachment.reader.digest}
    [hit] = client.retrieve(name, query, top_k=1, **digests).queries[0]
    assert hit.score == pytest.approx(float(query @ passage), abs=1e-5)
    for wrong in ({"document": "w1"}, {"query": 5}, "w1"):
        with pytest.raises(InputError, match="prompts"):
            EncoderEmbedder(plain, prompts=wrong)  # type: ignore[arg-type]


# -- refused, and earlier ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modules", "files", "reason"),
    [
        ((*FIRST, "LSTM"), {}, "LSTM"),
        (("StaticEmbedding",), {}, "StaticEmbedding"),
        (("Transformer",), {}, "order"),
        ((*FIRST, "Pooling"), {}, "order"),
        ((*FIRST, "Normalize", "Dense"), {}, "Normalize that is not the last"),
        ((*FIRST, "Dense"), {}, "dense layer"),
        (FIRST, {"modules": "[5]"}, "modules.json is damaged"),
        (FIRST, {"modules": "{"}, "modules.json is damaged"),
        (FIRST, {"modules": "{}"}, "modules.json is damaged"),
        (FIRST, {"config_sentence_transformers": {"similarity_fn_name": "manhattan"}}, "manhattan"),
        (FIRST, {"config_sentence_transformers": {"default_prompt_name": "absent"}}, "absent"),
        (FIRST, {"config_sentence_transformers": {"prompts": {"query": 5}}}, "prompts are texts"),
        (FIRST, {"config_sentence_transformers": {"prompts": ["query"]}}, "prompts are texts"),
        (FIRST, {"config_sentence_transformers": {"default_prompt_name": ["a"], "prompts": {"b": "c"}}}, "no prompt"),
        (FIRST, {"config_sentence_transformers": {"truncate_dim": -5}}, "truncate_dim is -5"),
        (FIRST, {"config_sentence_transformers": {"truncate_dim": True}}, "truncate_dim is True"),
        (FIRST, {"sentence_bert_config": {"max_seq_length": True}}, "max_seq_length is True"),
        (FIRST, {"sentence_bert_config": {"model_args": 5}}, "arguments are named"),
        (FIRST, {"1_Pooling__config": {"pooling_mode": "mean", "pooling_mode_cls_token": True}}, "cls_token, mean"),
        (FIRST, {"sentence_bert_config": {"max_seq_length": "many"}}, "max_seq_length"),
        (FIRST, {"sentence_bert_config": {"model_args": {"trust_remote_code": True}}}, "trust_remote_code"),
        (FIRST, {"sentence_bert_config": {"transformer_task": "fill-mask"}}, "fill-mask"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    made: Make, modules: tuple[str, ...], files: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        embedder(made(*modules, **files))


def test_an_activation_that_there_is_not(made: Make) -> None:
    said = {"in_features": 32, "out_features": 2, "bias": False, "activation_function": "x.Softsign"}
    folder = made(*FIRST, "Dense", **{"2_Dense__config": said})
    save_file({"linear.weight": torch.zeros(2, 32)}, folder / "2_Dense" / "model.safetensors")
    with pytest.raises(InputError, match="Softsign"):
        embedder(folder)


def test_a_pooling_that_there_is_not(plain: Path) -> None:
    with pytest.raises(InputError, match="pooling is one of mean"):
        EncoderEmbedder(plain, pooling="median")


def test_banks_of_before_are_searched_by_the_form_that_wrote_them(plain: Path, made: Make) -> None:
    """Older releases took the mean, later ones the pooling of the folder and nothing else that it says."""
    pooling = {"1_Pooling__config": {"pooling_mode_cls_token": True}}
    said = {
        "sentence_bert_config": {"max_seq_length": 3},
        "config_sentence_transformers": {"prompts": {"query": "w11 "}},
    }
    now = embedder(made(*FIRST, **pooling, **said))
    assert isinstance(now, EncoderEmbedder)
    for old in (EncoderEmbedder(plain, "cls"), EncoderEmbedder(plain, "mean")):
        form = of_bank(now, old.digest)
        assert isinstance(form, EncoderEmbedder)
        assert form.digest == old.digest != now.digest
        assert np.array_equal(form.embed([TEXT, OTHER]), old.embed([TEXT, OTHER]))
        assert np.array_equal(form.embed_queries([TEXT]), old.embed([TEXT]))


# -- all-MiniLM-L6-v2 -------------------------------------------------------------------------------------------------


def test_minilm_is_what_transformers_computes() -> None:
    """Mean of at most 256 word pieces, at unit length; a bank of the release that took 512 is still served."""
    folder = weights("minilm")
    texts = ["Where is the key?", "The key is under the blue flowerpot.", "flower pots and keys " * 150]
    words, net = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    found = embedder("minilm")
    assert found.dimension == 384
    for text, row in zip(texts, found.embed(texts), strict=True):
        batch = words(text, truncation=True, max_length=256, return_tensors="pt")
        with torch.no_grad():
            states = net(**batch).last_hidden_state[0]
        assert np.allclose(row, unit(states.mean(0)), atol=1e-5)
    before = of_bank(found, OF_MINILM)
    assert before.digest == OF_MINILM != found.digest
    assert np.allclose(before.embed(texts[:2]), found.embed(texts[:2]), atol=1e-6)
    assert not np.allclose(before.embed(texts[2:]), found.embed(texts[2:]), atol=1e-3)


# -- hub ids ----------------------------------------------------------------------------------------------------------

PRINT_DIGEST = "import sys; from model_worker.embed import embedder; print(embedder(sys.argv[1]).digest)"


def hub_cache(folder: Path, encoder: Path) -> None:
    """Put an encoder into a folder as the hub's client keeps it, under the id org/small."""
    kept = folder / "models--org--small"
    shutil.copytree(encoder, kept / "snapshots" / "0123")
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("0123")


@pytest.mark.slow
def test_a_hub_id_is_loaded_from_the_hubs_cache(plain: Path, tmp_path: Path) -> None:
    hub_cache(tmp_path, plain)
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    found = [
        subprocess.run([sys.executable, "-c", PRINT_DIGEST, name], env=env, capture_output=True, text=True, check=False)
        for name in ("org/small", "org/absent")
    ]
    assert found[0].stdout.strip() == EncoderEmbedder(plain).digest, found[0].stderr
    last = found[1].stderr.strip().splitlines()[-1]
    assert "ModelNotFound" in last
    assert "'org/absent' here, and it cannot be had from the hub" in last
