"""The disk fails in every step of a backup, a restore and a repair: one clear line, the source as it was, and nothing
that looks whole and is not."""

import copy
import errno
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kvbank
from memory_service.care.check import check
from tests.faults.shim import CHANGES, Action, Op, Rule
from tests.proof.content import DIGESTS, EMBEDDING, KV, chunk_of, new_key
from tests.proof.journal import Promises
from tests.proof.verify import verify
from tests.support.diagonal import rotated
from tests.support.service_process import Service, ServiceHost

BANK = "b"
FAULTS = [
    pytest.param(Action.FAIL, errno.EIO, id="EIO"),
    pytest.param(Action.FAIL, errno.ENOSPC, id="ENOSPC", marks=pytest.mark.slow),
    pytest.param(Action.TORN, errno.EIO, id="torn", marks=pytest.mark.slow),
    pytest.param(Action.TORN_KILL, 0, id="kill"),
]
some_or_all = pytest.mark.parametrize(
    "every", [197, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])]
)
faults = pytest.mark.parametrize(("action", "value"), FAULTS)


def _steps(disk, action: Action, value: int, every: int, ops: Op = CHANGES) -> Iterator[Rule]:
    """Plan the fault at a step of the body's command, later each time, until it makes no step that late."""
    steps = 0
    while True:
        rule = disk.rule(action, ops, nth=1 + steps, value=value)
        yield rule
        if not rule.fired:
            break
        steps += every
    disk.clear()
    assert rule.seen > 50 or ops != CHANGES


def _write(client: kvbank.Client, promises: Promises, chunks: int = 1) -> None:
    keys = [new_key(tokens=3) for _ in range(chunks)]
    for key, result in zip(keys, client.write_many(BANK, map(chunk_of, keys), **DIGESTS), strict=True):
        promises.acknowledged[result.chunk_id] = key
        promises.evicted.update(result.evicted)


def _filled(service: Service, chunks: int = 6, **bank: object) -> Promises:
    promises = Promises(BANK)
    with kvbank.connect(service.address) as client:
        client.create_bank(BANK, kv=KV, embedding=EMBEDDING, **bank)
        promises.exists = True
        _write(client, promises, chunks)
    return promises


def _holds(host: ServiceHost, data: Path, promises: Promises) -> None:
    """Serve the folder, and check that all that was promised is there, and right."""
    service = host.start(data, durability="os")
    with kvbank.connect(service.address) as client:
        verdict = verify(client, copy.deepcopy(promises))
    service.kill()
    assert verdict.holds, verdict


def _said(code: int, text: str, rule: Rule, action: Action) -> None:
    """Done, or one line that says why not; nothing where it was killed."""
    if rule.fired and action is Action.TORN_KILL:
        assert code == -9, text
    elif code != 0:
        assert rule.fired
        assert code == 1, text
        assert text.startswith("kvbank: "), text
        assert text.count("\n") == 1, text


def _sound(folder: Path, chunks: int) -> None:
    found = check(folder)
    assert (found.problems, found.totals["chunks"], found.totals["payloads"]) == ([], chunks, chunks)


@some_or_all
@faults
def test_a_fault_in_a_step_of_a_backup(disk, faulty_host, host, action, value, every):
    """Backups are made of a folder that is served and written to. What has the name of a backup is whole; the next run
    makes the rest of it."""
    data, place = disk.root / "data", disk.root / "backup"
    service = host.start(data, durability="os")
    promises = _filled(service, capacity=kvbank.Capacity(chunks=8))
    with kvbank.connect(service.address) as client:
        for rule in _steps(disk, action, value, every):
            _write(client, promises)
            chunks = client.get_bank(BANK).usage.chunks
            code, text = faulty_host.run("backup", data, place)
            _said(code, text, rule, action)
            disk.clear()
            if not place.exists():
                assert code != 0
                _refused_or_whole(faulty_host, Path(f"{place}.partial"), disk.root / "new", chunks)
                _write(client, promises)
                chunks = client.get_bank(BANK).usage.chunks
                assert faulty_host.run("backup", data, place)[0] == 0
            _sound(place, chunks)
            shutil.rmtree(place)
            assert not Path(f"{place}.partial").exists()
        verdict = verify(client, promises)
    assert verdict.holds, verdict
    assert service.stop() == 0
    assert check(data).problems == []


def _refused_or_whole(host: ServiceHost, partial: Path, place: Path, chunks: int) -> None:
    """Check what a backup that ended early has left, as somebody would who takes it for a backup."""
    code, text = host.run("restore", partial, place)
    if code == 0:  # it was whole, but for its name
        _sound(place, chunks)
        shutil.rmtree(place)
    else:
        assert code == 1, text
        assert "is not a backup" in text or "there is no folder" in text, text


