"""The console script `kvbank` runs here. Its commands stand in `kvbank.commands`, how each ends in
`kvbank.console.ending`.
"""

import signal
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line and end the process, which is all its own."""
    try:
        # Here, so that Ctrl-C during the imports ends like any other.
        from kvbank.console import aside, ending, streams

        streams.prepare()
        aside.listen()
        from kvbank.commands import application

        ending.run(application(arguments=sys.argv[1:]))
    except KeyboardInterrupt:  # before the command began, or while its end was being told
        raise SystemExit(130) from None
    finally:
        # The interpreter's own end takes up to a second with torch; Ctrl-C then ends it without a word.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
