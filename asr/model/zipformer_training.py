"""What makes a Zipformer learn that its forward pass does not show: rates that fall while it trains.

In training, parts of a layer are skipped for whole utterances, attention is made constant, channels are
masked; the rates of all that are piecewise linear in the number of batches seen, as published. In evaluation
nothing here is called.

Yao et al., "Zipformer: A faster and better encoder for automatic speech recognition", arXiv:2310.11230.

N utterances · T frames · C channels
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

Points = tuple[tuple[float, float], ...]
"""(batches, value) in the order of batches: constant before the first and behind the last, linear between."""

ATTENTION_SKIP: Points = ((0, 0.2), (4000, 0.05), (16000, 0))
CONVOLUTION_SKIP: Points = ((0, 0.2), (4000, 0.05), (16000, 0))
FEED_FORWARD_SKIP: Points = ((0, 0.1), (4000, 0.01), (50000, 0))
CONSTANT_ATTENTION: Points = ((0, 0.25), (4000, 0.025))
POSITION_SKIP: Points = ((0, 0.5), (4000, 0))
FRONT_SKIP: Points = ((0, 0.2), (20000, 0.015))
BYPASS_LEAST: Points = ((0, 0.9), (20000, 0.2))
WARMUP = 4000.0
"""Batches until the last layer is hardly skipped."""

FEATURE_MASK = 0.125
LIMIT_SHARE = 0.6
"""How often parameters beyond their limits are pushed back."""


def scheduled(batches: Tensor, points: Points) -> Tensor:
    """The value of a schedule behind so many batches, both scalars."""
    value = torch.full_like(batches, points[0][1])
    for (x, y), (next_x, next_y) in pairwise(points):
        value = value + (batches - x).clamp(0, next_x - x) * ((next_y - y) / (next_x - x))
    return value


def layer_skip(stack: int, num_stacks: int, rate: int, layer: int, num_layers: int) -> Points:
    """Layers begin one after the other: each is skipped half of the time until its turn comes."""
    begin = WARMUP * (stack + 1 + layer / num_layers) / (num_stacks + 1)
    end = WARMUP * (stack + 1 + (layer + 1) / num_layers) / (num_stacks + 1)
    return ((begin, 0.5), (end, 0.035 * rate**0.5))


class Rates(NamedTuple):
    """The values of a step, scalars."""

    batches: Tensor
    dropout: Tensor
    attention: Tensor
    convolution: Tensor
    feed_forward: Tensor
    constant: Tensor
    position: Tensor
    front: Tensor
    bypass_least: Tensor

    @classmethod
    def at(cls, batches: Tensor, dropout: float) -> "Rates":
        """dropout: the last value of its schedule, which starts with three times as much."""
        schedules = (
            ((0, 3 * dropout), (20000, dropout)),
            ATTENTION_SKIP,
            CONVOLUTION_SKIP,
            FEED_FORWARD_SKIP,
            CONSTANT_ATTENTION,
            POSITION_SKIP,
            FRONT_SKIP,
            BYPASS_LEAST,
        )
        return cls(batches, *(scheduled(batches, points) for points in schedules))


def kept(x: Tensor, rate: Tensor) -> Tensor:
    """(N, 1, ...) of 0 and 1, as many dimensions as x (N, ...): which utterances are not skipped."""
    return (torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= rate).to(x.dtype)


def dropout(x: Tensor, rate: Tensor) -> Tensor:
    """x (N, T, C): channels of whole utterances become 0, the others grow by as much."""
    return x * ((torch.rand_like(x[:, :1]) >= rate) / (1 - rate)).to(x.dtype)


def feature_masks(x: Tensor, dims: list[int], unmasked: list[int]) -> list[Tensor]:
    """For each stack (N, 1, C): the upper channels of some utterances are masked, all the way up.

    Half of the channels beyond the unmasked ones with probability p, the other half with them or, again with
    probability p, alone.
    """
    rate = x.new_tensor(FEATURE_MASK)
    some = kept(x, rate)
    more = some * kept(x, rate)
    masks = []
    for dim, first in zip(dims, unmasked, strict=True):
        second = first + (dim - first) // 2
        parts = (torch.ones_like(some).expand(-1, -1, first), some.expand(-1, -1, second - first))
        masks.append(torch.cat([*parts, more.expand(-1, -1, dim - second)], dim=-1))
    return masks


class _Limit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, least: Tensor, most: Tensor) -> Tensor:
        ctx.save_for_backward(x, least, most)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, least, most = ctx.saved_tensors
        away = ((grad > 0) & (x < least)) | ((grad < 0) & (x > most))
        return torch.where(away, -grad, grad), None, None


def limit(x: Tensor, least: Tensor, most: Tensor) -> Tensor:
    """x itself; gradients that would move it farther from [least, most] than it is are turned round."""
    return _Limit.apply(x, least, most)  # type: ignore[no-any-return,no-untyped-call]


def sometimes_limit(x: Tensor, least: float | Tensor, most: float) -> Tensor:
    """`limit` with probability LIMIT_SHARE, so that a parameter beyond its limits can still learn."""
    now = torch.rand((), device=x.device) < LIMIT_SHARE
    bounds = (torch.as_tensor(bound, device=x.device, dtype=x.dtype) for bound in (least, most))
    low, high = bounds
    infinite = torch.full_like(low, torch.inf)
    return limit(x, torch.where(now, low, -infinite), torch.where(now, high, infinite))
