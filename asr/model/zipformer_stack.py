"""Stacks of Zipformer layers: fewer frames and more channels, and back (arXiv:2310.11230, section 3.1).

N streams · T' frames of the front · C channels
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.model.layers import keep
from asr.model.masks import valid_mask
from asr.model.schedule import Schedule
from asr.model.zipformer_layer import Bypass, LayerSizes, Past, Sight, ZipformerLayer
from asr.model.zipformer_training import Rates


class Downsample(nn.Module):
    """Merges `rate` frames into one, their weighted mean."""

    def __init__(self, rate: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(rate))

    def forward(self, x: Tensor, lens: Tensor) -> Tensor:
        """x (N, T', C), where T' is a multiple of the rate, lens (N,) -> (N, T' / rate, C).

        The last valid frame is repeated to complete the last group.
        """
        last = keep(x, (lens - 1).clamp(min=0), 1, dim=1)
        x = torch.where(valid_mask(lens, x.shape[1])[..., None], x, last)
        rows = x.unflatten(1, (-1, len(self.scores)))
        return (rows * self.scores.softmax(0).to(x.dtype)[:, None]).sum(2)


class Stack(nn.Module):
    """Layers at one rate."""

    def __init__(self, sizes: LayerSizes, rate: int, skips: list[Schedule]) -> None:
        super().__init__()
        self.rate = rate
        self.layers = nn.ModuleList(ZipformerLayer(sizes, skip) for skip in skips)
        self.downsample = Downsample(rate) if rate > 1 else None
        self.bypass = Bypass(sizes.dim) if rate > 1 else None

    def forward(
        self,
        x: Tensor,
        lens: Tensor,
        pasts: list[Past],
        sight: Sight,
        rates: Rates | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, list[Past]]:
        """x (N, T', C) and lens (N,) at the rate of the front; mask (N, 1, C) of channels, in training."""
        y = self.downsample(x, lens) if self.downsample else x
        kept = []
        for layer, past in zip(self.layers, pasts, strict=True):
            y, present = layer(y if mask is None else y * mask, past, sight, rates)
            kept.append(present)
        y = y if mask is None else y * mask
        if self.bypass is None:
            return y, kept
        y = y[:, :, None].expand(-1, -1, self.rate, -1).flatten(1, 2)
        return self.bypass(x, y, rates), kept


def with_channels(x: Tensor, dim: int) -> Tensor:
    """x (..., C) -> (..., dim): cut or zero-padded."""
    return F.pad(x[..., :dim], (0, max(dim - x.shape[-1], 0)))


def latest_channels(outputs: list[Tensor]) -> Tensor:
    """Every channel, taken from the last stack that has it."""
    pieces, dim = [], 0
    for y in reversed(outputs):
        if y.shape[2] > dim:
            pieces.append(y[..., dim:])
            dim = y.shape[2]
    return torch.cat(pieces, dim=-1)
