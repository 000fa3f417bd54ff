"""The recorded life of a data folder is cut at any moment, opened by the real service, and held to its promises."""

import copy
import os
import random
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import kvbank
from memory_service.api.embedded import LocalServer
from memory_service.domain.errors import StartError
from tests.faults.power_cut import Disk, Left
from tests.faults.shim import Action, Op, Record, Shim, records
from tests.proof.content import EMBEDDING, KV, chunk_of, new_key
from tests.proof.journal import Journal, Promises, event_of
from tests.proof.load import LoadProcess
from tests.proof.once import Once
from tests.proof.verify import Verdict, verify
from tests.support.service_process import ServiceHost

BANK, GONE = "kept", "gone"

# Every kind of sync that the store makes: what is synced, and where it lies in the disk. A kind that is left out must
# cost data; for a kind with a reason it need not.
SYNCS = {
    "payload file": (r"file /data/payloads/\w+/\w\w/\d+\.tmp", ""),
    "folder of a payload": (r"folder /data/payloads/\w+/\w\w", ""),
    "whole disk": (r"disk ", ""),
    "parent of a new shard": (r"folder /data/payloads/\w+", ""),
    "parent of a new bank's folder": (r"folder /data/payloads", ""),
    "data folder": (r"folder /data", ""),
    "parent of the data folder": (r"folder ", ""),
    "log of SQLite": (r"file /data/metadata\.db-wal", ""),
    "database at a checkpoint": (r"file /data/metadata\.db", ""),
    "reserved ids": (
        r"file /data/chunk-ids\.tmp",
        "where the file is damaged, ids go on behind all that were given, and far behind what the records say",
    ),
    "mark of a folder": (r"file /data/payloads/(\w+/)?kvbank\.payloads", "an empty mark is one too"),
    "file on its way to quarantine": (r"file /data/payloads/\w+/\w\w/\d+\.safetensors", "it was damaged before"),
    "records of quarantine": (r"file /data/quarantine/\w+/\d+\.tmp", "see quarantine_cuts"),
    "folders of quarantine": (r"folder /data/quarantine(/\w+)?", "see quarantine_cuts"),
    "snapshot of an index": (
        r"file /data/indexes/\w+/[\w.-]+\.tmp",
        "it is derived, and its checksum says whether it is whole",
    ),
    "folders of snapshots": (r"folder /data/indexes(/\w+)?", "a snapshot that is not there is made from the records"),
    "journal of the first transaction": (
        r"file /data/metadata\.db-journal",
        "nothing is promised yet, and a database that is not there is made again",
    ),
}


@dataclass
class Recording:
    """All that happened below `root`, in order."""

    root: Path
    records: list[Record]

    def kind(self, record: Record) -> str:
        """Return the kind of a SYNC. Errors: AssertionError for one that SYNCS does not know."""
        place = ("file ", "folder ", "disk ")[record.offset] + record.path.removeprefix(str(self.root))
        kinds = [kind for kind, (pattern, _) in SYNCS.items() if re.fullmatch(pattern, place)]
        assert len(kinds) == 1, f"what is the sync of {place} for? {kinds}"
        return kinds[0]


@dataclass
class Broken:
    """A cut after which the store is not what was promised."""

    cut: int
    left: Left
    why: str
    verdict: Verdict = field(default_factory=Verdict)


def record(library: Path, place: Path, *, operations: int = 40) -> Recording:
    """Make a folder, work on it with two clients, kill the service, work, stop it, work, delete a bank, stop it.

    The clients stage their files in the first and the last life of the service, and stream in the second.
    """
    notes = place / "notes"
    notes.mkdir(parents=True)
    shim = Shim(library, place / "disk", notes, record=True)
    journal, environment = Journal(shim.log), os.environ | shim.environment
    clients = [LoadProcess(shim.log, BANK, seed, environment) for seed in (1, 2)]
    data = shim.root / "data"
    with ServiceHost(shim.environment) as host:
        service = host.start(data, same_host=True)
        with kvbank.connect(service.address) as client:
            for bank in (BANK, GONE):
                client.create_bank(bank, kv=KV, embedding=EMBEDDING, capacity=kvbank.Capacity(chunks=50))
                journal.say("created", bank=bank)
        with Once(service.address) as streaming:  # this process has no shim, and must not stage
            streaming.write(GONE, *[chunk_of(new_key(tokens=2)) for _ in range(5)])
        _work(clients, service.address, operations)
        shim.rule(Action.KILL, Op.WRITE, "metadata.db-wal", nth=random.randrange(20, 80))
        _work(clients, service.address, 10**6)
        service.wait()
        shim.clear()
        service = host.start(data)
        _work(clients, service.address, operations // 2)
        service.stop()
        service = host.start(data, same_host=True)
        with kvbank.connect(service.address) as client:
            journal.say("removing", bank=GONE)
            client.delete_bank(GONE)
            journal.say("removed", bank=GONE)
        _work(clients, service.address, operations // 2)
        service.stop()
    for worker in clients:
        worker.close()
    return Recording(shim.root, list(records(shim.log)))


def _work(clients: Sequence[LoadProcess], address: str, operations: int) -> None:
    for client in clients:
        client.work(address, operations)
    for client in clients:
        client.wait()


def broken(recording: Recording, cuts: int, seed: int, *, without: str | None = None) -> Iterator[Broken | None]:
    """Return for each of so many cuts what is wrong after it, or None.

    without: a kind of SYNCS that the service is taken not to make; then the cuts come after one of these, half of them
        soon.
    """
    choose = random.Random(seed)
    lefts = [left for left in Left if left is not Left.ALL or without is None]
    disk, promises, done = Disk(recording.root), {bank: Promises(bank) for bank in (BANK, GONE)}, 0
    for cut in sorted(_moments(recording, cuts, choose, without)):
        for change in recording.records[done:cut]:
            if change.op is Op.MARK:
                event = event_of(change)
                promises[event["bank"]].hear(event)
            elif change.op is not Op.SYNC or without is None or recording.kind(change) != without:
                disk.apply(change)
        done, left = cut, choose.choice(lefts)
        with tempfile.TemporaryDirectory(prefix="kvbank-proof-") as place:
            disk.write_out(Path(place, "disk"), left, choose)
            yield _judge(Path(place, "disk/data"), cut, left, copy.deepcopy(list(promises.values())))


def _moments(recording: Recording, cuts: int, choose: random.Random, without: str | None) -> Iterator[int]:
    total = len(recording.records)
    near = [
        number
        for number, change in enumerate(recording.records)
        if change.op is Op.SYNC and without is not None and recording.kind(change) == without
    ]
    for _ in range(cuts):
        first = choose.choice(near) + 1 if near else 0
        yield choose.randint(first, choose.choice((min(first + 60, total), total)) if near else total)


def _judge(data: Path, cut: int, left: Left, promises: Sequence[Promises]) -> Broken | None:
    try:
        with LocalServer(data, min_free=0, durability="os") as server, kvbank.connect(server.address) as client:
            for promise in promises:
                verdict = verify(client, promise)
                if not verdict.holds:
                    return Broken(cut, left, f"bank {promise.bank}: {verdict}", verdict)
    except (StartError, kvbank.ServiceError) as error:
        return Broken(cut, left, repr(error))
    return None
