"""`kvbank train memlong`, as a user calls it."""

import json
from pathlib import Path

import pytest

from tests.support import command
from tests.train.memlong.runs import texts
from tests.worker.tiny import build, tokenizer


def kvbank(*arguments: object) -> tuple[int, str, str]:
    ended = command.run(command.application(), *arguments)
    return ended.exit_code, ended.stdout, ended.stderr


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    build("llama_gqa").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_command_trains_measures_and_resumes(tiny_folder: Path, tmp_path: Path) -> None:
    paths, run = texts(tmp_path, 3, 200), tmp_path / "run"
    train = ["train", "memlong", "--model", tiny_folder, "--text", tmp_path, "--held-out", paths[0], "--out", run]
    train += ["--held-out", paths[1], "--train", "full", "--chunk", 4, "--window", 12, "--blocks", 4, "--memory", 8]
    train += ["--steps", 3, "--eval-blocks", 24, "--device", "cpu"]
    code, out, error = kvbank(*train)
    assert code == 0, error
    assert "of the weights trained" in " ".join(out.split())
    assert "another text" in out
    assert "nats a token [" in " ".join(out.split())
    code, _, error = kvbank(*train, "--json")
    assert code == 1
    assert "is not empty" in error
    code, out, error = kvbank(*train, "--resume", "--steps", 5, "--json")
    assert code == 0, error
    assert json.loads(out)["steps"] == 5
    code, out, error = kvbank("train", "memlong", "--text", paths[0], "--print-config", "--json")
    assert code == 0, error
    assert json.loads(out)["query_tokens"] is None


def test_a_wrong_flag_is_named_and_a_wrong_line_of_the_file_too(tmp_path: Path) -> None:
    file = tmp_path / "memlong.toml"
    file.write_text('text = ["novels"]\n')
    for given, said in (
        (("--text", "novels", "--lr", "0"), "Invalid value for '--lr': Input should be greater than 0; see kvbank"),
        ((file, "--alpha", "nan"), "Invalid value for '--alpha': Input should be greater than 0; see kvbank"),
    ):
        code, _, error = kvbank("train", "memlong", *given, "--print-config")
        assert (code, said in " ".join(error.split())) == (2, True), error
    file.write_text('text = ["novels"]\nlr = 0.0\n')
    code, _, error = kvbank("train", "memlong", file, "--print-config")
    assert (code, "memlong.toml: lr: Input should be greater than 0" in " ".join(error.split())) == (1, True), error


def test_a_model_without_keys_is_refused_in_one_line(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    net = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=4, n_head=2, bos_token_id=1, eos_token_id=1))
    net.save_pretrained(tmp_path / "gpt2")
    tokenizer().save_pretrained(tmp_path / "gpt2")
    paths = texts(tmp_path)
    train = ["train", "memlong", "--model", tmp_path / "gpt2", "--text", paths[0], "--chunk", 4, "--window", 12]
    code, out, error = kvbank(*train, "--train", "full", "--out", tmp_path / "run", "--device", "cpu")
    assert code == 1
    assert not out
    assert "no rotary positions" in " ".join(error.split())
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()
