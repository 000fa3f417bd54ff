"""The manifest of a backup, backup.json, which says what is in it. This file owns that it is written last, so that a
folder with a manifest is whole."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import xxhash

import memory_service
from kvbank.files import durable
from memory_service.care.folder import DATABASE
from memory_service.care.report import CareError, Findings
from memory_service.storage.local.files.folder import MANIFEST

_VERSION = 1


def write(folder: Path, *, schema: str, store_id: str, findings: Findings) -> None:
    """Write the manifest of a folder whose database is closed."""
    content = {
        "kvbank_backup": _VERSION,
        "kvbank": memory_service.__version__,
        "schema": schema,
        "store_id": store_id,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "totals": dict(findings.totals),
        "left_out": [{"bank": p.bank, "chunk_id": p.chunk_id, "detail": p.detail} for p in findings.problems],
        "database": {"bytes": (folder / DATABASE).stat().st_size, "xxh3_64": digest(folder / DATABASE)},
    }
    text = json.dumps(content, indent=2) + "\n"
    # The whole folder is made durable later.
    durable.replace(folder / MANIFEST, [text.encode()], sync="nothing", temporary=folder / f"{MANIFEST}.tmp")


def read(folder: Path) -> dict[str, Any]:
    """Read the manifest of a backup. Errors: CareError for a folder that is no backup, or one of a later kind."""
    if not folder.exists():
        raise CareError(f"there is no folder {folder}")
    if not folder.is_dir():
        raise CareError(f"{folder} is not a folder")
    try:
        text = (folder / MANIFEST).read_bytes()
    except FileNotFoundError as error:
        raise CareError(f"{folder} is not a backup of kvbank: it has no {MANIFEST}") from error
    return parse(text, str(folder))


def parse(text: bytes, place: str) -> dict[str, Any]:
    """Return what a manifest says. place: that of the backup, in words. Errors: CareError for one that cannot be read,
    or is of a later kind."""
    try:
        content = json.loads(text)
        version = content["kvbank_backup"]
        str(content["schema"]), str(content["database"]["xxh3_64"]), str(content["store_id"])
    except (ValueError, KeyError, TypeError) as error:
        raise CareError(f"{place}/{MANIFEST} cannot be read") from error
    if version != _VERSION:
        raise CareError(f"{place} was made by a newer kvbank (backup version {version}, this one knows {_VERSION})")
    return dict(content)


def digest(path: Path) -> str:
    """Return the xxh3-64 of a file, in hexadecimal."""
    hasher = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            hasher.update(part)
    return hasher.hexdigest()
