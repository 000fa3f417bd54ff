"""The row `objects` of the benchmarks: payloads of 1 MiB that are put into a bucket and read from it, and from the
cache, beside the bare requests to the same bucket. No service is asked."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from itertools import count
from pathlib import Path

from benchmarks import s3_server
from benchmarks.bench import Bench
from benchmarks.pair import Contender, Result, Skipped, Target, compare, timed
from memory_service.domain.model import Payload, Producer, Tensor
from memory_service.storage.s3.layout import key
from memory_service.storage.s3.opening import open_bucket, open_objects

ROW = "objects"
_MIB = 1 << 20
_READ = 8
_UID = "0123456789abcdef"
_TOKENS = 256
_KV = _TOKENS * 8 * 128 * 2
# A put takes at most so many milliseconds more than the request.
_MORE = 4.0


def run(bench: Bench) -> Iterator[Result]:
    """Time puts of 1 MiB, and reads of 8 x 1 MiB."""
    try:
        import moto  # noqa: F401
        import obstore  # noqa: F401
    except ImportError as error:
        bench.skipped.append(Skipped(ROW, "a bucket", f"{error.name} is not installed"))
        return
    os.environ.setdefault("AWS_ACCESS_KEY_ID", "benchmark")
    os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "benchmark")
    folder = bench.scratch(ROW)
    with ExitStack() as stack:
        stack.callback(bench.clear, folder)
        url = stack.enter_context(s3_server.bucket(folder))
        yield from _measured(bench, folder, url, stack)


def _measured(bench: Bench, folder: Path, url: str, stack: ExitStack) -> Iterator[Result]:
    import obstore
    from obstore.store import S3Store

    objects = open_objects(open_bucket(f"s3://{s3_server.BUCKET}", endpoint=url), "a store", folder / "cache", 1 << 30)
    stack.callback(objects.close)
    options = {"allow_http": True, "timeout": timedelta(seconds=60)}
    bare = S3Store(s3_server.BUCKET, prefix="bare", endpoint=url, client_options=options)  # type: ignore[arg-type]
    serial, data, pool = count(1), os.urandom(_MIB), stack.enter_context(ThreadPoolExecutor(_READ))
    described = _payload()

    def put() -> None:
        objects.put(_UID, next(serial), described, data, lambda _checksums: {})

    bench.say("put")
    contenders = [
        Contender("ours", "ours", timed(put)),
        Contender(
            "the request alone",
            "floor",
            timed(lambda: obstore.put(bare, f"put/{next(serial)}", data, mode="create")),
            (Target("difference", _MORE),),
        ),
    ]
    yield from compare(ROW, "put 1 MiB into a bucket", contenders, bench.n(60))

    stored = {n: objects.put(_UID, n, described, data, lambda _checksums: {}) for n in range(10**9, 10**9 + _READ)}
    for number in stored:
        obstore.put(bare, key(_UID, number), data)
    room = memoryview(bytearray(_MIB))

    def read() -> None:
        objects.expect((_UID, number, payload) for number, payload in stored.items())
        for number, payload in stored.items():
            source = objects.open(_UID, number, payload)
            source.read_at(room, payload.tensors[0].offset)
            source.close()

    def cold() -> float:
        objects.purge(_UID)
        return timed(read)()

    def request(number: int) -> int:
        return len(obstore.get_range(bare, key(_UID, number), start=0, length=_MIB))

    bench.say("read")
    contenders = [
        Contender("ours", "ours", cold),
        Contender("from the cache", "ours", timed(read), judged=False),
        Contender("the requests alone, one by one", "floor", timed(lambda: [*map(request, stored)])),
        Contender("the requests alone, all at once", "floor", timed(_all(pool, request, list(stored)))),
    ]
    yield from compare(ROW, f"read {_READ} x 1 MiB from a bucket", contenders, bench.n(60))


def _all(pool: ThreadPoolExecutor, request: Callable[[int], int], numbers: Sequence[int]) -> Callable[[], object]:
    return lambda: list(pool.map(request, numbers))


def _payload() -> Payload:
    """Describe 1 MiB of K-V of one layer: 256 tokens, 8 heads of 128, fp16."""
    kv = [Tensor(name, "fp16", (8, _TOKENS, 128), 0, _KV, 0) for name in ("k.0", "v.0")]
    return Payload(tuple(kv), Producer())
