"""Signals: at the first request to stop, training finishes its step and saves; at the second, it exits."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """The first signal received, if any."""

    def __init__(self) -> None:
        self.name = ""

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.name:
            os._exit(128 + number)
        self.name = signal.Signals(number).name

    def __bool__(self) -> bool:
        return bool(self.name)


@contextlib.contextmanager
def listen() -> Iterator[StopRequest]:
    """Catch SIGTERM, SIGINT and SIGUSR1 within this context, also in processes forked from it."""
    request = StopRequest()
    before = {number: signal.signal(number, request.receive) for number in REQUESTS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
