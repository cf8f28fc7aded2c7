"""Voice activity -> pieces of a recording of any length that a model can process at once.

Stretches of speech are joined until a piece would be too long; it is then cut in the longest pause of its
second half. Pieces include some of the silence on both sides, never more than half of the pause between two.
Only if there is no pause at all is a piece cut within speech: at its quietest place, with some overlap, and
a word belongs to the piece in which its middle lies. So every sample of speech is in a piece, and every word
in exactly one.

Only the incomplete piece of a recording is kept in memory. How samples arrive changes nothing.

S samples. Internal times count windows of the voice activity detector.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from asr.decode.scorer import Floats
from asr.errors import ConfigError

PAUSE_S = 0.1
"""A shorter gap in speech is no pause: plosives are silent for that long."""

HEARD_ACROSS_S = 1.0
"""Where speech is cut, each piece includes this much of the other."""

QUIETEST_S = 0.1
"""A cut in speech is in the middle of the quietest stretch of this length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CutConfig:
    """Where to cut."""

    max_s: float = 20.0
    """Maximum length of a piece."""

    silence_s: float = 2.0
    """Silence that ends a piece; the rest of a longer silence belongs to no piece."""

    padding_s: float = 0.3
    """Silence kept before and after the speech of a piece, if there is that much."""

    begins: float = 0.4
    """Speech probability at which speech begins, ..."""

    goes_on: float = 0.25
    """... and at which it continues."""

    def __post_init__(self) -> None:
        if not 5 <= self.max_s < math.inf:
            raise ConfigError(f"max_s is {self.max_s}, expected 5 seconds or more")
        if not 0 < self.goes_on <= self.begins < 1:
            raise ConfigError(f"goes_on is {self.goes_on}, begins {self.begins}; expected 0 to 1, in order")
        if not 0 <= 2 * self.padding_s <= self.silence_s <= self.max_s / 2:
            raise ConfigError(
                f"silence_s is {self.silence_s}, expected twice padding_s ({self.padding_s}) to half of max_s"
            )


@dataclass(frozen=True)
class Piece:
    """A part of a recording."""

    samples: Floats
    """(S,)."""

    start: int
    """Sample of the recording at which it begins."""

    own_from_s: float = -math.inf
    """Words whose middle lies before this time in the recording belong to the previous piece, ..."""

    own_to_s: float = math.inf
    """... and those from this time on to the next."""


class Cutter:
    """Cuts one recording."""

    def __init__(self, config: CutConfig, sample_rate: int, window: int, unit: int) -> None:
        """window: samples per speech probability. unit: pieces begin at multiples of this many samples."""
        seconds = window / sample_rate
        self._config, self._rate, self._window, self._unit = config, sample_rate, window, unit
        self._padding = round(config.padding_s / seconds)
        self._silence = round(config.silence_s / seconds)
        self._pause = max(round(PAUSE_S / seconds), 1)
        self._across = round(HEARD_ACROSS_S / seconds)
        self._quietest = max(round(QUIETEST_S / seconds), 1)
        # a piece also includes the samples from a multiple of the unit on
        self._longest = int(config.max_s / seconds) - 2 * self._padding - math.ceil(unit / window)
        self._buffer = np.zeros(0, np.float32)
        self._first = 0  # sample of the recording at which the buffer begins
        self._num_windows = 0
        self._stretches: list[list[int]] = []  # of speech: the first window, and the one after the last
        self._floor = 0  # the next piece begins no earlier
        self._own_from_s = -math.inf

    def accept(self, samples: Floats, speech: Sequence[float]) -> list[Piece]:
        """Samples (S,), and the speech probabilities of the windows that they complete -> complete pieces."""
        self._buffer = np.concatenate([self._buffer, samples])
        pieces = [piece for probability in speech for piece in self._hear(probability)]
        self._forget()
        return pieces

    def finish(self, speech: Sequence[float]) -> list[Piece]:
        """End the recording: the last pieces. speech: the probability of a last, partial window, if any."""
        pieces = [piece for probability in speech for piece in self._hear(probability)]
        return [*pieces, self._take(len(self._stretches), self._padding)] if self._stretches else pieces

    def _hear(self, probability: float) -> list[Piece]:
        now = self._num_windows
        self._num_windows += 1
        stretches, config = self._stretches, self._config
        goes_on = bool(stretches) and now - stretches[-1][1] < self._pause
        if goes_on and probability >= config.goes_on:
            stretches[-1][1] = now + 1
        elif probability >= config.begins:
            stretches.append([now, now + 1])
        if stretches and now + 1 - stretches[-1][1] >= self._silence:
            return [self._take(len(stretches), self._padding)]
        if stretches and now + 1 - stretches[0][0] >= self._longest:
            return [self._cut()]
        return []

    def _cut(self) -> Piece:
        """The piece before the longest pause of the second half, or else before the longest of all."""
        ends = [end for _, end in self._stretches]
        begins = [begin for begin, _ in self._stretches[1:]] + [self._num_windows]
        pauses = [(b - a, n) for n, (a, b) in enumerate(zip(ends, begins, strict=True), 1)]
        pauses = [x for x in pauses if x[0] >= self._pause]
        half = self._stretches[0][0] + self._longest // 2
        late = [x for x in pauses if ends[x[1] - 1] >= half]
        if not pauses:
            return self._split()
        length, number = max(late or pauses)
        return self._take(number, min(self._padding, length // 2))

    def _take(self, number: int, padding: int) -> Piece:
        """The piece of the first `number` stretches, with `padding` windows of the silence after them."""
        end = self._stretches[number - 1][1] + padding
        piece = self._piece(end, math.inf)
        del self._stretches[:number]
        self._floor, self._own_from_s = end, -math.inf
        return piece

    def _split(self) -> Piece:
        """The piece up to the quietest place within speech that has no pause."""
        start = self._stretches[0][0]
        first = start + self._longest // 2
        places = range(first, self._num_windows - self._across - self._quietest)
        energy = [
            float(np.square(self._samples(i, i + 1), dtype=np.float64).sum())
            for i in range(first, places.stop + self._quietest)
        ]
        around = np.convolve(energy, np.ones(self._quietest), "valid")
        cut = first + int(around.argmin()) + self._quietest // 2
        cut_s = cut * self._window / self._rate
        piece = self._piece(cut + self._across, cut_s)
        self._stretches = [[cut - self._across, self._stretches[-1][1]]]
        self._floor, self._own_from_s = cut - self._across, cut_s
        return piece

    def _piece(self, end: int, own_to_s: float) -> Piece:
        start = self._start()
        samples = self._buffer[start - self._first : end * self._window - self._first]
        return Piece(samples, start, self._own_from_s, own_to_s)

    def _start(self) -> int:
        """The sample at which the next piece begins, or would if somebody spoke now."""
        speech = self._stretches[0][0] if self._stretches else self._num_windows
        start = max(speech - self._padding, self._floor, 0) * self._window
        return start - start % self._unit

    def _samples(self, start: int, end: int) -> Floats:
        return self._buffer[start * self._window - self._first : end * self._window - self._first]

    def _forget(self) -> None:
        """Drop samples that no piece will include."""
        start = max(self._start(), self._first)
        self._buffer, self._first = self._buffer[start - self._first :], start
