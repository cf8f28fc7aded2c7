"""A server in a thread of the program that needs one: a notebook, a benchmark, a test."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

from asr.runtime import Bundle
from asr.serve.hub import Hub, ServeConfig
from asr.serve.server import Server, listen


@dataclass(frozen=True)
class Background:
    """A server that runs."""

    port: int
    hub: Hub
    loop: asyncio.AbstractEventLoop
    """The event loop of its thread."""

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def websocket(self, path: str) -> str:
        return f"ws://127.0.0.1:{self.port}{path}"


@contextmanager
def running(bundle: Bundle, config: ServeConfig) -> Iterator[Background]:
    """A server for programs of this machine, on any free port, until the block is left.

    Raises BundleError or ConfigError if the model cannot be served.
    """
    hub = Hub(bundle, config)
    server = Server(hub)
    opened: Future[asyncio.AbstractEventLoop] = Future()

    async def main() -> None:
        async with hub.open():
            opened.set_result(asyncio.get_running_loop())
            await server.serve(sockets=[listener])

    def work() -> None:
        try:
            asyncio.run(main())
        except Exception as error:
            if opened.done():
                raise
            opened.set_exception(error)

    with listen("127.0.0.1", 0, config.send_s) as listener:
        thread = threading.Thread(target=work, name="server")
        thread.start()
        try:
            yield Background(listener.getsockname()[1], hub, opened.result())
        finally:
            server.should_exit = True
            thread.join()
