"""The messages of a conversation are read here as they are typed, pasted or piped.

The module is light to import: no torch.
"""

import sys
from collections.abc import Iterator, Sequence

from kvbank.console.streams import typed


def messages(plain: bool, history: Sequence[str]) -> Iterator[str]:
    """Yield the messages of stdin until it ends, without the space around them.

    On a terminal a message is what stands there when Enter is pressed; lines that are pasted together are one message.
    From a pipe each line is a message. plain: no prompt is shown. history: what arrow up brings back.
    """
    if not sys.stdin.isatty():
        yield from (typed(line).strip() for line in sys.stdin)
        return
    import readline  # gives `input` its line editing

    if "libedit" not in (readline.__doc__ or ""):
        readline.parse_and_bind("set enable-bracketed-paste on")
    for line in history:
        readline.add_history(line)
    while True:
        try:
            yield typed(input("" if plain else "> ")).strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # an answer is stopped elsewhere; here it drops the line, and arrow up brings it back
            if dropped := readline.get_line_buffer().strip():
                readline.add_history(dropped)
            print()
