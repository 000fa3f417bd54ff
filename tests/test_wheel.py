"""The wheel has what it should have, and migrates and serves without the checkout."""

import os
import shutil
import sqlite3
import subprocess
import sys
import sysconfig
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvbank
from memory_service.storage.local.records import schema

ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "clients", "memory_service", "migrations", "model_worker", "proto")
EXPECTED = {
    "kvbank/__init__.py",
    "kvbank/__init__.pyi",
    "kvbank/py.typed",
    "kvbank/embed/idf.npz",
    "kvbank/v1/service_pb2_grpc.py",
    "memory_service/__main__.py",
    "memory_service/py.typed",
    "memory_service/storage/local/records/migrations/env.py",
    "memory_service/storage/local/records/migrations/script.py.mako",
    "memory_service/storage/postgres/migrations/env.py",
    "memory_service/storage/postgres/migrations/script.py.mako",
    "model_worker/__init__.py",
    "model_worker/__init__.pyi",
    "model_worker/http/page/index.html",
    "model_worker/http/page/main.js",
}


def run(*command: str | Path, **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the checkout gets no build folder and an old one of it does no harm."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, source)
    offline = ("--no-deps", "--no-index", "--no-build-isolation", "--quiet", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", built, source)
    (path,) = built.iterdir()
    return path


def test_it_has_everything_once(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    migrations = set(versions())
    assets = {str(path.relative_to(ROOT)) for path in (ROOT / "model_worker/assets").rglob("*") if path.is_file()}
    protos = {f"kvbank/v1/{path.name}" for path in (ROOT / "proto/kvbank/v1").glob("*.proto")}
    assert migrations
    assert protos
    assert any(name.endswith(".safetensors") for name in assets)
    assert EXPECTED | migrations | protos | assets <= set(names)
    folders = {name.partition("/")[0] for name in names}
    assert folders == {"kvbank", "memory_service", "model_worker", f"kvbank-{kvbank.__version__}.dist-info"}


def versions() -> Iterator[str]:
    for place in ("local/records", "postgres"):
        folder = ROOT / "memory_service/storage" / place / "migrations/versions"
        yield from (str(path.relative_to(ROOT)) for path in folder.glob("*.py"))


UPGRADE = """
import pathlib, sys
from memory_service.storage.local.records import schema
schema.upgrade(pathlib.Path(sys.argv[1]))
print(schema.__file__)
"""


@pytest.mark.slow
def test_it_migrates_and_serves(wheel: Path, tmp_path: Path) -> None:
    """Python is run with -S: with the folders of packages and without their .pth files, hence without the checkout."""
    site, data, ready = tmp_path / "site", tmp_path / "data", tmp_path / "ready"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", site, wheel)
    environment = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{sysconfig.get_path('purelib')}"}
    data.mkdir()
    upgrade = [sys.executable, "-S", "-c", UPGRADE, data / "metadata.db"]
    assert Path(run(*upgrade, env=environment, cwd=tmp_path).strip()).is_relative_to(site)
    command = [sys.executable, "-S", "-m", "memory_service", "--data", data, "--listen", "127.0.0.1:0"]
    with subprocess.Popen([*command, "--ready-file", ready], env=environment, cwd=tmp_path) as server:
        try:
            while not ready.exists():
                assert server.poll() is None
                time.sleep(0.02)
            with kvbank.connect(ready.read_text().strip()) as client:
                client.create_bank("notes", kv=None, embedding=kvbank.EmbeddingSpec("e", 2))
                client.write("notes", kvbank.NewChunk([1, 0]), reader_digest="", embedder_digest="e")
        finally:
            server.terminate()
    assert server.returncode == 0
    connection = sqlite3.connect(data / "metadata.db")
    assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == (schema.revisions()[-1],)
    connection.close()
