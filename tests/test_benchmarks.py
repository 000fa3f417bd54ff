"""The benchmarks run through and say what they measured; how fast anything is, is not tested."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def measured(tmp_path: Path, row: str) -> dict[str, Any]:
    """Write the file of a run of two rounds."""
    out = tmp_path / "bench.json"
    ended = run("--quick", "--only", row, "--rounds", "2", "--out", str(out), "--json")
    assert ended.returncode == 0, ended.stderr
    document: dict[str, Any] = json.loads(out.read_text())
    assert json.loads(ended.stdout) == document
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
    return document


@pytest.mark.slow
def test_a_row_is_measured_and_written(tmp_path: Path) -> None:
    document = measured(tmp_path, "same_host_fetch")
    assert document["machine"]["cores"] > 0
    for entry in document["results"]:
        assert entry["row"] == "same_host_fetch"
        assert entry["unit"] == "ms"
        assert entry["n"] == 2
        assert entry["ours"] > 0
        assert entry["ratio"] == entry["ours"] / entry["floor"]
        assert entry["load_average"] >= 0
        assert entry["against"]
    judged = [(entry, target) for entry in document["results"] for target in entry["targets"]]
    assert judged
    # What is left out is said.
    assert {(item["what"], item["why"]) for item in document["skipped"]} == {
        ("lmcache_blobs", "floors only"),
        ("redis_blobs", "floors only"),
    }
    for entry, target in judged:
        assert target["of"] == "ours"
        assert target["met"] == (entry["ours"] <= target["limit"])


@pytest.mark.slow
def test_a_search_is_measured_with_its_recall(tmp_path: Path) -> None:
    results = measured(tmp_path, "search")["results"]
    recalls = [entry for entry in results if entry["name"].startswith("recall@10, ")]
    assert {entry["name"].rpartition(", ")[2] for entry in recalls} == {"the call over TCP", "the index alone"}
    calls = [entry["name"] for entry in results if entry["against"] == "the index alone"]
    assert [name.rpartition(" over ")[2] for name in calls] == ["TCP", "a unix socket"] * 2
    for entry in recalls:
        assert 0.9 < entry["floor"] <= 1
        assert entry["ours"] == 1 or ("lists" in entry["name"] and 0.9 < entry["ours"] <= 1)
    assert {entry["unit"] for entry in results} == {"ms", "of 1"}
    assert any("lists" in entry["name"] for entry in results)


def test_an_unknown_row_is_refused() -> None:
    ended = run("--only", "nonsense")
    assert ended.returncode == 2
    assert "nonsense" in ended.stderr


@pytest.mark.slow
def test_the_hot_paths_say_which_threads_and_functions_take_the_time() -> None:
    command = [sys.executable, "-m", "benchmarks.hot_paths", "--vectors", "200", "--rounds", "2", "--over", "unix"]
    shown = [*command, "--only", "search", "--only", "fetch 1 MiB", "--functions", "3"]
    ended = subprocess.run(shown, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "fetch 1 MiB over unix" in ended.stdout
    assert "kvbank-direct" in ended.stdout
    assert "load average" in ended.stdout
