"""Banks of texts keep what goes in: it comes out once, is found, counted and deleted, whatever text it is."""

import asyncio
import subprocess
import sys
import uuid
from collections.abc import Iterator

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvbank
from kvbank._texts.passages import passages
from kvbank.embed import CallableEmbedder, LexicalEmbedder, embedder

LINES = ["The harbour was empty.", "Snow fell on the old mill.", "She counted the coins twice."]
ODD = ["a\0b", "\u202eשלום עולם\u202c", "e\u0301 é \ufeff", "😀" * 400, "\x1b[31mred", "  padded  ", "?!"]


def new_name() -> str:
    return f"texts-{uuid.uuid4().hex}"


@pytest.fixture
def memory(client: kvbank.Client) -> kvbank.TextMemory:
    return kvbank.TextMemory(client, new_name())


def ones(texts: list[str]) -> np.ndarray:
    return np.ones((len(texts), 2), np.float32)


def test_texts_are_found_counted_and_deleted(memory: kvbank.TextMemory) -> None:
    made = memory.add(LINES, source="novel", metadata={"year": 1901})
    assert (made.written, made.known, len(made.chunk_ids)) == (3, 0, 3)
    memory.add("Snow is frozen water.", source="lexicon")
    first, second = memory.search("snow", top_k=2)
    assert {first.text, second.text} == {LINES[1], "Snow is frozen water."}
    [hit] = memory.search("snow", source="novel", top_k=1)
    assert (hit.text, hit.source, hit.chunk_id, hit.score > 0) == (LINES[1], "novel", made.chunk_ids[1], True)
    old = kvbank.Filter(metadata={"year": kvbank.Range(below=1950)})
    assert [found.source for found in memory.search("snow", filter=old)] == ["novel"] * 3
    assert memory.search("?!") == []  # there is nothing in it that could be found
    assert (memory.count(), memory.count(old), memory.count(source="lexicon")) == (4, 3, 1)
    assert memory.get(made.chunk_ids[0]).text == LINES[0]
    assert [chunk.text for chunk in memory] == [*LINES, "Snow is frozen water."]
    assert [chunk.text for chunk in memory.chunks(old)] == LINES
    with pytest.raises(kvbank.InvalidArgument, match=r"Filter\(\) stands for all"):
        memory.delete()
    assert (memory.delete(source="novel"), memory.delete(old), memory.count()) == (3, 0, 1)
    assert (memory.delete(kvbank.Filter()), list(memory)) == (1, [])


def test_a_text_is_stored_once_and_again_when_it_was_deleted(memory: kvbank.TextMemory) -> None:
    first = memory.add(LINES, source="a")
    again = memory.add([*LINES, LINES[0]], source="a", metadata={"other": True})
    assert (again.written, again.known, again.chunk_ids) == (0, 4, (*first.chunk_ids, first.chunk_ids[0]))
    assert memory.add(LINES, source="b").written == memory.add(LINES).written == 3
    memory.delete(source="a")
    for written in (3, 0):
        anew = memory.add(LINES, source="a")
        assert (anew.written, set(anew.chunk_ids) & set(first.chunk_ids)) == (written, set())
    assert memory.count() == 9


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(min_size=1).filter(lambda text: not text.isspace()), max_size=4), st.integers(1, 9))
def test_adding_twice_is_adding_once(memory: kvbank.TextMemory, texts: list[str], longest: int) -> None:
    own, source = kvbank.TextMemory(memory.client, memory.bank, longest=longest), uuid.uuid4().hex
    first = own.add(texts, source=source)
    kept = [(chunk.chunk_id, chunk.start, chunk.text) for chunk in own.chunks(source=source)]
    second = own.add(texts, source=source)
    assert (second.chunk_ids, second.written) == (first.chunk_ids, 0)
    assert [(chunk.chunk_id, chunk.start, chunk.text) for chunk in own.chunks(source=source)] == kept
    assert first.written == len(kept)


