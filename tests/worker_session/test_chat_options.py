"""The options of `kvbank chat` that say which model runs, on what, and what it remembers by."""

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

import kvbank
from model_worker.embed import embedder
from model_worker.embed.hybrid import WEIGHT
from model_worker.pretrained.catalogue import PRETRAINED
from model_worker.pretrained.obtain import obtain
from tests.support import command
from tests.support.diagonal import rotated
from tests.worker_session.conftest import byte_tokenizer, said_in


def kvbank_command(*arguments: object, stdin: str = "") -> command.Ended:
    return command.run(command.application(), *arguments, stdin=stdin)


def save_encoder(folder: Path) -> Path:
    """Write a tiny encoder of random weights."""
    torch.manual_seed(1)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "</s>"
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def chat(model_folder: Path, address: str, sea: str) -> list[object]:
    begin = ["chat", "-s", sea, "--memory", address, "--model", model_folder]
    return [*begin, "--max-new-tokens", 3, "--window", 128]


def session_of(address: str, name: str) -> kvbank.Session:
    with kvbank.connect(address) as client:
        return client.sessions.get(name=name)


def test_a_bank_is_searched_by_the_embedder_that_was_asked_for(chat: list[object], address: str, sea: str) -> None:
    done = kvbank_command(*chat, "--embed", "lexical:idf", stdin="ahoy\n")
    assert done.exit_code == 0, done.stderr
    bank = session_of(address, sea).bank
    with kvbank.connect(address) as client:
        assert client.get_bank(bank).embedding.embedder_digest == embedder("lexical:idf").digest
    refused = kvbank_command(*chat, "--embed", "lexical", stdin="ahoy\n")
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert f"bank {bank!r} is searched by another embedder" in refused.stderr


def test_window_sinks_recent_and_positions_are_the_models(chat: list[object], address: str, sea: str) -> None:
    options = ["--window", 96, "--sinks", 2, "--recent", 1, "--positions", "near:16", "--device", "cpu"]
    done = kvbank_command(*chat, *options, "--dtype", "float32", stdin="word " * 60 + "\nahoy\n")
    assert done.exit_code == 0, done.stderr
    assert len(said_in(address, sea)) == 2


def test_a_session_keeps_the_embedder_that_it_was_begun_with(chat: list[object], address: str, sea: str) -> None:
    begun = kvbank_command(*chat, "--embed", "lexical:idf", stdin="ahoy\n")
    assert "begins, nothing in its bank yet, found by lexical:idf; " in begun.stderr
    again = kvbank_command(*chat, stdin="who\n")
    assert (again.exit_code, len(said_in(address, sea))) == (0, 2), again.stderr
    assert kvbank_command(*chat, stdin=f"/fork {sea}-lake\n").exit_code == 0
    forked = kvbank_command("chat", "-s", f"{sea}-lake", *chat[3:], stdin="who\n")
    assert forked.exit_code == 0, forked.stderr
    with kvbank.connect(address) as client:
        bank = client.get_bank(session_of(address, f"{sea}-lake").bank)
    assert bank.embedding.embedder_digest == embedder("lexical:idf").digest


