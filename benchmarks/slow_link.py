"""A TCP link to a service over which what is sent to the service arrives later, as from a machine that is further away.

`python -m benchmarks.slow_link PORT` is a worker (see lines.py) in front of the service that listens on this port.
"""

import asyncio
import socket
import sys
import threading

from benchmarks.lines import serve

_PIECE = 1 << 18


class SlowLink:
    """A link to the service on one port. seconds: how much later bytes arrive there; its answers arrive at once."""

    def __init__(self, port: int):
        self._port, self.seconds = port, 0.0
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def listen(self) -> int:
        """Return the port at which the link takes connections."""
        begun = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._connected, "127.0.0.1", 0), self._loop)
        port: int = begun.result().sockets[0].getsockname()[1]
        return port

    def delay(self, seconds: float) -> None:
        """Let bytes arrive so much later from now on."""
        self.seconds = seconds

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, service = await asyncio.open_connection("127.0.0.1", self._port)
        for end in (writer, service):
            end.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.gather(self._carry(reader, service, True), self._carry(answers, writer, False))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, late: bool) -> None:
        """Carry bytes in one direction until it ends."""
        on_its_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        arriving = asyncio.create_task(self._arrive(on_its_way, writer))
        try:
            while piece := await reader.read(_PIECE):
                on_its_way.put_nowait((self._loop.time() + (self.seconds if late else 0.0), piece))
        except ConnectionError:
            pass
        on_its_way.put_nowait((self._loop.time(), b""))
        await arriving

    async def _arrive(self, on_its_way: "asyncio.Queue[tuple[float, bytes]]", writer: asyncio.StreamWriter) -> None:
        """Hand over each piece at its time; an empty one is the end."""
        try:
            while True:
                at, piece = await on_its_way.get()
                await asyncio.sleep(max(0.0, at - self._loop.time()))
                if not piece:
                    break
                writer.write(piece)
        finally:
            writer.close()


if __name__ == "__main__":
    link = SlowLink(int(sys.argv[1]))
    serve({"listen": link.listen, "delay": link.delay})
