"""docs/scale.md says what its programs compute, and its picture is what is drawn."""

import subprocess
import sys
from pathlib import Path

import pytest

from docs.scale_figures import CHUNKS, GROUP, MODELS, TABLES, filled, stored

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("program", ["docs/scale_figures.py", "docs/draw_scale.py"])
def test_the_page_is_what_its_programs_make(program: str) -> None:
    done = subprocess.run([sys.executable, program, "--check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_page_has_every_table_and_one_that_is_wrong_is_seen() -> None:
    page = (ROOT / "docs" / "scale.md").read_text()
    assert all(f"<!-- table {name} -->" in page for name in TABLES)
    assert filled(page.replace("23,040 B", "23,041 B")) == page


def test_the_arithmetic() -> None:
    tokens = {(model.name, layers): model.token(layers) for model in MODELS for layers in (1, model.layers)}
    assert tokens == {
        ("SmolLM2-135M", 1): 768,
        ("SmolLM2-135M", 30): 23_040,
        ("Llama-3-8B", 1): 4096,
        ("Llama-3-8B", 32): 131_072,
    }
    assert CHUNKS == 10**9
    # 50 TB at the first price, 450 TB at the second, 500 TB at the third.
    assert stored(1_000_000) == pytest.approx(50_000 * 0.023 + 450_000 * 0.022 + 500_000 * 0.021)
    assert stored(1000) == pytest.approx(23)


def test_the_page_speaks_of_the_tables_as_they_are() -> None:
    adding = pytest.importorskip("memory_service.storage.postgres.adding")
    schema = pytest.importorskip("memory_service.storage.postgres.schema")
    page = (ROOT / "docs" / "scale.md").read_text()
    assert adding._MOST == GROUP
    assert f"are in {schema.PARTITIONS} partitions" in page
    assert {"vector"} == {schema.CHUNKS.c.embedding.type.get_col_spec()}
