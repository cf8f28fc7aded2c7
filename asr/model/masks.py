"""Which frames may attend to which.

One rule serves full context, chunked streaming and the decoder: time is cut into chunks of `chunk` encoder
frames, and a frame sees all of its own chunk, `left` whole chunks before it and `right` after it.

    chunk = 2, left = 1        keys 0 1 2 3 4 5      with right = 1     0 1 2 3 4 5
                    query 0 1       x x . . . .                         x x x x . .
                    query 2 3       x x x x . .                         x x x x x x
                    query 4 5       . . x x x x                         . . x x x x

Without `right`, look-ahead is between 0 and `chunk - 1` frames whatever the number of layers. With it, L
layers add L * right * chunk frames.

Masks are boolean and True means "may attend", as in torch's scaled_dot_product_attention.

N streams · T query frames · W cached frames, so W + T keys

Zhang et al., "Unified Streaming and Non-streaming Two-pass End-to-end Model", arXiv:2012.05481; Zhang et al.,
"Transformer Transducer", arXiv:2002.02562, whose limited context is chunks of one frame.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from asr.context import WHOLE, Context
from asr.errors import ConfigError

X = TypeVar("X")

ENDLESS = 1 << 40
"""A chunk longer than any recording."""


@dataclass(kw_only=True, slots=True)
class ChunkConfig:
    """The attention contexts of training, which let a model stream with any chunk afterwards."""

    dynamic: bool = True
    """Draw a context for every batch; if false, always use the whole utterance."""

    max_chunk: int = 25
    """The longest chunk, in encoder frames."""

    limit_left: bool = True
    """Limit the left context of half of the chunked batches to a random number of chunks."""

    max_right: int = 0
    """In chunked batches, let every layer look ahead by a random number of chunks, at most this many."""

    contexts: list[list[int]] = field(default_factory=list)
    """Draw one of these for every batch instead, as cache-aware models do (arXiv:2312.17279): [left, right]
    is a chunk of right + 1 frames and `left` frames before it, a whole number of chunks or -1 for all."""

    chunks: list[int] = field(default_factory=list)
    """Draw the chunk uniformly from these lengths instead, in encoder frames; 0 is the whole utterance."""

    left_frames: list[int] = field(default_factory=lambda: [-1])
    """With `chunks`, draw the left context from these lengths in encoder frames, rounded down to whole chunks
    but at least one; -1 is all."""

    def __post_init__(self) -> None:
        for name, least in (("max_chunk", 1), ("max_right", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least {least}")
        for pair in self.contexts:
            if len(pair) != 2 or pair[1] < 0 or pair[0] < -1 or (pair[0] > 0 and pair[0] % (pair[1] + 1)):
                raise ConfigError(
                    f"contexts has {pair}; expected [left, right] in frames, left -1 or a multiple of "
                    "right + 1"
                )
        if min(self.chunks, default=0) < 0:
            raise ConfigError(f"chunks is {self.chunks}; expected numbers of frames, 0 for all")
        if not self.left_frames or any(frames < 1 and frames != -1 for frames in self.left_frames):
            raise ConfigError(f"left_frames is {self.left_frames}; expected numbers of frames, -1 for all")

    @property
    def named(self) -> list[Context]:
        """The chunked contexts that `contexts` or `chunks` list, the latter with unlimited left context."""
        if not self.dynamic:
            return []
        return [cache_aware(*x) for x in self.contexts] or [Context(chunk) for chunk in self.chunks if chunk]


def valid_mask(lens: Tensor, length: int) -> Tensor:
    """lens (N,) -> (N, length): True for the first lens[n] entries."""
    return torch.arange(length, device=lens.device) < lens[:, None]


def window_mask(start: Tensor, end: Tensor, length: int) -> Tensor:
    """start, end (N, U) -> (N, U, length): True from start up to, not including, end."""
    frames = torch.arange(length, device=start.device)
    return (frames >= start[..., None]) & (frames < end[..., None])


def context_mask(
    offset: Tensor,
    lens: Tensor,
    width: int,
    length: int,
    chunk: int | Tensor,
    left: int | Tensor,
    right: int | Tensor = 0,
    delay: int = 0,
) -> Tensor:
    """The mask of `length` queries from offset - delay on, and keys offset - width .. offset + length - 1.

    offset (N,): frames of each stream before this call, so that a cache that is not full yet is masked by
    the rule that limits the context in training.  lens (N,): valid keys from `offset` on.  chunk: frames per
    chunk, 0 for one chunk of everything.  left: chunks before the query's own, -1 for all.  right: chunks
    after it. The three may be int64 scalar tensors.  delay: frames that queries wait for keys, at most
    `width`.

    Returns (N, length, width + length). Every query sees at least itself, so no softmax is empty.
    """
    chunk, left, right = (torch.as_tensor(value, device=offset.device) for value in (chunk, left, right))
    step = torch.arange(-width, length, device=offset.device)
    keys = (offset[:, None] + step)[:, None, :]
    queries = (offset[:, None] + torch.arange(length, device=offset.device) - delay)[:, :, None]
    chunk = torch.where(chunk > 0, chunk, ENDLESS)
    distance = queries // chunk - keys // chunk
    near = (distance >= -right) & ((left < 0) | (distance <= left))
    exists = (keys >= 0) & (step < lens[:, None])[:, None, :]
    return (near & exists) | (queries == keys)


def draw_context(num_frames: int, generator: torch.Generator, config: ChunkConfig) -> Context:
    """The context of one training batch, whose longest utterance has num_frames encoder frames.

    One of config.contexts or of config.chunks, if there are any. Else, with u uniform in 1 .. num_frames - 1:
    the whole utterance if u > num_frames / 2, else chunks of (u mod max_chunk) + 1 frames. Left context is
    unlimited or, if limit_left, half of the time a uniform number of chunks; look-ahead is a uniform number
    of chunks up to max_right.
    """
    if not config.dynamic or num_frames < 2:
        return WHOLE
    if config.contexts:
        return cache_aware(*_choice(config.contexts, generator))
    if config.chunks:
        chunk, left = (_choice(values, generator) for values in (config.chunks, config.left_frames))
        return Context(chunk, -1 if left < 0 else max(left // chunk, 1)) if chunk else WHOLE
    u = _uniform(1, num_frames - 1, generator)
    if u > num_frames / 2:
        return WHOLE
    chunk, left = u % config.max_chunk + 1, -1
    if config.limit_left and not _uniform(0, 1, generator):
        left = _uniform(0, (num_frames - 1) // chunk, generator)
    right = _uniform(0, config.max_right, generator) if config.max_right else 0
    return Context(chunk, left, right)


def cache_aware(left: int, right: int) -> Context:
    """Chunks of right + 1 frames with `left` frames of left context, -1 for all."""
    return Context(right + 1, left // (right + 1) if left >= 0 else -1)


def _choice(values: Sequence[X], generator: torch.Generator) -> X:
    return values[_uniform(0, len(values) - 1, generator)]


def _uniform(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))
