"""Put a checkpoint where the package expects it: `python -m model_worker.train.ship --run DIR --to DIR`.

Files are copied beside the old ones and then moved over them; the model card, written by hand, is left alone.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def thinned(lines: list[str], limit: int) -> list[str]:
    """Return the lines with every event and, of the others, as many as keep all below `limit` bytes."""
    every = 1
    while True:
        kept = [line for index, line in enumerate(lines) if '"event"' in line or index % every == 0]
        if sum(len(line) + 1 for line in kept) <= limit:
            return kept
        every += 1


def ship(run: Path, target: Path, limit: int = 100_000) -> None:
    """Copy the checkpoint of a run, its progress and its thinned log (`limit` bytes at most) to `target`."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (*FILES, "progress.json"):
        temporary = target / f".{name}.partial"
        shutil.copyfile(run / "checkpoint" / name, temporary)
        temporary.replace(target / name)
    lines = (run / "training_log.jsonl").read_text().splitlines()
    temporary = target / ".log.partial"
    temporary.write_text("\n".join(thinned(lines, limit)) + "\n")
    temporary.replace(target / "training_log.jsonl")


if __name__ == "__main__":
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--run", required=True, type=Path)
    parse.add_argument("--to", required=True, type=Path)
    args = parse.parse_args()
    ship(args.run, args.to)
