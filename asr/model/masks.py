"""Which frames may attend to which.

One rule serves full context, chunked streaming and the decoder: time is cut into chunks of `chunk` encoder
frames, and a frame sees its own chunk to the end, and `left` whole chunks before it. Look-ahead is therefore
between 0 and `chunk - 1` frames: (chunk - 1) / 2 on average.

    chunk = 2, left = 1        keys 0 1 2 3 4 5
                    query 0 1       x x . . . .
                    query 2 3       x x x x . .
                    query 4 5       . . x x x x

Masks are boolean and True means "may attend", as in torch's scaled_dot_product_attention.

N streams · T query frames · W frames of left context, so W + T keys

Zhang et al., "Unified Streaming and Non-streaming Two-pass End-to-end Model", arXiv:2012.05481.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

WHOLE = 1 << 40
"""A chunk longer than any recording."""


@dataclass(kw_only=True, slots=True)
class ChunkConfig:
    """The attention contexts that a model is trained on, so that it can stream with any chunk afterwards."""

    dynamic: bool = True
    """Draw a context for every batch; False: always the whole utterance."""

    max_chunk: int = 25
    """The longest chunk, in encoder frames."""

    limit_left: bool = True
    """Limit the left context of half of the chunked batches to a random number of chunks."""


def valid_mask(lens: Tensor, length: int) -> Tensor:
    """lens (N,) -> (N, length): True before the end of each."""
    return torch.arange(length, device=lens.device) < lens[:, None]


def window_mask(start: Tensor, end: Tensor, length: int) -> Tensor:
    """start, end (N, U) -> (N, U, length): True from start up to, not including, end."""
    frames = torch.arange(length, device=start.device)
    return (frames >= start[..., None]) & (frames < end[..., None])


def context_mask(
    offset: Tensor, lens: Tensor, width: int, length: int, chunk: int | Tensor, left: int | Tensor
) -> Tensor:
    """Queries at offset .. offset + length - 1, keys from `width` frames before the first query on.

    offset (N,): frames of each stream before this call, so that a cache which is not yet full is masked by
    the rule that limits the context in training.  lens (N,): queries that count.  chunk: frames per chunk, 0
    for one chunk of everything.  left: chunks before one's own, -1 for all.  Both may be int64 scalar
    tensors.

    Returns (N, length, width + length). Every query sees itself at least, so no softmax is empty.
    """
    chunk = torch.as_tensor(chunk, device=offset.device)
    left = torch.as_tensor(left, device=offset.device)
    step = torch.arange(-width, length, device=offset.device)
    keys = (offset[:, None] + step)[:, None, :]
    queries = keys[..., width:].transpose(1, 2)
    chunk = torch.where(chunk > 0, chunk, WHOLE)
    distance = queries // chunk - keys // chunk
    near = (distance >= 0) & ((left < 0) | (distance <= left))
    exists = (keys >= 0) & (step < lens[:, None])[:, None, :]
    return (near & exists) | (queries == keys)


def draw_context(num_frames: int, generator: torch.Generator, config: ChunkConfig) -> tuple[int, int]:
    """(chunk, left) for one training batch, whose longest utterance has num_frames encoder frames.

    With u uniform in 1 .. num_frames - 1: the whole utterance if u > num_frames / 2, else chunks of
    (u mod max_chunk) + 1 frames, with unlimited left context or, half of the time, a uniform number of
    chunks.
    """
    if not config.dynamic or num_frames < 2:
        return 0, -1
    u = _uniform(1, num_frames - 1, generator)
    if u > num_frames / 2:
        return 0, -1
    chunk = u % config.max_chunk + 1
    if not config.limit_left or _uniform(0, 1, generator):
        return chunk, -1
    return chunk, _uniform(0, (num_frames - 1) // chunk, generator)


def _uniform(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))
