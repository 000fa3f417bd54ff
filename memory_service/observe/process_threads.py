"""The threads of a server process: how long one that computes keeps the interpreter from the others.

A call gives the interpreter up and takes it again each time that it reads, waits or searches, some ten times in a
retrieval. Beside a thread that computes, such as one that evicts or adds up counts, each time takes as long as that may
keep it: with the 5 ms of Python's default a retrieval of 2 ms took 35 (the median while 10,000 hits were counted again
and again), with a tenth of that 3.5.
"""

import sys

# Seconds after which a thread that computes lets another one have the interpreter.
_SHORT_S = 0.0005


def take_short_turns() -> None:
    """Have threads take turns at the interpreter sooner than by default. It is for a process that is a server and
    nothing else."""
    sys.setswitchinterval(_SHORT_S)
