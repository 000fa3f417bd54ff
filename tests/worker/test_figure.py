"""Figures tell every line apart, keep names as they are, and are the same each time; those of docs/ are up to date."""

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib as mpl
import pytest

from model_worker.evaluate.figure import Figure, Panel, Point, Series, draw
from model_worker.evaluate.figures import compression_figure, documented
from model_worker.evaluate.interval import Share
from tests.support.diagonal import rotated

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"
ODD = "a <b> & $x$ \x1b[31m\x00"


def figure(names: list[str]) -> Figure:
    points = [[Point.around(16, 3.0 + at, 0.25), Point.around(32, 2.5 + at, 0.5)] for at in range(len(names))]
    lines = [Series(name, own) for name, own in zip(names, points, strict=True)]
    return Figure("a title", "What it shows.", "tokens kept", "loss, nats", [Panel("panel", lines, {"full": 2.0})])


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter(f"{SVG}text")]


def test_a_figure_says_what_it_shows() -> None:
    svg = draw(figure(["one", ODD]))
    assert {"a title", "panel", "tokens kept", "loss, nats", "one", "full", "16", "32"} <= set(texts(svg))
    assert r"a <b> & $x$ \x1b[31m\x00" in texts(svg)
    root = ET.fromstring(svg)
    assert root.get("role") == "img"
    assert root.findtext(f"{SVG}title") == "a title"
    told = root.findtext(f"{SVG}desc") or ""
    assert told.startswith("What it shows. Across: tokens kept. Up: loss, nats.")
    assert "panel, one: 3 ± 0.25 at 16, 2.5 ± 0.5 at 32." in told


def test_a_share_is_drawn_where_it_was_measured() -> None:
    """Draw all of 30 at the top of the axis, with an interval below it alone."""
    every, half = (Point.of_share(at, Share(right, 30).document()) for at, right in ((16, 30), (32, 15)))
    assert (every.y, every.above) == (1.0, pytest.approx(0.0))
    assert every.below == pytest.approx(1 - Share(30, 30).low)
    assert half.below == pytest.approx(half.above)
    svg = draw(Figure("a", "What.", "tokens", "share", [Panel("panel", [Series("one", [every, half])])]))
    assert "panel, one: 1 (0.89 to 1) at 16, 0.5" in svg


def test_the_same_figure_is_the_same_bytes() -> None:
    assert draw(figure(["one", "two"])) == draw(figure(["one", "two"]))


def test_no_two_lines_are_alike() -> None:
    """Lines have a colour with a marker with dashes of their own, also where there are more lines than colours."""
    svg = draw(figure([f"line {number}" for number in range(20)]))
    lines = re.findall(r'style="fill: none; (stroke-dasharray: [^;]*; )?[^"]*stroke: (#\w{6}); stroke-width: 1.4', svg)
    styles = [f"{colour} {dashes}" for dashes, colour in lines]
    assert len(styles) == 2 * 20  # in the plot and in the legend
    assert len(set(styles)) == 20


def test_nothing_is_drawn_in_black_or_white() -> None:
    """Black is lost on a dark page, white on a light one; there is no background."""
    svg = draw(figure(["one"]))
    assert not re.search(r"(fill|stroke): (#000000|#ffffff|black|white)", svg)
    assert "<text style=" in svg
    assert all("fill: #767676" in style for style in re.findall(r'<text style="([^"]*)"', svg))


def test_methods_stand_with_their_family() -> None:
    """Draw a method as one line, whatever its budget and wherever the budget stands among its parameters."""
    rows = [
        {"method": name, "budget": budget, "above": 0.1, "above_width": 0.01}
        for budget in (8, 16)
        for name in (
            "nothing",
            "full",
            f"window:m={budget}",
            f"tova:m={budget}",
            f"tova:m={budget},block=1",
            f"homer:m={budget},leaf=64",
            f"leaves of 64, {budget} tokens",
            f"press:SnapKVPress,m={budget},window_size=16",
        )
    ]
    panels = compression_figure("m", 64, rows).panels
    assert [(panel.title, [line.name for line in panel.series]) for panel in panels] == [
        ("others", ["window", "press:SnapKVPress window_size=16"]),
        ("tova", ["tova", "tova block=1"]),
        ("homer", ["homer leaf=64", "leaves of 64"]),
    ]


@pytest.mark.parametrize(
    "name",
    rotated(
        ["compression.svg", "homer-memory.svg", *(f"icae-{x}.svg" for x in ("length", "slots", "continuation"))], 0
    ),
)
def test_figures_of_the_docs_are_those_of_their_documents(name: str) -> None:
    """`python -m model_worker.evaluate.figures docs/measured docs` draws them again."""
    pinned = re.search(r"^matplotlib==(.*)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    assert pinned
    if mpl.__version__ != pinned[1]:
        pytest.skip(f"another matplotlib than {pinned[1]} draws other bytes")
    assert draw(documented(ROOT / "docs" / "measured")[name]) == (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_tables_of_the_docs_have_the_figures_of_their_documents() -> None:
    page = (ROOT / "docs" / "compression.md").read_text(encoding="utf-8")
    for row in json.loads((ROOT / "docs" / "measured" / "compression.json").read_text(encoding="utf-8")):
        if row["method"] != "full":
            assert f"{row['above']:+.3f} ± {row['above_width']:.3f}" in page, row["method"]
    page = (ROOT / "docs" / "icae.md").read_text(encoding="utf-8")
    for adapter in json.loads((ROOT / "docs" / "measured" / "icae.json").read_text(encoding="utf-8")):
        for made in (*adapter["restoration_by_length"], *adapter["restoration_by_content"].values()):
            nats = " | ".join(f"{made[reader]['nats']:.3f}" for reader in ("own", "other", "plain"))
            assert f"| {nats} | {made['own']['right']:.3f} |" in page


def test_documents_are_what_the_commands_print() -> None:
    for path in (ROOT / "docs" / "measured").glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert json.dumps(json.loads(text), indent=2) + "\n" == text
