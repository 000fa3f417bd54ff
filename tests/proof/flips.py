"""One flipped bit anywhere in a data folder that is not served: in a payload, in a snapshot of an index, in a page of
the database, in the log that a kill has left. Whatever SQLite makes of it, no wrong tensor is served, no id is given
twice, and of no chunk that was acknowledged both record and file are gone."""

import random
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import kvbank
from tests.proof.content import DIGESTS, EMBEDDER, EMBEDDING, KV, READER, chunk_of, differences, new_key, vector_of
from tests.support.service_process import Service, ServiceHost, StartFailed

BANK, VECTORS = "payloads", "vectors"
CHUNKS, ROWS = 20, 600
# Where a bit is flipped -> the files, below the folder of a stopped or of a killed service.
PLACES = {
    "payloads": ("stopped", "payloads/*/*/*.safetensors"),
    "snapshots": ("stopped", "indexes/*/*.segment"),
    "database": ("stopped", "metadata.db"),
    "database, killed": ("killed", "metadata.db"),
    "log": ("killed", "metadata.db-wal"),
    "ids": ("killed", "chunk-ids"),
}
_PATIENCE = 10.0


@dataclass
class Folders:
    """A folder as a stop, and as a kill, has left it, and the keys of the chunks with a payload by their ids."""

    place: Path
    keys: dict[int, bytes] = field(default_factory=dict)
    # Of all chunks that either has given, those without payload too.
    highest: dict[str, int] = field(default_factory=dict)


@dataclass
class Flipped:
    """Sums over all flips. `seen`: what became of them; `bad`: what is against the rules."""

    seen: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return ", ".join([*(f"{what} {count}" for what, count in self.seen.items()), f"wrong {len(self.bad)}"])


def prepare(host: ServiceHost, place: Path) -> Folders:
    """Make the two folders."""
    folders, data = Folders(place), place / "stopped"
    service = host.start(data)
    with kvbank.connect(service.address) as client:
        client.create_bank(BANK, kv=KV, embedding=EMBEDDING)
        client.create_bank(VECTORS, kv=None, embedding=EMBEDDING)
        vectors = (kvbank.NewChunk(vector_of(new_key())) for _ in range(ROWS))
        client.write_many(VECTORS, vectors, reader_digest="", embedder_digest=EMBEDDER)
        folders.highest["stopped"] = _write(client, folders)
        client.retrieve(VECTORS, vector_of(new_key()), reader_digest="", embedder_digest=EMBEDDER)
    service.stop()
    shutil.copytree(data, place / "killed")
    service = host.start(place / "killed")
    with kvbank.connect(service.address) as client:
        folders.highest["killed"] = _write(client, folders)
    service.kill()
    return folders


def _write(client: kvbank.Client, folders: Folders) -> int:
    """Write some chunks, and return the last id."""
    keys = [new_key(tokens=2) for _ in range(CHUNKS)]
    for key, written in zip(keys, client.write_many(BANK, map(chunk_of, keys), **DIGESTS), strict=True):
        folders.keys[written.chunk_id] = key
    return max(folders.keys)


def flip_often(
    host: ServiceHost, folders: Folders, flips: int, seed: int, tell: Callable[[Flipped], None] = lambda _: None
) -> Flipped:
    """Flip a bit of a copy and look at what a service makes of it, `flips` times, each place in turn."""
    choose, flipped = random.Random(seed), Flipped()
    for number in range(flips):
        name = list(PLACES)[number % len(PLACES)]
        base, pattern = PLACES[name]
        with tempfile.TemporaryDirectory(prefix="kvbank-flip-") as place:
            data = Path(place, "data")
            # Not by Python, which would close files of SQLite; and a hundred times as fast.
            subprocess.run(["cp", "-r", folders.place / base, data], check=True)
            path = choose.choice(sorted(data.glob(pattern)))
            bit = choose.randrange(8 * path.stat().st_size)
            _flip(path, bit)
            known = {chunk_id: key for chunk_id, key in folders.keys.items() if _file(data, chunk_id)}
            where = f"{name}: bit {bit} of {path.relative_to(data)}"
            flipped.seen[name] += 1
            flipped.bad += [f"{where}: {why}" for why in _look(host, data, known, folders.highest[base], flipped.seen)]
        tell(flipped)
    return flipped


def _flip(path: Path, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def _file(data: Path, chunk_id: int) -> bool:
    return any(data.glob(f"payloads/*/*/{chunk_id}.safetensors")) or any(
        data.glob(f"quarantine/*/{chunk_id}.safetensors")
    )


def _look(host: ServiceHost, data: Path, known: dict[int, bytes], highest: int, seen: Counter[str]) -> list[str]:
    """Return what is against the rules."""
    try:
        service = host.start(data)
    except StartFailed as error:
        seen["refused starts"] += 1
        return [] if error.code == 1 and "Traceback" not in error.text else [f"the start ends in {error}"]
    bad: list[str] = []
    try:
        with kvbank.connect(service.address, timeout=_PATIENCE, stream_timeout=_PATIENCE) as client:
            bad += _read(client, known, seen)
            bad += _written(client, known, highest, seen)
    finally:
        _end(service)
    gone = [chunk_id for chunk_id in known if not _file(data, chunk_id)]
    bad += [f"nothing is left of chunk {chunk_id}" for chunk_id in gone]
    return bad


def _end(service: Service) -> None:
    try:
        service.stop()
    finally:
        service.kill()


def _read(client: kvbank.Client, known: dict[int, bytes], seen: Counter[str]) -> list[str]:
    bad = []
    for chunk_id, key in known.items():
        try:
            (found,) = client.fetch(BANK, [chunk_id], reader_digest=READER)
        except kvbank.ServiceError as error:
            seen[type(error).__name__] += 1
            continue
        if found.idempotency_key != key or differences(found):
            bad.append(f"chunk {chunk_id} is served wrong: {differences(found)}")
    return bad


def _written(client: kvbank.Client, known: dict[int, bytes], highest: int, seen: Counter[str]) -> list[str]:
    """Write one chunk under a new id, and return that."""
    key = new_key(tokens=2)
    try:
        written = client.write(BANK, chunk_of(key), **DIGESTS)
    except kvbank.ServiceError as error:
        seen[f"writes: {type(error).__name__}"] += 1
        return []
    return [] if written.chunk_id > highest else [f"id {written.chunk_id} is given again"]
