"""The convolution module of the Zipformer, symmetric or causal in chunks.

The causal form has two convolutions: one over the past and the current frame, and one over the chunk, which
sees both sides but not beyond its edges. The latter's output is weighted by the distance to both edges.

Yao et al., arXiv:2310.11230; the chunked convolution: k2-fsa.

N streams · T frames · C channels · K kernel
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.model.layers import keep, scaled, swoosh_r
from asr.model.masks import ENDLESS
from asr.model.schedule import Schedule
from asr.model.shaping import Balancer, Whitener
from asr.model.zipformer_training import whiteness_limit


class Edges(NamedTuple):
    """The positions of the frames of a call in their chunks."""

    chunk: int | Tensor
    """Frames per chunk, 0 for one chunk that ends with the utterance."""

    before: Tensor
    """(1, T): frames of the chunk before each frame, ..."""

    behind: Tensor
    """(N, T): ... and after it, if the chunk is full."""

    @classmethod
    def at(cls, offset: Tensor, lens: Tensor, length: int, chunk: int | Tensor) -> "Edges":
        """lens (N,) of `length` frames, after offset (N,), are valid; the first one starts a chunk.

        A chunk that ends early is treated as full, but an utterance shorter than a chunk is a chunk itself.
        """
        size = torch.as_tensor(chunk, device=lens.device)
        step = torch.arange(length, device=lens.device)
        before = torch.where(size > 0, step % size.clamp(min=1), step)
        is_all = (size == 0) | ((offset == 0) & (lens < size))
        behind = torch.where(is_all[:, None], lens[:, None] - 1 - step, size - 1 - before)
        return cls(chunk, before[None], behind.clamp(min=0))


class ChunkConvolution(nn.Module):
    """A depthwise convolution that is causal across chunks and sees all of its own chunk."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.side = kernel_size // 2
        self.past = nn.Conv2d(dim, dim, (1, self.side + 1), groups=dim)
        self.within = nn.Conv2d(dim, dim, (1, kernel_size), padding=(0, self.side), groups=dim)
        self.edges = nn.Parameter(torch.zeros(2, dim, kernel_size))
        nn.init.uniform_(self.past.bias, -0.1, 0.1)  # type: ignore[arg-type]

    def forward(self, x: Tensor, edges: Edges) -> Tensor:
        """x (N, C, K // 2 + T), past frames first -> (N, C, T)."""
        past = self.past(x[:, :, None])[:, :, 0]
        within = self._within(x[:, :, self.side :], edges.chunk)
        return past + within * self._scale(edges)

    def _within(self, x: Tensor, chunk: int | Tensor) -> Tensor:
        if isinstance(chunk, Tensor):
            return self._within_any(x, chunk)
        length = x.shape[2]
        size = chunk or length
        rows = F.pad(x, (0, -length % size)).unflatten(2, (-1, size))
        return self.within(rows).flatten(2)[:, :, :length]

    def _within_any(self, x: Tensor, chunk: Tensor) -> Tensor:
        """As `_within`, for a graph whose shapes cannot depend on the chunk: masks frames of other chunks."""
        step = torch.arange(x.shape[2], device=x.device)[:, None]
        taps = step + torch.arange(2 * self.side + 1, device=x.device)
        size = torch.where(chunk > 0, chunk, ENDLESS)
        same = (taps - self.side) // size == step // size
        windows = F.pad(x, (self.side, self.side)).index_select(2, taps.flatten()).unflatten(2, taps.shape)
        y = (windows * (self.within.weight[:, 0] * same)).sum(-1)
        return y + self.within.bias[:, None]  # type: ignore[index]

    def _scale(self, edges: Edges) -> Tensor:
        """(N, C, T): 1 far from the edges."""
        far = self.edges.shape[2]
        left, right = F.pad(self.edges, (0, 1)), F.pad(self.edges, (1, 0))
        before = left[0][:, edges.before.clamp(max=far)]
        behind = right[1][:, far - edges.behind.clamp(max=far)]
        return 1 + (before + behind).transpose(0, 1)


class Convolution(nn.Module):
    """Gate, depthwise convolution, activation, projection; no norm."""

    def __init__(self, dim: int, kernel_size: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.gated = nn.Linear(dim, 2 * dim)
        self.depthwise = (
            ChunkConvolution(dim, kernel_size)
            if causal
            else nn.Conv2d(dim, dim, (1, kernel_size), padding=(0, kernel_size // 2), groups=dim)
        )
        self.out = nn.Linear(dim, dim)
        self.gate_balancer = Balancer(
            min_positive=Schedule((0, 0.05), (8000, 0.025)),
            max_positive=1.0,
            min_abs=1.5,
            max_abs=Schedule((0, 5), (8000, 10)),
        )
        self.balancer = Balancer(
            1,
            min_positive=Schedule((0, 0.1), (8000, 0.05)),
            max_positive=1.0,
            min_abs=Schedule((0, 0.2), (20000, 0.5)),
            max_abs=10.0,
        )
        self.whitener = Whitener(1, whiteness_limit(7.5))
        scaled(self.out, 0.05)

    def forward(
        self, x: Tensor, past: Tensor, lens: Tensor, valid: Tensor, edges: Edges
    ) -> tuple[Tensor, Tensor]:
        """x (N, T, C), past (N, C, K // 2 or 0), lens (N,), valid (N, T, 1) -> (N, T, C), the next past."""
        x, gate = self.gated(x).chunk(2, dim=-1)
        x = torch.where(valid, x * self.gate_balancer(gate).sigmoid(), 0.0)
        seen = torch.cat([past.transpose(1, 2).to(x.dtype), x], dim=1).transpose(1, 2)
        y = self.depthwise(seen, edges) if self.causal else self.depthwise(seen[:, :, None])[:, :, 0]
        y = self.whitener(self.balancer(y).transpose(1, 2))
        return self.out(swoosh_r(y)), keep(seen, lens, past.shape[2], dim=2)
