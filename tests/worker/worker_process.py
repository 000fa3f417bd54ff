"""A worker in a process of its own, for test_processes.py and test_spool.py."""

import json
import os
import signal
import sys
import time
import warnings

import torch
from tiny import build, tokenizer, tokens

import kvbank
from model_worker.attachment import attach
from model_worker.memory import Memory, encode
from model_worker.spool import Spool

CHUNK = 8
MINE = 1_000_000


def open_memory(address: str, name: str, **options: object) -> Memory:
    torch.set_num_threads(1)
    attachment = attach(build("llama_gqa"), tokenizer())
    return Memory(attachment, kvbank.connect(address), name, tokenizer(), chunk=CHUNK, top_k=1, **options)  # type: ignore[arg-type]


def share(address: str, name: str, number: str, seconds: str) -> None:
    """Write and recall for some time; then recall everything that the workers wrote, and compare the bytes."""
    memory = open_memory(address, name, strict=True)
    memory.open()
    print("ready", flush=True)
    sys.stdin.readline()
    end, own = time.monotonic() + float(seconds), []
    while time.monotonic() < end:
        start = int(number) * MINE + len(own)
        memory.remember([encode(memory.attachment, tokens(CHUNK, seed=start)[0].tolist(), start)])
        own.append(start)
        assert memory.recall([tokens(CHUNK, seed=own[len(own) // 2])[0].tolist()]) is not None
    print(json.dumps({"wrote": own, "acknowledged": memory.stats.written}), flush=True)
    wrong = []
    for start in json.loads(sys.stdin.readline()):
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
    print(json.dumps({"wrong": wrong, "recalls": memory.stats.recalls}), flush=True)


def die(address: str, name: str, folder: str) -> None:
    """Spool chunks while the service is away, and be killed."""
    warnings.simplefilter("ignore", RuntimeWarning)
    memory = open_memory(address, name, spool=Spool(folder), retry_after=1e6)
    memory.recall([[5, 6]])
    for start in range(3):
        memory.remember([encode(memory.attachment, tokens(CHUNK, seed=start)[0].tolist(), start)])
    os.kill(os.getpid(), signal.SIGKILL)


{"share": share, "die": die}[sys.argv[1]](*sys.argv[2:])
