"""The encoder interface that training, search, export and streaming rely on.

A stream passes its feature frames to the encoder call by call. Each call but the last has

    k * chunk * subsampling + overlap_frames

frames, all valid; the last `overlap_frames` of them come again at the start of the next call. The last call
has what is left, at most as many, followed by `flush_frames` padding frames: an encoder that must know where
an utterance ends recognises it by them. A call for a whole utterance is a last call.

N streams · T feature frames · T' encoder frames · C channels
"""

from typing import Any, Protocol

from torch import Tensor

from asr.model.state import State


class Encoder(Protocol):
    """The attributes and calls of every module in ENCODERS."""

    config: Any

    dim: int
    """C, the channels of the output."""

    subsampling: int
    """Feature frames per encoder frame."""

    overlap_frames: int
    """Feature frames that a call of a stream needs after its own; the next call gets them again."""

    can_stream: bool
    """Whether the encoder can stream. If not, `forward` encodes whole utterances only."""

    chunk_unit: int
    """The length of a chunk must be a multiple of this many encoder frames."""

    def init_state(self, n: int, width: int, delay: int = 0) -> State:
        """The state of n new streams that keep `width` encoder frames of left context and wait for `delay`
        frames of look-ahead in each layer. Every size is constant or proportional to one of the two."""
        ...

    def flush_frames(self, delay: int) -> int:
        """Padding frames that the last call of a stream needs after its own, to flush all output: an amount
        proportional to `delay`, plus a constant."""
        ...

    def __call__(
        self,
        x: Tensor,
        x_lens: Tensor,
        state: Any = None,
        chunk: int | Tensor = 0,
        left: int | Tensor = -1,
        right: int | Tensor = 0,
    ) -> tuple[Tensor, Tensor, Any]:
        """x (N, T, F), x_lens (N,) -> y (N, T', C), y_lens (N,) and the next state, in any Context."""
        ...


def look_ahead_layers(encoder: Encoder) -> int:
    """The number of layers that each wait for their look-ahead; 0 if none was trained with look-ahead."""
    if not encoder.config.chunk.max_right:
        return 0
    return (encoder.flush_frames(1) - encoder.flush_frames(0)) // encoder.subsampling
