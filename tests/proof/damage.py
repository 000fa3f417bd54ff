"""Stored payloads that somebody changed: flipped, swapped, cut, made longer."""

import os
import random
from dataclasses import dataclass
from pathlib import Path

import kvbank
from tests.proof.content import DIGESTS, EMBEDDING, KV, READER, chunk_of, differences, new_key, vector_of
from tests.support.synced import wait_until_synced

BANK = "damaged"


@dataclass
class Damage:
    """`detected` of `damaged` were DATA_LOSS; `served` were not; `healthy` others read as written."""

    damaged: int = 0
    detected: int = 0
    served: int = 0
    healthy: int = 0
    quarantined: int = 0
    wrong: int = 0

    @property
    def holds(self) -> bool:
        return self.detected == self.damaged == self.quarantined and not self.served and not self.wrong

    def __str__(self) -> str:
        names = ("damaged", "detected", "quarantined", "served", "healthy", "wrong")
        return ", ".join(f"{name} {getattr(self, name)}" for name in names)


def damage(client: kvbank.Client, data: Path, flips: int, seed: int, *, healthy: int = 100) -> Damage:
    """Flip a byte in each of `flips` files, anywhere; swap two, cut one, make one longer; then read everything."""
    choose = random.Random(seed)
    client.create_bank(BANK, kv=KV, embedding=EMBEDDING)
    keys = [new_key(tokens=2) for _ in range(flips + 4 + healthy)]
    ids = [result.chunk_id for result in client.write_many(BANK, map(chunk_of, keys), **DIGESTS)]
    wait_until_synced(data)
    bad, good = ids[: flips + 4], ids[flips + 4 :]
    paths = {int(path.stem): path for path in (data / "payloads").glob("*/*/*.safetensors")}
    for chunk_id in bad[4:]:
        _flip(paths[chunk_id], choose)
    _swap(paths[bad[0]], paths[bad[1]])
    cut, longer = paths[bad[2]], paths[bad[3]]
    os.truncate(cut, choose.randrange(cut.stat().st_size))
    os.truncate(longer, longer.stat().st_size + choose.randint(1, 1000))
    report = Damage(len(bad))
    for chunk_id in bad:
        try:
            client.fetch(BANK, [chunk_id], reader_digest=READER)
            report.served += 1
        except kvbank.DataLoss:
            report.detected += 1
    for chunk in client.fetch(BANK, good, reader_digest=READER):
        report.healthy += 1
        report.wrong += bool(differences(chunk))
    found = client.retrieve(BANK, vector_of(keys[0]), top_k=1000, payload=False, **DIGESTS)
    report.wrong += {hit.chunk_id for hit in found.queries[0]} != set(good)
    report.wrong += client.write(BANK, chunk_of(new_key()), **DIGESTS).chunk_id <= ids[-1]
    report.quarantined = client.get_bank(BANK).usage.chunks_quarantined
    return report


def _flip(path: Path, choose: random.Random) -> None:
    with open(path, "r+b") as file:
        place = choose.randrange(path.stat().st_size)
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ (1 << choose.randrange(8))]))


def _swap(one: Path, other: Path) -> None:
    between = one.with_suffix(".swap")
    one.rename(between)
    other.rename(one)
    between.rename(other)
