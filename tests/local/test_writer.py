"""The writer of the local engine, called directly: operations that are given together are one step each."""

import threading
import time
from pathlib import Path
from typing import Any

from memory_service.storage.local.engine import LocalEngine
from memory_service.storage.local.records.schema import raw
from memory_service.storage.local.records.writer import Operation
from tests.support.engines import opened
from tests.support.store import reason


def test_operations_behind_one_that_spoils_its_transaction_are_told_that_too(tmp_path: Path) -> None:
    ended: list[tuple[Any, str]] = []

    def write(number: int) -> Operation:
        def run(connection: Any) -> int:
            raw(connection).execute("INSERT INTO numbers VALUES (?)", (number,))
            return number // (number - 3) and number

        return Operation(run, None, lambda value, error: ended.append((value, type(error).__name__)))

    with opened(tmp_path / "data") as engine:
        assert isinstance(engine, LocalEngine)
        writer = engine.records.writer
        writer.submit(lambda connection: raw(connection).execute("CREATE TABLE numbers (number)")).result(60)
        writer.submit_all([write(number) for number in range(1, 6)], tenant="")
        found = writer.submit(lambda connection: raw(connection).execute("SELECT * FROM numbers").fetchall())
        assert found.result(60) == []
    assert ended == [(None, "ZeroDivisionError")] * 5
    writer.submit_all([write(9)], tenant="")
    assert ended[5:] == [(None, "ServiceError")]
    assert reason(lambda: writer.submit(lambda _: None).result(60)) == "NOT_SERVING"


def test_a_tenant_does_not_wait_for_all_operations_that_another_has_given_together(tmp_path: Path) -> None:
    order: list[str] = []

    def take_the_time_of_a_transaction(_connection: Any) -> None:
        end = time.monotonic() + 0.025
        while time.monotonic() < end:
            pass

    begun = threading.Event()
    with opened(tmp_path / "data") as engine:
        assert isinstance(engine, LocalEngine)
        writer = engine.records.writer
        writer.submit(lambda _: begun.wait(60), tenant="c")
        many = [Operation(take_the_time_of_a_transaction, None, lambda *_: order.append("a")) for _ in range(5)]
        writer.submit_all(many, tenant="a")
        one = writer.submit(lambda _: order.append("b"), tenant="b")
        begun.set()
        one.result(60)
        writer.submit(lambda _: None, tenant="a").result(60)
    assert order.index("b") < 3
    assert order.count("a") == 5
