"""The worker's commands as a user runs them, with the shipped model."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvbank.console import ending
from model_worker.attaching import attach
from model_worker.attachment.loading import load_model
from model_worker.demo.story import plant
from model_worker.errors import InputError
from model_worker.evaluate.facts import TRAINING_SEEDS, make_facts
from tests.support import command


def installed(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command, in a process of its own."""
    command = [str(Path(sys.executable).with_name("kvbank")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


Done = subprocess.CompletedProcess[str]


@pytest.fixture
def kvbank(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run the same entry point in this process, without the seconds that a new one takes to import torch."""
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # what the command sets goes with the test

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["kvbank", *arguments])
        with pytest.raises(SystemExit) as ended:
            ending.run(command.application())
        code = ended.value.code
        return subprocess.CompletedProcess(arguments, code if isinstance(code, int) else 0, *capsys.readouterr())

    return run


def check_demo(done: Done, facts: int) -> dict[str, Any]:
    """Check the claims of the table of `make demo` by the demo's own JSON, which is returned."""
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["chunks_evicted"] > 0
    assert sum(report["evicted_by_reason"].values()) == report["chunks_evicted"]
    assert (report["asked"], report["never_asked"]) == (facts // 2, facts // 2)
    right, asked = report["with_memory"]
    assert asked == report["asked_survived"] > 0
    assert right >= 0.9 * asked
    assert report["second_worker"] == report["with_memory"] == report["after_kill"]
    assert report["read_again"][1] == report["full_window"][1] == report["full_window_read_again"][1] == asked
    assert report["without_memory"][0] <= 1
    assert report["other_memory"][0] <= 1
    assert "the service was killed" in done.stderr
    return report


@pytest.mark.slow
def test_demo_recalls_with_memory_only_and_after_a_kill(kvbank: Callable[..., Done]) -> None:
    options = ("--limit", "20000", "--facts", "4", "--capacity", "100", "--seed", "3")
    check_demo(kvbank("demo", *options, "--json"), 4)


@pytest.mark.slow
def test_demo_on_a_tenth_of_the_text() -> None:
    """Test the installed command with all its facts, of which reading again tells some too."""
    report = check_demo(installed("demo", "--limit", "40000", "--capacity", "100", "--seed", "3", "--json"), 20)
    assert report["read_again"][0] >= 0.7 * report["asked_survived"]


def test_layers_finds_the_layer_that_the_model_was_made_with(kvbank: Callable[..., Done]) -> None:
    done = kvbank("layers", "--json", "--trials", "2")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    best = max((s for s in answer["layers"] if s["layer"] is not None), key=lambda s: s["drop_zero"])
    config = json.loads(
        (Path(__file__).parents[2] / "model_worker/assets/kvbank-small/config.json").read_text(encoding="utf-8")
    )
    assert [best["layer"]] == config["kvbank"]["memory_layers"]
    assert best["drop_zero"] > answer["loss_without_memory"] / 2


@pytest.mark.slow
def test_layers_are_chosen_into_a_file_that_attach_reads(kvbank: Callable[..., Done], tmp_path: Path) -> None:
    """Test that a choice begins with all layers, although the model's own entry names fewer."""
    shipped = Path(__file__).parents[2] / "model_worker/assets/kvbank-small"
    folder, chosen, picture = (tmp_path / name for name in ("model", "layers.json", "layers.svg"))
    shutil.copytree(shipped, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["kvbank"] = {"mode": "per_layer", "retrieval_layers": [1, 2], "chunk": 48, "top_k": 2, "positions": "zero"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    facts = ("--wording=number", "--local=0", "--facts=4", "--fresh=4")
    places = ("--out", str(chosen), "--plot", str(picture), "--log", str(tmp_path / "log"))
    done = kvbank("layers", "--choose", "--model", str(folder), *facts, *places, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["chosen"]["kept"]["share"] >= 0.95
    assert found["all"]["layers"] == [0, 1, 2, 3, 4]
    assert (found["chunk"], found["hits"], found["positions"]) == (48, 2, "zero")
    assert found["command"] == "kvbank layers --model model --choose --facts 4 --fresh 4 --local 0 --wording number"
    assert all(f">{line}</text>" in picture.read_text() for line in ("sets of the search", "confirmed on other facts"))
    attachment = attach(*load_model(folder), layers=chosen)
    attachment.detach()
    assert attachment.plan.memory_layers == tuple(found["chosen"]["layers"])
    said = json.loads(chosen.read_text())["measured"]
    assert (said["chosen"], said["seed"], said["keep"]) == (found["chosen"], 0, 0.95)
    table = kvbank("layers", "--choose", "--model", str(folder), *facts, *places).stdout.splitlines()
    assert table[-1] == f"written to {chosen}, for attach(layers=FILE)"
    few, every = (found[name]["bytes_per_token"] for name in ("chosen", "all"))
    saved = f"{few:,} bytes a token in place of {every:,}"
    assert any(line.startswith("chosen: ") and line.endswith(saved) for line in table)
    assert few * 5 == every * len(found["chosen"]["layers"])


def test_compressors_are_listed_with_paper_and_cost(kvbank: Callable[..., Done]) -> None:
    rows = json.loads(kvbank("compressors", "--json").stdout)
    assert [row["write"] for row in rows][:2] == ["none", "tova:m=N[,observer=last][,heads=shared][,block=...]"]
    assert {"homer", "h2o", "window", "sinks", "random"} <= {row["write"].partition(":")[0] for row in rows}
    assert all(row["keeps"] and row["paper"] and row["cost"] for row in rows)
    table = kvbank("compressors").stdout
    assert max(map(len, table.splitlines())) <= 80
    said = table.replace("│", " ").split()
    for row in rows:
        parts = re.split(r"(?=\[,)", row["write"])  # broken between parameters only
        assert set(parts) | {word for text in list(row.values())[1:] for word in text.split()} <= set(said)


def test_homer_calibrate(kvbank: Callable[..., Done], tmp_path: Path) -> None:
    """Tables go where the command is told, for the model and the rope scaling that were asked for."""
    made = {}
    for rope in (None, "yarn:2"):
        path = tmp_path / f"{rope}.safetensors"
        options = ["--distances", "64", "--segments", "3", "--out", str(path), "--json"]
        done = kvbank("homer", "calibrate", *options, *(["--rope", rope] if rope else []))
        made[rope] = json.loads(done.stdout)
        assert path.is_file()
        assert made[rope]["path"] == str(path)
        assert (made[rope]["segments"], made[rope]["distances"]) == ("3", "64")
    assert made[None]["model"] != made["yarn:2"]["model"]


def test_eval_compression(kvbank: Callable[..., Done], tmp_path: Path) -> None:
    """Rows are for nothing, full, and each method at each budget; the picture has a line for each method."""
    options = ["--chunk", "64", "--follow", "16", "--documents", "3", "--budget", "8", "--budget", "16"]
    methods = ["--method", "window:m=N", "--method", "tova:m=N"]
    picture = tmp_path / "plot.svg"
    done = kvbank("eval", "compression", *options, *methods, "--plot", str(picture), "--json")
    rows = json.loads(done.stdout)["rows"]
    assert [row["method"] for row in rows] == [
        "nothing",
        "full",
        *(f"{m}:m={n}" for n in (8, 16) for m in ("window", "tova")),
    ]
    assert rows[1]["loss"] < rows[0]["loss"]
    assert all(f">{line}</text>" in picture.read_text() for line in ("window", "tova", "tokens kept of 64"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--text", "no-such-file.txt"], "cannot read"),
        (["demo", "--model", "./no-such-folder"], "no model folder"),
        (["demo", "--compressor", "zip"], "unknown compressor"),
        (["layers", "--model", "./no-such-folder"], "no model folder"),
        (["layers", "--choose", "--wording", "color"], "there is no wording 'color'"),
        (["layers", "--choose", "--out", "no-such-folder/layers.json"], "cannot write"),
        (["layers", "--out", "layers.json"], "belong to --choose"),
        (["layers", "--device", "cuda:99"], "there is no CUDA device 'cuda:99' here"),
        (["eval", "compression", "--dtype", "int8"], "dtype 'int8' is not one that a model computes in"),
        (["demo", "--embed", "./no-such-folder"], "no model folder"),
        (["homer", "calibrate", "--rope", "yarn"], "write linear:F"),
        (["eval", "compression", "--text", "no-such-file.txt"], "cannot read"),
    ],
)
def test_wrong_input_is_one_line(kvbank: Callable[..., Done], arguments: list[str], words: str) -> None:
    done = kvbank(*arguments)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("kvbank: ")


def test_empty_text_is_one_line(kvbank: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    done = kvbank("demo", "--text", str(tmp_path / "empty.txt"))
    assert done.returncode == 1
    assert done.stderr.strip() == "kvbank: the text is empty"


def test_more_facts_than_the_other_text_has_room_for_are_refused_before_anything_is_begun(
    kvbank: Callable[..., Done],
) -> None:
    done = kvbank("demo", "--facts", "400")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "too few sentences to plant so many facts in" in done.stderr


def test_facts_are_planted_whole_and_differ_by_seed() -> None:
    import random

    text = "A sentence that says little.\n" * 2000
    facts = make_facts(1, 20)
    planted = plant(text, facts, random.Random(1))
    assert all(planted.count(fact.statement) == 1 for fact in facts)
    assert "".join(planted.replace(f"\n{f.statement}\n", "") for f in facts[:1]).count("A sentence") == 2000
    assert {f.name for f in facts}.isdisjoint(f.name for f in make_facts(2, 20))
    assert {f.name for f in facts}.isdisjoint(f.name for f in make_facts(TRAINING_SEEDS + 1, 20))
    with pytest.raises(InputError, match="too few sentences"):
        plant("no sentence ends here", facts, random.Random(1))


@pytest.mark.parametrize("command", [("compression", "--plot"), ("homer-memory", "--plot"), ("icae", "--plots")])
def test_a_picture_without_matplotlib_is_one_line_before_the_measurement(
    kvbank: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    name, option = command
    done = kvbank("eval", name, "--model", str(tmp_path / "no model"), option, str(tmp_path / "picture"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("module 'matplotlib' is not installed: pip install 'kvbank[eval]'\n")
