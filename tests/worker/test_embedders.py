"""Embedders by what they promise: weighted words, two cosines in one, functions of a user, queries of their own."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kvbank
from kvbank.embed.idf_table import BUCKETS, IdfTable, shipped_table
from kvbank.embed.lexical import features, hashed
from model_worker import CallableEmbedder, HybridEmbedder, MemoryModel
from model_worker.embed import LexicalEmbedder, embedder, name_of, of_bank
from model_worker.errors import BankMismatch, InputError
from tests.worker.tiny import bank, build, tokenizer

TEXTS = ["the cat sat on the mat", "a quorum of zoologists", "그는 서울에 갔다", "?!"]


def cosines(made: Any, queries: list[str], texts: list[str]) -> np.ndarray:
    return made.embed(queries) @ made.embed(texts).T


# -- lexical:idf ------------------------------------------------------------------------------------------------------


def test_weights_are_the_logarithm_of_inverse_chunk_frequency() -> None:
    """Against the formula, within half a step of the table."""
    chunks = [hashed(features(text)) for text in ("red red", "red blue", "red green", "red grey")]
    table = IdfTable.counted(iter(chunks), buckets=1 << 16)
    found = table.weights(hashed(["w red", "w blue", "w absent"]), np.array([True, True, True]))
    wanted = np.log(5 / np.array([5, 2, 1]))
    assert np.allclose(found, np.maximum(wanted, np.log(5) / 255), atol=np.log(5) / 510)
    assert (found > 0).all()


def test_rare_words_decide() -> None:
    """Weights put the passage with the one rare word before the passage with all the common ones."""
    query, texts = "what did he say of the zoologists", ["what did he say of the man", "zoologists are here"]
    assert cosines(embedder("lexical"), [query], texts).argmax() == 0
    assert cosines(embedder("lexical:idf"), [query], texts).argmax() == 1


def test_other_scripts_are_embedded_as_without_weights() -> None:
    """Texts of other scripts get no weights: what the buckets of their features say is about other features."""
    korean = ["서울 기차", "그는 어제 서울에서 기차를 탔다", "нет слов"]
    assert np.allclose(embedder("lexical:idf").embed(korean), embedder("lexical").embed(korean), atol=1e-6)
    mixed = shipped_table().weights(hashed(["w 서울", "w the"]), np.array([False, True]))
    assert mixed[0] == pytest.approx(np.log(shipped_table().chunks + 1))
    assert mixed[1] < 0.1 * mixed[0]


CODE = [
    "def read(self, path):\n    return path.read_text()",
    "for key, value in table.items():\n    print(key, value)",
    "class Parser(object):\n    tokens = ()",
    "SELECT name FROM users WHERE id = 4",
    "while (*p++) { count += sizeof(int); }",
]


def test_code_is_found() -> None:
    queries = ["path read_text", "print key value of the table", "the Parser class", "SELECT users", "count sizeof"]
    assert cosines(embedder("lexical:idf"), queries, CODE).argmax(1).tolist() == [0, 1, 2, 3, 4]


def test_the_digest_covers_the_table(tmp_path: Path) -> None:
    table = shipped_table()
    table.write(tmp_path / "idf.npz")
    assert LexicalEmbedder(table=IdfTable.read(tmp_path / "idf.npz")).digest == embedder("lexical:idf").digest
    other = IdfTable.counted([hashed(features("red"))], BUCKETS)
    digests = {LexicalEmbedder(table=own).digest for own in (None, table, other)}
    assert len(digests | {embedder("lexical:idf,d=64").digest}) == 4


def test_files_that_are_no_table(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", steps=np.zeros(3))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "other.npz").read_bytes()[:50])
    np.savez(tmp_path / "floats.npz", steps=np.zeros(3), chunks=3)
    for name in ("other", "cut", "floats", "absent"):
        with pytest.raises(kvbank.InvalidArgument, match=name):
            IdfTable.read(tmp_path / f"{name}.npz")
    with pytest.raises(kvbank.InvalidArgument, match="no chunk"):
        IdfTable.counted([])


def test_the_table_is_counted_by_a_command(tmp_path: Path) -> None:
    """Held-back novels are left out, and the same texts give the same bytes."""
    (tmp_path / "some.txt").write_text("a quick fox " * 60)
    (tmp_path / "frankenstein.txt").write_text("monster " * 90)
    command = [sys.executable, "-m", "model_worker.train.idf", tmp_path, "--out"]
    for out in ("a", "b"):
        subprocess.run([*command, tmp_path / out], check=True, capture_output=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    fox, monster = IdfTable.read(tmp_path / "a").weights(hashed(["w fox", "w monster"]), np.array([True, True]))
    assert fox < monster
    nowhere = subprocess.run(command[:-1], check=False, capture_output=True, text=True)
    assert (nowhere.returncode, "Missing option '--out'" in nowhere.stderr) == (2, True)


# -- hybrid -----------------------------------------------------------------------------------------------------------


def test_a_hybrid_scores_by_the_weighted_sum_of_both_cosines() -> None:
    first, second = embedder("lexical"), embedder("lexical:d=64")
    made = HybridEmbedder(first, second, 0.3)
    assert made.dimension == 1088
    wanted = 0.3 * cosines(first, TEXTS, TEXTS) + 0.7 * cosines(second, TEXTS, TEXTS)
    assert np.allclose(cosines(made, TEXTS, TEXTS), wanted, atol=1e-6)
    assert np.allclose(np.linalg.norm(made.embed(TEXTS[:3]), axis=1), 1, atol=1e-6)
    assert not made.embed(TEXTS[3:]).any()


def ones(texts: list[str]) -> np.ndarray:
    """Return vectors that see something in every text, and are not of unit length."""
    return np.full((len(texts), 2), 5.0)


def test_a_part_that_sees_nothing_counts_as_a_cosine_of_zero() -> None:
    parts = embedder("lexical"), CallableEmbedder(ones, name="ones")
    for made in (HybridEmbedder(*parts, 0.4), HybridEmbedder(*reversed(parts), 0.6)):
        assert cosines(made, TEXTS, ["?!"]).ravel() == pytest.approx([0.6] * 4)
        assert cosines(made, TEXTS[:1], TEXTS[:1]).item() == pytest.approx(1)


def test_specs_of_hybrids() -> None:
    made = embedder("hybrid:lexical:idf+lexical:d=64,w=0.25")
    assert isinstance(made, HybridEmbedder)
    assert (made.weight, made.dimension) == (0.25, 1088)
    assert made.digest == HybridEmbedder(embedder("lexical:idf"), embedder("lexical:d=64"), 0.25).digest
    digests = {embedder(f"hybrid:{parts}").digest for parts in ("lexical+lexical:idf", "lexical:idf+lexical")}
    assert len(digests | {embedder("hybrid:lexical+lexical:idf,w=0.5").digest}) == 3
    assert embedder("hybrid:lexical:idf,d=8+lexical,w=0.5").dimension == 1032


def test_names_in_messages_are_specs() -> None:
    for spec in ("lexical", "lexical:d=64", "lexical:idf,d=64", "hybrid:lexical:idf+lexical:d=64,w=0.3"):
        assert name_of(embedder(spec)) == spec


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("hybrid:lexical", "write hybrid:A"),
        ("hybrid:lexical+", "write hybrid:A"),
        ("hybrid:lexical+/a+b", "HybridEmbedder"),
        ("hybrid:lexical+/a,b", "HybridEmbedder"),
        ("hybrid:lexical+lexical,w=0,4", "HybridEmbedder"),
        ("hybrid:lexical+lexical,w=1", "between 0 and 1"),
        ("hybrid:lexical+lexical,w=0", "greater than 0"),
        ("hybrid:lexical+lexical,w=0.4.1", "no number"),
        ("hybrid:lexical+hybrid:lexical", "no hybrid"),
        ("lexical:idf:d=4", "lexical:idf,d=DIMENSION"),
        ("lexical,d=4", "no model folder"),
    ],
)
def test_specs_that_are_refused(spec: str, reason: str) -> None:
    with pytest.raises(kvbank.KVBankError, match=reason):
        embedder(spec)


def test_a_bank_of_an_earlier_form_is_searched_by_a_hybrid_of_that_form() -> None:
    old = HybridEmbedder(LexicalEmbedder(version=1), embedder("lexical:d=64"), 0.3)
    made = embedder("hybrid:lexical+lexical:d=64,w=0.3")
    assert made.digest != old.digest
    assert of_bank(made, old.digest).digest == old.digest


# -- functions --------------------------------------------------------------------------------------------------------


def lengths(texts: list[str]) -> torch.Tensor:
    """Return a vector of each text by the number of its letters."""
    angle = torch.tensor([float(len(text)) for text in texts]) / 40
    return torch.stack([angle.cos(), angle.sin()], dim=1)


Open = Callable[..., MemoryModel]


@pytest.fixture
def opened(client: kvbank.Client) -> Open:
    def open_model(embed: Any, name: str) -> MemoryModel:
        return MemoryModel(build("llama_gqa"), tokenizer(), memory=client, bank=name, chunk=8, window=16, embed=embed)

    return open_model


def test_a_function_is_an_embedder_under_its_name(opened: Open) -> None:
    name = bank()
    with opened(CallableEmbedder(lengths, name="lengths-1"), name) as model:
        model.read("w5 w6 w7")
    with opened(CallableEmbedder(lengths, name="lengths-1"), name) as model:
        assert len(model.memory.recall([[5, 6]])[0]) == 1  # type: ignore[index]
    with pytest.raises(BankMismatch, match="lengths-2"):
        opened(CallableEmbedder(lengths, name="lengths-2"), name)


def test_what_an_embedder_object_lacks() -> None:
    class Own:
        dimension: Any = 2
        digest: Any = "own 1"

        def embed(self, texts: list[str]) -> torch.Tensor:
            return lengths(texts)

    made = Own()
    assert embedder(made) is made
    for name, wrong in (("dimension", None), ("dimension", 0), ("digest", 5), ("digest", " ")):
        other = Own()
        setattr(other, name, wrong)
        with pytest.raises(InputError, match=f"{name} of the embedder"):
            embedder(other)


def test_numbers_beyond_float32_are_refused() -> None:
    huge = CallableEmbedder(lambda texts: np.full((len(texts), 2), 1e300), name="huge")
    with pytest.raises(InputError, match="finite numbers"):
        huge.embed(["a"])


def test_a_bare_function_needs_a_digest(opened: Open) -> None:
    def own(texts: list[str]) -> torch.Tensor:
        return lengths(texts)

    with pytest.raises(InputError, match="CallableEmbedder"):
        opened(own, bank())
    own.digest = "lengths of version 1"  # type: ignore[attr-defined]
    with opened(own, bank()) as model:
        assert (model.memory.embedder.digest, model.memory.embedder.dimension) == ("lengths of version 1", 2)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"function": 5}, "function is a function"),
        ({"queries": 5}, "queries is a function"),
        ({"name": " "}, "name is empty"),
        ({"name": 5}, "name is a str"),
        ({"dimension": 0}, "dimension is at least 1"),
        ({"function": lambda texts: [0.5]}, "array"),
        ({"digest": 5}, "digest is a str"),
    ],
)
def test_functions_that_are_refused(wrong: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        CallableEmbedder(**{"function": lengths, "name": "lengths", **wrong})


def test_queries_are_embedded_by_their_own_function(opened: Open) -> None:
    """Passages are seen by one function and queries by the other, also inside a hybrid."""
    seen: dict[str, list[str]] = {"passage": [], "query": []}

    def watched(kind: str) -> Callable[[list[str]], torch.Tensor]:
        def embed(texts: list[str]) -> torch.Tensor:
            seen[kind] += texts
            return lengths(texts)

        return embed

    made = CallableEmbedder(watched("passage"), queries=watched("query"), name="watched", dimension=2)
    for own in (made, HybridEmbedder(embedder("lexical"), made)):
        with opened(own, bank()) as model:
            model.read("w5 w6 w7")
            assert seen["passage"] == ["w5 w6 w7"]
            seen["passage"].clear()
            model.memory.recall([[5, 6]])
            assert (seen["passage"], seen["query"][-1]) == ([], "w5 w6")


def test_the_lexical_embedders_load_no_torch() -> None:
    code = "import sys; from model_worker.embed import embedder; embedder('hybrid:lexical:idf+lexical').embed(['a'])"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True)
