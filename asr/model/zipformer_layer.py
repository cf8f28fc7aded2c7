"""A layer of the Zipformer: attention weights are computed once and used three times.

    weights of all heads, from the input of the layer
    feed-forward · non-linear attention with the first head · attention · convolution · feed-forward
    bypass · attention · convolution · feed-forward · norm · bypass

Scores are not divided by the square root of their dimension; the initialisation includes that scale.
Positions are relative, and their table is compact: its resolution falls with distance.

Yao et al., arXiv:2310.11230.

N streams · T frames · W cached frames, so W + T keys · C channels · H heads · D channels per head · K kernel
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from asr.model.attention import join_heads, split_heads
from asr.model.layers import BiasNorm, append, may_be_cut, scaled, swoosh_l
from asr.model.schedule import Schedule
from asr.model.shaping import Balancer, Whitener, happens, limit_param_value, penalize_abs_values_gt
from asr.model.zipformer_convolution import Convolution, Edges
from asr.model.zipformer_training import Rates, dropout, kept, whiteness_limit

QUERIES = 64
"""Rows of attention weights per piece, if they may be computed in pieces."""


class LayerSizes(NamedTuple):
    """The sizes of one layer."""

    dim: int
    num_heads: int
    query_dim: int
    """D of queries and keys, ..."""
    value_dim: int
    """... of values, ..."""
    position_head_dim: int
    """... and of positional queries."""
    ff_dim: int
    kernel_size: int
    position_dim: int
    """Channels of the table of positions."""
    causal: bool

    @property
    def memory_dims(self) -> list[int]:
        """Channels cached per frame: keys, hidden of the non-linear attention, values of both attentions."""
        values = self.num_heads * self.value_dim
        return [self.num_heads * self.query_dim, 3 * self.dim // 4, values, values]

    @property
    def past_frames(self) -> int:
        """Frames that a convolution caches."""
        return self.kernel_size // 2 if self.causal else 0


class Sight(NamedTuple):
    """What all layers of one call at one rate share."""

    lens: Tensor
    """(N,) valid frames."""

    valid: Tensor
    """(N, T, 1), True for valid frames."""

    mask: Tensor
    """(N, 1, T, W + T)."""

    positions: Tensor
    """(W + 2 T, channels of the table): a row per distance, from the earliest key on, and an extra one."""

    edges: Edges


class Past(NamedTuple):
    """What a layer remembers."""

    memory: Tensor
    """(N, W, sum of memory_dims)."""

    convolutions: Tensor
    """(N, 2, C, K // 2), or (N, 2, C, 0) if the convolution is symmetric."""


def compact_positions(first: int, last: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Rows for the distances first to last (key minus query), (last - first + 1, dim).

    A distance t becomes s = sqrt(d) sign(t) log(1 + |t| / sqrt(d)), then an angle atan(2 pi s / d); the
    channels alternate cosine and sine of its multiples, and the last one is 1.
    """
    distance = torch.arange(first, last + 1, device=device).float()[:, None]
    unit = math.sqrt(dim)
    squeezed = unit * distance.sign() * ((distance.abs() + unit).log() - math.log(unit))
    angle = (squeezed * (2 * math.pi / dim)).atan() * torch.arange(1, dim // 2 + 1, device=device)
    table = torch.stack([angle.cos(), angle.sin()], dim=-1).flatten(1)
    return torch.cat([table[:, :-1], torch.ones_like(distance)], dim=1)


class AttentionWeights(nn.Module):
    """Softmax over products of queries and keys, plus scores of distances."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        heads = sizes.num_heads
        self.num_heads = heads
        self.splits = [heads * d for d in (sizes.query_dim, sizes.query_dim, sizes.position_head_dim)]
        self.project = nn.Linear(sizes.dim, sum(self.splits))
        self.position = nn.Linear(sizes.position_dim, self.splits[2], bias=False)
        self.dropout = nn.Dropout(0.15)
        # a bias common to all keys changes nothing, and could drift
        self.key_balancer = Balancer(min_positive=0.4, max_positive=0.6, min_abs=0.0, prob=0.025)
        self.key_whitener = Whitener(heads, whiteness_limit(3.0), grad_scale=0.025)
        scaled(self.project, sizes.query_dim**-0.25)
        scaled(self.position, 0.05)

    def forward(self, x: Tensor, keys: Tensor, sight: Sight, rates: Rates | None) -> tuple[Tensor, Tensor]:
        """x (N, T, C), keys (N, W, H D) of the past -> weights (N, H, T, W + T), new keys (N, T, H D)."""
        q, new, p = self.project(x).split(self.splits, dim=-1)
        new = self.key_whitener(self.key_balancer(new))
        q, k, p = (split_heads(part, self.num_heads) for part in (q, append(keys, new, 1), p))
        table = split_heads(self.position(self.dropout(sight.positions.to(x.dtype)))[None], self.num_heads)
        if not may_be_cut():
            return _listen(q, k, p, table, sight.mask, rates).to(x.dtype), new
        length, parts = q.shape[2], []
        for first in range(0, length, QUERIES):
            rows = slice(first, min(first + QUERIES, length))
            # the distances from these rows to all keys, and an extra one
            distances = table[:, :, length - rows.stop : table.shape[2] - first]
            mask = sight.mask[:, :, rows]
            parts.append(_listen(q[:, :, rows], k, p[:, :, rows], distances, mask, rates).to(x.dtype))
        return torch.cat(parts, 2), new


def _listen(q: Tensor, k: Tensor, p: Tensor, table: Tensor, mask: Tensor, rates: Rates | None) -> Tensor:
    """q (N, H, T, D), k (N, H, W + T, D), p (N, H, T, D'), table (1, H, W + 2 T, D') -> (N, H, T, W + T)."""
    near = _by_key(p @ table.transpose(2, 3))
    if rates and happens(rates.position):
        near = near * 0
    scores = q @ k.transpose(2, 3) + near
    if rates and happens(0.1):
        scores = penalize_abs_values_gt(scores, 25.0, 1e-4)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1)


def _by_key(scores: Tensor) -> Tensor:
    """(N, H, T, W + 2 T) by distance, earliest first -> (N, H, T, W + T) by key.

    Read as rows one element shorter, each row starts one distance earlier than the one before.
    """
    length, num = scores.shape[2:]
    rows = scores.flatten(2)[:, :, length - 1 : length * num - 1].unflatten(2, (length, num - 1))
    return rows[..., : num - length]


class Attention(nn.Module):
    """Values weighted by given attention weights."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        self.num_heads = sizes.num_heads
        self.project = nn.Linear(sizes.dim, sizes.num_heads * sizes.value_dim)
        self.out = nn.Linear(sizes.num_heads * sizes.value_dim, sizes.dim)
        self.whitener = Whitener(1, whiteness_limit(7.5, ratio=3.0))
        scaled(self.out, 0.05)

    def forward(self, x: Tensor, weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, T, C), weights (N, H, T, W + T), values (N, W, H D) -> (N, T, C), new values (N, T, H D)."""
        new = self.project(x)
        heard = weights @ split_heads(append(values, new, 1), self.num_heads)
        return self.whitener(self.out(join_heads(heard))), new


class NonlinearAttention(nn.Module):
    """A convolution module with one attention head in place of the convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = 3 * dim // 4
        self.project = nn.Linear(dim, 3 * hidden)
        self.out = nn.Linear(hidden, dim)
        self.balancer = Balancer(
            min_positive=Schedule((0, 0.25), (20000, 0.05)),
            max_positive=Schedule((0, 0.75), (20000, 0.95)),
            min_abs=0.5,
            max_abs=5.0,
        )
        self.hidden_whitener = Whitener(1, whiteness_limit(5.0))
        self.whitener = Whitener(1, whiteness_limit(5.0, ratio=3.0))
        scaled(self.out, 0.05)

    def forward(self, x: Tensor, weights: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, T, C), weights (N, T, W + T), past (N, W, 3 C / 4) -> (N, T, C), new (N, T, 3 C / 4)."""
        scale, hidden, gate = self.project(x).chunk(3, dim=-1)
        new = self.hidden_whitener(hidden) * self.balancer(scale).tanh()
        return self.whitener(self.out(weights @ append(past, new, 1) * gate)), new


class ZipformerFeedForward(nn.Module):
    """Expansion, activation, projection; no norm."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, hidden_dim)
        self.out = nn.Linear(hidden_dim, dim)
        self.balancer = Balancer(min_positive=0.3, max_positive=1.0, min_abs=0.75, max_abs=5.0)
        self.whitener = Whitener(1, whiteness_limit(7.5))
        scaled(self.out, 0.1)

    def forward(self, x: Tensor, rates: Rates | None) -> Tensor:
        """x (N, T, C)."""
        x = swoosh_l(self.balancer(self.hidden(x)))
        return self.whitener(self.out(dropout(x, rates.dropout) if rates else x))


class Bypass(nn.Module):
    """Interpolates between input and output of a module by a learnt weight per channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), 0.5))

    def forward(self, before: Tensor, x: Tensor, rates: Rates | None, skip: Schedule | None = None) -> Tensor:
        """before, x (N, T, C); skip: the probability of taking `before` alone."""
        scale: Tensor = self.scale
        if rates and happens(0.6):
            scale = limit_param_value(scale, rates.bypass_least, 1.0)
        if rates and skip:
            scale = scale * kept(x, skip(rates.batch_count))
        return before + (x - before) * scale


