"""What a frame of the encoder may attend to: chosen per call, with the same weights and the same graph."""

from typing import NamedTuple


class Context(NamedTuple):
    """A chunk, and how many chunks before and behind it; by default the whole utterance.

    With chunk 1 it is the limited context of the Transformer Transducer (arXiv:2002.02562).
    """

    chunk: int = 0
    """Encoder frames per chunk, 0 for the whole utterance."""

    left: int = -1
    """Chunks before one's own, -1 for all."""

    right: int = 0
    """Look-ahead: chunks behind one's own. Every layer looks so far, so that it adds up over the layers."""

    @property
    def delay(self) -> int:
        """Encoder frames by which every layer of a stream is late, since it waits for its look-ahead."""
        return self.right * self.chunk

    @property
    def width(self) -> int:
        """Encoder frames of the past that every layer of a stream keeps."""
        return max(self.left, 0) * self.chunk + self.delay

    def __str__(self) -> str:
        if not self.chunk:
            return "at once"
        ahead = f", {self.right} of look-ahead" if self.right else ""
        return f"chunks of {self.chunk} frames, {self.left} of left context{ahead}"


WHOLE = Context()
