"""What docker/ has is checked without an engine: what its containers do is done by processes of this machine."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import yaml
from cryptography import x509

from tests.support.shell_commands import free_ports, kvbank_on_path

ROOT = Path(__file__).parents[1]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
SERVICE, COMPOSE = ROOT / "docker" / "service.Dockerfile", ROOT / "docker" / "compose.yaml"
SETUP = ROOT / "docker" / "secure" / "setup.sh"
# What a command needs to find this checkout.
_ENVIRONMENT = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "clients" / "python")))}
CALLERS = ("worker-1", "worker-2", "operator")


def test_there_are_two_images() -> None:
    assert [path.name for path in DOCKERFILES] == ["service.Dockerfile", "worker.Dockerfile"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_image_runs_unprivileged_from_a_named_base(path: Path) -> None:
    lines = path.read_text().splitlines()
    bases = [line.split()[1] for line in lines if line.startswith("FROM")]
    assert all(re.fullmatch(r"python:3\.\d+-slim", base) for base in bases)
    users = [i for i, line in enumerate(lines) if line.startswith("USER")]
    entry = next(i for i, line in enumerate(lines) if line.startswith("ENTRYPOINT"))
    assert users
    assert users[-1] < entry
    assert lines[users[-1]] != "USER root"


def test_service_has_a_health_check_and_keeps_its_data_in_a_volume() -> None:
    text = SERVICE.read_text()
    assert "HEALTHCHECK --interval=10s --timeout=5s CMD [" in text
    assert "VOLUME /data" in text
    assert "--insecure" not in text


def test_compose_has_one_service_and_callers_of_it_that_reach_nothing_else() -> None:
    compose = yaml.safe_load(COMPOSE.read_text())
    assert set(compose["services"]) == {"setup", "service", *CALLERS}
    assert compose["networks"]["memory"]["internal"] is True
    for name, service in compose["services"].items():
        assert (ROOT / "docker" / service["build"]["context"] / service["build"]["dockerfile"]).resolve().is_file()
        assert ("ports" in service) == (name == "service")
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        for volume in service["volumes"]:
            assert volume.split(":")[0] in compose["volumes"]
        if name in CALLERS:
            assert service["networks"] == ["memory"]
            assert service["depends_on"]["service"]["condition"] == "service_healthy"
            assert service["environment"]["KVBANK_MEMORY"] == "service:7400"
            assert f"{name}:/secrets:ro" in service["volumes"]
    assert compose["services"]["service"]["depends_on"]["setup"]["condition"] == "service_completed_successfully"
    volumes = [set(compose["services"][caller]["volumes"]) for caller in CALLERS]
    assert not set.intersection(*volumes)


def test_each_volume_has_a_folder_in_the_image_from_which_it_takes_its_owner() -> None:
    compose = yaml.safe_load(COMPOSE.read_text())
    made = set(re.findall(r" (/\w[\w/-]*)", " ".join(re.findall(r"install -d .*", SERVICE.read_text()))))
    for name in ("setup", "service"):
        assert {volume.split(":")[1] for volume in compose["services"][name]["volumes"]} <= made


class Containers:
    """What docker/compose.yaml starts, as processes of this machine: the commands and variables that stand there, with
    folders in the place of volumes, and free ports."""

    def __init__(self, folder: Path, path: str) -> None:
        self.folder, self._path = folder, path
        compose = yaml.safe_load(COMPOSE.read_text())
        self._services = compose["services"]
        (folder / "secrets").mkdir()
        for volume in compose["volumes"]:
            (folder / volume).mkdir()
        for volume in self._services["setup"]["volumes"]:
            name, place = volume.split(":")
            if place.startswith("/secrets/"):
                (folder / "secrets" / Path(place).name).symlink_to(folder / name)
        self._ports = dict(zip(("7400", "9400"), free_ports(2), strict=True))

    def command(self, name: str, words: Sequence[str]) -> subprocess.Popen[str]:
        """Start a command with the variables of a container."""
        volumes = dict(reversed(each.split(":")[:2]) for each in self._services[name]["volumes"])
        given = self._services[name].get("environment", {})
        return subprocess.Popen(
            [self._here(word, volumes) for word in words],
            env=_ENVIRONMENT | {"PATH": self._path} | {key: self._here(value, volumes) for key, value in given.items()},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, name: str, words: Sequence[str], ends: int = 0) -> str:
        """Run a command to its end, and return what it said."""
        with self.command(name, words) as process:
            said, _ = process.communicate(timeout=250)
        assert process.returncode == ends, said
        return said

    def setup(self, *others: str, ends: int = 0) -> str:
        """Run the container `setup`, and return what it said. others: further names of the service. ends: its exit
        status."""
        setup = self._services["setup"]
        names = [word for word in setup["command"] if "$" not in word]
        # One folder for all, because what the script is told is the folder of these volumes.
        script = [*setup["entrypoint"], *names, *others]
        here = {
            "/usr/local/bin/kvbank-setup": SETUP,
            "/data": self.folder / "memory",
            "/secrets": self.folder / "secrets",
        }
        return self.run("setup", [str(here.get(word, word)) for word in script], ends)

    def _here(self, word: str, volumes: Mapping[str, str]) -> str:
        """Return a word with the folders and ports of this machine."""
        for place in sorted(volumes, key=len, reverse=True):
            word = re.sub(rf"(?<![\w.]){place}(?=/|$)", str(self.folder / volumes[place]), word)
        for port, free in self._ports.items():
            word = re.sub(rf":{port}\b", f":{free}", word)
        return word.replace("service:", "localhost:") if word.startswith("service:") else word


@pytest.fixture(scope="module")
def containers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    """Start what `docker compose up -d service` does."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is missing")
    with kvbank_on_path() as path:
        containers = Containers(tmp_path_factory.mktemp("compose"), path)
        containers.setup()
        [entry] = re.findall("^ENTRYPOINT (.*)$", SERVICE.read_text(), re.MULTILINE)
        words = [sys.executable, "-c", "from kvbank.cli import main; main()", *json.loads(entry)[1:]]
        with containers.command("service", words) as process:
            assert process.stdout is not None
            try:
                said: list[str] = []
                while not said or " serving " not in said[-1]:
                    said.append(process.stdout.readline())
                    assert said[-1], said
                yield containers
            finally:
                process.terminate()
                process.stdout.read()


