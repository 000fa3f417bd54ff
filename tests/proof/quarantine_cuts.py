"""Power cuts while damaged chunks go to quarantine, where a server meets them and where `kvbank repair` finds them.

What is out of the records is aside, whole, and the other chunks are as they were.
"""

import copy
import json
import os
import random
import re
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, suppress
from itertools import chain
from pathlib import Path

import kvbank
from memory_service.api.embedded import LocalServer
from memory_service.care.repair import repair
from memory_service.care.report import CareError
from memory_service.domain.errors import StartError
from tests.faults.power_cut import Disk, Left
from tests.faults.shim import Op, Record, Shim, records
from tests.proof.content import DIGESTS, EMBEDDING, KV, chunk_of, new_key
from tests.proof.journal import Journal, Promises, event_of
from tests.proof.verify import verify
from tests.support.service_process import ServiceHost
from tests.support.synced import unsynced, wait_until_synced

BANK = "b"
# As in power_cuts: every kind of sync that a quarantine makes.
SYNCS = {
    "record": r"file /data/quarantine/\w+/\d+\.tmp",
    "folder of a bank's quarantine": r"folder /data/quarantine/\w+",
    "quarantine": r"folder /data/quarantine",
    "data folder": r"folder /data",
}
# A process of its own, so that the fault layer sees what it does.
_FLIP = """
import sys
with open(sys.argv[1], "r+b") as file:
    byte = file.seek(-20, 2) and file.read(1)[0]
    file.seek(-20, 2)
    file.write(bytes([byte ^ 1]))
"""


def kind_of(record: Record, root: Path) -> str:
    """Return the kind of a SYNC; empty for one that is not for the quarantine."""
    place = ("file ", "folder ", "disk ")[record.offset] + record.path.removeprefix(str(root))
    return next((kind for kind, pattern in SYNCS.items() if re.fullmatch(pattern, place)), "")


def record(library: Path, place: Path) -> tuple[Path, list[Record]]:
    """Record a folder with chunks that are damaged and read, and others that are damaged and repaired; return the root,
    and all that happened below it."""
    notes = place / "notes"
    notes.mkdir(parents=True)
    shim = Shim(library, place / "disk", notes, record=True)
    data, journal, environment = shim.root / "data", Journal(shim.log), os.environ | shim.environment

    def damage(chunk_ids: list[int]) -> None:
        journal.say("deleting", bank=BANK, ids=chunk_ids)
        for chunk_id in chunk_ids:
            (path,) = data.glob(f"payloads/*/*/{chunk_id}.safetensors")
            subprocess.run([sys.executable, "-c", _FLIP, path], check=True, env=environment)

    with ServiceHost(shim.environment) as host:
        service = host.start(data)
        with kvbank.connect(service.address) as client:
            client.create_bank(BANK, kv=KV, embedding=EMBEDDING)
            journal.say("created", bank=BANK)
            chunks = [chunk_of(new_key(tokens=2)) for _ in range(10)]
            ids = [written.chunk_id for written in client.write_many(BANK, chunks, **DIGESTS)]
            for chunk_id, chunk in zip(ids, chunks, strict=True):
                key = chunk.idempotency_key.hex()
                journal.say("acknowledged", bank=BANK, id=chunk_id, key=key, evicted=[])
            # A file that is not synced would be made again of its bytes in the records.
            wait_until_synced(data)
            damage(ids[:3])
            for chunk_id in ids[:3]:
                with suppress(kvbank.DataLoss):
                    client.fetch(BANK, [chunk_id], reader_digest=DIGESTS["reader_digest"])
                journal.say("deleted", bank=BANK, ids=[chunk_id])
        service.stop()
        damage(ids[3:6])
        code, text = host.run("repair", data)
        assert (code, text.count("quarantined: ")) == (0, 3), text
        journal.say("deleted", bank=BANK, ids=ids[3:6])
    return shim.root, list(records(shim.log))


def broken(root: Path, log: list[Record], cuts: int, seed: int, *, without: str | None = None) -> Iterator[str]:
    """Return what is wrong after so many cuts. without: a kind of SYNCS that is taken not to be made."""
    choose = random.Random(seed)
    disk, promises, done = Disk(root), Promises(BANK), 0
    lefts = [left for left in Left if left is not Left.ALL or without is None]
    near = [number for number, change in enumerate(log) if change.op is Op.SYNC and kind_of(change, root) == without]
    # Before the first damage the other proofs have cut often enough.
    first = next(i for i, change in enumerate(log) if change.op is Op.MARK and event_of(change)["event"] == "deleting")
    begins = [number for number in near if number > first] or [first]
    for cut in sorted(choose.randint(choose.choice(begins) + 1, len(log)) for _ in range(cuts)):
        for change in log[done:cut]:
            if change.op is Op.MARK:
                promises.hear(event_of(change))
            elif change.op is not Op.SYNC or without is None or kind_of(change, root) != without:
                disk.apply(change)
        done, left = cut, choose.choice(lefts)
        with tempfile.TemporaryDirectory(prefix="kvbank-proof-") as place:
            disk.write_out(Path(place, "disk"), left, choose)
            data, told = Path(place, "disk/data"), copy.deepcopy(promises)
            found = chain(_thrown_away(data, told), _not_mended(data, told), _thrown_away(data, told))
            yield from (f"cut {cut}, {left}: {why}" for why in found)


def _thrown_away(data: Path, promises: Promises) -> Iterator[str]:
    """Damaged chunks that are neither in the records nor whole in quarantine, or that came back."""
    try:
        with closing(sqlite3.connect(data / "metadata.db")) as database:
            listed = {row[0] for row in database.execute("SELECT chunk_id FROM chunks JOIN contents USING (chunk_id)")}
        made_again = unsynced(data)  # by the next start
    except sqlite3.Error as error:
        yield f"the records cannot be read: {error}"
        return
    for chunk_id in sorted(promises.deleting):
        if not list(data.rglob(f"{chunk_id}.safetensors")) and chunk_id not in made_again:
            yield f"chunk {chunk_id} has no file"
        if chunk_id in listed and chunk_id in promises.deleted:
            yield f"chunk {chunk_id} is quarantined and there"
        if chunk_id not in listed and not _is_aside(data, chunk_id):
            yield f"chunk {chunk_id} is gone"


def _is_aside(data: Path, chunk_id: int) -> bool:
    try:
        (path,) = data.glob(f"quarantine/*/{chunk_id}.json")
        kept = json.loads(path.read_text())
        return bool(kept["chunk"]["chunk_id"] == chunk_id == kept["content"]["chunk_id"])
    except ValueError:
        return False


def _not_mended(data: Path, promises: Promises) -> Iterator[str]:
    """Return what `repair` leaves, and what a server then does not have."""
    try:
        if left := repair(data).left:
            yield f"repair leaves {left}"
        with LocalServer(data, min_free=0, durability="os") as server, kvbank.connect(server.address) as client:
            verdict = verify(client, promises)
            if not verdict.holds:
                yield str(verdict)
    except (CareError, StartError, kvbank.ServiceError) as error:
        yield repr(error)
