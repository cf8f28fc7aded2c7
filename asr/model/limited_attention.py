"""Attention to a window around each frame and to the first frames, with memory linear in time.

Beltagy et al., "Longformer", arXiv:2004.05150, in blocks: B queries share the B + left + right keys near any
of them, and a mask hides those too far from a query: T (B + left + right) scores instead of T^2.

The first `num_global` frames see all frames and are seen by all: each query has extra scores for them besides
those of its window, which may contain them again. These scores have no positional term and no bias.

N utterances · T frames · H heads · D channels per head · R = left + 1 + right distances · B queries a block
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from asr.model.masks import valid_mask

LEAST_BLOCK = 16


class Window(NamedTuple):
    """The frames that a frame sees."""

    left: int
    right: int
    num_global: int = 0
    """How many first frames of the utterance see all frames and are seen by all."""

    @property
    def block(self) -> int:
        """B, the larger side: of a symmetric window, only a third of the scores is computed to be masked."""
        return max(self.left, self.right, LEAST_BLOCK)


def attend_near(
    q: Tensor,
    content_bias: Tensor,
    places: Tensor,
    keys: Tensor,
    values: Tensor,
    lens: Tensor,
    window: Window,
) -> Tensor:
    """The attention output (N, H, T, D) for queries q (N, H, T, D).

    content_bias (H, D) of queries; places (N, H, T, R): score terms of the distances `left` to -`right`;
    keys, values (N, H, T, D); lens (N,): valid keys.
    """
    size, length = window.block, q.shape[2]
    blocks = (length + size - 1) // size
    behind = blocks * size - length
    queries = F.pad(q + content_bias[:, None], (0, 0, 0, behind))
    near_keys, near_values = (_near(x, window, behind) for x in (keys, values))
    bias = skew(F.pad(places, (0, 0, 0, behind)).unflatten(2, (blocks, size))).transpose(1, 2)
    bias = bias.masked_fill(~_exists(lens, blocks, window)[:, :, None], -torch.inf)
    if window.num_global:
        first_keys, first_values = (x[:, None, :, : window.num_global] for x in (keys, values))
        near_keys, near_values = (
            torch.cat([near, x.expand(-1, blocks, -1, -1, -1)], dim=3)
            for near, x in ((near_keys, first_keys), (near_values, first_values))
        )
        bias = torch.cat([bias, _without_bias(first_keys, content_bias, lens, bias)], dim=-1)
    y = F.scaled_dot_product_attention(
        queries.unflatten(2, (blocks, size)).transpose(1, 2).flatten(0, 1),
        near_keys.flatten(0, 1),
        near_values.flatten(0, 1),
        bias.flatten(0, 1),
    )
    y = y.unflatten(0, (len(q), blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]
    if window.num_global:
        firsts = _attend_all(q[:, :, : window.num_global], keys, values, lens)
        y = torch.cat([firsts, y[:, :, window.num_global :]], dim=2)
    return y


def skew(x: Tensor) -> Tensor:
    """x (..., B, R) by distance -> (..., B, B - 1 + R) by key: row i shifted by i, padded with -inf.

    Rows padded by B columns, when read as rows one column shorter, each start one element later.
    """
    rows, num_distances = x.shape[-2:]
    x = F.pad(x, (0, rows), value=-torch.inf).flatten(-2)[..., :-rows]
    return x.unflatten(-1, (rows, rows - 1 + num_distances))


def _near(x: Tensor, window: Window, behind: int) -> Tensor:
    """x (N, H, T, D) -> (N, T / B, H, left + B + right, D): what each block sees."""
    padded = F.pad(x, (0, 0, window.left, window.right + behind))
    return padded.unfold(2, window.left + window.block + window.right, window.block).permute(0, 2, 1, 4, 3)


def _exists(lens: Tensor, blocks: int, window: Window) -> Tensor:
    """(N, T / B, B, left + B + right): valid keys, and each frame itself, so that no row is empty."""
    size, span = window.block, window.left + window.block + window.right
    column = torch.arange(span, device=lens.device)
    keys = torch.arange(blocks, device=lens.device)[:, None] * size - window.left + column
    counts = (keys >= 0) & (keys < lens[:, None, None])
    itself = column == torch.arange(size, device=lens.device)[:, None] + window.left
    return counts[:, :, None] | itself


def _without_bias(first_keys: Tensor, content_bias: Tensor, lens: Tensor, bias: Tensor) -> Tensor:
    """The term (N, T / B, H, B, G) that cancels the bias in scores of global keys (N, 1, H, G, D)."""
    of_bias = (first_keys @ content_bias[..., None]).squeeze(-1) * content_bias.shape[-1] ** -0.5
    counts = valid_mask(lens, first_keys.shape[3])[:, None, None]
    terms = torch.where(counts, -of_bias, -torch.inf)
    return terms[:, :, :, None].expand(*bias.shape[:-1], -1)


def _attend_all(q: Tensor, keys: Tensor, values: Tensor, lens: Tensor) -> Tensor:
    """q (N, H, G, D): each global frame sees all valid frames and itself."""
    itself = torch.eye(q.shape[2], keys.shape[2], dtype=torch.bool, device=q.device)
    mask = valid_mask(lens, keys.shape[2])[:, None, None] | itself
    return F.scaled_dot_product_attention(q, keys, values, mask)
