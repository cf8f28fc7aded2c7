"""Servers of the tiny model on sockets of this machine, and what their clients should be told."""

import asyncio
import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from asr.audio import Floats
from asr.runtime import Bundle, EndpointConfig, Event, StreamConfig, open_stream
from asr.serve.hub import Hub, ServeConfig
from asr.serve.server import Server, listen, serve
from export.verify import made_sound

SOME = StreamConfig(endpoint=EndpointConfig(trailing_s=0.2, max_s=2.0))
"""Utterances end often, so that a few seconds have several."""


@dataclass(frozen=True)
class Running:
    """A server that runs in another thread."""

    port: int
    hub: Hub
    loop: asyncio.AbstractEventLoop

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def url(self, path: str) -> str:
        return f"ws://127.0.0.1:{self.port}{path}"

    def soon(self, function: Callable[..., Any], *args: Any) -> None:
        """Call a function in the server's thread."""
        self.loop.call_soon_threadsafe(function, *args)

    def wait(self, is_true: Callable[[], bool]) -> None:
        """Wait until something is true of the server."""
        done = threading.Event()

        async def poll() -> None:
            while not is_true():
                await asyncio.sleep(0.01)
            done.set()

        asyncio.run_coroutine_threadsafe(poll(), self.loop)
        assert done.wait(30)


@contextmanager
def running(bundle: Bundle, **config: Any) -> Iterator[Running]:
    """A server of a bundle, until the block is left."""
    hub = Hub(bundle, ServeConfig(**{"name": "tiny", "stream": SOME, **config}))
    server = Server(hub)
    loops: list[asyncio.AbstractEventLoop] = []

    async def main(listener: Any) -> None:
        loops.append(asyncio.get_running_loop())
        await serve(server, hub, listener)

    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=lambda: asyncio.run(main(listener)))
        thread.start()
        try:
            while not server.started:
                thread.join(0.01)
                assert thread.is_alive(), "the server did not start"
            yield Running(port, hub, loops[0])
        finally:
            server.should_exit = True
            thread.join(60)
    assert not thread.is_alive()
    assert hub.engine.num_streams == 0


@pytest.fixture(scope="session")
def bundle(tiny_bundles: Path) -> Bundle:
    return Bundle.load(tiny_bundles / "cpu-fp32")


@pytest.fixture(scope="session")
def server(bundle: Bundle) -> Iterator[Running]:
    """The server of all tests that need no other settings."""
    with running(bundle) as found:
        yield found


@pytest.fixture(scope="session")
def sound() -> Floats:
    """Five seconds, with a pause, as if read from a file of 16 bits."""
    samples = made_sound(5.0, 16000)
    samples[32000:48000] = 0
    return (np.round(samples * 32768).clip(-32768, 32767) / 32768).astype(np.float32)


@pytest.fixture(scope="session")
def finals(bundle: Bundle, sound: Floats) -> list[Event]:
    """What a stream says of `sound`."""
    stream = open_stream(bundle, SOME)
    events = [event for event in stream.accept(sound) + stream.finish() if event.final and event.text]
    assert len(events) > 2
    return events


@pytest.fixture(scope="session")
def text(finals: list[Event]) -> str:
    return " ".join(event.text for event in finals)


def wav(samples: Floats, sample_rate: int = 16000, kind: str = "WAV") -> bytes:
    """A sound file of 16 bits."""
    file = io.BytesIO()
    pcm = (samples * 32768).round().clip(-32768, 32767).astype(np.int16)
    soundfile.write(file, pcm, sample_rate, format=kind)
    return file.getvalue()


def pcm(samples: Floats) -> bytes:
    """Samples of 16 bits without a header."""
    return (samples * 32768).round().clip(-32768, 32767).astype("<i2").tobytes()
