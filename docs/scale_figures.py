"""Compute the tables of docs/scale.md, each between the line `<!-- table NAME -->` and an empty line behind it.

    python docs/scale_figures.py            write them
    python docs/scale_figures.py --check    fail where the page has other ones

Bytes are decimal (GB, TB), memory of machines is binary (GiB). What is measured (`ROW`, `INDEXES`, `VECTOR`) is
measured again by the tests; prices are those that the page names.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).with_name("scale.md")
CHUNKS, DIMENSION, TOKENS = 10**9, 384, 64
# Bytes of a chunk in PostgreSQL, with its embedding, 64 token ids, 256 letters of text and a payload of one layer; and
# of its entries in indexes (tests/postgres/test_size.py).
ROW, INDEXES = 3100, 160
# Bytes of a vector in the index of a service: fp16, and its id.
VECTOR = 2 * DIMENSION + 8
GIB, HOURS = 2**30, 730
# Chunks that wait for the same bank and go in one transaction.
GROUP = 64


class Model(NamedTuple):
    """The K-V of a model: layers, key/value heads, the length of one head's key, and the bytes of a number."""

    name: str
    layers: int
    heads: int
    head: int
    number: int = 2

    def token(self, layers: int) -> int:
        """Return the bytes of a token in so many layers: a key and a value."""
        return layers * 2 * self.heads * self.head * self.number


MODELS = (Model("SmolLM2-135M", 30, 3, 64), Model("Llama-3-8B", 32, 8, 128))


class Prices(NamedTuple):
    """What things cost in US dollars. bucket: a GB and month, in the tiers that begin at so many GB; put, get: a
    thousand requests; disk: a GB and month of the database's; memory: a GiB and hour of a machine's, with its share of
    processors."""

    bucket: Mapping[int, float]
    put: float
    get: float
    disk: float
    memory: float


PRICES = Prices({0: 0.023, 50_000: 0.022, 500_000: 0.021}, 0.005, 0.0004, 0.115, 0.0816 / 8)


def stored(gigabytes: float) -> float:
    """Return what so many GB of the bucket cost a month."""
    begins = [*PRICES.bucket, float("inf")]
    return sum(max(0.0, min(gigabytes, end) - begin) * PRICES.bucket[begin] for begin, end in pairwise(begins))


def rows() -> list[list[str]]:
    """Return what a billion chunks take of the database."""
    single, half = 4 * DIMENSION + 8, 2 * DIMENSION + 8
    return [
        ["of a chunk", "bytes", f"of {CHUNKS:,} chunks"],
        _row("embedding, `vector` (float32), as it is today", single),
        _row("embedding, `halfvec` (not offered)", half),
        _row("all else of the rows: text, token ids, metadata, key, counts", ROW - single),
        _row("indexes of the tables", INDEXES),
        _row("**together, today**", ROW + INDEXES),
    ]


def _row(name: str, size: int) -> list[str]:
    return [name, f"{size:,}", _size(size * CHUNKS)]


def tokens() -> list[list[str]]:
    """Return the K-V of a token, of a chunk, and of a billion chunks, by model and layers."""
    table = [["model, layers with a memory", "a token", f"a chunk of {TOKENS} tokens", f"{CHUNKS:,} chunks"]]
    for model in MODELS:
        for layers in (1, model.layers):
            which = "one" if layers == 1 else f"all {layers}"
            size = model.token(layers)
            chunk = size * TOKENS
            table.append([f"{model.name}, {which}", f"{size:,} B", _size(chunk), _size(chunk * CHUNKS)])
    return table


def memory() -> list[list[str]]:
    """Return the memory of indexes by the chunks of a bank, and how many such banks a service of 64 GiB holds."""
    table = [["chunks of a bank", "its index", "banks in 48 GiB of a service of 64 GiB", "of a billion chunks"]]
    for chunks in (20_000, 200_000, 1_000_000, 10_000_000):
        banks = int(48 * GIB / (chunks * VECTOR))
        table.append([f"{chunks:,}", _size(chunks * VECTOR), f"{banks:,}", f"{banks * chunks / CHUNKS:.1%}"])
    return table


def commits() -> list[list[str]]:
    """Return the most chunks that one bank takes a second, by the time of a transaction."""
    table = [["a transaction, with its commit", "one writer that waits for each", f"groups of {GROUP}"]]
    for seconds in (0.002, 0.005, 0.02):
        table.append([f"{seconds * 1000:.0f} ms", f"{1 / seconds:,.0f} a second", f"{GROUP / seconds:,.0f} a second"])
    return table


def cost() -> list[list[str]]:
    """Return what a month costs, by model and layers."""
    table = [["a month", *(f"{model.name}, {which}" for model in MODELS for which in ("one layer", "all layers"))]]
    sizes = [model.token(layers) * TOKENS * CHUNKS / 1e9 for model in MODELS for layers in (1, model.layers)]
    disk = 2 * 1.5 * (ROW + INDEXES) * CHUNKS / 1e9 * PRICES.disk
    database, services = (count * size * HOURS * PRICES.memory for count, size in ((2, 256), (4, 64)))
    reads = 1e8 * 8 * PRICES.get / 1000
    lines = {
        "bucket": [stored(size) for size in sizes],
        "reads: 100 million retrievals of 8 chunks, half of them in the cache": [reads / 2] * len(sizes),
        "disks of the database: all rows, as much as half of them dead, and a standby": [disk] * len(sizes),
        "two machines of 256 GiB for the database": [database] * len(sizes),
        "four machines of 64 GiB for services": [services] * len(sizes),
    }
    table += [[name, *map(_dollars, values)] for name, values in lines.items()]
    table.append(["**together**", *(f"**{_dollars(sum(each))}**" for each in zip(*lines.values(), strict=True))])
    table.append(["once: PUT of a billion objects", *[_dollars(CHUNKS * PRICES.put / 1000)] * len(sizes)])
    return table


TABLES: Mapping[str, Callable[[], list[list[str]]]] = {
    "rows": rows,
    "tokens": tokens,
    "memory": memory,
    "commits": commits,
    "cost": cost,
}


def _dollars(value: float) -> str:
    return f"${value:,.0f}"


def _size(value: float) -> str:
    units = ["B", "kB", "MB", "GB", "TB", "PB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        del units[0]
    return f"{value:.3g} {units[0]}"


def _markdown(table: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


def filled(page: str) -> str:
    """Return the page with each table as it is computed. Errors: KeyError for a table that is not known."""
    return re.sub(
        r"(<!-- table (\w+) -->\n)(?:.+\n)*", lambda found: f"{found[1]}{_markdown(TABLES[found[2]]())}\n", page
    )


def main() -> int:
    """Write or check all tables, and return the exit status."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true", help="write nothing; fail where the page has other tables")
    check = options.parse_args().check
    page = PAGE.read_text(encoding="utf-8")
    now = filled(page)
    if check and now != page:
        print("docs/scale.md has other tables than are computed: python docs/scale_figures.py", file=sys.stderr)
        return 1
    if not check:
        PAGE.write_text(now, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
