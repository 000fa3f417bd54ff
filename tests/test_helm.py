"""The chart docker/helm/kvbank is checked without Helm: what its values may be, that its templates are whole and ask
for values that there are, and what its pods may do."""

import json
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from memory_service import __version__
from memory_service.settings import Settings

CHART = Path(__file__).parents[1] / "docker" / "helm" / "kvbank"
TEMPLATES = sorted((CHART / "templates").iterdir())
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
GIVEN = {
    "image": VALUES["image"] | {"repository": "registry.example/kvbank-service", "digest": f"sha256:{'0' * 64}"},
    "store": VALUES["store"]
    | {"data": "postgresql://kvbank@db.example:5432/kvbank", "objects": "s3://bucket/kvbank", "secret": "kvbank-store"},
    "tls": VALUES["tls"] | {"secret": "kvbank-tls"},
}


def accepts(values: Mapping[str, Any]) -> bool:
    """Tell whether `helm install` takes these values."""
    jsonschema = pytest.importorskip("jsonschema")
    return bool(jsonschema.Draft7Validator(SCHEMA).is_valid(values))


def test_the_schema_is_one_and_takes_the_values_as_they_are_and_those_that_must_be_given() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    assert accepts(VALUES)
    assert accepts(VALUES | GIVEN)
    assert set(SCHEMA["properties"]) - set(VALUES) == {"global"}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("replicas", 0),
        ("replicas", "2"),
        ("store.data", "postgresql://kvbank:a-password@db/kvbank"),
        ("store.data", "/var/lib/kvbank"),
        ("store.objects", "bucket/kvbank"),
        ("store.secret", "Not_A_Name"),
        ("store.endpoint", "minio:9000"),
        ("cache.limit", "12GB"),
        ("cache.payloads", "much"),
        ("settings.max_calls", "2000"),
        ("settings.KVBANK_MAX_CALLS", 2000),
        ("image.digest", "sha256:1"),
        ("networkPolicy.storePorts", []),
        ("networkPolicy.enabled", "yes"),
        ("replica", 2),
    ],
)
def test_the_schema_refuses(path: str, value: Any) -> None:
    values = deepcopy(VALUES | GIVEN)
    *folders, name = path.split(".")
    place = values
    for folder in folders:
        place = place[folder]
    place[name] = value
    assert not accepts(values)


def actions(text: str) -> Iterator[str]:
    """Yield what stands between the braces of a template, without comments."""
    for action in re.findall(r"\{\{-?\s*(.*?)\s*-?\}\}", text, re.DOTALL):
        if not action.startswith("/*"):
            yield action


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_a_template_is_whole(path: Path) -> None:
    text, opened = path.read_text(), list[str]()
    assert text.count("{{") == text.count("}}") == len(re.findall(r"\{\{.*?\}\}", text, re.DOTALL))
    for action in actions(text):
        word = action.split()[0]
        if word in ("if", "with", "range", "define"):
            opened.append(word)
        elif word == "else":
            assert opened[-1] in ("if", "with", "range")
        elif word == "end":
            opened.pop()
        assert action.count("(") == action.count(")")
        assert action.count('"') % 2 == 0
    assert opened == []


def test_templates_ask_for_values_and_parts_that_there_are_and_for_all_of_them() -> None:
    text = "".join(path.read_text() for path in TEMPLATES)
    asked = set(re.findall(r"\.Values\.([\w.]+)", text))
    for path in asked:
        place: Any = VALUES
        for name in path.split("."):
            assert name in place, path
            place = place[name]
    given = {name if not isinstance(value, dict) or not value else None for name, value in VALUES.items()} - {None}
    given |= {f"{name}.{inner}" for name, value in VALUES.items() if isinstance(value, dict) for inner in value}
    used = asked | {f"resources.{name}" for name in VALUES["resources"]}
    assert {path for path in given if path not in used} == set()
    defined = re.findall(r'define "([\w.]+)"', text)
    assert set(re.findall(r'include "([\w.]+)"', text)) == set(defined)
    assert len(set(defined)) == len(defined)


def test_each_variable_of_the_chart_is_a_setting_of_the_service() -> None:
    text = "".join(path.read_text() for path in TEMPLATES)
    known = {f"KVBANK_{name.upper()}" for name in Settings.model_fields}
    assert set(re.findall(r"name: (KVBANK_\w+)", text)) <= known
    for name in ("DATA", "OBJECTS", "CACHE_BYTES", "TLS_CERT", "TLS_KEY", "METRICS_LISTEN"):
        assert f"name: KVBANK_{name}" in text


@pytest.mark.parametrize("name", ["deployment.yaml", "migrate.yaml"])
def test_pods_have_no_rights(name: str) -> None:
    text, names = (CHART / "templates" / name).read_text(), (CHART / "templates" / "_names.tpl").read_text()
    containers = text.count("- name: service\n") + text.count("- name: migrate\n")
    assert text.count('securityContext: {{- include "kvbank.closed"') == containers == 1
    assert 'securityContext: {{- include "kvbank.unprivileged"' in text
    assert "automountServiceAccountToken: false" in text
    for line in (
        "allowPrivilegeEscalation: false",
        "readOnlyRootFilesystem: true",
        "capabilities: { drop: [ALL] }",
        "runAsNonRoot: true",
        "seccompProfile: { type: RuntimeDefault }",
    ):
        assert line in names
    # What is written goes to folders with a bound.
    assert all("sizeLimit" in line for line in text.splitlines() if "emptyDir" in line)
    assert "hostPath" not in text
    assert "--insecure" not in text


def test_the_chart_is_of_this_version_and_upgrades_tables_before_services() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["name"], chart["appVersion"]) == ("kvbank", __version__)
    text = (CHART / "templates" / "migrate.yaml").read_text()
    assert "helm.sh/hook: pre-install,pre-upgrade" in text
    assert 'command: ["kvbank", "migrate"]' in text
