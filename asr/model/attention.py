"""Self-attention with left context, and cross-attention. Both are one scaled_dot_product_attention.

Positions are rotary (Su et al., "RoFormer", arXiv:2104.09864): queries and keys are rotated by their absolute
position, so that their product depends on the distance alone, and cached keys stay as they are. Models of
other families add sinusoids to their input instead (arXiv:1706.03762).

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
    """Cosine and sine of every position and channel pair, (N or 1, 1, T, D / 2) each."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, head_dim: int) -> "Rotation":
        """positions (N or 1, T) int64; in double precision and modulo a turn: a stream may run for days."""
        angle = _angles(positions, head_dim)[:, None]
        return cls(angle.cos(), angle.sin())

    def __call__(self, x: Tensor) -> Tensor:
        """x (N, H, T, D) -> rotated, in the type of x."""
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * self.cos - b * self.sin, b * self.cos + a * self.sin], dim=-1).to(x.dtype)


def sinusoids(positions: Tensor, dim: int) -> Tensor:
    """positions (N or 1, T) int64 -> (N or 1, T, C): sine and cosine in turn, slower and slower."""
    angle = _angles(positions, dim)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(2)


def _angles(positions: Tensor, dim: int) -> Tensor:
    """(N or 1, T) -> (N or 1, T, dim / 2), modulo a turn."""
    pair = torch.arange(dim // 2, device=positions.device, dtype=torch.float64)
    return (positions[..., None] * BASE ** (-pair * 2 / dim) % (2 * math.pi)).float()


class SelfAttention(nn.Module):
    """Attention of a sequence to itself and to what is cached of its past."""

    def __init__(self, dim: int, num_heads: int, inner_dim: int | None = None) -> None:
        """inner_dim: of all heads together, None for dim."""
        super().__init__()
        inner_dim = inner_dim or dim
        self.num_heads = num_heads
        self.project = nn.Linear(dim, 3 * inner_dim)
        self.out = nn.Linear(inner_dim, dim)

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, rotation: Rotation | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, T, C); keys, values (N, H, W, D) of the past; mask (N, 1, T, W + T), None where all is seen;
        no rotation where x knows its positions.

        Returns y (N, T, C), and keys and values with those of x behind them, (N, H, W + T, D).
        """
        queries, keys, values = self.extend(x, keys, values, rotation)
        return self.attend(queries, keys, values, mask), keys, values

    def extend(
        self, x: Tensor, keys: Tensor, values: Tensor, rotation: Rotation | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The queries of x (N, H, T, D), and keys and values with those of x behind them."""
        q, k, v = (split_heads(part, self.num_heads) for part in self.project(x).chunk(3, dim=-1))
        if rotation is not None:
            q, k = rotation(q), rotation(k)
        return q, torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """What queries (N, H, T, D), of now or earlier, hear: (N, T, C)."""
        y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return self.out(join_heads(y))


class CrossAttention(nn.Module):
    """Attention to another sequence, whose keys and values are given."""

    def __init__(self, dim: int, num_heads: int, inner_dim: int | None = None) -> None:
        """inner_dim: of all heads together, None for dim."""
        super().__init__()
        inner_dim = inner_dim or dim
        self.num_heads = num_heads
        self.query = nn.Linear(dim, inner_dim)
        self.out = nn.Linear(inner_dim, dim)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """x (B, U, C); keys, values (N, H, T, D); mask (N, 1, U or 1, T). Returns (B, U, C).

        Each of N sequences is heard by B / N queries, side by side in x, which for more than one have the
        mask of one token. A row that may attend to nothing hears zeros.
        """
        if torch.compiler.is_exporting():  # as a graph, the other would transpose and scale all keys
            weights, empty = self._attend(x, keys, mask)
            return self._join(torch.where(empty, 0.0, weights @ values), x)
        q = self._queries(x, keys.shape[0])
        empty = ~mask.any(-1, keepdim=True)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask | empty)
        return self._join(torch.where(empty, 0.0, y), x)

    def listen(
        self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor, heads: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, and what some heads weight the values with, (B, heads, U, T)."""
        weights, empty = self._attend(x, keys, mask)
        listening = torch.where(empty, 0.0, weights[:, list(heads)])
        y = self._join(torch.where(empty, 0.0, weights @ values), x)
        return y, listening.unflatten(2, (-1, x.shape[1])).transpose(1, 2).flatten(0, 1)

    def weights(self, x: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        """What `forward` weights the values with: (N, H, B / N * U, T)."""
        weights, empty = self._attend(x, keys, mask)
        return torch.where(empty, 0.0, weights)

    def _attend(self, x: Tensor, keys: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What values are weighted with, (N, H, B / N * U, T), where a row that may attend to nothing attends
        to all; and which rows these are."""
        q = self._queries(x, keys.shape[0])
        empty = ~mask.any(-1, keepdim=True)
        bias = torch.where(mask | empty, 0.0, -torch.inf)  # of fewer numbers than there are scores
        return ((q * q.shape[-1] ** -0.5) @ keys.transpose(2, 3) + bias).softmax(-1), empty

    def _queries(self, x: Tensor, n: int) -> Tensor:
        """(B, U, C) -> (N, H, B / N * U, D)."""
        return split_heads(self.query(x).unflatten(0, (n, -1)).flatten(1, 2), self.num_heads)

    def _join(self, y: Tensor, x: Tensor) -> Tensor:
        """The inverse, for queries of x, through the output layer."""
        return self.out(join_heads(y).reshape(*x.shape[:2], self.out.in_features))


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(N, T, C) -> (N, H, T, D)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(N, H, T, D) -> (N, T, C)."""
    return x.transpose(1, 2).flatten(2)
