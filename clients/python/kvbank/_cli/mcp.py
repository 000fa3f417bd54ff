"""The command `kvbank mcp` gives programs that speak the Model Context Protocol a memory.

The module is light to import: the protocol comes with the call.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

import kvbank
from kvbank._cli.common import Service
from kvbank._cli.text_options import Embed
from kvbank.console.ending import USAGE, Failed
from kvbank.console.options import spread
from kvbank.console.output import print_line
from kvbank.serving.listening import Listening, address_of, write_address
from kvbank.serving.service import check_asks_for_keys, service_address


@dataclass(frozen=True, slots=True)
class Http:
    """The options of a server over HTTP."""

    listen: Annotated[
        str | None, typer.Option(help="Serve over HTTP at HOST:PORT (port 0: any free one), and not on stdin.")
    ] = None
    tls_cert: Annotated[
        Path | None, typer.Option(help="File of the certificate (PEM, with those that it was signed by), for HTTPS.")
    ] = None
    tls_key: Annotated[Path | None, typer.Option(help="File of the certificate's key (PEM).")] = None
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow addresses that others can reach without TLS or without a key.")
    ] = False
    ready_file: Annotated[Path | None, typer.Option(help="Write the address here when requests are answered.")] = None


@spread
def mcp(
    service: Service,
    http: Http,
    bank: Annotated[str, typer.Option("--bank", "-b", help="Bank of the texts; the first one makes it.")] = "default",
    embed: Embed = None,
) -> None:
    """Serve a memory of texts to programs that speak the Model Context Protocol, on stdin and stdout or over HTTP.

    Its tools: remember, recall, forget, list_sessions, explain. Several may
    use one service, or one folder (--memory FOLDER), at once. Over HTTP a
    caller's key (Authorization: Bearer KEY) goes to the service as it is, and
    --api-key is for stdin alone.

    Example: kvbank mcp --memory ./memory --bank notes
    """
    if http.listen is None:
        _over_stdio(service, bank, embed)
    else:
        _over_http(service, http, http.listen, bank, embed)


def _over_stdio(service: Service, bank: str, embed: str | None) -> None:
    from kvbank._mcp import server, stores

    target = kvbank.parse_target(service.memory)
    if isinstance(target, Path):
        server.serve_stdio(server.made(stores.Folder(target), bank, embed))
        return
    with service.connect() as client:
        server.serve_stdio(server.made(stores.of_service(client), bank, embed))


def _over_http(service: Service, http: Http, listen: str, bank: str, embed: str | None) -> None:
    target = service_address(service.memory)
    place = Listening("this server", listen, http.tls_cert, http.tls_key, http.insecure)
    place.check()
    if service.api_key is not None:
        raise Failed("--api-key is for stdin: over HTTP each caller brings a key of its own", USAGE)
    # A key in the environment would be this server's own.
    os.environ.pop("KVBANK_API_KEY", None)
    listening = place.socket()
    address = address_of(listening)
    if place.needs_key:
        check_asks_for_keys(target)

    from kvbank._mcp import server
    from kvbank.serving.clients import Clients

    def ready() -> None:
        print_line(f"kvbank mcp serving bank {bank} of {target} on {place.scheme}://{address}{server.PATH}")
        sys.stdout.flush()
        if http.ready_file is not None:
            write_address(http.ready_file, address)

    clients = Clients(target)
    try:
        made = server.made(clients.client, bank, embed)
        server.HttpServer(made, place, ready).run(sockets=[listening])
    finally:
        clients.close()
