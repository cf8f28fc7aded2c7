"""Training-time regularisation of the Zipformer, with rates that fall during training.

In training, parts of a layer are skipped for whole utterances, attention is made constant, and channels are
masked. The rates are piecewise linear in the number of batches seen, as published. Evaluation calls none of
this.

Yao et al., "Zipformer: A faster and better encoder for automatic speech recognition", arXiv:2310.11230.

N utterances · T frames · C channels
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from asr.model.schedule import Schedule

ATTENTION_SKIP = Schedule((0, 0.2), (4000, 0.05), (16000, 0))
CONVOLUTION_SKIP = Schedule((0, 0.2), (4000, 0.05), (16000, 0))
FEED_FORWARD_SKIP = Schedule((0, 0.1), (4000, 0.01), (50000, 0))
CONSTANT_ATTENTION = Schedule((0, 0.25), (4000, 0.025))
POSITION_SKIP = Schedule((0, 0.5), (4000, 0))
FRONT_SKIP = Schedule((0, 0.2), (20000, 0.015))
BYPASS_LEAST = Schedule((0, 0.9), (20000, 0.2))
WARMUP = 4000.0
"""Batches until all layers take part."""

FEATURE_MASK = 0.125


def dropout_schedule(last: float) -> Schedule:
    """Starts at three times `last`."""
    return Schedule((0, 3 * last), (20000, last))


def layer_skip(stack: int, num_stacks: int, rate: int, layer: int, num_layers: int) -> Schedule:
    """Layers start one after another: each is skipped half of the time until its turn comes."""
    begin = WARMUP * (stack + 1 + layer / num_layers) / (num_stacks + 1)
    end = WARMUP * (stack + 1 + (layer + 1) / num_layers) / (num_stacks + 1)
    return Schedule((begin, 0.5), (end, 0.035 * rate**0.5))


def whiteness_limit(first: float, ratio: float = 2.0) -> Schedule:
    return Schedule((0, first), (20000, ratio * first))


class Rates(NamedTuple):
    """The values of all schedules in a training step."""

    batch_count: float
    dropout: float
    attention: float
    convolution: float
    feed_forward: float
    constant: float
    position: float
    front: float
    bypass_least: float

    @classmethod
    def at(cls, batch_count: float, dropout: float) -> Self:
        """batch_count: in batches of 600 s of audio; dropout: the last value of its schedule."""
        return cls(
            batch_count,
            dropout_schedule(dropout)(batch_count),
            ATTENTION_SKIP(batch_count),
            CONVOLUTION_SKIP(batch_count),
            FEED_FORWARD_SKIP(batch_count),
            CONSTANT_ATTENTION(batch_count),
            POSITION_SKIP(batch_count),
            FRONT_SKIP(batch_count),
            BYPASS_LEAST(batch_count),
        )


def kept(x: Tensor, skip: float) -> Tensor:
    """Which utterances are not skipped: (N, 1, ...) of 0 and 1, with as many dimensions as x (N, ...)."""
    return (torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= skip).to(x.dtype)


def dropout(x: Tensor, rate: float) -> Tensor:
    """x (N, T, C): drops channels for whole utterances and scales the others up to compensate."""
    return x * ((torch.rand_like(x[:, :1]) >= rate) / (1 - rate)).to(x.dtype)


def feature_masks(x: Tensor, dims: list[int], unmasked: list[int]) -> list[Tensor]:
    """A mask (N, 1, C) for each stack: masks the upper channels of some utterances, in all stacks alike.

    x (N, T, C): gives N and the dtype.  Half of the channels beyond the unmasked ones are masked with
    probability p; the other half with them or, again with probability p, alone.
    """
    some = kept(x, FEATURE_MASK)
    more = some * kept(x, FEATURE_MASK)
    masks = []
    for dim, first in zip(dims, unmasked, strict=True):
        second = (dim - first) // 2
        sizes = (first, second, dim - first - second)
        parts = zip((torch.ones_like(some), some, more), sizes, strict=True)
        masks.append(torch.cat([part.expand(-1, -1, size) for part, size in parts], dim=-1))
    return masks
