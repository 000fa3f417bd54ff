"""A client process that works on a bank and keeps a journal of what it was promised.

    python -m tests.proof.load JOURNAL BANK SEED [steady]

reads lines `ADDRESS OPERATIONS` from its input, does so many operations (or works until the service is gone), answers
`done` and waits for the next line. What the service took without an answer is written again, under the same keys. A
steady one waits longer for a service, notes in its journal what fails, and goes on.
"""

import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import kvbank
from tests.proof.content import DIGESTS, chunk_of, new_key, vector_of
from tests.proof.journal import Journal

ROOT = Path(__file__).parents[2]
# How long a client tries to reach a service that was killed, and a steady one.
PATIENCE, LONG_PATIENCE = 2.0, 20.0


class Worker:
    """A client that writes most of the time, alone or many at once, retrieves, fetches, and deletes what it wrote."""

    def __init__(self, journal: Journal, bank: str, seed: int, *, steady: bool = False) -> None:
        self._steady = steady
        self._journal = journal
        self._bank = bank
        self._random = random.Random(seed)
        self._pending: list[bytes] = []
        self._mine: list[int] = []

    def work(self, address: str, operations: int) -> None:
        """Do so many operations; this ends early when the service is gone, unless the client is steady."""
        patience = LONG_PATIENCE if self._steady else PATIENCE
        limits = {"timeout": patience, "stream_timeout": patience, "first_contact": patience}
        with kvbank.connect(address, **limits) as client:
            for _ in range(operations):
                try:
                    self._step(client)
                except kvbank.ServiceError as error:
                    if self._steady:
                        said = {"error": type(error).__name__, "reason": error.reason, "text": str(error)}
                        self._journal.say("failed", bank=self._bank, **said)
                    elif isinstance(error, kvbank.Unavailable | kvbank.DeadlineExceeded):
                        return
                    else:
                        raise

    def _step(self, client: kvbank.Client) -> None:
        kind = self._random.random()
        if kind < 0.6 or self._pending:
            self._write(client)
        elif kind < 0.8:
            client.retrieve(self._bank, vector_of(new_key()), top_k=8, **DIGESTS)
        elif kind < 0.9 and self._mine:
            self._delete(client)
        elif self._mine:
            self._fetch(client)

    def _write(self, client: kvbank.Client) -> None:
        if not self._pending:
            self._pending = [new_key() for _ in range(self._random.choice((1, 1, 4, 16)))]
        results = client.write_many(self._bank, map(chunk_of, self._pending), **DIGESTS)
        for key, result in zip(self._pending, results, strict=True):
            fields = {"id": result.chunk_id, "key": key.hex(), "evicted": result.evicted}
            self._journal.say("acknowledged", bank=self._bank, **fields)
            self._mine.append(result.chunk_id)
        self._pending = []

    def _delete(self, client: kvbank.Client) -> None:
        ids = [self._mine.pop(self._random.randrange(len(self._mine)))]
        self._journal.say("deleting", bank=self._bank, ids=ids)
        client.delete_chunks(self._bank, ids)
        self._journal.say("deleted", bank=self._bank, ids=ids)

    def _fetch(self, client: kvbank.Client) -> None:
        try:
            client.fetch(self._bank, self._mine[-1:], reader_digest=DIGESTS["reader_digest"])
        except kvbank.ChunkNotFound:
            self._mine.pop()


class LoadProcess:
    """The process, from the side of the test."""

    def __init__(
        self, journal: Path, bank: str, seed: int, environment: Mapping[str, str] | None = None, *, steady: bool = False
    ) -> None:
        command = [sys.executable, "-m", "tests.proof.load", str(journal), bank, str(seed)]
        command += ["steady"] if steady else []
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, **pipes, text=True, env=environment, cwd=ROOT)

    def work(self, address: str, operations: int = 10**9) -> None:
        """Let the client begin; it ends after so many operations, or with the service."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{address} {operations}\n")
        self._process.stdin.flush()

    def wait(self) -> None:
        """Wait until the work is done. Errors: AssertionError when it failed; its error stands on stderr."""
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "done\n", "a client failed"

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def main(journal: str, bank: str, seed: str, how: str = "") -> None:
    worker = Worker(Journal(Path(journal)), bank, int(seed), steady=how == "steady")
    for line in sys.stdin:
        address, operations = line.split()
        worker.work(address, int(operations))
        print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
