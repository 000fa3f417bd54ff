"""The unit of systemd: it is well formed, closes the service in, and leaves it all that it does."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kvbank
from tests.support.certificates import Authority

ROOT = Path(__file__).parents[1]
UNIT = ROOT / "docker" / "systemd" / "kvbank.service"
ANALYZE = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is missing")


def values(name: str) -> list[str]:
    """Return the values that a name has in the unit, in their order."""
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)


def test_the_unit_sets_nothing_but_settings_and_hands_over_the_files_that_they_name() -> None:
    from memory_service.settings import Settings

    names = [variable.partition("=")[0].removeprefix("KVBANK_").lower() for variable in values("Environment")]
    assert set(names) <= set(Settings.model_fields)
    handed = {f"%d/{each.partition(':')[0]}" for each in values("LoadCredential")}
    assert handed == {each.partition("=")[2] for each in values("Environment") if "%d/" in each}
    assert "--insecure" not in UNIT.read_text()


@ANALYZE
def test_systemd_takes_the_unit_and_finds_it_closed(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/kvbank/bin/kvbank", sys.executable))
    # The threshold is in tenths; 0 is closed and 100 open.
    for command in (["verify", "--man=no"], ["security", "--offline=yes", "--threshold=15"]):
        done = subprocess.run(
            ["systemd-analyze", *command, str(unit)], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        if command[0] == "verify":
            assert not done.stdout + done.stderr


def forbidden() -> set[str]:
    """Return the calls of the system that the unit does not allow."""
    sets: dict[str, list[str]] = {}
    done = subprocess.run(
        ["systemd-analyze", "syscall-filter"], capture_output=True, text=True, timeout=60, check=False
    )
    for line in done.stdout.splitlines():
        if line.startswith("@"):
            sets[line] = members = []
        elif (name := line.strip()) and not name.startswith("#"):
            members.append(name)

    def expanded(name: str) -> set[str]:
        return set().union(*map(expanded, sets[name])) if name in sets else {name}

    found: set[str] = set()
    for value in values("SystemCallFilter"):
        named = set().union(*map(expanded, value.removeprefix("~").split()))
        found = found - named if value.startswith("~") else found | named
    return expanded("@known") - found


@ANALYZE
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("strace"), reason="strace is missing")
def test_the_service_needs_nothing_that_the_unit_forbids(tmp_path: Path) -> None:
    state, logs = tmp_path / "state", tmp_path / "logs"
    (logs / "kvbank").mkdir(parents=True)
    authority = Authority(tmp_path / "credentials")
    authority.settings("localhost")
    with kvbank.connect(state / "kvbank") as client:
        key = client.access.create_key("write").secret
    unit = "\n".join(values("Environment"))
    for specifier, place in {"%S": state, "%L": logs, "%d": tmp_path / "credentials"}.items():
        unit = unit.replace(specifier, str(place))
    settings = dict(line.split("=", 1) for line in re.sub(":(7400|9400)", ":0", unit).splitlines())
    trace = tmp_path / "trace"
    program = ["-c", "from kvbank.cli import main; main()", "serve"]
    # Only these are looked at, because a service of which every call is takes minutes to start; what the unit forbids
    # fails as it does there (NUMA policies of OpenBLAS, owners of files that SQLite sets as root).
    refused = ",".join(f"?{name}" for name in forbidden())
    strace = ["strace", "-D", "-f", "--seccomp-bpf", "-qq", "-e", "signal=none"]
    strace += ["-e", f"trace=openat,socket,mmap,mprotect,{refused}", "-e", f"inject={refused}:error=EPERM"]
    strace += ["-o", str(trace), sys.executable, *program]
    with subprocess.Popen(strace, env=os.environ | settings, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            port = process.stdout.readline().strip().rpartition(":")[2]
            options = {"root_certificates": authority.file, "api_key": key, "timeout": 100.0}
            with kvbank.connect(f"localhost:{port}", **options) as client:  # type: ignore[arg-type]
                client.create_bank("b", kv=None, embedding=kvbank.EmbeddingSpec("e", 4))
                client.write("b", kvbank.NewChunk([1, 0, 0, 0], text="x"), reader_digest="", embedder_digest="e")
                assert client.retrieve("b", [1, 0, 0, 0], top_k=1, embedder_digest="e").queries[0]
        finally:
            process.terminate()
    lines = trace.read_text(errors="replace").splitlines()
    called = {found[1] for line in lines if (found := re.match(r"\d+ +(\w+)\(", line))}
    assert called >= {"openat", "socket", "mmap", "mprotect"}
    families = {found[1] for line in lines if (found := re.search(r" socket\((AF_\w+)", line))}
    assert families <= set(values("RestrictAddressFamilies")[0].split())
    assert [line for line in lines if "PROT_WRITE|PROT_EXEC" in line] == []
    written = {found[1] for line in lines if (found := re.search(r'openat\(.*"(/.+?)", O_(?:WRONLY|RDWR)', line))}
    assert {path for path in written if not path.startswith((str(tmp_path), "/dev/null", "/dev/shm", "/tmp"))} == set()
