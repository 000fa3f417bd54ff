"""What a chunk takes of a database: the figures of docs/scale.md go by it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import psycopg
import pytest

from docs.scale_figures import DIMENSION, INDEXES, ROW
from memory_service.domain.model import EmbeddingSpec
from tests.support.engines import ENGINES, opened
from tests.support.store import adding, new_bank, new_chunk
from tests.support.writing import PAYLOAD

KIND = ENGINES["postgres"]
pytestmark = pytest.mark.skipif(bool(KIND.missing()), reason=KIND.missing())
CHUNKS, TOKENS, TEXT = 500, 64, "All that a bank remembers takes room. " * 7
# The tables that grow with the chunks; those of the log of changes and of evictions have bounds of their own.
SIZES = """
    SELECT sum(pg_table_size(c.oid))::int8, sum(pg_indexes_size(c.oid))::int8
    FROM pg_class c WHERE c.relkind = 'r' AND c.relname ~ '^(chunks_[0-9]+|keys|chunk_use)$'
"""


def test_a_chunk_takes_what_the_page_says(tmp_path: Path) -> None:
    with KIND.place(tmp_path) as place, psycopg.connect(place["data"], autocommit=True) as connection:
        before = connection.execute(SIZES).fetchone()
        with opened(place) as engine:
            spec = EmbeddingSpec("embedder", DIMENSION)
            bank, _ = engine.store.create_bank(replace(new_bank(), embedding=spec))
            draw = np.random.default_rng(0)
            written = [
                adding(
                    engine.store,
                    bank,
                    new_chunk(
                        number,
                        embedding=draw.standard_normal(DIMENSION).astype("<f4").tobytes(),
                        token_ids=draw.integers(0, 50_000, TOKENS).astype("<i4").tobytes(),
                        text=TEXT[: TOKENS * 4],
                        payload=PAYLOAD,
                    ),
                )
                for number in range(CHUNKS)
            ]
            for each in written:
                each.result(60)
        after = connection.execute(SIZES).fetchone()
    assert before is not None
    assert after is not None
    row, indexes = ((now - then) / CHUNKS for now, then in zip(after, before, strict=True))
    assert (row, indexes) == (pytest.approx(ROW, rel=0.1), pytest.approx(INDEXES, rel=0.15))
