"""Find the passages of some files that answer a question, for the prompt of any model.

    python examples/remember.py MEMORY QUESTION FILE...

MEMORY is a folder, or HOST:PORT of `kvbank serve`. A file that is known is stored once; the question is asked of all.
"""

import sys
from pathlib import Path

import kvbank

memory, question, *files = sys.argv[1:]
with kvbank.connect(memory) as client:
    library = kvbank.TextMemory(client, "library", embed="lexical")
    for name in files:
        library.add([Path(name).read_text(encoding="utf-8")], source=name)
    passages = [f"[{hit.source}] {hit.text}" for hit in library.search(question, top_k=3)]
print("\n\n".join(["Answer by these passages alone:", *passages, f"Question: {question}"]))
