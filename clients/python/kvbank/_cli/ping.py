"""The command `kvbank ping` tells whether a memory service answers."""

import time
from dataclasses import asdict
from typing import Annotated

import typer

from kvbank._cli import common
from kvbank._cli.common import DEFAULT_ADDRESS, AsJson
from kvbank.console.keys import ApiKey
from kvbank.console.output import print_json, print_line


def ping(
    target: Annotated[str, typer.Argument(metavar="[HOST:PORT]", envvar="KVBANK_MEMORY")] = DEFAULT_ADDRESS,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show the version and identity of a memory service, and how long it takes to answer.

    Example: kvbank ping localhost:7400
    """
    with common.connect(target, api_key) as client:
        client.server_info()
        start = time.perf_counter()
        info = client.server_info()
        milliseconds = (time.perf_counter() - start) * 1000
    if as_json:
        print_json({"address": target, "milliseconds": round(milliseconds, 3), **asdict(info)})
    else:
        print_line(f"{target}: kvbank {info.version}, store {info.store_id}, {info.durability}, {milliseconds:.2f} ms")
