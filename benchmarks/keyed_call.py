"""The row `keyed_call` of the benchmarks: what a key costs a small call, against a service that has no keys."""

from collections.abc import Iterator
from contextlib import ExitStack

import kvbank
from benchmarks.bench import Bench
from benchmarks.pair import Contender, Result, Target, compare, timed
from benchmarks.service import EMBEDDING, serving

ROW = "keyed_call"
# Milliseconds.
_MORE = 0.2


def run(bench: Bench) -> Iterator[Result]:
    """Time calls that ask for a bank, over the loopback."""
    folder = bench.scratch(ROW)
    with ExitStack() as stack:
        stack.callback(bench.clear, folder)
        clients = {}
        for name in ("keyless", "keyed"):
            (folder / name).mkdir()
            address = stack.enter_context(serving(folder / name)).address
            clients[name] = stack.enter_context(kvbank.connect(address))
            clients[name].create_bank("b", kv=None, embedding=EMBEDDING)
        key = clients["keyed"].access.create_key("read", banks=["a-*", "b"]).secret
        keyed = stack.enter_context(kvbank.connect(address, api_key=key))
        contenders = [
            Contender("ours", "ours", timed(lambda: keyed.get_bank("b"))),
            Contender(
                "the same without a key",
                "floor",
                timed(lambda: clients["keyless"].get_bank("b")),
                (Target("difference", _MORE),),
            ),
        ]
        bench.say("calls with a key")
        yield from compare(ROW, "get_bank with a key", contenders, bench.n(2000))
