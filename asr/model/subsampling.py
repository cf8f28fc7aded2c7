"""Convolutional subsampling, causal in time: one encoder frame for every 4 or 8 feature frames.

Two or three 3 x 3 convolutions with stride 2; all but the first are depthwise-separable (arXiv:2305.05084).
Output frame t sees feature frames 4 t - 3 .. 4 t + 3 (8 t - 7 .. 8 t + 7), so a stream keeps 3 (7) frames.

N streams · T feature frames · F mel bins · C channels
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Subsampling(nn.Module):
    """(N, T, F) -> (N, ceil(T / rate), C)."""

    def __init__(self, num_bins: int, channels: int, dim: int, rate: int) -> None:
        super().__init__()
        self.rate = rate
        self.past_frames = rate - 1
        self.convolutions = strided_convolutions(channels, rate, nn.SiLU)
        self.out = nn.Linear(channels * -(-num_bins // rate), dim)

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        """x (N, T, F), past (N, rate - 1, F). Zeros complete the last encoder frame."""
        x = torch.cat([past, F.pad(x, (0, 0, 0, self.rate - 1))], dim=1)
        y = self.convolutions(x[:, None]).permute(0, 2, 3, 1)
        return self.out(y.flatten(2))


def strided_convolutions(channels: int, rate: int, activation: type[nn.Module]) -> nn.Sequential:
    """(N, 1, T, F) -> (N, channels, T / rate, F / rate); padded by one bin at either edge, not in time."""
    layers: list[nn.Module] = [nn.Conv2d(1, channels, 3, stride=2, padding=(0, 1)), activation()]
    for _ in range(rate.bit_length() - 2):
        layers += [
            nn.Conv2d(channels, channels, 3, stride=2, padding=(0, 1), groups=channels),
            nn.Conv2d(channels, channels, 1),
            activation(),
        ]
    # on a CPU the backward of a depthwise convolution is five times faster; absent from torch's stubs
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
