"""A server that is not the one of the folder that it names: none of its client's files is read for it, and it learns no
nonce. One that is does not learn either what is in a file."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

import kvbank
from kvbank.v1 import service_pb2 as pb
from kvbank.wire import proof
from tests.sdk.host import Host
from tests.sdk.relay import Relay

Make = Callable[..., kvbank.NewChunk]
READER = {"reader_digest": "ab" * 32}
Says = Callable[[pb.SameHost, bytes], None]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Give one server for all tests, without direct calls, which would pass a relay by."""
    kv, embedding = kvbank.KVSpec(READER["reader_digest"], (1, 3), 2, 8), kvbank.EmbeddingSpec("cd" * 32, 16)
    digests = {**READER, "embedder_digest": "cd" * 32}
    host = Host(tmp_path_factory.mktemp("host") / "data", kv, embedding, digests)
    (host.data / "direct.sock").unlink()
    yield host
    host.close()


@pytest.fixture
def relay(host: Host) -> Iterator[Relay]:
    with closing(Relay(host.address)) as relay:
        yield relay


def says(relay: Relay, change: Says) -> None:
    """Change what the server says of its folder; `change` gets the challenge too."""

    def changed(frames: list[bytes]) -> Iterable[bytes]:
        info = pb.GetServerInfoResponse.FromString(frames[0])
        change(info.same_host, pb.GetServerInfoRequest.FromString(relay.requests[-1]).challenge)
        return [info.SerializeToString()]

    relay.change("GetServerInfo", changed)


def names(relay: Relay, *files: str) -> None:
    """Change the files that the answer to a fetch names."""

    def changed(frames: list[bytes]) -> Iterable[bytes]:
        answer = pb.FetchFilesResponse.FromString(frames[0])
        answer.files[:] = files
        return [answer.SerializeToString()]

    relay.change("FetchFiles", changed)


def forget(folder: pb.SameHost, _: bytes) -> None:
    folder.proof = b""


def guess(folder: pb.SameHost, _: bytes) -> None:
    folder.proof = os.urandom(32)


def by_another_way(folder: pb.SameHost, _: bytes) -> None:
    folder.path = folder.path + b"/../" + os.path.basename(folder.path)


def staged_elsewhere(folder: pb.SameHost, _: bytes) -> None:
    folder.staging = "payloads"


def of_a_known_key(folder: pb.SameHost, challenge: bytes) -> None:
    folder.proof = proof.of_server(b"", challenge, folder)


@pytest.mark.parametrize("change", [forget, guess, by_another_way, staged_elsewhere, of_a_known_key])
def test_without_a_proof_no_file_is_read_and_no_nonce_is_sent(
    host: Host, relay: Relay, make_chunk: Make, assert_equal: Callable[..., None], change: Says
) -> None:
    (chunk_id,) = host.write(make_chunk(1))
    before = host.received("staged"), host.sent("file")
    says(relay, change)
    with kvbank.connect(relay.unix) as client:
        assert_equal(client.fetch("b", [chunk_id], **READER)[0], make_chunk(1))
        client.write("b", make_chunk(2), **host.digests)
    assert "FetchFiles" not in relay.calls
    nonce = (host.data / "same-host.nonce").read_bytes()
    assert not any(nonce in request or proof.of_client(nonce) in request for request in relay.requests)
    assert (host.received("staged"), host.sent("file")) == before


def test_a_proof_is_for_one_challenge(host: Host, relay: Relay, make_chunk: Make) -> None:
    """Show that a proof which was overheard is of no use."""
    (chunk_id,) = host.write(make_chunk(1))
    kept: list[bytes] = []

    def again(folder: pb.SameHost, _: bytes) -> None:
        kept.append(folder.proof)
        folder.proof = kept[0]

    says(relay, again)
    for path in ("FetchFiles", "FetchChunks"):
        with kvbank.connect(relay.unix) as client:
            client.fetch("b", [chunk_id], **READER)
        assert relay.calls[-1] == path


