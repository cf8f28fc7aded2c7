"""Self-attention with left context, and cross-attention, each one call of scaled_dot_product_attention.

Positions are rotary (Su et al., "RoFormer", arXiv:2104.09864): queries and keys are rotated by their absolute
position, so their product depends only on the distance and cached keys never change. Models of other
families add sinusoids to their input instead (arXiv:1706.03762).

N streams · B hypotheses of what they say · T query frames · U tokens · W cached frames · C channels · H
heads · D channels per head
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BASE = 10000.0


class Rotation(NamedTuple):
    """Cosine and sine for every position and channel pair, (N or 1, 1, T, D / 2) each."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, head_dim: int) -> "Rotation":
        """positions (N or 1, T) int64. Uses double precision modulo 2 pi, as a stream may run for days."""
        angle = _angles(positions, head_dim)[:, None]
        return cls(angle.cos(), angle.sin())

    def __call__(self, x: Tensor) -> Tensor:
        """x (N, H, T, D) -> x rotated, in its dtype."""
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * self.cos - b * self.sin, b * self.cos + a * self.sin], dim=-1).to(x.dtype)


def sinusoids(positions: Tensor, dim: int) -> Tensor:
    """positions (N or 1, T) int64 -> (N or 1, T, C): alternating sine and cosine of falling frequency."""
    angle = _angles(positions, dim)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(2)


def _angles(positions: Tensor, dim: int) -> Tensor:
    """(N or 1, T) -> (N or 1, T, dim / 2), modulo 2 pi."""
    pair = torch.arange(dim // 2, device=positions.device, dtype=torch.float64)
    return (positions[..., None] * BASE ** (-pair * 2 / dim) % (2 * math.pi)).float()


class SelfAttention(nn.Module):
    """Attention of a sequence to itself and to its cached past."""

    def __init__(self, dim: int, num_heads: int, inner_dim: int | None = None) -> None:
        """inner_dim: channels of all heads together, None for dim."""
        super().__init__()
        inner_dim = inner_dim or dim
        self.num_heads = num_heads
        self.project = nn.Linear(dim, 3 * inner_dim)
        self.out = nn.Linear(inner_dim, dim)

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, rotation: Rotation | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, T, C); keys, values (N, H, W, D) of the past; rotation: None if x already encodes its
        positions; mask (N, 1, T, W + T), None for no mask.

        Returns y (N, T, C), and keys and values with those of x appended, (N, H, W + T, D).
        """
        queries, keys, values = self.extend(x, keys, values, rotation)
        return self.attend(queries, keys, values, mask), keys, values

    def extend(
        self, x: Tensor, keys: Tensor, values: Tensor, rotation: Rotation | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The queries of x (N, H, T, D), and keys and values with those of x appended."""
        q, k, v = (split_heads(part, self.num_heads) for part in self.project(x).chunk(3, dim=-1))
        if rotation is not None:
            q, k = rotation(q), rotation(k)
        return q, torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """The output (N, T, C) for queries (N, H, T, D), of this call or an earlier one."""
        y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return self.out(join_heads(y))


class CrossAttention(nn.Module):
    """Attention to another sequence, given its keys and values."""

    def __init__(self, dim: int, num_heads: int, inner_dim: int | None = None) -> None:
        """inner_dim: channels of all heads together, None for dim."""
        super().__init__()
        inner_dim = inner_dim or dim
        self.num_heads = num_heads
        self.query = nn.Linear(dim, inner_dim)
        self.out = nn.Linear(inner_dim, dim)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """x (B, U, C); keys, values (N, H, T, D); mask (N, 1, U or 1, T). Returns (B, U, C).

        B / N adjacent rows of x attend to each of N sequences; if that is more than one, the mask has 1 row
        for all their tokens. A row that may attend to nothing gets zeros.
        """
        if torch.compiler.is_exporting():  # the other path would transpose and scale all keys
            weights, empty = self._attend(x, keys, mask)
            return self._join(torch.where(empty, 0.0, weights @ values), x)
        q = self._queries(x, keys.shape[0])
        empty = ~mask.any(-1, keepdim=True)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask | empty)
        return self._join(torch.where(empty, 0.0, y), x)

    def listen(
        self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor, heads: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, and also the attention weights of some heads, (B, heads, U, T)."""
        weights, empty = self._attend(x, keys, mask)
        listening = torch.where(empty, 0.0, weights[:, list(heads)])
        y = self._join(torch.where(empty, 0.0, weights @ values), x)
        return y, listening.unflatten(2, (-1, x.shape[1])).transpose(1, 2).flatten(0, 1)

    def weights(self, x: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        """The attention weights of `forward`: (N, H, B / N * U, T)."""
        weights, empty = self._attend(x, keys, mask)
        return torch.where(empty, 0.0, weights)

    def _attend(self, x: Tensor, keys: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Attention weights (N, H, B / N * U, T), and which rows may attend to nothing: these attend to
        everything."""
        q = self._queries(x, keys.shape[0])
        empty = ~mask.any(-1, keepdim=True)
        bias = torch.where(mask | empty, 0.0, -torch.inf)  # smaller than the scores
        return ((q * q.shape[-1] ** -0.5) @ keys.transpose(2, 3) + bias).softmax(-1), empty

    def _queries(self, x: Tensor, n: int) -> Tensor:
        """(B, U, C) -> (N, H, B / N * U, D)."""
        return split_heads(self.query(x).unflatten(0, (n, -1)).flatten(1, 2), self.num_heads)

    def _join(self, y: Tensor, x: Tensor) -> Tensor:
        """The inverse of `_queries`, for queries of x, through the output layer."""
        return self.out(join_heads(y).reshape(*x.shape[:2], self.out.in_features))


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(N, T, C) -> (N, H, T, D)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(N, H, T, D) -> (N, T, C)."""
    return x.transpose(1, 2).flatten(2)
