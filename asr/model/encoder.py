"""What the rest of the toolkit asks of an encoder, whatever it is: training, search, export and streams.

A stream gives an encoder its feature frames in calls. While it goes on, each call has

    k * chunk * subsampling + overlap_frames

frames that all count, of which the last `overlap_frames` are given again at the start of the next call. The
last call has what is left, at most as much, and behind that `flush_frames` more, which do not count: whoever
must know that an utterance ends sees it by them. A call for a whole utterance is a last call.

N streams · T feature frames · T' encoder frames · C channels
"""

from typing import Any, Protocol

from torch import Tensor

from asr.model.state import State


class Encoder(Protocol):
    """The attributes and calls of every module in ENCODERS."""

    config: Any

    dim: int
    """C, of its output."""

    subsampling: int
    """Feature frames per encoder frame."""

    overlap_frames: int
    """Feature frames that a call of a stream needs behind its own; the next call is given them again."""

    can_stream: bool
    """Whether there is a state. If not, `forward` encodes whole utterances only."""

    chunk_unit: int
    """A chunk is a multiple of so many encoder frames."""

    def init_state(self, n: int, width: int, delay: int = 0) -> State:
        """The state of n new streams that keep `width` encoder frames of left context and wait for `delay` of
        look-ahead in each layer. Sizes are in proportion to one of the two, or constant."""
        ...

    def flush_frames(self, delay: int) -> int:
        """Feature frames that the last call of a stream needs behind its own, so that all comes out: in
        proportion to `delay`, and perhaps some more."""
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
    """Layers that wait for their look-ahead, one after another; 0 where none was trained to look ahead."""
    if not encoder.config.chunk.max_right:
        return 0
    return (encoder.flush_frames(1) - encoder.flush_frames(0)) // encoder.subsampling
