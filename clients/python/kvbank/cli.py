"""The console script `kvbank`. What it runs stands in `kvbank._cli`, how it ends in `kvbank._cli.ending`."""

from typing import NoReturn


def main() -> NoReturn:
    """Run the command line and end the process."""
    try:
        # Here, so that Ctrl-C during the imports ends like any other.
        from kvbank._cli import ending, streams

        streams.prepare()
        from kvbank._cli.application import application

        app = application()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    ending.run(app)
