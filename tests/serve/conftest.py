"""A server of the tiny model on a socket of this machine, and what its clients should be told."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asr.audio import Floats
from asr.runtime import Bundle, Event, open_stream
from asr.serve import engine
from asr.serve.background import Background
from export.verify import made_sound

from .clients import SOME, pcm, served, wait


@pytest.fixture(scope="session")
def bundle(tiny_bundles: Path) -> Bundle:
    return Bundle.load(tiny_bundles / "cpu-fp32")


@pytest.fixture(scope="session")
def server(bundle: Bundle) -> Iterator[Background]:
    """The server of all tests that need no other settings."""
    with served(bundle) as found:
        yield found
        wait(found, lambda: found.hub.engine.num_streams == 0)


@pytest.fixture(scope="session")
def sound() -> Floats:
    """Five seconds, with a pause, as if read from a file of 16 bits."""
    samples = made_sound(5.0, 16000)
    samples[32000:48000] = 0
    return np.frombuffer(pcm(samples), "<i2").astype(np.float32) / np.float32(32768)


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


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Cleared, it makes the model wait."""
    is_let_on, told = threading.Event(), engine._do
    is_let_on.set()

    def slow(jobs: Any) -> Any:
        is_let_on.wait(30)
        return told(jobs)

    monkeypatch.setattr(engine, "_do", slow)
    return is_let_on