def test_the_nonce_itself_is_sent_to_nobody(host: Host, relay: Relay, make_chunk: Make) -> None:
    before = host.received("stream"), host.sent("stream")
    with kvbank.connect(relay.unix) as client:
        chunk_id = client.write("b", make_chunk(1), **host.digests).chunk_id
        client.fetch("b", [chunk_id], **READER)
    assert {"WriteChunks", "FetchFiles"} <= set(relay.calls)
    assert (host.received("stream"), host.sent("stream")) == before
    nonce = (host.data / "same-host.nonce").read_bytes()
    assert not any(nonce in request for request in relay.requests)


@pytest.mark.parametrize("readable", [0o640, 0o604])
def test_a_nonce_that_others_can_read_proves_nothing(host: Host, relay: Relay, make_chunk: Make, readable: int) -> None:
    (chunk_id,) = host.write(make_chunk(1))
    nonce = host.data / "same-host.nonce"
    nonce.chmod(readable)
    with kvbank.connect(relay.unix) as client:
        client.fetch("b", [chunk_id], **READER)
    nonce.chmod(0o600)
    assert "FetchFiles" not in relay.calls


def test_a_folder_stays_the_one_that_was_proven(
    host: Host, relay: Relay, make_chunk: Make, assert_equal: Callable[..., None], tmp_path: Path
) -> None:
    """Also where its path leads elsewhere by then, to files that the client can read and the server cannot."""
    (chunk_id,) = host.write(make_chunk(1))
    mine, link = tmp_path / "mine", tmp_path / "link"
    mine.mkdir()
    shutil.copy(host.data / "same-host.nonce", mine)
    link.symlink_to(mine)
    nonce = (mine / "same-host.nonce").read_bytes()

    def named(folder: pb.SameHost, challenge: bytes) -> None:
        folder.path = os.fsencode(link)
        folder.proof = proof.of_server(nonce, challenge, folder)

    says(relay, named)
    with kvbank.connect(relay.unix) as client:
        assert_equal(client.fetch("b", [chunk_id], **READER)[0], make_chunk(1))
        link.unlink()
        link.symlink_to(host.data)
        assert_equal(client.fetch("b", [chunk_id], **READER)[0], make_chunk(1))
    assert relay.calls.count("FetchFiles") == relay.calls.count("FetchChunks") == 2, "a file was read"


@pytest.mark.parametrize(
    "name", ["secret", "metadata.db", "payloads/{uid}/00/secret", "payloads/{uid}/{id}", "{other}"]
)
def test_nothing_but_the_payload_of_a_chunk_is_opened(host: Host, relay: Relay, make_chunk: Make, name: str) -> None:
    """Open no other file, even if the bytes of that payload are in it."""
    chunk_id, other = host.write(make_chunk(1), make_chunk(2))
    uid, payload = host.client.get_bank("b").uid, host.file(chunk_id)
    wrong = name.format(uid=uid, id=payload.name, other=host.file(other).relative_to(host.data))
    (host.data / wrong).parent.mkdir(exist_ok=True)
    if wrong != "metadata.db":
        shutil.copy(payload, host.data / wrong)
    names(relay, wrong)
    with kvbank.connect(relay.unix) as client:
        client.fetch("b", [chunk_id], **READER)
    assert relay.calls[-2:] == ["FetchFiles", "FetchChunks"]


def test_the_server_does_not_learn_which_file_was_another(host: Host, relay: Relay, make_chunk: Make) -> None:
    """Ask for every chunk again; the checksum of one that is not asked for would have been guessed."""
    ids = host.write(*(make_chunk(i) for i in range(3)))
    good = [str(host.file(chunk_id).relative_to(host.data)) for chunk_id in ids]
    names(relay, good[0], good[0], good[2])
    with kvbank.connect(relay.unix) as client:
        client.fetch("b", ids, **READER)
    assert relay.calls[-1] == "FetchChunks"
    assert list(pb.FetchChunksRequest.FromString(relay.requests[-1]).chunk_ids) == ids
