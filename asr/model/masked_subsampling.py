"""The subsampling of Fast Conformer (arXiv:2305.05084): padded in time, with padding that stays zero.

Three (two) 3 x 3 convolutions with stride 2, all but the first depthwise-separable, each followed by ReLU and
zero-padded at both ends of the utterance: by one frame at either end or, if causal, two before and one after,
and the bins likewise. A convolution with a bias makes frames outside the utterance non-zero, so these are
zeroed before each convolution, by their position in the utterance. Batching therefore changes nothing, and a
window of a stream or of a very long utterance gives the same as the whole.

Encoder frame t sees feature frames 8 t - 7 .. 8 t + 7 or, if causal, 8 t - 14 .. 8 t. The causal form ends
with one or two frames more than there are whole ones: they see what is left of the utterance.

N streams · T' encoder frames · F mel bins · P frames before a window that it needs · C channels
"""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.errors import ConfigError
from asr.model.subsampling import strided_convolutions

PIECE_FRAMES = 512
"""Feature frames of an utterance that pass through the convolutions at once. The output of the first one is
the largest tensor of a model: for an hour of audio it exceeds 31-bit indexing on a GPU; in pieces it stays in
the CPU cache until the next convolution reads it, which makes the subsampling twice as fast."""


Lens = TypeVar("Lens", int, Tensor)


class MaskedSubsampling(nn.Module):
    """(N, P + rate * T', F) -> (N, T', C)."""

    def __init__(self, num_bins: int, channels: int, dim: int, rate: int, causal: bool) -> None:
        super().__init__()
        self.rate = rate
        self.before = 2 if causal else 1
        self.past_frames = self.before * (rate - 1)
        self.convolutions = strided_convolutions(channels, rate, nn.ReLU)
        for _ in range(rate.bit_length() - 1):
            num_bins = (num_bins + self.before) // 2
        if num_bins < 1:
            raise ConfigError("features.num_bins: 0 mel bins; expected at least 1")
        self.out = nn.Linear(channels * num_bins, dim)

    def num_frames(self, x_lens: Tensor) -> Tensor:
        """Feature frames of an utterance -> its encoder frames, element by element."""
        return torch.where(x_lens > 0, self._shrunk(x_lens), 0)

    def forward(self, x: Tensor, start: Tensor, x_lens: Tensor) -> Tensor:
        """x (N, P + rate * T', F) -> (N, T', C), for a window of an utterance.

        start (N,): the first frame of the window, negative if the utterance begins within it.  x_lens (N,):
        frames of the utterance so far, including those before the window.
        """
        y = x[:, None]
        for layer in self.convolutions:
            if isinstance(layer, nn.Conv2d) and layer.stride[0] == 2:
                y = torch.where(_inside(start, x_lens, y.shape[2])[:, None, :, None], y, 0.0)
                y = F.pad(y, (self.before - 1, 0))
                start, x_lens = (start + self.before) // 2, (x_lens + self.before) // 2
            y = layer(y)
        return self.out(y.transpose(1, 2).flatten(2))

    def whole(self, x: Tensor, x_lens: Tensor) -> Tensor:
        """Utterances x (N, T, F), x_lens (N,) -> (N, T', C), long ones in pieces."""
        length = torch.sym_max(self._shrunk(x.shape[1]), 1)
        x = F.pad(x, (0, 0, self.past_frames, length * self.rate - x.shape[1]))
        begin = torch.full_like(x_lens, -self.past_frames)
        if torch.compiler.is_exporting():  # the number of pieces is unknown then
            return self(x, begin, x_lens)
        size, pieces = max(PIECE_FRAMES // self.rate, 1) * self.rate, []
        for start in range(0, length * self.rate, size):
            window = x[:, start : start + size + self.past_frames]
            pieces.append(self(window, begin + start, x_lens))
        return torch.cat(pieces, dim=1)

    def _shrunk(self, lens: Lens) -> Lens:
        for _ in range(self.rate.bit_length() - 1):
            lens = (lens + self.before) // 2
        return lens


def _inside(start: Tensor, lens: Tensor, length: int) -> Tensor:
    """(N, length): which of the positions from start (N,) on lie within frames 0 .. lens - 1."""
    position = start[:, None] + torch.arange(length, device=start.device)
    return (position >= 0) & (position < lens[:, None])
