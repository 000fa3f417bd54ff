"""Put the model of a finished run of `kvbank train memlong` where the package expects it:
`python -m model_worker.train.ship --run DIR --to DIR`.

Weights are rounded to bfloat16. The folder is written anew beside the old one, and takes its place when all is there,
so that no reader finds files of both; where a kill comes between the two renames, the next call puts the old one back.
The model card, written by hand, is kept, and so is what the old configuration says of chats (its entry `session`): no
training sets it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from model_worker.attachment.loading import load_model
from model_worker.train.memlong.product import MODEL
from model_worker.train.run_log import LOG


def thinned(lines: list[str], limit: int) -> list[str]:
    """Return the lines with every event and, of the others, as many as keep all below `limit` bytes; the events alone
    where they are beyond it."""
    for every in range(1, len(lines) + 1):
        kept = [line for index, line in enumerate(lines) if '"event"' in line or index % every == 0]
        if sum(len(line) + 1 for line in kept) <= limit:
            return kept
    return [line for line in lines if '"event"' in line]


def ship(run: Path, target: Path, limit: int = 100_000) -> None:
    """Write the model of a run, and its log in `limit` bytes at most, to the folder `target`."""
    loaded, tokenizer = load_model(str(run / MODEL))
    model: Any = loaded.to(torch.bfloat16)
    with _anew(target) as folder:
        if session := _session(folder):
            model.config.kvbank = {**model.config.kvbank, "session": session}
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        log = thinned((run / LOG).read_text().splitlines(), limit)
        (folder / LOG).write_text("\n".join(log) + "\n")


@contextmanager
def _anew(target: Path) -> Iterator[Path]:
    """Yield a copy of a folder, which takes its place behind the block."""
    new, old = (target.with_name(f"{target.name}.{word}") for word in ("new", "old"))
    if old.exists() and not target.exists():  # a kill came between the renames
        old.rename(target)
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    if target.exists():
        shutil.copytree(target, new)
    else:
        new.mkdir(parents=True)
    yield new
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _session(target: Path) -> Any:
    """Return what the configuration in a folder says of chats; None where there is none."""
    config = target / "config.json"
    return json.loads(config.read_text()).get("kvbank", {}).get("session") if config.is_file() else None


if __name__ == "__main__":
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--run", required=True, type=Path)
    parse.add_argument("--to", required=True, type=Path)
    args = parse.parse_args()
    ship(args.run, args.to)
