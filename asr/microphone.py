"""The microphone, as blocks of float32 mono samples. Needs the extra `mic` (sounddevice) and PortAudio.

PortAudio calls back from its own thread and must never wait, so blocks pass through a queue of QUEUE_S
seconds. If the reader falls behind by more than that, the newest blocks are lost, and the next delivered
block says so; every block also tells how far the reader is behind. A simulated device
(asr/virtual_microphone.py) uses the same path, with its own clock.
"""

import queue
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from asr.audio import SAMPLE_RATE, Floats, Resampler
from asr.errors import AudioError, MissingExtra

QUEUE_S = 30.0
"""Audio that may wait to be read."""
SILENT_S = 5.0
"""A device that delivers nothing for this long is an error."""
FLOOR_DB = -100.0


@dataclass(frozen=True)
class Device:
    """An input device of this machine."""

    index: int
    name: str
    channels: int
    sample_rate: int
    """Its default, in Hz."""
    is_default: bool


@dataclass(frozen=True)
class Block:
    samples: Floats
    """(S,) mono, in [-1, 1]."""

    lag_s: float
    """Seconds from its arrival until the reader gets it: how far the reader is behind."""

    overflowed: bool
    """Whether audio was lost right before it, here or in the device."""

    lost_s: float = 0.0
    """How much was lost here; what a device loses is unknown."""


class Simulation(Protocol):
    """A simulated device, and its clock."""

    audio: Any
    """Replaces the sounddevice module."""

    def now(self) -> float:
        """Seconds."""
        ...

    def wait(self, is_empty: bool) -> None:
        """Deliver what has arrived; if nothing waits to be read, advance the clock until something does."""
        ...


def devices() -> list[Device]:
    """The input devices. Raises MissingExtra without sounddevice, AudioError without PortAudio."""
    return _inputs(_sounddevice())


def _inputs(sounddevice: Any) -> list[Device]:
    default = sounddevice.default.device[0]
    return [
        Device(i, d["name"], d["max_input_channels"], int(d["default_samplerate"]), i == default)
        for i, d in enumerate(sounddevice.query_devices())
        if d["max_input_channels"] > 0
    ]


def microphone_blocks(
    device: int | str | None = None,
    sample_rate: int = SAMPLE_RATE,
    block_ms: int = 100,
    simulation: Simulation | None = None,
) -> Iterator[Block]:
    """The audio of a microphone from now on, without end; closing the iterator releases the device.

    device: its number, its name or a part of it, or None (or "") for the default. A device that does not
    support sample_rate is opened at its own rate and resampled. Raises AudioError if there is no such device,
    or if it stops delivering.
    """
    sounddevice = simulation.audio if simulation else _sounddevice()
    found = _find(device, _inputs(sounddevice))
    rate = _native_rate(sounddevice, found, sample_rate)
    inbox = _Inbox(max(1, round(1000 * QUEUE_S / block_ms)), simulation)
    resampler = Resampler(rate, sample_rate)
    try:
        with sounddevice.InputStream(
            samplerate=rate,
            blocksize=max(1, round(rate * block_ms / 1000)),
            device=found.index,
            channels=1,
            dtype="float32",
            callback=inbox.put,
        ) as stream:
            while True:
                samples, arrived_s, overflowed, lost = inbox.get(stream, found.name)
                yield Block(resampler.accept(samples), inbox.now() - arrived_s, overflowed, lost / rate)
    except sounddevice.PortAudioError as error:
        raise AudioError(f"microphone {found.name!r}: {error}; is it in use, or unplugged?") from None


def level_db(samples: Floats) -> float:
    """Root mean square in decibels below full scale: 0 for a full square wave, FLOOR_DB for silence."""
    power = float(np.mean(np.square(samples, dtype=np.float64))) if len(samples) else 0.0
    return max(FLOOR_DB, 10 * np.log10(power)) if power > 0 else FLOOR_DB


class _Inbox:
    """The queue that PortAudio's thread fills, with a record of what did not fit."""

    def __init__(self, max_blocks: int, simulation: Simulation | None) -> None:
        self._queue: queue.Queue[tuple[Floats, float, bool, int]] = queue.Queue(max_blocks)
        self._simulation = simulation
        self._has_lost = False
        self._num_lost = 0

    def now(self) -> float:
        return self._simulation.now() if self._simulation else time.monotonic()

    def put(self, samples: Floats, _num_frames: int, _time: Any, status: Any) -> None:
        self._has_lost |= bool(status.input_overflow)
        try:
            self._queue.put_nowait((samples[:, 0].copy(), self.now(), self._has_lost, self._num_lost))
            self._has_lost, self._num_lost = False, 0
        except queue.Full:
            self._has_lost, self._num_lost = True, self._num_lost + len(samples)

    def get(self, stream: Any, name: str) -> tuple[Floats, float, bool, int]:
        if self._simulation:
            self._simulation.wait(self._queue.empty())
        try:
            # a stream that has ended delivers nothing more, so do not wait
            return self._queue.get(timeout=SILENT_S if stream.active else 0.01)
        except queue.Empty:
            what = "delivers nothing" if stream.active else "has stopped"
            raise AudioError(f"microphone {name!r} {what}; is it unplugged or muted by the system?") from None


def _find(device: int | str | None, there: list[Device]) -> Device:
    if not there:
        raise AudioError("no microphone found; plug one in, or transcribe a file")
    if device is None or device == "":
        return next((d for d in there if d.is_default), there[0])
    number = int(device) if isinstance(device, int) or device.isdecimal() else None
    part = str(device).lower()
    fits = [d for d in there if d.index == number or (number is None and part in d.name.lower())]
    fits = [d for d in fits if d.name.lower() == part] or fits
    if len(fits) != 1:
        what = "no microphone" if not fits else f"{len(fits)} microphones match"
        names = ", ".join(f"{d.index} {d.name!r}" for d in there)
        raise AudioError(f"{what} {str(device)!r}; available: {names}")
    return fits[0]


def _native_rate(sounddevice: Any, device: Device, sample_rate: int) -> int:
    try:
        sounddevice.check_input_settings(
            device=device.index, channels=1, dtype="float32", samplerate=sample_rate
        )
    except sounddevice.PortAudioError:
        return device.sample_rate
    return sample_rate


def _sounddevice() -> Any:
    try:
        import sounddevice
    except ModuleNotFoundError:
        raise MissingExtra("sounddevice", "mic") from None
    except OSError:  # sounddevice is installed, but not the library that it wraps
        raise AudioError("the PortAudio library is not installed; apt-get install libportaudio2") from None
    return sounddevice
