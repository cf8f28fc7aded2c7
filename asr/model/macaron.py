"""The Conformer layer of public model families, which differ in attention and convolution.

N streams · T' encoder frames · C channels · H heads · D channels per head · W cached frames · K kernel
"""

from typing import Protocol

from torch import Tensor, nn

from asr.model.layers import FeedForward, initialise, keep, start_small


class Shared(Protocol):
    """What this layer needs of the data that all layers of one call share."""

    @property
    def lens(self) -> Tensor:
        """(N,) valid frames."""

    @property
    def valid(self) -> Tensor:
        """(N, T', 1), True for valid frames."""


class MacaronLayer(nn.Module):
    """Half a feed-forward step, self-attention, convolution, half a feed-forward step, norm."""

    def __init__(
        self,
        dim: int,
        ff_dim: int,
        dropout: float,
        attention: nn.Module,
        convolution: nn.Module,
        bias: bool = True,
    ) -> None:
        """attention, convolution: modules that end with a linear map `out`."""
        super().__init__()
        self.feed_forward_1 = FeedForward(dim, ff_dim, dropout, bias=bias)
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = attention
        self.dropout = nn.Dropout(dropout)
        self.convolution = convolution
        self.feed_forward_2 = FeedForward(dim, ff_dim, dropout, bias=bias)
        self.norm = nn.LayerNorm(dim)
        self.apply(initialise)
        start_small(self.feed_forward_1[-2], attention.get_submodule("out"))
        start_small(convolution.get_submodule("out"), self.feed_forward_2[-2])

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, conv: Tensor, sight: Shared
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (N, T', C); keys, values (N, H, W, D), conv (N, C, K - 1) of this layer. Returns all updated."""
        width, conv_width = keys.shape[2], conv.shape[2]
        x = x + 0.5 * self.feed_forward_1(x)
        y, keys, values = self.attention(self.attention_norm(x), keys, values, sight)
        x = x + self.dropout(y)
        y, conv = self.convolution(x, conv, sight.valid)
        x = x + y
        x = x + 0.5 * self.feed_forward_2(x)
        keys, values = (keep(past, sight.lens, width, dim=2) for past in (keys, values))
        return self.norm(x), keys, values, keep(conv, sight.lens, conv_width, dim=2)
