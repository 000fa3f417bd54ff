"""Chunks wait in a folder, the spool, while the memory service is away.

There is one safetensors file for each chunk, written, synced and renamed before `put` returns; it has the idempotency
key under which the chunk will be delivered, and the digests of the model and embedder that made the chunk. Delivery may
happen twice, after a crash or by two workers over one folder; the key makes the service store the chunk once.

This file owns the rule that one bad chunk does not hold up those behind it: a chunk that is damaged or refused is set
aside, under another suffix in the same folder, and never tried again.
"""

import base64
import json
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch

import kvbank
from kvbank.files import private
from kvbank.files.durable import make_folder, replace
from model_worker.arguments import whole
from model_worker.errors import InputError, SpoolFull

_WAITING, _ASIDE = ".chunk", ".aside"


@dataclass(frozen=True, slots=True)
class Spooled:
    """A chunk on its way to `bank`, with tensors of torch, and with the digests of the model and embedder that made it.

    renewable: the chunk's key follows from the text that the chunk is of, so that an earlier reading of that text may
    have used the same key.
    """

    bank: str
    chunk: kvbank.NewChunk
    reader_digest: str
    embedder_digest: str
    renewable: bool = False


def _is_ours(name: str) -> bool:
    return name.endswith((_WAITING, _ASIDE, ".tmp"))


def user_spool(bank_uids: Sequence[str]) -> "Spool":
    """Return the user's own spool for some banks.

    Its folder is named by the banks' uids, so that a bank that was made anew never gets chunks of the former one.
    """
    import platformdirs

    return Spool(Path(platformdirs.user_state_dir("kvbank")) / "spool" / "-".join(bank_uids)[:200])


class Spool:
    """A folder in which chunks wait, at most `max_bytes` bytes in all. Iteration gives them with their paths."""

    def __init__(self, folder: Path | str, max_bytes: int = 1 << 30):
        try:
            self.folder = Path(folder).absolute()
        except TypeError:
            raise InputError(f"a spool is in a folder, not in a {type(folder).__name__}") from None
        self.max_bytes = whole("max_bytes", max_bytes)
        self._serial = 0

    def put(self, spooled: Spooled) -> None:
        """Make a chunk durable in the folder. Raises SpoolFull, with nothing written, when the chunk would not fit."""
        data = _pack(spooled)
        if self.size() + len(data) > self.max_bytes:
            raise SpoolFull(f"{len(self)} chunks wait in {self.folder}, its bound of {self.max_bytes} bytes is reached")
        make_folder(self.folder)
        if not self._serial:
            private.close_ours(self.folder, _is_ours)  # as an earlier version may have left them
        self._serial += 1
        path = self.folder / f"{self._next_time():020d}-{os.getpid()}-{self._serial:06d}{_WAITING}"
        replace(path, [data])

    def _next_time(self) -> int:
        """Return nanoseconds since 1970, or a later number than any in the folder where the clock was set back."""
        waiting = (path.name.partition("-")[0] for path in self._files())
        return max([time.time_ns(), *(int(number) + 1 for number in waiting if number.isdecimal())])

    def __iter__(self) -> Iterator[tuple[Path, Spooled]]:
        """Yield the paths and chunks that wait, the oldest first; one that is damaged is set aside."""
        for path in self._files():
            try:
                yield path, _unpack(path)
            except FileNotFoundError:  # another worker delivered it
                continue
            except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
                self.set_aside(path, f"it is damaged: {error}")

    def done(self, path: Path) -> None:
        """Remove the chunk at `path`, which the service has acknowledged."""
        path.unlink(missing_ok=True)

    def set_aside(self, path: Path, reason: str) -> None:
        """Rename the chunk at `path`, which cannot be delivered, and warn; it stays on disk for a person to look at."""
        with suppress(FileNotFoundError):
            path.rename(path.with_suffix(_ASIDE))
        warnings.warn(
            f"a waiting chunk was set aside as {path.with_suffix(_ASIDE)}: {reason}", RuntimeWarning, stacklevel=2
        )

    def __len__(self) -> int:
        return len(self._files())

    def size(self) -> int:
        """Add up the bytes of the chunks that wait."""
        total = 0
        for path in self._files():
            with suppress(FileNotFoundError):
                total += path.stat().st_size
        return total

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"*{_WAITING}"))


def _pack(spooled: Spooled) -> bytes:
    chunk = spooled.chunk
    record = {
        "bank": spooled.bank,
        "reader_digest": spooled.reader_digest,
        "embedder_digest": spooled.embedder_digest,
        "key": base64.b64encode(chunk.idempotency_key).decode(),
        "renewable": spooled.renewable,
        "start": chunk.start,
        "original_length": chunk.original_length,
        "token_ids": [int(i) for i in chunk.token_ids],
        "text": chunk.text,
        "metadata": dict(chunk.metadata),
        "producer": asdict(chunk.producer or kvbank.Producer("none")) if chunk.tensors else None,
    }
    # Copies, because safetensors refuses tensors that share memory, as the offsets of all layers may.
    tensors = {name: tensor.clone() for name, tensor in (chunk.tensors or {}).items()}
    tensors["embedding"] = torch.tensor(chunk.embedding)
    data: bytes = safetensors.torch.save(tensors, {"record": json.dumps(record)})
    return data


def _unpack(path: Path) -> Spooled:
    with safetensors.safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["record"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    chunk = kvbank.NewChunk(
        embedding=tensors.pop("embedding").numpy(),
        tensors=tensors or None,  # a passage has none
        start=record["start"],
        original_length=record["original_length"],
        token_ids=record["token_ids"],
        text=record["text"],
        metadata=record["metadata"],
        producer=record["producer"] and kvbank.Producer(**record["producer"]),
        idempotency_key=base64.b64decode(record["key"]),
    )
    return Spooled(
        record["bank"], chunk, record["reader_digest"], record["embedder_digest"], record.get("renewable", False)
    )
