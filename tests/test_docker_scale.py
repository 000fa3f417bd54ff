"""What docker/scale has is checked without an engine; its scripts, its balancer and its services run as processes of
this machine."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import yaml

import kvbank
from tests.support import bucket, postgres
from tests.support.shell_commands import kvbank_on_path

ROOT = Path(__file__).parents[1]
SCALE = ROOT / "docker" / "scale"
COMPOSE = yaml.safe_load((SCALE / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
# What ends by itself; all else is kept running, and says whether it is well.
ONCE = ("secrets", "make-bucket", "keys", "migrate", "operator")
CALLERS = ("worker-1", "worker-2", "operator")


def test_who_reaches_whom() -> None:
    for name, network in COMPOSE["networks"].items():
        assert (network.get("internal") is True) == (name != "outside")
    reach = {name: set(service.get("networks", ())) for name, service in SERVICES.items()}
    assert {name for name, networks in reach.items() if "store" in networks} == {
        "database",
        "bucket",
        "keys",
        "migrate",
        "service-1",
        "service-2",
    }
    assert {name for name, networks in reach.items() if "outside" in networks} == {"balancer", "grafana"}
    assert all(reach[name] == {"memory"} for name in CALLERS)
    ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert ports == {"balancer": ["7400:7400"], "grafana": ["127.0.0.1:3000:3000"]}


def test_containers_are_closed_and_their_secrets_are_files_of_their_own() -> None:
    text = (SCALE / "compose.yaml").read_text()
    assert not re.search(r"(?i)(password|secret_access_key|secretkey)\w*: +(?!/secrets/)\S", text)
    for name, service in SERVICES.items():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "healthcheck" in service or name in ("make-bucket", *CALLERS, "service-1", "service-2")
        assert ("restart" in service) == (name not in (*ONCE, *CALLERS))
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert (SCALE / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]
            # Who makes secrets writes them; all others read them.
            if volume.split(":")[1].startswith("/secrets") and name not in ("secrets", "keys"):
                assert volume.endswith(":ro")
    volumes = [set(SERVICES[caller]["volumes"]) for caller in CALLERS]
    assert not set.intersection(*volumes)
    kept = {name: {v.split(":")[0] for v in SERVICES[name]["volumes"]} for name in ("service-1", "service-2")}
    assert kept["service-1"] & kept["service-2"] == {"store", "certificate"}


def test_each_volume_of_our_image_has_a_folder_from_which_it_takes_its_owner() -> None:
    image = (ROOT / "docker" / "service.Dockerfile").read_text()
    made = set(re.findall(r" (/\w[\w/-]*)", " ".join(re.findall(r"install -d .*", image))))
    for name in ("secrets", "keys", "service-1", "service-2"):
        assert {volume.split(":")[1] for volume in SERVICES[name]["volumes"]} <= made
    for script in re.findall(r"COPY (docker/scale/\S+) (\S+)", image):
        assert (ROOT / script[0]).is_file()
        assert any(script[1] in service.get("entrypoint", ()) for service in SERVICES.values())


def test_prometheus_reads_both_services_and_grafana_shows_the_dashboard() -> None:
    read = yaml.safe_load((SCALE / "prometheus.yaml").read_text())
    [job] = read["scrape_configs"]
    assert job["job_name"] == "kvbank"  # by which the alerts go
    targets = [target.split(":") for each in job["static_configs"] for target in each["targets"]]
    assert [host for host, _ in targets] == ["service-1", "service-2"]
    assert {port for _, port in targets} == {
        SERVICES["service-1"]["environment"]["KVBANK_METRICS_LISTEN"].split(":")[1]
    }
    [source] = yaml.safe_load((SCALE / "grafana" / "datasources.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    [provider] = yaml.safe_load((SCALE / "grafana" / "dashboards.yaml").read_text())["providers"]
    folder = provider["options"]["path"]
    assert any(volume.split(":")[1].startswith(f"{folder}/") for volume in SERVICES["grafana"]["volumes"])


HAPROXY = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
needs_haproxy = pytest.mark.skipif(HAPROXY is None, reason="haproxy is missing (Debian: apt install haproxy)")


def make_role(data: str, secrets: Path) -> None:
    """Do in a database what its container does when it is made."""
    made = sa.make_url(data)
    variables = {
        "PATH": f"{postgres.programs()}{os.pathsep}{os.environ['PATH']}",
        "PGHOST": str(made.query["host"]),
        "POSTGRES_USER": made.username or "",
        "POSTGRES_DB": made.database or "",
        "SERVICE_PASSWORD_FILE": str(secrets / "database/service"),
    }
    subprocess.run(["/bin/sh", str(SCALE / "roles.sh")], env=variables, check=True)


class Store:
    """What the containers of docker/scale/compose.yaml are, as processes: their scripts and commands, with a server of
    PostgreSQL and one of objects of the tests. Services have addresses of the loopback of their own."""

    def __init__(self, folder: Path, data: str, path: str) -> None:
        self.folder, self.secrets, self.data = folder, folder / "secrets", data
        # Services are processes of their own, which signals reach; all other commands are forked, which is quick.
        quick, here = path.split(os.pathsep, 1)[0], os.pathsep.join((str(ROOT), str(ROOT / "clients" / "python")))
        program = folder / "bin" / "kvbank"
        program.parent.mkdir()
        program.write_text(
            f"""#!/bin/sh
