"""The console script `kvbank`. What it runs stands in `kvbank._cli`, how it ends in `kvbank._cli.ending`."""

from typing import NoReturn


def main() -> NoReturn:
    """Run the command line and end the process."""
    try:
        # Here, so that Ctrl-C during the imports ends like any other.
        from kvbank._cli import aside, ending, streams

        streams.prepare()
        aside.listen()
        from kvbank._cli.application import application

        ending.run(application())
    except KeyboardInterrupt:  # before the command began, or while its end was being told
        raise SystemExit(130) from None