@given(st.text("ab. \n!。é", max_size=200), st.integers(1, 40))
def test_passages_are_the_text(text: str, longest: int) -> None:
    found = list(passages(text, longest))
    assert all(text[start : start + len(passage)] == passage for start, passage in found)
    assert all(1 <= len(passage) <= longest and not passage.isspace() for _, passage in found)
    covered = {at for start, passage in found for at in range(start, start + len(passage))}
    assert all(text[at].isspace() for at in set(range(len(text))) - covered)
    assert sorted(start for start, _ in found) == [start for start, _ in found]


def test_a_long_text_is_cut_where_something_ends(memory: kvbank.TextMemory) -> None:
    text = "First paragraph, of a few words.\n\nThe second one! It goes on and on. " + "word " * 300
    memory.add(text)
    cut = [chunk.text for chunk in memory]
    assert cut == [passage for _, passage in passages(text)]
    assert "".join(cut) == text
    assert [passage for _, passage in passages("One is here. Two is here. Three.", 15)] == [
        "One is here. ",
        "Two is here. ",
        "Three.",
    ]


def test_odd_texts_come_back_as_they_were(memory: kvbank.TextMemory) -> None:
    memory.add(ODD)
    assert [chunk.text for chunk in memory] == ODD
    assert memory.search("שלום", top_k=1)[0].text == ODD[1]
    assert memory.add(ODD).written == 0


@pytest.mark.parametrize(
    ("wrong", "reason"), [("", "is empty"), (" \n", "is empty"), ("a\udce9", "surrogate"), (5, "a string")]
)
def test_texts_that_are_refused_are_named_by_their_place(memory: kvbank.TextMemory, wrong: str, reason: str) -> None:
    with pytest.raises(kvbank.InvalidArgument, match=rf"texts\[1\].*{reason}"):
        memory.add([LINES[0], wrong, LINES[1]])
    with pytest.raises(kvbank.InvalidArgument):
        memory.add(b"bytes")  # type: ignore[arg-type]
    with pytest.raises(kvbank.InvalidArgument, match="argument of its own"):
        memory.add(LINES, metadata={"source": "x"})
    memory.add(LINES)  # the bank works on


def test_ten_megabytes(client: kvbank.Client) -> None:
    memory = kvbank.TextMemory(client, new_name(), embed=CallableEmbedder(ones, name="ones"), longest=100_000)
    done: list[int] = []
    made = memory.add("ten letters " * 900_000, progress=done.append)
    assert (made.written, done[-1]) == (len(made.chunk_ids), len(made.chunk_ids))
    assert sum(len(chunk.text) for chunk in memory) == 10_800_000
    whole = kvbank.TextMemory(client, memory.bank, embed=CallableEmbedder(ones, name="ones"), longest=None)
    with pytest.raises(kvbank.TooLarge):
        whole.add("ten letters " * 900_000)


def test_what_was_interrupted_goes_on(memory: kvbank.TextMemory) -> None:
    def broken() -> Iterator[str]:
        yield from (f"line {number}" for number in range(100))
        raise OSError("the file is gone")

    with pytest.raises(OSError, match="gone"):
        memory.add(broken())
    assert memory.count() == 64  # what was embedded
    assert memory.add(f"line {number}" for number in range(100)).known == 64
    assert memory.count() == 100


def test_a_bank_says_its_embedder(client: kvbank.Client) -> None:
    name = new_name()
    kvbank.TextMemory(client, name, embed="lexical:idf,d=64", metadata={"about": "it"}).add(LINES)
    bank = client.get_bank(name)
    assert (bank.embedding.dimension, dict(bank.metadata)) == (64, {"embedder": "lexical:idf,d=64", "about": "it"})
    assert kvbank.TextMemory(client, name).search("snow")[0].text == LINES[1]
    with pytest.raises(kvbank.EmbedderMismatch, match=f"{bank.embedding.embedder_digest}.*lexical"):
        kvbank.TextMemory(client, name, embed="lexical").search("snow")
    own = new_name()
    kvbank.TextMemory(client, own, embed=CallableEmbedder(ones, name="ones")).add(LINES)
    with pytest.raises(kvbank.FailedPrecondition, match="give embed="):
        kvbank.TextMemory(client, own).search("snow")
    with pytest.raises(kvbank.BankNotFound):
        kvbank.TextMemory(client, new_name()).search("snow")
    old = new_name()
    kvbank.TextMemory(client, old, embed=LexicalEmbedder(version=1)).add(LINES)
    for embed in (None, "lexical"):  # by which nobody writes any more
        assert kvbank.TextMemory(client, old, embed=embed).search("snow")[0].text == LINES[1]


