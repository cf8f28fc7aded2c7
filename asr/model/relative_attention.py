"""Self-attention with the relative positions of Transformer-XL (Dai et al., arXiv:1901.02860, section 3.3).

The score of query i and key j is ((q_i + u) k_j + (q_i + v) W s_{i - j}) / sqrt(D): a content term and one
for the sinusoid of their distance, each with its own query bias. Nothing depends on absolute time, so cached
keys never change.

N streams · T query frames · W cached frames · R distances · C channels · H heads · D channels per head
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.model.attention import join_heads, sinusoids, split_heads
from asr.model.limited_attention import Window, attend_near
from asr.model.masks import valid_mask


class Sight(NamedTuple):
    """What all layers of one call share: its frames, and which of them see each other."""

    lens: Tensor
    """(N,) valid frames."""

    valid: Tensor
    """(N, T, 1), True for valid frames."""

    distances: Tensor
    """(1, R, C), the sinusoids of the distances i - j that occur, from the past to the future."""

    seen: Tensor | Window
    """What each frame sees: a mask (N, 1, T, W + T) or a window."""

    @classmethod
    def of_mask(cls, lens: Tensor, mask: Tensor, dim: int) -> "Sight":
        """mask (N, T, W + T): R is W + 2 T - 1."""
        length, width = mask.shape[1], mask.shape[2] - mask.shape[1]
        distances = torch.arange(width + length - 1, -length, -1, device=lens.device)
        return cls(lens, valid_mask(lens, length)[..., None], sinusoids(distances[None], dim), mask[:, None])

    @classmethod
    def of_window(cls, lens: Tensor, length: int, window: Window, dim: int) -> "Sight":
        """R is left + right + 1."""
        distances = torch.arange(window.left, -window.right - 1, -1, device=lens.device)
        valid = valid_mask(lens, length)[..., None]
        return cls(lens, valid, sinusoids(distances[None], dim), window)


class RelativeAttention(nn.Module):
    """Attention of a sequence to itself and to its cached past, by content and distance."""

    def __init__(self, dim: int, num_heads: int, bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.project = nn.Linear(dim, 3 * dim, bias)
        self.position = nn.Linear(dim, dim, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(num_heads, dim // num_heads))
        self.position_bias = nn.Parameter(torch.zeros(num_heads, dim // num_heads))
        self.out = nn.Linear(dim, dim, bias)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, sight: Sight) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, T, C); keys, values (N, H, W, D) of the past, W = 0 for a window.

        Returns y (N, T, C), and keys and values with those of x appended, (N, H, W + T, D).
        """
        q, k, v = (split_heads(part, self.num_heads) for part in self.project(x).chunk(3, dim=-1))
        keys = torch.cat([keys, k], dim=2)
        values = torch.cat([values, v], dim=2)
        # scaling the distances is cheaper than scaling the scores
        distances = split_heads(self.position(sight.distances), self.num_heads) * q.shape[-1] ** -0.5
        places = (q + self.position_bias[:, None]) @ distances.transpose(2, 3)
        if isinstance(sight.seen, Window):
            y = attend_near(q, self.content_bias, places, keys, values, sight.lens, sight.seen)
        else:
            bias = align_distances(places).masked_fill(~sight.seen, -torch.inf)
            y = F.scaled_dot_product_attention(q + self.content_bias[:, None], keys, values, bias)
        return self.out(join_heads(y)), keys, values


def align_distances(x: Tensor) -> Tensor:
    """x (N, H, T, R) by distance, from W + T - 1 down to 1 - T -> (N, H, T, W + T) by key.

    Row i begins T - 1 - i columns into x. With a column prepended, rows of R + 1 elements, when read as rows
    of R, each start one element earlier.
    """
    n, heads, length, num_distances = x.shape
    rows = F.pad(x, (1, 0)).view(n, heads, num_distances + 1, length)[:, :, 1:]
    return rows.reshape(n, heads, length, num_distances)[..., : num_distances - length + 1]
