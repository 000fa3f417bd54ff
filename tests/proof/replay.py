"""Do again what a state machine did: python -m tests.proof.replay TRACE [folder|database]"""

import json
import sys
import tempfile
from pathlib import Path

from tests.proof.sites import SITES
from tests.proof.world import World
from tests.support.service_process import ServiceHost


def replay(host: ServiceHost, trace: Path, site: str = "folder") -> int:
    """Do the steps of a trace at a site of this kind, and return how many there were; this raises what the failing step
    raises, with its number as a note."""
    steps = [json.loads(line) for line in trace.read_text().splitlines()]
    with tempfile.TemporaryDirectory(prefix="kvbank-proof-") as folder, SITES[site](host, Path(folder)) as made:
        world = World(made)
        try:
            for number, step in enumerate(steps, 1):
                try:
                    world.do(**step)
                except Exception as error:
                    error.add_note(f"step {number} of {len(steps)} fails: {step}")
                    raise
        finally:
            world.close()
    return len(steps)


def main(trace: str, site: str = "folder") -> int:
    with ServiceHost() as host:
        try:
            print(f"{replay(host, Path(trace), site)} steps, nothing wrong")
        except Exception as error:
            print("\n".join([repr(error), *getattr(error, "__notes__", [])]))
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