def test_a_bank_with_kv_is_read_alone(client: kvbank.Client, kv: kvbank.KVSpec) -> None:
    name, own = new_name(), LexicalEmbedder(16)
    client.create_bank(name, kv=kv, embedding=kvbank.EmbeddingSpec(own.digest, 16))
    with pytest.raises(kvbank.FailedPrecondition, match="K-V of a model"):
        kvbank.TextMemory(client, name).add(LINES)
    assert kvbank.TextMemory(client, name).search("snow") == []


def test_embedders_that_are_refused(client: kvbank.Client) -> None:
    for wrong, reason in ((5, "embed is a string"), (ones, "CallableEmbedder"), ("lexical:x", "lexical:d=DIMENSION")):
        with pytest.raises(ValueError, match=reason):
            kvbank.TextMemory(client, new_name(), embed=wrong).add(LINES)  # type: ignore[arg-type]


# Digests, and hashes of the vectors of four texts, as they were before the embedders became the client's.
EARLIER = {
    "lexical": ("32f100ae6658b503e6521e20b21c7718", "645e8bb52a0ff029841d31568f25dc89"),
    "lexical:idf": ("e59ba2acad69f541acb15b6593034668", "2e60eb7ac009a3e5c5d1fad70edd932c"),
    "lexical:d=64": ("e54231805f0c40fced8a16e1f5010459", "88478edc422a0c80558d335c5777cc71"),
    "lexical:idf,d=4096": ("61637e206e3f136a4592370e8835d55f", "828b5823377b60e643b5f7d19b745653"),
}


@pytest.mark.parametrize("spec", EARLIER)
def test_banks_that_exist_are_searched_by_the_same_numbers(spec: str) -> None:
    made = embedder(spec)
    vectors = made.embed(["The harbour was empty.", "서울 기차 e\u0301", "naïve café 42", "?!"])
    assert (made.digest, xxhash.xxh3_128_hexdigest(vectors.tobytes())) == EARLIER[spec]


WITHOUT_WORKER = """
import sys
for name in ("torch", "transformers", "model_worker"):
    sys.modules[name] = None
import kvbank
from kvbank.embed import embedder
assert embedder("lexical:idf").embed(["snow"]).any()
try:
    embedder("minilm")
except kvbank.MissingExtra as error:
    print(error)
"""


def test_without_the_worker_an_encoder_names_what_to_install() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_WORKER], capture_output=True, text=True, check=True)
    assert "embed='minilm' needs the worker: pip install 'kvbank[worker]'" in done.stdout


def test_the_asynchronous_twin_does_the_same(address: str, client: kvbank.Client) -> None:
    name = new_name()

    async def use() -> None:
        async with kvbank.connect_async(address) as own:
            memory = kvbank.AsyncTextMemory(own, name)
            made = await memory.add(LINES, source="novel")
            assert (await memory.add(iter(LINES), source="novel")).chunk_ids == made.chunk_ids
            assert [hit.text for hit in await memory.search("snow", top_k=1, source="novel")] == [LINES[1]]
            assert await memory.search("?!") == []
            assert [chunk.text async for chunk in memory] == LINES
            assert [chunk.text async for chunk in memory.chunks(source="none")] == []
            assert (await memory.count(), await memory.count(source="novel")) == (3, 3)
            assert (await memory.get(made.chunk_ids[0])).text == LINES[0]
            assert (await memory.embedder()).digest == LexicalEmbedder().digest
            assert (await memory.delete(source="novel"), await memory.count()) == (3, 0)

    asyncio.run(use())
    assert kvbank.TextMemory(client, name).add(LINES, source="novel").written == 3