class ZipformerLayer(nn.Module):
    def __init__(self, sizes: LayerSizes, skip: Schedule) -> None:
        super().__init__()
        dim, ff_dim = sizes.dim, sizes.ff_dim
        self.skip = skip
        self.memory_dims = sizes.memory_dims
        self.weights = AttentionWeights(sizes)
        self.feed_forward_1 = ZipformerFeedForward(dim, ff_dim * 3 // 4)
        self.nonlinear = NonlinearAttention(dim)
        self.attention_1 = Attention(sizes)
        self.convolution_1 = Convolution(dim, sizes.kernel_size, sizes.causal)
        self.feed_forward_2 = ZipformerFeedForward(dim, ff_dim)
        self.bypass_middle = Bypass(dim)
        self.attention_2 = Attention(sizes)
        self.convolution_2 = Convolution(dim, sizes.kernel_size, sizes.causal)
        self.feed_forward_3 = ZipformerFeedForward(dim, ff_dim * 5 // 4)
        self.norm = BiasNorm(dim)
        self.bypass = Bypass(dim)
        self.nonlinear_balancer = _balancer(Schedule((0, 0.004), (4000, 0.02)), 100.0)
        self.balancer_2 = _balancer(Schedule((0, 0), (4000, 0.1)), 2.0)
        self.balancer_3 = _balancer(Schedule((0, 0), (4000, 0.2)), 4.0)
        self.norm_balancer = Balancer(min_positive=0.45, max_positive=0.55, min_abs=0.2, max_abs=4.0)
        self.balancer = Balancer(min_positive=0.45, max_positive=0.55, min_abs=0.1, max_abs=4.0)
        self.whitener = Whitener(1, whiteness_limit(4.0, ratio=3.0))
        # public checkpoints contain and count it; nothing reads it
        self.unused_scale = nn.Parameter(torch.full((dim,), 0.5), requires_grad=False)

    def forward(self, x: Tensor, past: Past, sight: Sight, rates: Rates | None) -> tuple[Tensor, Past]:
        """x (N, T, C) -> y (N, T, C), and a Past with the T new frames of `memory`, and `convolutions`."""
        before = x
        keys, hidden, values_1, values_2 = past.memory.split(self.memory_dims, dim=-1)
        conv_1, conv_2 = past.convolutions.unbind(1)
        weights, keys = self.weights(x, keys, sight, rates)
        share = kept(x, rates.attention) if rates else 1.0

        x = x + self.feed_forward_1(x, rates)
        y, hidden = self.nonlinear(x, self._first_head(weights, sight, rates), hidden)
        x = x + self.nonlinear_balancer(y) * share
        y, values_1 = self.attention_1(x, weights, values_1)
        x = x + y * share
        y, conv_1 = self.convolution_1(x, conv_1, sight.lens, sight.valid, sight.edges)
        x = x + _skipped(y, rates and rates.convolution)
        y = self.balancer_2(self.feed_forward_2(x, rates))
        x = x + _skipped(y, rates and rates.feed_forward)
        x = self.bypass_middle(before, x, rates)

        y, values_2 = self.attention_2(x, weights, values_2)
        x = x + y * share
        y, conv_2 = self.convolution_2(x, conv_2, sight.lens, sight.valid, sight.edges)
        x = x + _skipped(y, rates and rates.convolution)
        y = self.balancer_3(self.feed_forward_3(x, rates))
        x = self.norm_balancer(x + _skipped(y, rates and rates.feed_forward))
        x = self.bypass(before, self.norm(x), rates, self.skip)
        x = self.whitener(self.balancer(x))
        memory = torch.cat([keys, hidden, values_1, values_2], dim=-1).detach()
        return x, Past(memory, torch.stack([conv_1, conv_2], dim=1).detach())

    def _first_head(self, weights: Tensor, sight: Sight, rates: Rates | None) -> Tensor:
        """(N, T, W + T); in training, sometimes uniform weights over all visible frames."""
        if not (rates and happens(rates.constant)):
            return weights[:, 0]
        mean = sight.mask[:, 0].to(weights.dtype)
        return mean / mean.sum(-1, keepdim=True)


def _balancer(min_abs: Schedule, max_abs: float) -> Balancer:
    """For the output of a module; acts rarely, as such problems are rare and grow slowly."""
    return Balancer(min_positive=0.3, max_positive=0.7, min_abs=min_abs, max_abs=max_abs, prob=0.05)


def _skipped(x: Tensor, rate: float | None) -> Tensor:
    return x if rate is None else x * kept(x, rate)
