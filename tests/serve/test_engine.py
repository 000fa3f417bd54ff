"""Requests that share a model: who comes next, how many wait, and what becomes of those whose callers leave."""

import threading
from collections import Counter
from statistics import median

import pytest
import torch

from model_worker.serve.engine import Busy, Engine, Left, Stopping, Turn


def token(turn: Turn) -> bool:
    """Take the time of a token that no other request's can be decoded with; tell whether the caller has left."""
    turn.step(lambda: None, {})
    return turn.left


def test_sessions_of_one_caller_get_equal_shares() -> None:
    """Decode until each of six sessions has had 300 tokens: half of them have had about as many, and no more.

    A thread that is there first has the model alone for a while, which the others get back.
    """
    engine, counts, over = Engine(most_running=8), Counter({str(n): 0 for n in range(6)}), threading.Event()
    all_there = threading.Barrier(6)

    def work(name: str):
        def run(turn: Turn) -> None:
            all_there.wait()
            with turn.holding_model():
                while not over.is_set():
                    counts[name] += 1
                    if min(counts.values()) == 300:
                        over.set()
                    token(turn)

        return run

    for job in [engine.submit("caller", str(n), work(str(n))) for n in range(6)]:
        job.result.result(60)
    assert median(counts.values()) <= 1.2 * min(counts.values())


def test_no_answer_waits_for_all_those_that_begin_behind_it() -> None:
    """Let sessions ask again and again, more than may run: each answer takes about as long, in tokens of all."""
    engine, tokens, took = Engine(most_running=8), 0, list[int]()

    def work(length: int):
        def run(turn: Turn) -> None:
            nonlocal tokens
            with turn.holding_model():
                for _ in range(length):
                    tokens += 1
                    token(turn)

        return run

    def talk(session: int) -> None:
        for number in range(30):
            begun = tokens
            engine.submit("caller", session, work(12 + (5 * session + 7 * number) % 12)).result.result(60)
            took.append(tokens - begun)

    talking = [threading.Thread(target=talk, args=(session,)) for session in range(10)]
    for each in talking:
        each.start()
    for each in talking:
        each.join()
    assert max(took) <= 3 * median(took)


def test_a_caller_with_many_sessions_takes_nothing_from_another() -> None:
    engine, counts, over = Engine(most_running=8), Counter[str](), threading.Event()
    all_there, awake = threading.Barrier(7), set[int]()

    def work(name: str):
        def run(turn: Turn) -> None:
            all_there.wait()
            with turn.holding_model():
                while not over.is_set():
                    awake.add(threading.get_ident())
                    counts[name] += len(awake) == 7  # from then on all of them want the model
                    if counts["small"] == 3000:
                        over.set()
                    token(turn)

        return run

    jobs = [engine.submit("big", str(n), work("big")) for n in range(6)] + [engine.submit("small", "a", work("small"))]
    for job in jobs:
        job.result.result(60)
    assert 0.5 * counts["big"] <= counts["small"] <= 2 * counts["big"]


def test_one_thread_at_a_time_has_the_model() -> None:
    engine, inside, most = Engine(), 0, 0
    lock = threading.Lock()

    def work(turn: Turn) -> None:
        nonlocal inside, most
        with turn.holding_model():
            for _ in range(200):
                with lock:
                    inside += 1
                    most = max(most, inside)
                with lock:
                    inside -= 1
                token(turn)

    for job in [engine.submit(str(n % 3), str(n), work) for n in range(6)]:
        job.result.result(60)
    assert most == 1


def test_requests_of_one_session_run_one_after_the_other() -> None:
    engine, order = Engine(), list[tuple[str, int]]()

    def work(number: int):
        def run(turn: Turn) -> None:
            with turn.holding_model():
                order.append(("begin", number))
                token(turn)
            order.append(("end", number))

        return run

    for job in [engine.submit("caller", "one", work(n)) for n in range(5)]:
        job.result.result(60)
    assert order == [(what, n) for n in range(5) for what in ("begin", "end")]


