"""The options of `kvbank chat` that say which model runs, on what, and what it remembers by."""

from pathlib import Path

import pytest

import kvbank
from kvbank.commands import application
from model_worker.embed import embedder
from model_worker.session.folder import read_session
from tests.support import command


def kvbank_command(*arguments: object, stdin: str = "") -> command.Ended:
    return command.run(application(), *arguments, stdin=stdin)


@pytest.fixture
def chat(model_folder: Path, address: str, tmp_path: Path) -> list[object]:
    begin = ["chat", "-s", "sea", "--sessions", tmp_path, "--memory", address, "--model", model_folder]
    return [*begin, "--max-new-tokens", 3, "--window", 128]


def test_a_bank_is_searched_by_the_embedder_that_was_asked_for(
    chat: list[object], address: str, tmp_path: Path
) -> None:
    done = kvbank_command(*chat, "--embed", "lexical:idf", stdin="ahoy\n")
    assert done.exit_code == 0, done.stderr
    bank = read_session(tmp_path, "sea")[0].bank
    with kvbank.connect(address) as client:
        assert client.get_bank(bank).embedding.embedder_digest == embedder("lexical:idf").digest
    refused = kvbank_command(*chat, "--embed", "lexical", stdin="ahoy\n")
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert f"bank {bank!r} is searched by another embedder" in refused.stderr


def test_window_sinks_recent_and_positions_are_the_models(chat: list[object], tmp_path: Path) -> None:
    options = ["--window", 96, "--sinks", 2, "--recent", 1, "--positions", "near:16", "--device", "cpu"]
    done = kvbank_command(*chat, *options, "--dtype", "float32", stdin="word " * 60 + "\nahoy\n")
    assert done.exit_code == 0, done.stderr
    assert len([turn for turn in read_session(tmp_path, "sea")[1] if not turn.part]) == 2


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
