"""Talk to a model that goes on tomorrow with what was said today.

    python examples/chat.py [MEMORY [SESSION [MODEL]]]

MEMORY is a folder, or HOST:PORT of `kvbank serve`; SESSION is a name; MODEL a name, a folder or a hub id. What leaves
the window of the model goes into the memory, and comes back when it is relevant. Ctrl-D ends the program.
"""

import sys

from model_worker import MemoryModel
from model_worker.session.session import Session


def chat(memory: str = "./memory", name: str = "diary", model: str = "kvbank-small") -> None:
    """Answer the lines of the input within a session, which is made where there is none of this name."""
    with (
        MemoryModel.from_pretrained(model, memory=memory, bank=()) as loaded,
        Session.open(loaded, name=name) as session,
    ):
        print(f"{name}: {len(session.turns)} turns so far")
        for line in filter(str.strip, sys.stdin):
            session.say(line, on_text=lambda piece: print(piece, end="", flush=True), max_new_tokens=60)
            print()


if __name__ == "__main__":
    chat(*sys.argv[1:4])
