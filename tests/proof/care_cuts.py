"""Power cuts while a folder is backed up and restored: what has the name of a backup, or of a restored folder, is
whole, and the folder that is copied keeps its promises."""

import copy
import os
import random
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import kvbank
from memory_service.api.embedded import LocalServer
from memory_service.care.check import check
from memory_service.care.folder import Folder
from memory_service.care.report import CareError
from memory_service.care.restore import restore
from memory_service.domain.errors import StartError
from tests.faults.power_cut import Disk, Left
from tests.faults.shim import Action, Op, Record, Shim, records
from tests.proof.content import EMBEDDING, KV
from tests.proof.journal import Journal, Promises, event_of
from tests.proof.load import LoadProcess
from tests.proof.verify import verify
from tests.support.service_process import ServiceHost

BANK = "b"
# In the order in which they are made: one of a folder at work, one with the files of a copy of that (which nobody has
# synced), one by a run that takes up what a killed one left, and the folder that is restored.
BACKUPS, RESTORED = ("first", "second", "third"), "restored"

# As in power_cuts: every kind of sync that backup and restore make.
_PARTIAL = r"/(first|second|third|restored)\.partial"
SYNCS = {
    "payload file": (rf"file {_PARTIAL}/payloads/\w+/\w\w/\d+\.tmp", ""),
    "linked payload file": (rf"file {_PARTIAL}/payloads/\w+/\w\w/\d+\.safetensors", ""),
    "folders of payloads": (rf"folder {_PARTIAL}/payloads(/\w+(/\w\w)?)?", ""),
    "folder in the making": (rf"folder {_PARTIAL}", ""),
    "database": (rf"file {_PARTIAL}/metadata\.db", ""),
    "manifest": (rf"file {_PARTIAL}/backup\.json", ""),
    "parent of what was made": ("folder ", ""),
    "log or journal of SQLite": (rf"file {_PARTIAL}/metadata\.db-(wal|journal)", "the folder has no name yet"),
}


def kind_of(record: Record, root: Path) -> str:
    """Return the kind of a SYNC of a command; empty for a SYNC of the service."""
    place = ("file ", "folder ", "disk ")[record.offset] + record.path.removeprefix(str(root))
    kinds = [kind for kind, (pattern, _) in SYNCS.items() if re.fullmatch(pattern, place)]
    assert kinds or re.search(r" (/data)?", place), f"what is the sync of {place} for?"
    return kinds[0] if kinds else ""


def record(library: Path, place: Path) -> tuple[Path, list[Record]]:
    """Record a folder at work, its backups and its restoration; return the root and all that happened below it."""
    notes = place / "notes"
    notes.mkdir(parents=True)
    shim = Shim(library, place / "disk", notes, record=True)
    root, journal = shim.root, Journal(shim.log)

    def run(host: ServiceHost, command: str, *words: object) -> None:
        journal.say("begun", bank=BANK, place=Path(str(words[1])).name)
        code, text = host.run(command, *words)
        assert code == 0, text
        journal.say("made", bank=BANK, place=Path(str(words[1])).name)

    with ExitStack() as stack:
        host = stack.enter_context(ServiceHost(shim.environment))
        service = host.start(root / "data")
        with kvbank.connect(service.address) as client:
            client.create_bank(BANK, kv=KV, embedding=EMBEDDING)
        journal.say("created", bank=BANK)
        worker = LoadProcess(shim.log, BANK, 1)
        stack.callback(worker.close)
        worker.work(service.address, 8)
        worker.wait()
        worker.work(service.address, 8)
        run(host, "backup", root / "data", root / "first")
        worker.wait()
        environment = os.environ | shim.environment
        subprocess.run(["cp", "-r", root / "first", root / "copy"], check=True, env=environment)
        worker.work(service.address, 8)
        run(host, "backup", root / "data", root / "second", "--base", root / "copy")
        worker.wait()
        shim.rule(Action.KILL_AFTER, Op.RENAME, "third.partial", nth=4)
        assert host.run("backup", root / "data", root / "third")[0] == -9
        shim.clear()
        run(host, "backup", root / "data", root / "third")
        service.stop()
        run(host, "restore", root / "third", root / RESTORED)
    return root, list(records(shim.log))