def test_what_does_not_fit_is_refused_and_room_is_left_for_other_callers() -> None:
    engine, over = Engine(most_running=4, most_waiting=2), threading.Event()
    begun = threading.Semaphore(0)

    def work(turn: Turn) -> None:
        begun.release()
        over.wait(60)

    jobs = [engine.submit("big", str(n), work) for n in range(5)]
    for _ in range(3):
        assert begun.acquire(timeout=60)
    assert (engine.running, engine.waiting) == (3, 2)
    with pytest.raises(Busy, match="2 requests wait already") as busy:
        engine.submit("big", "6", work)
    assert busy.value.retry_after >= 1
    engine.forget(jobs[4])
    jobs.append(engine.submit("small", "a", work))
    assert begun.acquire(timeout=60)
    over.set()
    with pytest.raises(Left):
        jobs.pop(4).result.result(60)
    for job in jobs:
        job.result.result(60)
    assert engine.wait_until_idle(60)


def test_who_leaves_ends_at_the_next_token_and_in_a_prompt() -> None:
    engine, reading = Engine(), threading.Event()

    def endless(turn: Turn) -> int:
        done = 0
        with turn.holding_model():
            while not token(turn):
                done += 1
                reading.set()
        return done

    def prompt(turn: Turn) -> None:
        with turn.holding_model():
            while True:
                turn.progress(0, 100)

    jobs = [engine.submit("caller", "a", endless), engine.submit("caller", "b", prompt)]
    assert reading.wait(60)
    for job in jobs:
        engine.forget(job)
    assert jobs[0].result.result(60) > 0
    with pytest.raises(Left):
        jobs[1].result.result(60)


def test_draws_do_not_depend_on_who_else_draws() -> None:
    def work(turn: Turn) -> list[int]:
        drawn = []
        with turn.holding_model(seed=7):
            for _ in range(20):
                drawn.append(int(torch.randint(1000, (1,))))
                token(turn)
        return drawn

    alone = Engine().submit("a", "a", work).result.result(60)
    engine = Engine()
    assert [job.result.result(60) for job in [engine.submit("a", str(n), work) for n in range(4)]] == [alone] * 4


def test_a_stopping_engine_takes_nothing_new_and_ends_what_runs() -> None:
    engine, begun, over = Engine(most_running=1), threading.Event(), threading.Event()

    def work(turn: Turn) -> str:
        begun.set()
        over.wait(60)
        return "answered"

    jobs = [engine.submit("a", "a", work), engine.submit("a", "b", work)]
    assert begun.wait(60)
    engine.stop()
    with pytest.raises(Stopping):
        engine.submit("a", "c", work)
    over.set()
    assert [job.result.result(60) for job in jobs] == ["answered"] * 2
    engine.close()


def test_the_error_of_a_request_is_its_own() -> None:
    engine = Engine(most_running=1)

    def fails(turn: Turn) -> None:
        with turn.holding_model():
            raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        engine.submit("a", "a", fails).result.result(60)
    assert engine.submit("a", "a", lambda turn: turn.left).result.result(60) is False


def test_who_waits_for_something_else_lends_the_model_and_draws_as_if_alone() -> None:
    engine, has, done = Engine(), threading.Event(), threading.Event()

    def lending(turn: Turn) -> list[float]:
        with turn.holding_model(seed=7):
            has.set()
            first = float(torch.rand(()))
            with turn.lending_model():
                assert done.wait(60)
            return [first, float(torch.rand(()))]

    def other(turn: Turn) -> None:
        with turn.holding_model(seed=8):
            torch.rand(())
        done.set()

    lender = engine.submit("a", "a", lending)
    assert has.wait(60)
    engine.submit("b", "b", other).result.result(60)
    drawn = lender.result.result(60)
    torch.manual_seed(7)  # behind the last draw of the other thread, since all threads share one state
    assert drawn == torch.rand(2).tolist()
