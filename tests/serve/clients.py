"""What all tests of the server use."""

import io
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import numpy as np
import soundfile
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection

from asr.audio import Floats
from asr.runtime import Bundle, EndpointConfig, StreamConfig
from asr.serve.background import Background, running
from asr.serve.hub import ServeConfig

SOME = StreamConfig(endpoint=EndpointConfig(trailing_s=0.2, max_s=2.0))
"""Utterances end often, so that a few seconds have several."""

MULTIPART = "multipart/form-data; boundary=b"


def served(bundle: Bundle, **config: Any) -> AbstractContextManager[Background]:
    """A server whose model is called tiny."""
    return running(bundle, ServeConfig(**{"name": "tiny", "stream": SOME, **config}))


def wait(server: Background, is_true: Callable[[], bool]) -> None:
    """Let the server run until something is true of it."""
    done = threading.Event()

    def look() -> None:
        if is_true():
            done.set()
        else:
            server.loop.call_later(0.01, look)

    server.loop.call_soon_threadsafe(look)
    assert done.wait(30)


@contextmanager
def held(server: Background) -> Iterator[None]:
    """The server hears and answers nothing until the block is left; then all that was sent is there."""
    is_held, is_let_on = threading.Event(), threading.Event()

    def hold() -> None:
        is_held.set()
        is_let_on.wait(30)

    server.loop.call_soon_threadsafe(hold)
    assert is_held.wait(30)
    try:
        yield
    finally:
        is_let_on.set()


def closed(client: ClientConnection, message: bytes | str | None = None) -> tuple[int, str]:
    """(code, reason) with which the server ends the connection, if it is sent a message or nothing."""
    with suppress(ConnectionClosed):
        if message is not None:
            client.send(message)
        while True:
            client.recv(timeout=30)
    return client.close_code or 0, client.close_reason or ""


def wav(samples: Floats, sample_rate: int = 16000, kind: str = "WAV") -> bytes:
    """A sound file of 16 bits."""
    file = io.BytesIO()
    soundfile.write(file, np.frombuffer(pcm(samples), "<i2"), sample_rate, format=kind)
    return file.getvalue()


def pcm(samples: Floats) -> bytes:
    """Samples of 16 bits without a header."""
    return (samples * 32768).round().clip(-32768, 32767).astype("<i2").tobytes()