def test_a_new_session_goes_by_the_encoder_that_is_there_and_an_old_one_by_its_own(
    chat: list[object], sea: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "found by lexical:idf; " in kvbank_command(*chat, stdin="ahoy\n").stderr
    monkeypatch.setenv("KVBANK_CACHE", str(tmp_path / "cache"))
    obtain(PRETRAINED["minilm"], given=save_encoder(tmp_path / "encoder"))
    old = kvbank_command(*chat, stdin="ahoy\n")
    assert old.exit_code == 0
    assert "found by lexical:idf; " in old.stderr
    new = kvbank_command("chat", "-s", f"{sea}-lake", *chat[3:], stdin="ahoy\n")
    assert new.exit_code == 0, new.stderr
    assert f"found by hybrid:lexical:idf+minilm,w={WEIGHT:g}; " in new.stderr
    assert kvbank_command("chat", "-s", f"{sea}-lake", *chat[3:], stdin="ahoy\n").exit_code == 0
    assert kvbank_command("model", "rm", "minilm").exit_code == 0
    gone = kvbank_command("chat", "-s", f"{sea}-lake", *chat[3:], stdin="ahoy\n")
    assert (gone.exit_code, gone.stderr.count("\n")) == (1, 1)
    assert "minilm is not on this machine yet: kvbank model get minilm" in gone.stderr


@pytest.mark.parametrize("embed", rotated(["./encoder", "encoder", "hybrid:lexical:idf+encoder,w=0.3"], 2))
def test_folders_of_model_and_embedder_are_found_again_from_another_place(
    chat: list[object], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embed: str
) -> None:
    save_encoder(tmp_path / "encoder")
    (tmp_path / "lexical").mkdir()  # a name goes before a folder of that name
    (tmp_path / "model").symlink_to(model_folder)
    monkeypatch.chdir(tmp_path)
    begun = kvbank_command(*chat, "--model", "model", "--embed", embed, stdin="ahoy\n")
    assert begun.exit_code == 0, begun.stderr
    monkeypatch.chdir(tmp_path / "encoder")
    again = kvbank_command(*chat[:5], *chat[7:], stdin="who\n")
    assert again.exit_code == 0, again.stderr


def test_a_system_prompt_is_the_sessions_for_good(chat: list[object], address: str, sea: str) -> None:
    assert kvbank_command(*chat, "--system", "You speak of the sea.", stdin="ahoy\n").exit_code == 0
    assert session_of(address, sea).settings["system"] == "You speak of the sea."
    assert kvbank_command(*chat, stdin="ahoy\n").exit_code == 0
    other = kvbank_command(*chat, "--system", "You speak of ships.", stdin="ahoy\n")
    assert (other.exit_code, other.stderr.count("\n")) == (1, 1)
    assert "was begun with 'You speak of the sea.'" in other.stderr


def test_sessions_may_share_a_bank_of_a_name(chat: list[object], address: str, sea: str) -> None:
    """Recall what was said in the session alone."""
    bank = f"the {sea}"
    with kvbank.connect(address) as client:
        assert kvbank_command(*chat, "--bank", bank, stdin="word " * 200 + "\n").exit_code == 0
        assert session_of(address, sea).bank == bank
        assert client.get_bank(bank).usage.chunks > 0
        lake = ["chat", "-s", f"{sea}-lake", *chat[3:]]
        for arguments, words in [
            ([*chat, "--bank", "another"], f"session {sea!r} has bank {bank!r}, and keeps it"),
            ([*lake, "--bank", ""], "bank '': 1 to 200 printable characters"),
            ([*lake, "--bank", " sea"], "bank ' sea': 1 to 200 printable characters"),
        ]:
            done = kvbank_command(*arguments, stdin="ahoy\n")
            assert (done.exit_code, done.stderr.count("\n")) == (1, 1), done.stderr
            assert words in done.stderr
        assert kvbank_command(*lake, "--bank", bank, stdin="other " * 200 + "\n").exit_code == 0
        own = [list(client.list_chunks(bank, filter=session_of(address, name).filter)) for name in (sea, f"{sea}-lake")]
        texts = ["".join(chunk.text for chunk in chunks) for chunks in own]
        assert ["other" in text for text in texts] == [False, True]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "cuda:99"], "there is no CUDA device 'cuda:99' here; use --device cpu"),
        (["--device", "tpu"], "device 'tpu' is not auto, cpu or cuda"),
        (["--dtype", "int8"], "dtype 'int8' is not one that a model computes in"),
        (["--embed", "./nowhere"], "there is no model folder './nowhere'"),
        (["--embed", "smollm2"], "smollm2 is a language model, and an encoder is wanted here: name it by --model"),
        (["--embed", "minilm"], "minilm is not on this machine yet: kvbank model get minilm"),
        (["--model", "minilm"], "minilm is an encoder, and a language model is wanted here: name it by --embed"),
        (["--model", "smollm2"], "smollm2 is not on this machine yet: kvbank model get smollm2"),
        (["--positions", "far"], "positions 'far' is not one of"),
    ],
)
def test_what_cannot_be_is_one_line(
    chat: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], words: str
) -> None:
    monkeypatch.setenv("KVBANK_CACHE", str(tmp_path / "empty"))
    done = kvbank_command(*chat, *options, stdin="ahoy\n")
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith(f"kvbank: {words}")


def test_the_folder_of_a_language_model_is_no_embedder(chat: list[object], model_folder: Path) -> None:
    done = kvbank_command(*chat, "--embed", model_folder, stdin="ahoy\n")
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "is a language model, and an encoder is wanted here" in done.stderr