def broken(root: Path, log: list[Record], cuts: int, seed: int, *, without: str | None = None) -> Iterator[str]:
    """Return what is wrong after so many cuts. without: as in power_cuts.broken, with the kinds of this file."""
    choose = random.Random(seed)
    disk, promises, begun, made = Disk(root), Promises(BANK), dict[str, set[int]](), set[str]()
    lefts = [left for left in Left if left is not Left.ALL or without is None]
    done = 0
    for cut in sorted(_moments(root, log, cuts, choose, without)):
        for change in log[done:cut]:
            if change.op is Op.MARK:
                event = event_of(change)
                promises.hear(event)
                if event["event"] == "begun":
                    begun[event["place"]] = set(promises.acknowledged)
                elif event["event"] == "made":
                    made.add(event["place"])
            elif change.op is not Op.SYNC or without is None or kind_of(change, root) != without:
                disk.apply(change)
        done, left = cut, choose.choice(lefts)
        with tempfile.TemporaryDirectory(prefix="kvbank-proof-") as place:
            disk.write_out(Path(place, "disk"), left, choose)
            found = _judge(Path(place, "disk"), copy.deepcopy(promises), begun, made)
            if without is None:  # no sync of a command is for the folder that it copies
                found = chain(found, _serves_wrong(Path(place, "disk/data"), copy.deepcopy(promises)))
            yield from (f"cut {cut}, {left}: {why}" for why in found)


def _moments(root: Path, log: list[Record], cuts: int, choose: random.Random, without: str | None) -> Iterator[int]:
    """Choose moments for cuts: while a command runs and soon after; where a sync is left out, soon after that sync or
    after what it was made for."""
    first = next(i for i, r in enumerate(log) if r.op is Op.MARK and event_of(r)["event"] == "begun")
    for _ in range(cuts):
        if without is None:
            yield choose.randint(first, len(log))
            continue
        near = [i for i, r in enumerate(log) if r.op is Op.SYNC and kind_of(r, root) == without]
        yield choose.randint(choose.choice(near) + 1, len(log))


def _judge(place: Path, promises: Promises, begun: dict[str, set[int]], made: set[str]) -> Iterator[str]:
    for name, before in begun.items():
        least = before - promises.deleting
        folder, partial = place / name, place / f"{name}.partial"
        if folder.exists():
            yield from _wrong(folder, least)
        elif name in made:
            yield f"{name} is not there"
        if partial.exists() and name != RESTORED:
            yield from _taken_for_a_backup(partial, place / "taken", least)
    if (place / RESTORED).exists():
        yield from _serves_wrong(place / RESTORED, Promises(BANK))


def _wrong(folder: Path, least: set[int]) -> Iterator[str]:
    """Return what is wrong with something that has the name of a backup or of a restored folder."""
    try:
        problems = check(folder).problems
        with Folder(folder) as opened, opened.read() as connection:
            ids = set(connection.exec_driver_sql("SELECT chunk_id FROM chunks").scalars())
    except (CareError, OSError) as error:
        yield f"{folder.name}: {error}"
        return
    if problems:
        yield f"{folder.name}: {problems}"
    if not ids >= least:
        yield f"{folder.name} is without {sorted(least - ids)}"


def _taken_for_a_backup(partial: Path, target: Path, least: set[int]) -> Iterator[str]:
    """Check that what an interrupted backup has left is refused, or whole."""
    try:
        if restore(partial, target)[0]:
            yield from _wrong(target, least)
    except CareError:
        return


def _serves_wrong(data: Path, promises: Promises) -> Iterator[str]:
    promises.exists = True
    try:
        with LocalServer(data, min_free=0, durability="os") as server, kvbank.connect(server.address) as client:
            verdict = verify(client, promises)
            if not verdict.holds:
                yield f"{data.name}: {verdict}"
    except (StartError, kvbank.ServiceError) as error:
        yield f"{data.name}: {error!r}"
