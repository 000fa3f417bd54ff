"""A service in a process of its own that says how much processor time each kind of its threads has used, and in which
functions. The command `hot_paths` asks it both, beside calls over the wire."""

import cProfile
import json
import pstats
import sys
import threading
import time
from collections import Counter
from typing import Any

from benchmarks.lines import serve
from memory_service.api.embedded import LocalServer
from memory_service.observe.process_memory import keep_memory

# Threads of gRPC's core, which Python does not know.
CORE = "gRPC's core"
# The kind of thread that was in a function, the function, how often it was called, and the seconds in it alone.
Function = tuple[str, str, int, float]


def seconds() -> dict[str, float]:
    """Return the seconds of processor time of this process by the kind of its threads, which their names begin with."""
    used: Counter[str] = Counter()
    for thread in threading.enumerate():
        if thread.ident is not None:
            kind = thread.name.rstrip("0123456789_-")
            used[kind] += time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    return {**used, CORE: time.process_time() - sum(used.values())}


class Profiles:
    """Profiles, in processor time, of all threads that begin after the making of this object."""

    def __init__(self) -> None:
        self._of: list[tuple[str, cProfile.Profile]] = []
        threading.setprofile(self._begin)  # each new thread calls it once, and is then profiled by what it enables

    def _begin(self, *_event: object) -> None:
        profile = cProfile.Profile(time.thread_time)
        self._of.append((threading.current_thread().name.rstrip("0123456789_-"), profile))
        profile.enable()

    def forget(self) -> None:
        """Forget what the threads have done until now."""
        for _, profile in self._of:
            profile.clear()

    def functions(self) -> list[Function]:
        """Return the functions of all threads. The profiles end with this."""
        found: list[Function] = []
        for kind, profile in self._of:
            found += functions_of(kind, profile)
        return found


def functions_of(kind: str, profile: cProfile.Profile) -> list[Function]:
    """Return the functions of a profile of one kind of thread; the profile ends with this."""
    profile.create_stats()
    stats: Any = profile.stats  # type: ignore[attr-defined]
    rows = ((*pstats.func_strip_path(function), *figures[:3]) for function, figures in stats.items())
    return [(kind, f"{file}:{line} {name}", calls, own) for file, line, name, _, calls, own in rows]


def _main(settings: str, profiled: str) -> None:
    keep_memory()
    profiles = Profiles() if profiled else None
    with LocalServer(**json.loads(settings)) as server:
        asked = {"address": lambda: server.address, "seconds": seconds}
        if profiles is not None:
            asked |= {"forget": profiles.forget, "functions": profiles.functions}
        serve(asked)


if __name__ == "__main__":
    _main(*sys.argv[1:])
