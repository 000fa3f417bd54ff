"""The routes below /v1/kvbank/: why an answer came, and sessions with their memory."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import kvbank
from tests.worker_http.conftest import Running
from tests.worker_http.test_chat import ask
from tests.worker_http.test_server import call
from tests.worker_http.test_sessions import WORDS, talk

NAME = "looked at"
SAID = [*WORDS, "and who sails the ships?"]


@pytest.fixture(scope="module")
def service(address: str) -> Iterator[kvbank.Client]:
    with kvbank.connect(address) as client:
        yield client


@pytest.fixture(scope="module")
def answers(worker: Running) -> list[Any]:
    """Return the answers of a conversation that is longer than its window."""
    with worker.client() as client:
        return talk(client, SAID, extra_headers={"X-Kvbank-Session": NAME})[1]


@pytest.fixture(scope="module")
def session(answers: list[Any], service: kvbank.Client) -> kvbank.Session:
    return service.sessions.get(name=NAME)


@pytest.fixture
def asked(worker: Running, session: kvbank.Session) -> Callable[..., Any]:
    """Return what asks a route and returns the document of its answer. path: behind that of the session."""

    def answered(
        method: str, path: str = "", body: Any = None, *, status: int = 200, of: str = session.session_id
    ) -> Any:
        data = None if body is None else json.dumps(body).encode()
        found, _, document = call(worker, method, f"/v1/kvbank/sessions/{of}{path}", data)
        assert found == status, document
        return document

    return answered


def test_an_answer_says_why_it_came(worker: Running, answers: list[Any], session: kvbank.Session) -> None:
    status, _, trace = call(worker, "GET", f"/v1/kvbank/responses/{answers[-1].id}/trace")
    assert status == 200
    assert (trace["id"], trace["session"], trace["turn"]) == (answers[-1].id, session.session_id, len(SAID))
    assert SAID[-1].endswith(trace["query"])
    assert trace["query"]
    shares = [trace[part]["share"] for part in ("window", "sinks", "others")]
    shares += [chunk["share"] for chunk in trace["chunks"]]
    assert sum(shares) == pytest.approx(1, abs=1e-3)
    masses = [chunk["total"] for chunk in trace["chunks"]]
    assert masses == sorted(masses, reverse=True)
    for chunk in trace["chunks"]:
        assert len(chunk["mass"]) == len(trace["layers"])
        assert (chunk["bank"], chunk["source"]) == (session.bank, None)
        assert chunk["turn"] in range(1, len(SAID))
        assert chunk["text"]
        assert chunk["created_at"] <= trace["created_at"]
        assert chunk["score"] is None or chunk["query"]
        assert trace["steps"][chunk["steps"][0]]["query"] == (chunk["query"] or trace["query"])


def test_a_chunk_that_is_gone_is_not_shown(worker: Running, service: kvbank.Client) -> None:
    with worker.client() as client:
        answers = talk(client, SAID, extra_headers={"X-Kvbank-Session": "gone"})[1]
    path = f"/v1/kvbank/responses/{answers[-1].id}/trace"
    bank = service.sessions.get(name="gone").bank
    before = call(worker, "GET", path)[2]["chunks"]
    service.delete_chunks(bank, [before[0]["chunk_id"]])
    after = call(worker, "GET", path)[2]["chunks"]
    assert [chunk["chunk_id"] for chunk in after] == [chunk["chunk_id"] for chunk in before]
    assert after[0] == {**before[0], **dict.fromkeys(("text", "source", "turn", "role", "created_at", "retrievals"))}
    assert after[1:] == before[1:]


def test_an_answer_without_a_trace_says_so(serving: Callable[..., Any]) -> None:
    with serving(why=0) as running, running.loaded().client() as client:
        answers = talk(client, SAID[:1], extra_headers={"X-Kvbank-Session": "untraced"})[1]
        status, _, document = call(running, "GET", f"/v1/kvbank/responses/{answers[0].id}/trace")
        assert (status, document["error"]["code"]) == (404, "no_trace")


def test_sessions_are_listed_in_pages(worker: Running, service: kvbank.Client, session: kvbank.Session) -> None:
    fork = service.sessions.fork(session.session_id, turn=2)
    path, found = "/v1/kvbank/sessions?limit=2", list[Any]()
    page = call(worker, "GET", path)[2]
    while page["has_more"]:
        found += page["data"]
        page = call(worker, "GET", f"{path}&after={found[-1]['id']}")[2]
    found += page["data"]
    assert [each["id"] for each in found] == [each.session_id for each in service.sessions.list()]
    shown = {each["id"]: each for each in found}
    assert shown[session.session_id]["name"] == NAME
    assert (shown[fork.session_id]["title"], shown[fork.session_id]["turns"]) == (SAID[0], 2)
    assert shown[fork.session_id]["forked_from"] == {"session": session.session_id, "turn": 2}


def test_a_session_is_shown_with_its_last_turns(asked: Callable[..., Any], answers: list[Any]) -> None:
    found = asked("GET", "?limit=2")
    assert (found["turns"], found["after"]) == (len(SAID), len(SAID) - 2)
    assert [turn["id"] for turn in found["data"]] == [answer.id for answer in answers[-2:]]
    assert found["data"][-1]["items"][0] == {"role": "user", "text": SAID[-1]}
    assert all(turn["traced"] for turn in found["data"])
    assert [turn["number"] for turn in asked("GET", "?after=0&limit=1")["data"]] == [1]


def test_the_memory_of_a_session(asked: Callable[..., Any], service: kvbank.Client, session: kvbank.Session) -> None:
    stored = {chunk.chunk_id: chunk for chunk in service.list_chunks(session.bank, filter=session.filter)}
    page = asked("GET", "/memory?tokens=40")
    found = page["data"]
    while page["before"]:
        page = asked("GET", f"/memory?tokens=40&before={page['before']}")
        found += page["data"]
    assert [chunk["start"] for chunk in found] == sorted((chunk.start for chunk in stored.values()), reverse=True)
    assert {chunk["chunk_id"]: chunk["text"] for chunk in found} == {key: value.text for key, value in stored.items()}
    assert (page["evicted"], page["next"]) == ([], [])


def test_what_was_evicted_is_shown_and_why(worker: Running, service: kvbank.Client, asked: Callable[..., Any]) -> None:
    with worker.client() as client:
        messages = talk(client, SAID[:3], extra_headers={"X-Kvbank-Session": "evicted"})[0]
        made = service.sessions.get(name="evicted")
        held = service.get_bank(made.bank).usage.chunks
        service.update_bank(made.bank, capacity=kvbank.Capacity(chunks=held), policy=kvbank.Policy("lru"))
        said = [*messages, {"role": "user", "content": "and what else was there to be said of the ships?"}]
        ask(client, said, extra_headers={"X-Kvbank-Session": "evicted"})
    full = kvbank.Capacity(chunks=service.get_bank(made.bank).usage.chunks)
    service.update_bank(made.bank, capacity=full)
    memory = asked("GET", "/memory", of=made.session_id)
    assert {each["reason"] for each in memory["evicted"]} == {"least_recent"}
    assert memory["next"]
    assert memory["evicted"][0]["turn"] in range(1, 5)
    events = asked("GET", "/timeline", of=made.session_id)["data"]
    gone = {event["chunk_id"] for event in events if event["kind"] == "evicted"}
    assert gone == {each["chunk_id"] for each in memory["evicted"]}


def test_the_time_line_of_a_session(asked: Callable[..., Any], answers: list[Any]) -> None:
    events = asked("GET", "/timeline")["data"]
    written = [event for event in events if event["kind"] == "written"]
    assert [event["id"] for event in written] == [answer.id for answer in answers]
    recalled = [event for event in events if event["kind"] == "recalled"]
    assert recalled[-1]["turn"] == len(SAID)
    assert set(recalled[-1]["from_turns"]) <= set(range(1, len(SAID)))
    assert [event["at"] for event in events] == sorted(event["at"] for event in events)
    assert {event["turn"] for event in asked("GET", "/timeline?limit=1")["data"]} == {len(SAID)}


def test_a_fork_is_rewound_and_deleted(
    asked: Callable[..., Any], service: kvbank.Client, session: kvbank.Session
) -> None:
    fork = asked("POST", "/fork", {"turn": 3, "name": "a fork"})
    assert (fork["turns"], fork["name"]) == (3, "a fork")
    assert asked("POST", "/rewind", {"turn": 1}, of=fork["id"])["turns"] == 1
    lease = service.sessions.acquire(fork["id"], "another worker").lease
    assert lease is not None
    refused = asked("POST", "/rewind", {"turn": 0}, of=fork["id"], status=409)
    assert refused["error"]["code"] == "session_conflict"
    service.sessions.release(fork["id"], lease.epoch)
    assert asked("POST", "/fork", {"name": "a fork"}, status=409)["error"]["code"] == "session_conflict"
    receipt = asked("DELETE", of=fork["id"])
    assert receipt["object"] == "kvbank.receipt"
    assert asked("GET", of=fork["id"], status=404)["error"]["code"] == "not_found"
    assert asked("GET")["turns"] == len(SAID)


def test_a_turn_is_forgotten_with_its_trace(worker: Running, asked: Callable[..., Any], service: kvbank.Client) -> None:
    with worker.client() as client:
        answers = talk(client, SAID, extra_headers={"X-Kvbank-Session": "forgotten"})[1]
    session = service.sessions.get(name="forgotten")
    receipt = asked("POST", "/forget", {"first": 1, "last": 2}, of=session.session_id)
    assert (receipt["object"], receipt["turns"], receipt["remains"]) == ("kvbank.receipt", 2, "")
    assert receipt["id"]
    assert receipt["chunks"]
    assert all(int(chunk["checksum"], 16) for chunk in receipt["chunks"])
    shown = asked("GET", of=session.session_id)["data"]
    assert [turn["status"] == "forgotten" for turn in shown] == [True, True, False, False]
    assert shown[0]["items"] == []
    events = asked("GET", "/timeline", of=session.session_id)["data"]
    assert [event["turn"] for event in events if event["kind"] == "forgotten"] == [1, 2]
    paths = [f"/v1/kvbank/responses/{answer.id}/trace" for answer in answers]
    assert [call(worker, "GET", path)[0] for path in paths] == [404, 404, 200, 200]
    assert {chunk["text"] for chunk in call(worker, "GET", paths[2])[2]["chunks"]} == {None}


@pytest.mark.parametrize(
    ("method", "path", "body", "param"),
    [
        ("GET", "?limit=0", None, "limit"),
        ("GET", "?after=x", None, "after"),
        ("GET", "/memory?tokens=65537", None, "tokens"),
        ("GET", "/timeline?limit=-1", None, "limit"),
        ("POST", "/fork", {"turn": -1}, "turn"),
        ("POST", "/fork", {"turns": 1}, "turns"),
        ("POST", "/rewind", {}, "turn"),
        ("POST", "/forget", {}, "first"),
        ("POST", "/forget", {"first": 0}, "first"),
        ("POST", "/forget", {"first": 2, "last": 1}, "last"),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_name(
    asked: Callable[..., Any], method: str, path: str, body: Any, param: str
) -> None:
    assert asked(method, path, body, status=400)["error"]["param"] == param


def test_a_document_is_forgotten(worker: Running, service: kvbank.Client) -> None:
    memory = kvbank.TextMemory(service, "library")
    for source in ("guide.md", "other.md"):
        memory.add(["the sea is wide", "ships come and go"], source=source)
    path, body = "/v1/kvbank/documents/forget", json.dumps({"bank": "library", "source": "guide.md"}).encode()
    status, _, receipt = call(worker, "POST", path, body)
    assert (status, receipt["object"], receipt["chunk_count"], len(receipt["chunks"])) == (200, "kvbank.receipt", 2, 2)
    assert {chunk.metadata["source"] for chunk in memory} == {"other.md"}
    assert call(worker, "POST", path, body)[2] == receipt
    status, _, refused = call(worker, "POST", path, b'{"bank": "library"}')
    assert (status, refused["error"]["param"]) == (400, "source")
    assert call(worker, "POST", path, b'{"bank": "none", "source": "x"}')[0] == 404


def test_what_is_not_there_is_told_in_one_way(worker: Running) -> None:
    nothing = "0" * 32
    for method, path, body in (
        ("GET", "", None),
        ("GET", "/memory", None),
        ("GET", "/timeline", None),
        ("POST", "/fork", b"{}"),
        ("POST", "/rewind", b'{"turn": 0}'),
        ("DELETE", "", None),
    ):
        status, _, document = call(worker, method, f"/v1/kvbank/sessions/{nothing}{path}", body)
        assert (status, document["error"]["code"]) == (404, "not_found")
    assert call(worker, "GET", f"/v1/kvbank/responses/{nothing}/trace")[0] == 404
