"""The attention context of the encoder: chosen per call, with the same weights and the same graph."""

from typing import NamedTuple


class Context(NamedTuple):
    """A chunk, and how many chunks before and after it; by default the whole utterance.

    With chunk 1, this is the limited context of the Transformer Transducer (arXiv:2002.02562).
    """

    chunk: int = 0
    """Encoder frames per chunk, 0 for the whole utterance."""

    left: int = -1
    """Chunks before the frame's own, -1 for all."""

    right: int = 0
    """Look-ahead: chunks after the frame's own. It applies in every layer, so it adds up over the layers."""

    @property
    def delay(self) -> int:
        """Encoder frames that every layer of a stream lags, as it waits for its look-ahead."""
        return self.right * self.chunk

    @property
    def width(self) -> int:
        """Past encoder frames that every layer of a stream caches."""
        return max(self.left, 0) * self.chunk + self.delay

    def __str__(self) -> str:
        if not self.chunk:
            return "at once"
        ahead = f", {self.right} of look-ahead" if self.right else ""
        return f"chunks of {self.chunk} frames, {self.left} of left context{ahead}"


WHOLE = Context()
