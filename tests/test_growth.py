"""What `benchmarks.growth` measured is kept by size, its slopes are those of its figures, and docs/growth.md has it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.growth.log import Log, Point
from benchmarks.growth.slopes import slope, table

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def point(size: int, cost: float, axis: str = "chunks") -> Point:
    return Point(axis, size, {"search, ms": cost, "none": 0.0}, 1.5, "2026-12-01T11:00+00:00")


def test_a_log_keeps_the_last_figures_of_each_size(tmp_path: Path) -> None:
    log = Log(tmp_path / "log")
    for made in (point(100, 3.0), point(10, 1.0), point(100, 2.0), point(10, 9.0, "banks")):
        log.add(made)
    again = Log(tmp_path / "log")
    assert again.of("chunks") == log.of("chunks") == [point(10, 1.0), point(100, 2.0)]
    assert ("banks", 10) in again
    assert ("banks", 100) not in again


def test_a_slope_is_the_exponent_of_the_growth() -> None:
    assert slope([1, 10, 100], [5, 5, 5]) == pytest.approx(0)
    assert slope([1, 10, 100], [2, 20, 200]) == pytest.approx(1)
    assert slope([1, 4, 16], [3, 6, 12]) == pytest.approx(0.5)
    assert slope([1], [3]) is None
    assert slope([1, 10], [0, 3]) is None


def test_a_table_has_the_slope_of_all_sizes_and_of_the_last_two() -> None:
    rows = table("chunks of the bank", [point(1, 1.0), point(10, 1.0), point(100, 1000.0)])
    assert rows == [
        ["chunks of the bank", "search, ms", "none", "load"],
        ["1", "1", "0", "1.5"],
        ["10", "1", "0", "1.5"],
        ["100", "1,000", "0", "1.5"],
        ["slope", "1.50", "", ""],
        ["slope of the last two", "3.00", "", ""],
    ]


def test_the_page_has_the_figures_that_were_measured() -> None:
    checked = run("-m", "benchmarks.growth.page", "--check")
    assert checked.returncode == 0, checked.stderr


@pytest.mark.slow
def test_what_the_log_has_is_not_measured_again(tmp_path: Path) -> None:
    command = ["-m", "benchmarks.growth", "--axis", "banks", "--rounds", "4", "--log", str(tmp_path / "log"), "--json"]
    first, second = (run(*command, "--most", str(most)) for most in (1, 10))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    (one,), both = json.loads(first.stdout), json.loads(second.stdout)
    assert [found["size"] for found in both] == [1, 10]
    assert both[0] == one
    for found in both:
        assert all(value > 0 for value in found["figures"].values())
        assert "search, processor ms" in found["figures"]
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
