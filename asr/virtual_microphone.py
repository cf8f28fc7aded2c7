"""A simulated microphone: it plays a recording on its own clock, through the code path of a real one.

Computation takes its real time; waiting for audio takes none, as the clock is advanced instead. So hours of
audio pass as fast as they are computed, and every text has the time at which it would have appeared.

S samples
"""

import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from itertools import count
from types import SimpleNamespace, TracebackType
from typing import Any, Self

import numpy as np

from asr.audio import Floats


class VirtualMicrophone:
    """Delivers samples (S,) in blocks, each at its end, then silence: a `Simulation` of asr/microphone.py."""

    PortAudioError = OSError

    def __init__(
        self,
        samples: Floats,
        sample_rate: int,
        timer: Callable[[], float] = time.perf_counter,
        lost_blocks: Collection[int] = (),
        unplugged_s: float = np.inf,
    ) -> None:
        """lost_blocks: numbers of the blocks that the device loses. unplugged_s: when it is unplugged."""
        self.audio = self
        self.default = SimpleNamespace(device=[0, -1])
        self._samples, self._rate, self._timer = samples, sample_rate, timer
        self._lost, self._unplugged_s = lost_blocks, unplugged_s
        self._waited_s = 0.0
        self._stream: _Stream | None = None
        self._past_s: float | None = None

    def now(self) -> float:
        """Seconds from the start of the audio; within a callback, the time when it would have happened."""
        return self._timer() + self._waited_s if self._past_s is None else self._past_s

    def wait(self, is_empty: bool) -> None:
        """As Simulation.wait."""
        stream = self._stream
        if stream is None:
            return
        present_s = self.now()
        number = next(n for n in count(stream.number) if n not in self._lost)
        if is_empty and stream.end_s(number) <= self._unplugged_s:
            present_s = max(present_s, stream.end_s(number))
            self._waited_s += present_s - self.now()
        while stream.next_s <= min(present_s, self._unplugged_s):
            self._past_s = stream.next_s
            stream.deliver(self._samples, stream.number in self._lost)
            self._past_s = None
        stream.active = stream.next_s <= self._unplugged_s

    # the part of sounddevice that asr/microphone.py uses

    def query_devices(self) -> list[dict[str, Any]]:
        return [{"name": "virtual", "max_input_channels": 1, "default_samplerate": float(self._rate)}]

    def check_input_settings(self, *, samplerate: int, **_: Any) -> None:
        """Raise PortAudioError unless it is the rate of the samples."""
        if samplerate != self._rate:
            raise self.PortAudioError("Invalid sample rate")

    def InputStream(self, **options: Any) -> "_Stream":
        self._waited_s = -self._timer()  # the audio starts now, at 0
        self._stream = _Stream(**options)
        return self._stream


class _Stream(AbstractContextManager["_Stream"]):
    """The open stream; `number` is that of the next block."""

    def __init__(self, samplerate: int, blocksize: int, callback: Callable[..., None], **_: Any) -> None:
        self._rate, self._size, self._callback = samplerate, blocksize, callback
        self._has_lost = False
        self.number = 0
        self.active = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self.active = False

    def end_s(self, number: int) -> float:
        """When this block is complete."""
        return (number + 1) * self._size / self._rate

    @property
    def next_s(self) -> float:
        """When the next block is complete."""
        return self.end_s(self.number)

    def deliver(self, samples: Floats, is_lost: bool) -> None:
        """Deliver the next block, unless the device loses it; then the following one reports an overflow."""
        block = samples[self.number * self._size : (self.number + 1) * self._size]
        self.number += 1
        if not is_lost:
            whole = np.pad(block, (0, self._size - len(block)))[:, None]
            self._callback(whole, self._size, None, SimpleNamespace(input_overflow=self._has_lost))
        self._has_lost = is_lost
