"""Every command that asks a memory service takes its key by this option."""

from typing import Annotated

import typer

ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        metavar="KEY|@FILE",
        help="Key for the service. Better a file, or the variable KVBANK_API_KEY: others can see a command's words.",
        show_default=False,
    ),
]
