"""Chunks that wait on disk while the memory service is away.

One safetensors file a chunk, written, synced and renamed before `put` returns, with the idempotency key it will be
delivered under and the digests of the model and embedder that made it. Delivery may happen twice, after a crash or by
two workers over one folder; the key makes the service store it once.

This file owns the rule that one bad chunk does not hold up those behind it: what is damaged or refused is set aside,
under another suffix in the same folder, and never tried again.
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

import kvbank
from kvbank.files import private
from kvbank.files.durable import make_folder, replace
from model_worker.arguments import whole
from model_worker.errors import InputError, SpoolFull
from model_worker.tensors import to_numpy, to_torch

_WAITING, _ASIDE = ".chunk", ".aside"


@dataclass(frozen=True, slots=True)
class Spooled:
    """A chunk on its way to `bank`, and the digests it has to be written under, whoever delivers it.

    renewable: its key follows from the text that it is of, so that it may be that of an earlier reading.
    """

    bank: str
    chunk: kvbank.NewChunk
    reader_digest: str
    embedder_digest: str
    renewable: bool = False


def _is_ours(name: str) -> bool:
    return name.endswith((_WAITING, _ASIDE, ".tmp"))


def user_spool(bank_uids: Sequence[str]) -> "Spool":
    """The user's own spool for these banks: named by uid, so that a bank made anew never gets the old one's chunks."""
    import platformdirs

    return Spool(Path(platformdirs.user_state_dir("kvbank")) / "spool" / "-".join(bank_uids)[:200])


class Spool:
    """A folder of waiting chunks, at most `max_bytes` in all."""

    def __init__(self, folder: Path | str, max_bytes: int = 1 << 30):
        try:
            self.folder = Path(folder).absolute()
        except TypeError:
            raise InputError(f"a spool is in a folder, not in a {type(folder).__name__}") from None
        self.max_bytes = whole("max_bytes", max_bytes)
        self._serial = 0

    def put(self, spooled: Spooled) -> None:
        """Make a chunk durable here. Raises SpoolFull, with nothing written, when it would not fit."""
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
        """Nanoseconds since 1970, and behind whatever waits here, also where the clock has been set back."""
        waiting = (path.name.partition("-")[0] for path in self._files())
        return max([time.time_ns(), *(int(number) + 1 for number in waiting if number.isdecimal())])

    def __iter__(self) -> Iterator[tuple[Path, Spooled]]:
        """Waiting chunks, oldest first."""
        for path in self._files():
            try:
                yield path, _unpack(path)
            except FileNotFoundError:  # another worker delivered it
                continue
            except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
                self.set_aside(path, f"it is damaged: {error}")

    def done(self, path: Path) -> None:
        """The chunk at `path` was acknowledged by the service."""
        path.unlink(missing_ok=True)

    def set_aside(self, path: Path, reason: str) -> None:
        """The chunk at `path` cannot be delivered; it stays on disk for whoever looks into it."""
        with suppress(FileNotFoundError):
            path.rename(path.with_suffix(_ASIDE))
        warnings.warn(
            f"a waiting chunk was set aside as {path.with_suffix(_ASIDE)}: {reason}", RuntimeWarning, stacklevel=2
        )

    def __len__(self) -> int:
        return len(self._files())

    def size(self) -> int:
        """Bytes waiting."""
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
        "producer": asdict(chunk.producer or kvbank.Producer("none")),
    }
    # Copies, because safetensors refuses tensors that share memory, as the offsets of all layers may.
    tensors = {name: to_torch(array).clone() for name, array in (chunk.tensors or {}).items()}
    tensors["embedding"] = to_torch(chunk.embedding)  # type: ignore[arg-type]
    return safetensors.torch.save(tensors, {"record": json.dumps(record)})


def _unpack(path: Path) -> Spooled:
    with safetensors.safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["record"])
        tensors = {name: to_numpy(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    chunk = kvbank.NewChunk(
        embedding=tensors.pop("embedding"),
        tensors=tensors,
        start=record["start"],
        original_length=record["original_length"],
        token_ids=record["token_ids"],
        text=record["text"],
        metadata=record["metadata"],
        producer=kvbank.Producer(**record["producer"]),
        idempotency_key=base64.b64decode(record["key"]),
    )
    return Spooled(
        record["bank"], chunk, record["reader_digest"], record["embedder_digest"], record.get("renewable", False)
    )
