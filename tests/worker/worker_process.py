"""A worker in a process of its own: what it does there, and `worker`, which starts it."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings

import torch

import kvbank
from model_worker.attaching import attach
from model_worker.errors import BankMismatch
from model_worker.remember.memory import Memory
from model_worker.remember.spool import Spool
from model_worker.window.encoding import encode
from tests.worker.tiny import build, tokenizer, tokens

CHUNK = 8
MINE = 1_000_000


def worker(*arguments: object) -> "subprocess.Popen[str]":
    """Start a process that does what the first argument says."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.worker.worker_process", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def open_memory(address: str, name: str, **options: object) -> Memory:
    torch.set_num_threads(1)
    attachment = attach(build("llama_gqa"), tokenizer())
    return Memory(attachment, kvbank.connect(address), name, tokenizer(), **{"chunk": CHUNK, "top_k": 1, **options})  # type: ignore[arg-type]


def share(address: str, name: str, number: str, seconds: str) -> None:
    """Do `write_for` and then `compared`, each when the other process says so, which is told the results."""
    memory = open_memory(address, name, strict=True)
    memory.open()
    print("ready", flush=True)
    sys.stdin.readline()
    own = write_for(memory, int(number), float(seconds))
    print(json.dumps({"wrote": own, "acknowledged": memory.stats.written}), flush=True)
    wrong = compared(memory, json.loads(sys.stdin.readline()))
    print(json.dumps({"wrong": wrong, "recalls": memory.stats.recalls}), flush=True)


def write_for(memory: Memory, number: int, seconds: float) -> list[int]:
    """Write and recall for some time, as the worker of a number; return the offsets of the chunks that were written."""
    end, own = time.monotonic() + seconds, list[int]()
    while time.monotonic() < end:
        start = number * MINE + len(own)
        memory.remember([encode(memory.attachment, tokens(CHUNK, seed=start)[0].tolist(), start)])
        own.append(start)
        assert memory.recall([tokens(CHUNK, seed=own[len(own) // 2])[0].tolist()]) is not None
    return own


def compared(memory: Memory, starts: list[int]) -> list[int]:
    """Recall the chunks of these offsets, and return the offsets of those that are not as they were written."""
    wrong = []
    for start in starts:
        ids = tokens(CHUNK, seed=start)[0].tolist()
        [found] = memory.recall([ids]) or [[]]
        expected = encode(memory.attachment, ids)
        same = [
            torch.equal(chunk.layers[n][0], layer.keys) and torch.equal(chunk.layers[n][1], layer.values)
            for chunk in found
            for n, layer in expected.layers.items()
        ]
        if not same or not all(same) or found[0].start != start:
            wrong.append(start)
    return wrong


def die(address: str, name: str, folder: str) -> None:
    """Spool chunks while the service is away, and be killed."""
    warnings.simplefilter("ignore", RuntimeWarning)
    memory = open_memory(address, name, spool=Spool(folder), retry_after=1e6)
    memory.recall([[5, 6]])
    for start in range(3):
        memory.remember([encode(memory.attachment, tokens(CHUNK, seed=start)[0].tolist(), start)])
    os.kill(os.getpid(), signal.SIGKILL)


def slots(address: str, name: str, folder: str, other: str) -> None:
    """Attend to the memory slots in a bank, without peft; then restore them and answer from them with an adapter."""
    sys.modules["peft"] = None  # type: ignore[assignment]
    memory = open_memory(address, name, strict=True, top_k=9, order="time")
    memory.open()
    [found] = memory.recall([tokens(97, seed=1)[0].tolist()]) or [[]]
    sums = [float(sum(k.double().sum() for k, _, _ in chunk.layers.values())) for chunk in found]
    del sys.modules["peft"]
    from model_worker.compress.icae import adapter_of
    from model_worker.icae import answer, restore

    icae, ids = adapter_of(memory.attachment, folder), [chunk.chunk_id for chunk in found]
    got = memory.slots(ids, icae)
    refused = ""
    try:
        memory.slots(ids, adapter_of(memory.attachment, other))
    except BankMismatch as error:
        refused = str(error)
    restored = [restore(icae, own) for own in got]
    answered = answer(icae, got, [7, 8], max_new_tokens=9)
    print(json.dumps({"sums": sums, "restored": restored, "answer": answered, "refused": refused}))


if __name__ == "__main__":
    {"share": share, "die": die, "slots": slots}[sys.argv[1]](*sys.argv[2:])
