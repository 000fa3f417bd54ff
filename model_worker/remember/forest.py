"""An input many times the context goes into a memory as a forest: one HOMER tree for each group of tokens.

The root of a tree is written as soon as the tree is complete: a crash loses one group, and the order of reading stays.
"""

from collections.abc import Iterator, Sequence

from model_worker.errors import InputError
from model_worker.remember.memory import Memory
from model_worker.window.capture import Captured
from model_worker.window.chunking import chunks


def remember_forest(memory: Memory, ids: Sequence[int], group: int, start: int = 0) -> Iterator[int]:
    """Write `ids` as trees of `group` tokens each, in reading order; yield the number of tokens done after each root.

    memory: its compressor is `homer:...`, which says how many tokens a group leaves. start: offset of the first id in
    its source. Raises InputError for a memory with another compressor.
    """
    if memory.compressor.name != "homer":
        raise InputError(f"a forest is written by the compressor homer, not by {memory.compressor.spec}")
    done = 0
    for block in chunks(ids, group):
        memory.remember([Captured(block, start + done, {}, "isolated")])
        done += len(block)
        yield done
