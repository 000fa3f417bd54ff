"""Reading payloads from a bucket: what is asked for, what comes from the cache, and that nothing wrong is handed on."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from memory_service.domain.cancellation import Cancellation, Cancelled
from memory_service.domain.errors import StartError
from memory_service.domain.limits import ObjectLimits
from memory_service.observe.metrics import BucketFigures
from memory_service.storage.base import DamagedError, NotThereError
from memory_service.storage.s3.layout import key
from tests.s3.conftest import QUICK
from tests.support.bucket import CHANGED, CUT, DEAF
from tests.support.layered import UID, data_of, only, put, read


def gets(proxy):
    return [request for request in proxy.seen if request.startswith("GET")]


def test_what_was_read_comes_from_the_cache_also_after_a_restart(bucket, through, proxy, opened):
    objects = opened(through())
    payload = put(objects, 1)
    assert read(objects, 1, payload) == read(objects, 1, payload) == data_of(1, payload)
    objects.close()
    again = opened(through())
    proxy.faults = [(500, "InternalError")]
    other = put(again, 2)
    assert read(again, 1, payload) == data_of(1, payload)
    assert len(gets(proxy)) == 1
    read(again, 2, other)
    assert again.figures() == BucketFigures(cached=1, fetched=1, repeated=1, cache_bytes=8192)


def test_layers_are_read_alone_and_neighbours_at_once(through, proxy, opened):
    near, far = through(replace(QUICK, gap_bytes=1000)), through(replace(QUICK, gap_bytes=0))
    objects = opened(near)
    payload = put(objects, 1, layers=6, tokens=200)
    data = data_of(1, payload)
    layer = len(data) // 6
    for layers, parts in (([5], 2), ([0, 1], 1), ([0, 3, 4], 2)):
        proxy.seen.clear()
        wanted = b"".join(data[layer * n : layer * (n + 1)] for n in layers)
        assert read(objects, 1, only(payload, layers)) == wanted
        assert len(gets(proxy)) == parts
    objects.close()
    proxy.seen.clear()
    tight = opened(far)
    assert read(tight, 1, only(payload, [1, 2, 4])) == b"".join(data[layer * n : layer * (n + 1)] for n in (1, 2, 4))
    assert len(gets(proxy)) == 3


def test_a_large_object_is_read_in_parts_that_are_bounded(bucket, through, proxy, opened):
    objects = opened(through(replace(QUICK, part_bytes=1000)))
    payload = put(objects, 1, layers=3, tokens=100)
    assert read(objects, 1, payload) == data_of(1, payload)
    assert len(gets(proxy)) == -(-payload.file_length // 1000)


def test_objects_that_are_expected_are_read_together_within_the_bound(bucket, through, proxy, opened):
    objects = opened(through(replace(QUICK, requests=3)))
    payloads = {n: put(objects, n) for n in range(1, 7)}
    # Three requests are under way at once, which none of them could leave before.
    together, running, most = threading.Barrier(3, timeout=60), [], []

    def meet(request):
        if request.startswith("GET"):
            running.append(request)
            most.append(len(running))
            together.wait()
            running.remove(request)

    proxy.answers = meet
    objects.expect((UID, n, payload) for n, payload in payloads.items())
    assert all(read(objects, n, payload) == data_of(n, payload) for n, payload in payloads.items())
    assert max(most) == 3
    assert len(gets(proxy)) == 6


def test_readers_of_the_same_object_ask_once(bucket, through, proxy, opened):
    objects = opened(through())
    payload = put(objects, 1)
    waiting, asked = threading.Event(), threading.Event()

    def hold(request):
        if request.startswith("GET"):
            asked.set()
            waiting.wait(60)

    proxy.answers = hold
    with ThreadPoolExecutor(3) as pool:
        reads = [pool.submit(read, objects, 1, payload) for _ in range(3)]
        assert asked.wait(60)
        waiting.set()
        assert {done.result(60) for done in reads} == {data_of(1, payload)}
    assert len(gets(proxy)) == 1


@pytest.mark.parametrize("fault", [CHANGED, (404, "NoSuchKey"), (416, "InvalidRange")])
def test_an_answer_that_is_wrong_once_is_no_damage(bucket, through, proxy, opened, fault):
    objects = opened(through())
    payload = put(objects, 1)
    proxy.faults = [fault]
    assert read(objects, 1, payload) == data_of(1, payload)
    assert len(gets(proxy)) == 2


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda data, begin: data[:-1] + bytes([data[-1] ^ 1]), r"tensor pos\.1 does not match"),
        (lambda data, begin: data[: begin - 1] + b"!" + data[begin:], "its header does not match"),
        (lambda data, begin: data[:-1], "but of"),
        (lambda data, begin: data[:begin], "but of"),
        (lambda data, begin: data + b"x", "but of"),
        (lambda data, begin: b"", "but of 0"),
    ],
)
def test_an_object_of_other_bytes_is_damaged_and_nothing_of_it_is_read(bucket, opened, change, why):
    objects = opened(bucket)
    payload = put(objects, 1)
    stored = bytes(bucket.read(key(UID, 1), 0, payload.file_length).data)
    bucket.put(key(UID, 1), [change(stored, payload.header_length)])
    for _ in range(2):
        with pytest.raises(DamagedError, match=why):
            objects.open(UID, 1, payload)


def test_an_object_that_is_gone_is_told_from_a_bucket_that_fails(bucket, through, proxy, opened):
    objects = opened(through(replace(QUICK, patience_s=0)))
    payload = put(objects, 1)
    for fault in ((503, "SlowDown"), (403, "AccessDenied"), (404, "NoSuchBucket"), CUT):
        proxy.answers = lambda _request, fault=fault: fault
        with pytest.raises(OSError, match="s3://") as caught:
            objects.open(UID, 1, payload)
        assert not isinstance(caught.value, FileNotFoundError)
        assert not objects.there(UID)
    proxy.answers = lambda _request: None
    bucket.delete([key(UID, 1)])
    with pytest.raises(FileNotFoundError):
        objects.open(UID, 1, payload)


def test_a_damaged_file_of_the_cache_is_read_anew(bucket, through, proxy, opened, tmp_path, caplog):
    objects = opened(through())
    payload = put(objects, 1)
    read(objects, 1, payload)
    for harm in (lambda data: b"?" + data[1:], lambda data: data[:-5], lambda data: b""):
        (file,) = (tmp_path / "cache" / UID).iterdir()
        file.write_bytes(harm(file.read_bytes()))
        proxy.seen.clear()
        assert read(objects, 1, payload) == data_of(1, payload)
        assert len(gets(proxy)) == 1
    assert "a file of the cache is damaged, that of chunk 1" in caplog.text
    (file,) = (tmp_path / "cache" / UID).iterdir()
    file.unlink()
    assert read(objects, 1, payload) == data_of(1, payload)


def test_what_the_cache_cannot_keep_is_read_all_the_same(bucket, through, proxy, opened, tmp_path):
    objects = opened(through(), cache_bytes=4096)
    small, large = put(objects, 1), put(objects, 2, tokens=400)
    objects.expect([(UID, 2, large)])
    assert read(objects, 1, small) == data_of(1, small)
    for _ in range(2):
        assert read(objects, 2, large) == data_of(2, large)
    assert len(gets(proxy)) == 3
    assert [file.name.partition(".")[0] for file in (tmp_path / "cache" / UID).iterdir()] == ["1"]


def test_a_deleted_chunk_leaves_nothing_in_the_cache(bucket, through, proxy, opened, tmp_path):
    objects = opened(through())
    payload, other = put(objects, 1), put(objects, 2)
    read(objects, 1, payload)
    read(objects, 2, other)
    asked, deleted = threading.Event(), threading.Event()

    def hold(request):
        if request.startswith("GET"):
            asked.set()
            deleted.wait(60)

    proxy.answers = hold
    with ThreadPoolExecutor(1) as pool:
        # Another part of the same chunk is on its way when it is deleted, and is handed on, but not kept.
        reading = pool.submit(read, objects, 1, only(payload, [1]))
        assert asked.wait(60)
        objects.purge(UID, [1])
        deleted.set()
        assert reading.result(60)
    assert [file.name.partition(".")[0] for file in (tmp_path / "cache" / UID).iterdir()] == ["2"]
    objects.delete_bank(UID)
    assert list((tmp_path / "cache" / UID).iterdir()) == []
    assert list(bucket.pages("chunks")) == []


@pytest.mark.parametrize("delete", [lambda objects: objects.delete(UID, [1]), lambda objects: objects.delete_bank(UID)])
def test_who_reads_a_chunk_while_it_is_deleted_leaves_nothing_in_the_cache(through, proxy, opened, tmp_path, delete):
    objects = opened(through())
    payload = put(objects, 1)
    read_meanwhile = []

    def meet(request):
        if request.startswith("POST") and not read_meanwhile:
            read_meanwhile.append(read(objects, 1, payload))

    proxy.answers = meet
    delete(objects)
    assert read_meanwhile == [data_of(1, payload)]
    assert list((tmp_path / "cache" / UID).iterdir()) == []


def test_a_cache_that_somebody_empties_makes_no_object_missing(through, proxy, opened, tmp_path):
    objects = opened(through())
    payload = put(objects, 1)
    proxy.answers = lambda request: shutil.rmtree(tmp_path / "cache") if request.startswith("GET") else None
    assert read(objects, 1, payload) == data_of(1, payload)
    assert objects.figures().cache_bytes == 0
    proxy.answers = lambda _request: None
    for _ in range(2):
        assert read(objects, 1, payload) == data_of(1, payload)
    assert objects.figures() == BucketFigures(cached=1, fetched=2, repeated=0, cache_bytes=4096)


def test_a_reading_behind_the_end_is_refused_as_any_failure(bucket, opened):
    objects = opened(bucket)
    payload = put(objects, 1)
    objects.close()
    with pytest.raises(OSError, match="the service stops"):
        objects.open(UID, 1, payload)


def test_a_caller_that_has_gone_does_not_wait(bucket, through, proxy, opened):
    objects = opened(through(replace(QUICK, request_s=60)))
    payload = put(objects, 1)
    asked, gone = threading.Event(), Cancellation()

    def never(_request):
        asked.set()
        return DEAF

    proxy.answers = never

    def called():
        gone.enter()
        read(objects, 1, payload)

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(called)
        assert asked.wait(60)
        gone.cancel()
        with pytest.raises(Cancelled):
            reading.result(60)
    proxy.ended.set()


def test_a_bucket_says_whose_payloads_it_has(bucket, opened):
    first = opened(bucket)
    with pytest.raises(StartError, match="has no payloads of this store; is it another bucket or prefix than before"):
        first.claim(new=False)
    assert not first.there(UID)
    first.claim(new=True)
    first.claim(new=True)
    first.claim(new=False)
    assert first.there(UID)
    first.close()
    second = opened(bucket, store="another")
    assert not second.there(UID)
    with pytest.raises(StartError, match="has the payloads of another store"):
        second.claim(new=True)
    with pytest.raises(StartError, match="has no payloads of this store"):
        second.claim(new=False)


def test_a_service_that_writes_over_objects_is_refused(bucket, through, proxy, opened):
    proxy.dropped = {"if-none-match"}
    with pytest.raises(StartError, match="does not know If-None-Match"):
        opened(through()).claim(new=True)
    assert [item.key for page in bucket.pages("") for item in page] == ["kvbank.store"]


def test_a_bucket_that_refuses_is_one_line_at_the_start(through, proxy, opened):
    objects = opened(through(ObjectLimits(patience_s=0)))
    for fault, text in (((403, "InvalidAccessKeyId"), "refuses the credentials"), ((404, "NoSuchBucket"), "not there")):
        proxy.answers = lambda _request, fault=fault: fault
        with pytest.raises(StartError, match=text):
            objects.claim(new=True)
    with pytest.raises(NotThereError):
        put(objects, 1)


def test_the_object_of_a_chunk_is_not_written_over(bucket, opened):
    objects = opened(bucket)
    payload = put(objects, 1)
    assert put(objects, 1) == payload
    with pytest.raises(FileExistsError):
        put(objects, 1, copy={"text": "another"})
    assert read(objects, 1, payload) == data_of(1, payload)


def test_who_has_waited_long_for_a_bucket_that_hangs_asks_no_more(bucket, through, proxy, opened):
    writing = opened(bucket)
    payloads = {n: put(writing, n) for n in range(1, 9)}
    writing.close()
    objects = opened(through(replace(QUICK, requests=1, patience_s=0, request_s=0.2)))
    proxy.answers = lambda _request: DEAF
    with ThreadPoolExecutor(8) as pool:
        for failed in [pool.submit(read, objects, *item) for item in payloads.items()]:
            with pytest.raises(TimeoutError, match="does not answer in time"):
                failed.result(60)
    # Behind one or two requests the others were in line for longer than anybody is to wait.
    assert len(gets(proxy)) < 8
    proxy.answers = lambda _request: None
    objects.close()
    assert read(opened(bucket), 2, payloads[2]) == data_of(2, payloads[2])
