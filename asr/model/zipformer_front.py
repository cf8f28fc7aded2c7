"""The front of a Zipformer: three convolutions from 100 to 50 frames a second, and a ConvNeXt layer.

A frame of the front needs `WINDOW` feature frames from its own on, and the ConvNeXt layer sees three more
frames on either side: the calls of a stream overlap by the frames to the right.

Yao et al., arXiv:2310.11230, section 3.1; ConvNeXt: Liu et al., arXiv:2201.03545.

N streams · T feature frames · T' frames of the front · F mel bins · C channels
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.errors import ConfigError
from asr.model.layers import BiasNorm, keep, may_be_cut, scaled, swoosh_l, swoosh_r
from asr.model.masks import valid_mask
from asr.model.schedule import Schedule
from asr.model.shaping import Balancer, Whitener
from asr.model.zipformer_training import Rates, dropout, kept

RATE = 2
WINDOW = 9
SIDE = 3
"""Frames that the ConvNeXt layer sees on either side."""

OVERLAP = WINDOW - RATE + SIDE * RATE
"""Feature frames to the right of those by which a stream advances."""

CHANNELS = (8, 32, 128)

PIECE = 32
"""Frames computed at once without gradients: activations between the convolutions are a hundred times as
large as the features, and this way they fit the cache."""


class ConvNeXt(nn.Module):
    """A depthwise 7 x 7 convolution, then expansion to three times as many channels and back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        size = 2 * SIDE + 1
        self.depthwise = nn.Conv2d(channels, channels, size, padding=(0, SIDE), groups=channels)
        self.expand = nn.Conv2d(channels, 3 * channels, 1)
        self.contract = nn.Conv2d(3 * channels, channels, 1)
        self.hidden_balancer = Balancer(min_positive=0.3, max_positive=1.0, min_abs=0.75, max_abs=5.0)
        self.balancer = Balancer(min_positive=0.4, max_positive=0.6, min_abs=1.0, max_abs=6.0)
        self.whitener = Whitener(1, 5.0)
        scaled(self.contract, 0.01)

    def forward(self, x: Tensor, rates: Rates | None) -> Tensor:
        """x (N, C, T' + 2 SIDE, F) -> (N, C, T', F)."""
        if not torch.compiler.is_exporting():  # channels last suits the maps and speeds up the gradient
            x = x.contiguous(memory_format=torch.channels_last)
        y = self.depthwise(x).permute(0, 2, 3, 1)
        hidden = self.hidden_balancer(F.linear(y, self.expand.weight.flatten(1), self.expand.bias))
        y = F.linear(swoosh_l(hidden), self.contract.weight.flatten(1), self.contract.bias)
        if rates:
            y = y * kept(y, rates.front)
        y = self.balancer(x[:, :, SIDE:-SIDE].permute(0, 2, 3, 1) + y)
        return self.whitener(y).permute(0, 3, 1, 2)


class ZipformerFront(nn.Module):
    """(N, T, F) -> (N, T', C), where T' = (T - OVERLAP) // RATE."""

    def __init__(self, num_bins: int, dim: int) -> None:
        super().__init__()
        self.num_bins = ((num_bins - 1) // 2 - 1) // 2
        """Bins that reach the linear map."""
        if self.num_bins < 1:
            raise ConfigError(f"features.num_bins: {num_bins}, expected 7 or more for a Zipformer")
        first, second, third = CHANNELS
        self.convolutions = nn.ModuleList(
            [
                nn.Conv2d(1, first, 3, padding=(0, 1)),
                nn.Conv2d(first, second, 3, stride=2),
                nn.Conv2d(second, third, 3, stride=(1, 2)),
            ]
        )
        self.balancers = nn.ModuleList(Balancer(1, max_abs=most) for most in (1.0, 4.0, 4.0))
        self.mix = ConvNeXt(third)
        self.out = nn.Linear(third * self.num_bins, dim)
        self.whitener = Whitener(1, Schedule((0, 4), (20000, 8)), grad_scale=0.02)
        self.norm = BiasNorm(dim)

    def init_frames(self, n: int) -> Tensor:
        """What n new streams remember: (N, CHANNELS[-1], SIDE, F')."""
        return self.out.weight.new_zeros(n, CHANNELS[-1], SIDE, self.num_bins)

    def forward(
        self, x: Tensor, x_lens: Tensor, past: Tensor, rates: Rates | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, T, F), x_lens (N,), past (N, CHANNELS[-1], SIDE, F') -> y, y_lens, and the next past.

        Frames at the end of x whose right context may still arrive are left to the next call.
        """
        y = in_pieces(self._convolve, x[:, None], RATE, WINDOW, dim=2)
        length = y.shape[2] - SIDE
        heard = ((x_lens - WINDOW) // RATE + 1).clamp(min=0)
        y = torch.where(valid_mask(heard, y.shape[2])[:, None, :, None], y, 0.0)
        seen = torch.cat([past.to(y.dtype), y], dim=2)
        y_lens = heard.clamp(max=length)
        y = in_pieces(lambda part: self._project(self.mix(part, rates)), seen, 1, 2 * SIDE + 1, dim=1)
        y = self.norm(self.whitener(y))
        if rates:
            y = dropout(y, rates.dropout)
        return y, y_lens, keep(seen.detach(), y_lens, SIDE, dim=2)

    def _convolve(self, x: Tensor) -> Tensor:
        """x (N, 1, T, F) -> (N, CHANNELS[-1], (T - WINDOW) // RATE + 1, F')."""
        for convolution, balancer in zip(self.convolutions, self.balancers, strict=True):
            x = swoosh_r(balancer(convolution(x)))
        return x

    def _project(self, x: Tensor) -> Tensor:
        """x (N, CHANNELS[-1], T', F') -> (N, T', C)."""
        return self.out(x.transpose(1, 2).flatten(2))


def in_pieces(function: Callable[[Tensor], Tensor], x: Tensor, rate: int, window: int, dim: int) -> Tensor:
    """function(x), computed in pieces along time unless a gradient or a graph is needed. Frame i of the
    output, along `dim`, depends on the `window` frames of x (N, C, T, F) from rate * i on."""
    if not may_be_cut():
        return function(x)
    length = (x.shape[2] - window) // rate + 1
    parts = [
        function(x[:, :, rate * first : rate * (min(first + PIECE, length) - 1) + window])
        for first in range(0, length, PIECE)
    ]
    return torch.cat(parts, dim)