case $1 in
serve) PYTHONPATH={here} exec {sys.executable} -c "from kvbank.cli import main; main()" "$@" ;;
*) exec {quick}/kvbank "$@" ;;
esac
"""
        )
        program.chmod(0o700)
        self.environment = {
            "PATH": f"{program.parent}{os.pathsep}{path}",
            "KVBANK_DATA": data,
            "KVBANK_OBJECTS": f"s3://{bucket.NAME}/{bucket.new_prefix()}",
            "AWS_ENDPOINT_URL": bucket.endpoint(),
            "AWS_REGION": "us-east-1",
            "SETUP": str(ROOT / "docker" / "secure" / "setup.sh"),
            "KVBANK_DURABILITY": "os",
        }

    def script(self, name: str, *words: str) -> None:
        """Run one of the scripts to its end."""
        command = ["/bin/sh", str(SCALE / f"{name}.sh"), *words]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=800, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def make(self) -> None:
        """Do what the containers `secrets`, `database` and `keys` do."""
        self.script("secrets", str(self.secrets))
        make_role(self.data, self.secrets)
        keys = ["/bin/sh", str(SCALE / "keys.sh"), str(self.secrets), *SERVICES["keys"]["command"][:-1]]
        self.script("store", str(self.secrets / "owner"), *keys)

    @contextmanager
    def service(self, number: int) -> Iterator[subprocess.Popen[str]]:
        """Serve at an address of the number's own, until the end of the block."""
        words = SERVICES["service-1"]["entrypoint"]
        command = ["/bin/sh", str(SCALE / "store.sh"), str(self.secrets / "store"), *words[words.index("kvbank") :]]
        given = {
            "KVBANK_DATA": postgres.of(self.data, "kvbank_service"),
            "KVBANK_CACHE": str(self.folder / f"cache-{number}"),
            "KVBANK_TLS_CERT": str(self.secrets / "service/server.pem"),
            "KVBANK_TLS_KEY": str(self.secrets / "service/server.key"),
            "KVBANK_METRICS_LISTEN": f"127.0.0.{number}:9400",
        }
        with subprocess.Popen(
            [word.replace("0.0.0.0", f"127.0.0.{number}") for word in command],
            env=self.environment | given,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout is not None
            said = [process.stdout.readline()]
            while " serving " not in said[-1]:
                said.append(process.stdout.readline())
                assert said[-1], said
            try:
                yield process
            finally:
                process.terminate()
                process.stdout.read()

    def balancer(self, services: Mapping[str, int]) -> Path:
        """Write the balancer's file with the addresses of this machine. services: numbers by name."""
        text = (SCALE / "haproxy.cfg").read_text().replace("/secrets", str(self.secrets))
        for name, number in services.items():
            text = text.replace(f"{name}:7400", f"127.0.0.{number}:7400")
        path = self.folder / "haproxy.cfg"
        path.write_text(text.replace("bind :7400", "bind 127.0.0.9:7400"))
        return path

    def connect(self, caller: str) -> Any:
        """Call the balancer with the key of a caller."""
        folder = self.secrets / caller
        return kvbank.connect(
            "127.0.0.9:7400",
            api_key=f"@{folder / 'key'}",
            root_certificates=str(folder / "ca.pem"),
            server_name="balancer",
            timeout=60,
        )


def calls_of(client: Any) -> int:
    """Return how many requests the service has answered that answers this one."""
    samples = client.stats().samples
    return int(sum(each.value for each in samples if each.name == "kvbank_request_seconds_count"))


def test_secrets_are_made_once(tmp_path: Path) -> None:
    made = lambda: {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}  # noqa: E731
    run = lambda: subprocess.run(["/bin/sh", str(SCALE / "secrets.sh"), str(tmp_path)], check=True)  # noqa: E731
    run()
    first = made()
    assert {str(path.relative_to(tmp_path)) for path in first} == {
        "database/password",
        "database/service",
        "bucket/s3.json",
        "store/env",
        "store/pgpass",
        "owner/env",
        "owner/pgpass",
        "grafana/password",
    }
    words = set()
    for folder, user, file in (("store", "kvbank_service", "service"), ("owner", "kvbank", "password")):
        assert (tmp_path / folder / "pgpass").stat().st_mode & 0o777 == 0o600
        assert (tmp_path / folder / "env").stat().st_mode & 0o777 == 0o600
        words.add(word := first[tmp_path / "database" / file].decode())
        assert len(word) == 40
        assert first[tmp_path / folder / "pgpass"].decode() == f"database:5432:kvbank:{user}:{word}\n"
    assert len(words) == 2
    [identity] = json.loads(first[tmp_path / "bucket/s3.json"])["identities"]
    assert "Admin" not in identity["actions"]
    assert identity["credentials"][0]["secretKey"] in first[tmp_path / "store/env"].decode()
    run()
    assert made() == first


def test_a_store_of_before_services_had_a_user_of_their_own_gets_its_password(tmp_path: Path) -> None:
    run = partial(subprocess.run, ["/bin/sh", str(SCALE / "secrets.sh"), str(tmp_path)], check=True)
    run()
    shutil.rmtree(tmp_path / "owner")
    (tmp_path / "database/service").unlink()
    old = (tmp_path / "database/password").read_text()
    (tmp_path / "store/pgpass").write_text(f"database:5432:kvbank:kvbank:{old}\n")
    keys = (tmp_path / "store/env").read_bytes()
    run()
    assert (tmp_path / "owner/pgpass").read_text() == f"database:5432:kvbank:kvbank:{old}\n"
    assert old not in (tmp_path / "store/pgpass").read_text()
    assert keys == (tmp_path / "store/env").read_bytes() == (tmp_path / "owner/env").read_bytes()


def test_services_change_rows_alone_and_are_bound_by_row_level_security(tmp_path: Path) -> None:
    if why := postgres.missing():
        pytest.skip(why)
    import psycopg

    (tmp_path / "database").mkdir()
    (tmp_path / "database/service").write_text("word")
    with postgres.database(empty=True) as data:
        for _ in range(2):
            make_role(data, tmp_path)
        with kvbank_on_path() as path:
            words = ["kvbank", "migrate", "--data", data]
            subprocess.run(words, env={"PATH": path}, check=True, capture_output=True)
        with psycopg.connect(postgres.of(data, "kvbank_service"), autocommit=True) as service:
            service.execute("SELECT count(*) FROM banks")
            service.execute("DELETE FROM chunks")
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                service.execute("CREATE TABLE mine (id int)")
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                service.execute("DROP TABLE banks")
            bound = "SELECT NOT (rolsuper OR rolbypassrls) FROM pg_roles WHERE rolname = current_user"
            assert service.execute(bound).fetchone() == (True,)


@needs_haproxy
@pytest.mark.parametrize("other", [False, True], ids=["as it is", "with the lines in its comment"])
def test_the_balancer_takes_its_file(tmp_path: Path, other: bool) -> None:
    if not shutil.which("openssl"):
        pytest.skip("openssl is missing")
    (tmp_path / "secrets/balancer").mkdir(parents=True)
    pair, names = tmp_path / "secrets/balancer/service.pem", "/CN=service"
    words = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-subj",
        names,
    ]
    subprocess.run([*words, "-keyout", str(pair) + ".k", "-out", str(pair) + ".c"], check=True, capture_output=True)
    certificate = Path(f"{pair}.c").read_text()
    pair.write_text(certificate + Path(f"{pair}.k").read_text())
    pair.with_name("ca.pem").write_text(certificate)
    file = Store(tmp_path, "", "").balancer({"service-1": 7, "service-2": 8})
    if other:
        text = file.read_text()
        commented = re.findall(r"^    #   (.*)$", text, re.MULTILINE)
        assert len(commented) == 2
        file.write_text(text.replace("balance leastconn", "\n    ".join(commented)))
    done = subprocess.run([str(HAPROXY), "-c", "-f", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1500)
@needs_haproxy
def test_calls_of_one_connection_go_to_both_services_and_to_the_other_when_one_ends(tmp_path: Path) -> None:
    if why := postgres.missing() or bucket.missing():
        pytest.skip(why)
    with ExitStack() as running:
        path = running.enter_context(kvbank_on_path())
        store = Store(tmp_path, running.enter_context(postgres.database(empty=True)), path)
        store.make()
        services = [running.enter_context(store.service(number)) for number in (7, 8)]
        file = store.balancer({"service-1": 7, "service-2": 8})
        balancer = running.enter_context(subprocess.Popen([str(HAPROXY), "-f", str(file)]))
        running.callback(balancer.terminate)
        client = running.enter_context(store.connect("worker-1"))
        client.create_bank("session-a", kv=None, embedding=kvbank.EmbeddingSpec("e", 4))
        for number in range(40):
            vector = [1.0, 0.0, 0.0, float(number)]
            client.write("session-a", kvbank.NewChunk(vector, text=str(number)), reader_digest="", embedder_digest="e")
            assert client.get_bank("session-a").usage.chunks == number + 1
        operator = running.enter_context(store.connect("operator"))
        seen = {calls_of(operator) for _ in range(20)}
        print("requests that services have answered:", sorted(seen), file=sys.stderr)
        assert 20 < min(seen) <= max(seen) < 80
        services[0].terminate()
        for _ in range(30):
            assert client.get_bank("session-a").usage.chunks == 40
        services[0].wait(60)
        assert client.get_bank("session-a").usage.chunks == 40
