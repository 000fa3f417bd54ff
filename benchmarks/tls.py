"""The row `tls` of the benchmarks: what TLS costs the bytes of K-V, and, with a key, a small call, against a service
that has neither."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

import trustme

import kvbank
from benchmarks import material
from benchmarks.bench import Bench
from benchmarks.pair import Contender, Result, Target, compare, timed
from benchmarks.service import EMBEDDER, EMBEDDING, READER, serving, spec, writer

ROW = "tls"
_CHUNKS = 8
# TLS carries at least 0.7 of the bytes a second; a small call takes at most so many milliseconds more.
_LONGER, _MORE = 1 / 0.7, 0.2
Call = Callable[[kvbank.Client], object]


def run(bench: Bench) -> Iterator[Result]:
    """Time fetches and writes of 8 MiB, and calls that ask for a bank, over the loopback."""
    folder = bench.scratch(ROW)
    authority = trustme.CA()
    roots = authority.cert_pem.bytes()
    with ExitStack() as stack:
        stack.callback(bench.clear, folder)
        with _certified(folder, authority):
            certified = stack.enter_context(serving(_made(folder / "tls"))).address
        bare = stack.enter_context(serving(_made(folder / "plain"))).address
        ours = stack.enter_context(kvbank.connect(certified, root_certificates=roots))
        plain = stack.enter_context(kvbank.connect(bare))
        chunks = {client: _filled(client) for client in (ours, plain)}

        def fetch(client: kvbank.Client) -> None:
            client.fetch("chunks", chunks[client], reader_digest=READER)

        for what, call, rounds in (("fetch", fetch, 100), ("write", _writing(), 24)):
            bench.say(f"{what} over TLS")
            contenders = _contenders(ours, plain, call, Target("ratio", _LONGER))
            yield from compare(ROW, f"{what} {_CHUNKS} x 1 MiB over TLS, loopback TCP", contenders, bench.n(rounds))
        bench.say("calls with TLS and a key")
        key = ours.access.create_key("read").secret
        keyed = stack.enter_context(kvbank.connect(certified, root_certificates=roots, api_key=key))
        contenders = _contenders(keyed, plain, lambda client: client.get_bank("chunks"), Target("difference", _MORE))
        yield from compare(ROW, "get_bank over TLS with a key", contenders, bench.n(2000))


def _contenders(ours: kvbank.Client, plain: kvbank.Client, call: Call, target: Target) -> list[Contender]:
    return [
        Contender("ours", "ours", timed(lambda: call(ours))),
        Contender("the same without TLS", "floor", timed(lambda: call(plain)), (target,)),
    ]


def _filled(client: kvbank.Client) -> list[int]:
    """Make a bank with some chunks and return their ids."""
    client.create_bank("chunks", kv=spec(1), embedding=EMBEDDING)
    vectors = material.vectors(_CHUNKS)
    made = (kvbank.NewChunk(vector, material.tensors(1, seed=seed)) for seed, vector in enumerate(vectors))
    return [written.chunk_id for written in writer(client, "chunks")(made)]


def _writing() -> Call:
    """Return a call that writes chunks in one stream, of which no two have the same bytes."""
    vectors, seeds = material.vectors(_CHUNKS), count()

    def write(client: kvbank.Client) -> None:
        made = [kvbank.NewChunk(vector, material.tensors(1, seed=next(seeds))) for vector in vectors]
        client.write_many("chunks", made, reader_digest=READER, embedder_digest=EMBEDDER)

    return write


@contextmanager
def _certified(folder: Path, authority: trustme.CA) -> Iterator[None]:
    """Let the services that start in the block speak TLS."""
    issued = authority.issue_cert("localhost", "127.0.0.1")
    files = {"KVBANK_TLS_CERT": folder / "server.pem", "KVBANK_TLS_KEY": folder / "server.key"}
    for pem in issued.cert_chain_pems:
        pem.write_to_path(files["KVBANK_TLS_CERT"], append=True)
    issued.private_key_pem.write_to_path(files["KVBANK_TLS_KEY"])
    os.environ |= {name: str(path) for name, path in files.items()}
    try:
        yield
    finally:
        for name in files:
            del os.environ[name]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
