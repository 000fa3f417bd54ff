"""A trace is replayed here with a bank of fewer chunks: how much of what was found later is still there?

The replay is open: it asks for what the recorded bank has found. A bank that has lost a chunk would find the next best
in its place, and count that as retrieved; the replay neither does nor counts that.
"""

from dataclasses import dataclass

from model_worker.evaluate.eviction.policy import Policy, Run
from model_worker.evaluate.eviction.trace import Remove, Retrieve, Trace, Write


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a replay has counted. hits: chunks that were found and are still there, of all that were asked for. held:
    the chunks that are there at the end."""

    hits: int
    asked: int
    evicted: int
    held: frozenset[int]


def replay(trace: Trace, policy: Policy, capacity: int, seed: int = 0) -> Outcome:
    """Replay a trace from an empty bank of `capacity` chunks, at least 1.

    Raises RuntimeError for a policy that makes no room, or names chunks that are not there.
    """
    run = Run(capacity, trace, seed)
    policy.begin(run)
    held: set[int] = set()
    hits = evicted = 0
    for run.now, step in enumerate(trace.steps):
        match step:
            case Write(chunk):
                if len(held) >= capacity:
                    gone = set(policy.room(chunk))
                    if not gone or not gone <= held:
                        raise RuntimeError(f"{policy.name} evicts {sorted(gone)[:5]}, which makes no room")
                    held -= gone
                    evicted += len(gone)
                held.add(chunk)
                policy.written(chunk)
            case Retrieve(chunks):
                found = [chunk for chunk in chunks if chunk in held]
                hits += len(found)
                policy.retrieved(found, [chunk for chunk in chunks if chunk not in held])
            case Remove(chunks):
                for chunk in held.intersection(chunks):
                    held.remove(chunk)
                    policy.removed(chunk)
    return Outcome(hits, trace.asked, evicted, frozenset(held))
