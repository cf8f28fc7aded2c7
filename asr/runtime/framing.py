"""Samples of any block length -> windows of whole feature frames.

Frame f covers samples f * shift - lead to f * shift - lead + length, where lead = length / 2 - shift / 2
centres it. Samples before the start and after the end are mirrored (-1 -> 0, n -> n - 1), as
`asr/features.py` does for whole utterances, so that n samples always become (n + shift / 2) // shift frames,
however they arrive.

For `asr/nemo_features.py`, the signal is instead zero before the start and decays after the end, frame f
begins at f * shift - length / 2 - 1, and n samples become n // shift frames.
"""

import numpy as np

from asr.decode.scorer import Floats, Ints


class Framer:
    """Holds the samples of one stream that its frames still need, and nothing older."""

    def __init__(self, shift: int, length: int, snip_edges: bool = False, fading: float = 0.0) -> None:
        self.shift, self.length = shift, length
        self.num_samples = 0
        self._snip_edges, self._fading = snip_edges, fading
        self._lead = 0 if snip_edges else length // 2 - shift // 2
        if fading:
            self._lead = length // 2 + 1
        self._buffer = np.zeros(0, np.float32)
        self._first = 0  # sample of the stream at which the buffer begins
        self.num_taken = 0
        """Frames taken, without those that will be given again."""

        self._finished = False

    def accept(self, samples: Floats) -> None:
        """Append samples (S,)."""
        self._buffer = np.concatenate([self._buffer, samples])
        self.num_samples += len(samples)

    def finish(self) -> None:
        """End the stream: the frames at the end may now be taken."""
        self._finished = True

    def ready(self) -> int:
        """Frames that can be taken now."""
        if self._finished and self._fading:
            total = self.num_samples // self.shift
        elif self._finished and not self._snip_edges:
            total = (self.num_samples + self.shift // 2) // self.shift
        else:
            total = (self.num_samples + self._lead - self.length) // self.shift + 1
        return max(total - self.num_taken, 0)

    def take(self, num_frames: int, again: int = 0) -> Floats:
        """The window of the next num_frames frames, ((num_frames - 1) * shift + length,), edges mirrored.

        The last `again` of them are also the first of the next window.
        """
        start = self.num_taken * self.shift - self._lead
        position = np.arange(start, start + (num_frames - 1) * self.shift + self.length)
        window = self._fade(position) if self._fading else self._mirror(position)
        self.num_taken += num_frames - again
        self._forget()
        return window

    def _mirror(self, position: Ints) -> Floats:
        if len(position) and (position[0] < 0 or position[-1] >= self.num_samples):
            position %= 2 * self.num_samples
            position = np.minimum(position, 2 * self.num_samples - 1 - position)
        return self._buffer[position - self._first]

    def _fade(self, position: Ints) -> Floats:
        behind = np.maximum(position - (self.num_samples - 1), 0)
        parts = np.where(position < 0, 0.0, self._fading**behind).astype(np.float32)
        inside = np.clip(position, self._first, self.num_samples - 1) - self._first
        return self._buffer[inside] * parts if len(self._buffer) else np.zeros(len(position), np.float32)

    def _forget(self) -> None:
        """Drop the samples before the next frame, but keep those that mirroring the end may need."""
        keep_from = max(self.num_taken * self.shift - self._lead, self._first)
        if self.num_samples > self.length:
            keep_from = min(keep_from, self.num_samples - self.length)
            self._buffer = self._buffer[keep_from - self._first :]
            self._first = keep_from