def test_the_health_check_of_the_image_finds_the_service_well(containers: Containers) -> None:
    [check] = re.findall("^HEALTHCHECK .*? CMD (.*)$", SERVICE.read_text(), re.MULTILINE)
    containers.run("service", [sys.executable, *json.loads(check)[1:]])


def test_each_worker_is_a_tenant_of_its_own_and_the_operator_sees_no_content(containers: Containers) -> None:
    bank = ["session-a-1", "--embedder", "e", "--dimension", "4"]
    containers.run("worker-1", ["kvbank", "bank", "create", *bank])
    assert "session-a-1" in containers.run("worker-1", ["kvbank", "bank", "ls"])
    assert "session-a-1" not in containers.run("worker-2", ["kvbank", "bank", "ls"])
    containers.run("worker-1", ["kvbank", "bank", "create", "other", *bank[1:]], ends=1)
    assert "may not manage these keys" in containers.run("worker-1", ["kvbank", "key", "ls"], ends=1)
    assert "worker-1" in containers.run("operator", ["kvbank", "tenant", "ls"])
    assert "ListBanks" in containers.run("operator", ["kvbank", "bank", "ls"], ends=1)
    containers.run("worker-1", ["kvbank", "bank", "rm", "session-a-1", "--yes"])


def test_setup_keeps_what_is_there_while_the_service_runs(containers: Containers) -> None:
    files = {path: path.read_bytes() for path in (containers.folder / "secrets").glob("*/*") if path.is_file()}
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    containers.setup()
    assert {path: path.read_bytes() for path in files} == files
    (containers.folder / "secrets/service/server.pem").unlink()
    assert "a certificate for service localhost" in containers.setup()
    containers.run("worker-1", ["kvbank", "bank", "ls"])


def test_another_name_of_the_service_is_in_its_certificate_at_once(containers: Containers) -> None:
    assert "a certificate for" in containers.setup("memory.example.org", "::1")
    assert containers.setup("memory.example.org", "::1") == ""
    certificate = x509.load_pem_x509_certificate((containers.folder / "secrets/service/server.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["service", "localhost", "memory.example.org"]
    assert list(map(str, names.get_values_for_type(x509.IPAddress))) == ["127.0.0.1", "::1"]


def test_what_openssl_says_of_a_name_that_it_refuses_is_shown(containers: Containers) -> None:
    certificate = containers.folder / "secrets/service/server.pem"
    before = certificate.read_bytes()
    said = containers.setup("1.2.3.400", ends=1)
    assert "setup: openssl req failed:" in said
    assert "1.2.3.400" in said
    assert certificate.read_bytes() == before


ALERTS = ROOT / "docker" / "prometheus" / "alerts.yaml"


def test_alerts_ask_for_metrics_that_the_service_has_and_are_all_tested() -> None:
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    documented = set(re.findall(r"^\| `(kvbank_\w+)` \|", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE))
    asked = {
        re.sub("_(count|bucket|sum)$", "", name) for rule in rules for name in re.findall(r"kvbank_\w+", rule["expr"])
    }
    assert asked <= documented
    [cases] = yaml.safe_load(ALERTS.with_name("alerts.test.yaml").read_text())["tests"]
    assert {case["alertname"] for case in cases["alert_rule_test"]} == {rule["alert"] for rule in rules}


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is missing (Debian: apt install prometheus)")
def test_alerts_are_told_when_they_should_and_not_of_a_service_that_is_well() -> None:
    command = ["promtool", "test", "rules", str(ALERTS.with_name("alerts.test.yaml"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
