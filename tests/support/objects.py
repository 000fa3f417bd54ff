"""The kinds of objects that the contract of `Objects` is held against. One more is an entry more in `OBJECTS`."""

import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from memory_service.domain.model import Bank, Capacity, EmbeddingSpec, KvSpec, Policy
from memory_service.storage.base import Objects
from tests.support import bucket as s3
from tests.support.engines import ENGINES, opened


@dataclass(frozen=True)
class Place:
    """Objects, and the uid of a bank whose payloads they may have. elsewhere: the same for a place that is lost."""

    objects: Objects
    uid: str
    elsewhere: tuple[Objects, str]


@contextmanager
def _in_a_folder(folder: Path) -> Iterator[Place]:
    with opened(folder / "data") as engine:
        kv, embedding = KvSpec("reader", (0,), 1, 4, "fp16"), EmbeddingSpec("e", 4)
        bank, _ = engine.store.create_bank(Bank("b", kv, embedding, Capacity("chunks", 9), Policy(), {}))
        yield Place(engine.objects, bank.uid, (engine.objects, secrets.token_hex(8)))


@contextmanager
def _in_a_bucket(folder: Path) -> Iterator[Place]:
    from memory_service.storage.s3.opening import open_bucket, open_objects

    url, store = s3.endpoint(), secrets.token_hex(8)
    there = open_bucket(f"s3://{s3.NAME}/{s3.new_prefix()}", endpoint=url)
    nowhere = open_bucket("s3://no-such-bucket", endpoint=url)
    objects, lost = (
        open_objects(bucket, store, folder / name, 1 << 20) for name, bucket in (("a", there), ("b", nowhere))
    )
    try:
        objects.claim(new=True)
        uid = secrets.token_hex(8)
        yield Place(objects, uid, (lost, uid))
    finally:
        objects.close()
        lost.close()


@dataclass(frozen=True)
class Kind:
    """How tests get objects of one kind. missing: says why they cannot; empty where they can."""

    missing: Callable[[], str]
    placed: Callable[[Path], AbstractContextManager[Place]]


OBJECTS = {"local": Kind(ENGINES["local"].missing, _in_a_folder), "s3": Kind(s3.missing, _in_a_bucket)}
