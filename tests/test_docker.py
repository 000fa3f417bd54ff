"""Static checks of docker/: no engine is assumed, so what can be checked without one is checked here."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


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
    text = (ROOT / "docker/service.Dockerfile").read_text()
    assert 'HEALTHCHECK --interval=10s --timeout=5s CMD ["kvbank", "ping"' in text
    assert "VOLUME /data" in text


def test_compose_has_one_service_and_two_workers_on_a_closed_network() -> None:
    compose = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    assert set(compose["services"]) == {"service", "worker-1", "worker-2"}
    assert compose["networks"]["memory"]["internal"] is True
    for name, service in compose["services"].items():
        assert (ROOT / "docker" / service["build"]["context"] / service["build"]["dockerfile"]).resolve().is_file()
        assert "ports" not in service  # nobody is asked for a key yet
        for volume in service["volumes"]:
            assert volume.split(":")[0] in compose["volumes"]
        if name != "service":
            assert service["depends_on"]["service"]["condition"] == "service_healthy"
            assert "service:7400" in service["command"]
    volumes = [compose["services"][w]["volumes"] for w in ("worker-1", "worker-2")]
    assert volumes[0] != volumes[1]


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