@some_or_all
@faults
def test_a_fault_in_a_step_of_a_restore(disk, faulty_host, contents, action, value, every):
    data, backup, new = (disk.root / name for name in ("data", "backup", "new"))
    service = faulty_host.start(data)
    promises = _filled(service)
    service.stop()
    assert faulty_host.run("backup", data, backup)[0] == 0
    before = contents(backup)
    for rule in _steps(disk, action, value, every):
        code, text = faulty_host.run("restore", backup, new)
        _said(code, text, rule, action)
        disk.clear()
        if new.exists():
            _sound(new, len(promises.acknowledged))
            _holds(faulty_host, new, promises)
        else:
            assert code != 0
            assert faulty_host.run("restore", backup, new)[0] == 0
            _sound(new, len(promises.acknowledged))
        shutil.rmtree(new)
        assert not Path(f"{new}.partial").exists()
    assert contents(backup) == before


@pytest.fixture
def damaged(disk, faulty_host) -> Callable[[], Promises]:
    """Make a folder anew that has one of each thing to mend; the promises are those of what is sound."""
    data = disk.root / "data"
    service = faulty_host.start(data)
    promises = _filled(service)
    service.stop()
    bad = max(promises.acknowledged)
    path = next(data.glob(f"payloads/*/*/{bad}.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    shutil.copy(path, path.with_name("77.safetensors"))
    promises.deleting.add(bad)
    promises.deleted.add(bad)
    shutil.copytree(data, disk.root / "damaged")

    def lay_out() -> Promises:
        shutil.rmtree(data)
        shutil.copytree(disk.root / "damaged", data)
        return promises

    return lay_out


@some_or_all
@faults
def test_a_fault_in_a_step_of_a_repair(disk, faulty_host, damaged, action, value, every):
    """Nothing sound is given up, and the next run mends the rest."""
    data = disk.root / "data"
    for rule in _steps(disk, action, value, every):
        promises = damaged()
        code, text = faulty_host.run("repair", data)
        if code == 1 and "left: " in text:
            assert rule.fired, text
        else:
            _said(code, text, rule, action)
        disk.clear()
        assert faulty_host.run("repair", data)[0] == 0
        _sound(data, len(promises.acknowledged) - 1)
        kept = {path.name for path in data.glob("quarantine/*/*")}
        bad = max(promises.acknowledged)
        assert kept >= {f"{number}{suffix}" for number in (bad, 77) for suffix in (".json", ".safetensors")}
        assert {name.split(".")[0] for name in kept} == {str(bad), "77"}
        _holds(faulty_host, data, promises)


@pytest.mark.parametrize("removed", [0, 1])
def test_a_disk_that_reads_nothing_is_no_reason_to_give_a_chunk_up(disk, faulty_host, damaged, removed):
    """Chunks that are gone are gone; of chunks that cannot be read it is not known whether they are sound."""
    data, promises = disk.root / "data", damaged()
    ids = sorted(promises.acknowledged)
    gone, there = ids[:removed], ids[removed:]
    for chunk_id in gone:
        next(data.glob(f"payloads/*/*/{chunk_id}.safetensors")).unlink()
        promises.deleting.add(chunk_id)
        promises.deleted.add(chunk_id)
    rule = disk.rule(Action.FAIL, Op.READ, "/payloads/", repeat=True)
    code, text = faulty_host.run("repair", data)
    disk.clear()
    assert rule.fired
    assert code == 1, text
    # Of the file that no chunk owns too; it is left where it is.
    assert "left: payload_unreadable: payloads/" in text
    assert [line for line in text.splitlines() if line.startswith("left: ") and "chunk" in line] == [
        f"left: payload_unreadable: bank {BANK}, chunk {chunk_id}, its file cannot be read: Input/output error"
        for chunk_id in there
    ]
    assert [path.name for path in data.glob("quarantine/*/*")] == [f"{chunk_id}.json" for chunk_id in gone]
    assert faulty_host.run("repair", data)[0] == 0
    _sound(data, len(there) - 1)
    _holds(faulty_host, data, promises)


@some_or_all
@pytest.mark.parametrize("command", rotated(["backup", "restore", "repair"], 2))
def test_a_read_that_fails_once_costs_nothing(disk, faulty_host, damaged, command, every):
    """Sound chunks are neither left out nor put into quarantine because the disk failed to read once."""
    data, backup, new = (disk.root / name for name in ("data", "backup", "new"))
    promises = damaged()
    sound = len(promises.acknowledged) - 1
    assert faulty_host.run("repair", data)[0] == 0
    assert faulty_host.run("backup", data, backup)[0] == 0
    words = {"backup": (data, disk.root / "again"), "restore": (backup, new), "repair": (data,)}[command]
    for rule in _steps(disk, Action.FAIL, errno.EIO, every, Op.READ):
        if command == "repair":
            promises = damaged()
        code, text = faulty_host.run(command, *words)
        disk.clear()
        made = data if command == "repair" else words[1]
        if code == 0:
            _sound(made, sound)
        else:
            assert (code, rule.fired) == (1, 1), text
            said = {"backup": f"{made}: ", "restore": f"{backup} is damaged", "repair": "left: "}[command]
            assert text.startswith("kvbank: ") or said in text, text
            assert command != "restore" or not made.exists()
        if command == "repair":
            aside = {path.stem for path in data.glob("quarantine/*/*")}
            assert aside <= {str(max(promises.acknowledged)), "77"}
            assert code == 0 or faulty_host.run("repair", data)[0] == 0
            _holds(faulty_host, data, promises)
        else:
            shutil.rmtree(made, ignore_errors=True)
