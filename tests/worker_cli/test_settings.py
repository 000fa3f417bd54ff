"""Options of commands follow from settings models: a flag decides over a file, and the file over the default."""

import tomllib
from pathlib import Path

import pytest

from model_worker.errors import InputError
from model_worker.settings.file import as_toml
from model_worker.train.adapter_settings import AdapterTraining
from tests.support import command

TRAIN = ("train", "icae")


def printed(*arguments: object) -> dict[str, object]:
    """Return the settings that `--print-config` prints, read as a TOML file is."""
    ended = command.run(command.application(), *TRAIN, *arguments, "--print-config")
    assert ended.exit_code == 0, ended.stderr
    return tomllib.loads(ended.stdout)


def test_a_flag_decides_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('data = ["a.txt", "b.jsonl"]\nslots = 16\nrate = 8\nlm_row = true\nchat = false\nlr = 1e-3\n')
    found = printed(file, "--rate", 2, "--no-lm-row", "--chat", "--targets", "all-linear")
    assert (found["data"], found["slots"], found["lr"]) == (["a.txt", "b.jsonl"], 16, 1e-3)
    assert (found["rate"], found["lm_row"], found["chat"], found["targets"]) == (2, False, True, "all-linear")
    assert (found["rank"], found["schedule"]) == (128, "cosine")
    assert printed(file, "--data", "c.txt")["data"] == ["c.txt"]
    assert printed(file, "--rate", 4)["rate"] == 4  # a flag that says the default decides too


def test_what_is_printed_is_a_file_that_gives_the_same(tmp_path: Path) -> None:
    odd = 'a "b" \\ c\t\x1b\u202e\U0001f600é.txt'
    settings = AdapterTraining(data=(Path(odd), Path("b.txt")), minutes=0.5, bf16=True, seed=-3, adapter="run/adapter")
    text = as_toml(settings)
    assert all(line.isprintable() for line in text.splitlines())
    file = tmp_path / "same.toml"
    file.write_text(text)
    assert AdapterTraining(**tomllib.loads(text)) == settings
    assert printed(file) == tomllib.loads(text)
    assert "# slots =" in text  # has no value: the default is the model's
    with pytest.raises(InputError, match="not UTF-8"):
        as_toml(AdapterTraining(data=(Path("caf\udce9"),)))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"data = 7\n", "data: Input should be a valid tuple"),
        (b'data = ["a"]\nslots = 0\n', "slots: Input should be greater than or equal to 1"),
        (b'data = ["a"]\nschedule = "linear"\n', "schedule: Input should be 'cosine' or 'constant'"),
        (b'data = ["a"]\nrats = 4\n', "rats: there is no such setting"),
        (b'data = ["a"\n', "cannot read"),
        (b"data = '\xff'\n", "cannot read"),
        (b"data = []\n", "data: Tuple should have at least 1 item"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(content)
    ended = command.run(command.application(), *TRAIN, file, "--out", tmp_path / "run")
    assert (ended.exit_code, ended.stdout) == (1, "")
    [line] = ended.stderr.splitlines()
    assert str(file) in line
    assert said in line


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("slots = 4\n")
    for arguments, said in (
        (("--out", "run"), "kvbank: Missing option '--data'; see kvbank train icae --help\n"),
        (
            (file, "--out", "run"),
            f"kvbank: Missing option '--data', which {file} does not have either; see kvbank train icae --help\n",
        ),
        (("--data", "a.txt"), "kvbank: Missing option '--out'; see kvbank train icae --help\n"),
    ):
        assert command.run(command.application(), *TRAIN, *arguments) == (2, "", said)
    ended = command.run(command.application(), *TRAIN, tmp_path / "none.toml", "--out", "run")
    assert ended.exit_code == 1
    assert "No such file" in ended.stderr


def test_help_groups_the_options_and_shows_their_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    shown = command.run(command.application(), *TRAIN, "--help").stdout
    text = " ".join(shown.split())
    assert all(name in text for name in ("The adapter (ignored with --adapter)", "Data and objective", "The run"))
    missing = [name for name in AdapterTraining.model_fields if f"--{name.replace('_', '-')}" not in text]
    assert missing == []
    assert "[default: cosine]" in text
    assert "--lm-row" in text
    assert "--no-lm-row" in text
