"""The Conformer encoder of FireRedASR-AED (arXiv:2501.14350), for whole utterances.

Differences from asr/model/conformer.py:

- attention is relative (arXiv:1901.02860): a score adds the product of the query with the projected sinusoid
  of their distance to that of query and key, with a separate query bias for each. Queries, keys and values
  have separate norms and no biases;
- the convolution module is wide: its depthwise convolution has 2 C channels and no bias, and is symmetric, so
  an encoder frame sees the future;
- the subsampling convolutions are not padded: the first encoder frame covers 7 feature frames.

N utterances · T feature frames · T' encoder frames · F mel bins · C channels · H heads · D channels per head
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.errors import ConfigError
from asr.model.attention import join_heads, sinusoids, split_heads
from asr.model.layers import FeedForward, initialise, start_small
from asr.model.masks import ChunkConfig, valid_mask
from asr.model.relative_attention import align_distances
from asr.model.state import State
from asr.model.wenet import ValidSubsampling


@dataclass(kw_only=True, slots=True)
class FireRedConfig:
    """Size; the defaults are those of the published large model."""

    type: Literal["firered"] = "firered"
    """The key in ENCODERS."""

    dim: int = 1280
    """C, channels of every layer; must be even."""

    num_layers: int = 16

    num_heads: int = 20
    """H, which must divide dim."""

    ff_dim: int = 5120
    """Hidden channels of both feed-forward modules of a layer."""

    kernel_size: int = 33
    """Kernel of the depthwise convolution; must be odd."""

    subsampling_channels: int = 32
    """Channels of the subsampling convolutions."""

    dropout: float = 0.1
    """Dropout after the front and every module of a layer, and within the feed-forward modules."""

    chunk: ChunkConfig = field(default_factory=lambda: ChunkConfig(dynamic=False))
    """The contexts of training: `dynamic` must be false, as the encoder takes whole utterances."""


@dataclass(frozen=True)
class FireRedState(State):
    """The state after a whole utterance, which cannot be continued."""

    offset: Tensor
    """(N,) int64: encoder frames of the utterance."""


class DistanceAttention(nn.Module):
    """Self-attention by content and distance, with norms before the query, key and value maps."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_norm, self.key_norm, self.value_norm = (nn.LayerNorm(dim) for _ in range(3))
        self.query, self.key, self.value, self.position, self.out = (
            nn.Linear(dim, dim, bias=False) for _ in range(5)
        )
        self.content_bias = nn.Parameter(torch.zeros(num_heads, dim // num_heads))
        self.position_bias = nn.Parameter(torch.zeros(num_heads, dim // num_heads))

    def forward(self, x: Tensor, distances: Tensor, mask: Tensor) -> Tensor:
        """x (N, T', C); distances (1, 2 T' - 1, C), sinusoids from T' - 1 down; mask (N, 1, 1, T').

        Returns (N, T', C).
        """
        q, k, v, p = (
            split_heads(part, self.num_heads)
            for part in (
                self.query(self.query_norm(x)),
                self.key(self.key_norm(x)),
                self.value(self.value_norm(x)),
                self.position(distances),
            )
        )
        scale = q.shape[-1] ** -0.5
        by_distance = (q + self.position_bias[:, None]) @ (p * scale).transpose(2, 3)
        bias = torch.where(mask, align_distances(by_distance), torch.finfo(by_distance.dtype).min)
        y = F.scaled_dot_product_attention(q + self.content_bias[:, None], k, v, bias)
        return self.out(join_heads(y))


class WideConvModule(nn.Module):
    """The Conformer's convolution module with 2 C channels: symmetric, with LayerNorm, without biases."""

    def __init__(self, dim: int, kernel_size: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.gated = nn.Linear(dim, 4 * dim, bias=False)
        self.depthwise = nn.Conv2d(
            2 * dim, 2 * dim, (1, kernel_size), padding=(0, kernel_size // 2), groups=2 * dim, bias=False
        )
        self.depthwise_norm = nn.LayerNorm(2 * dim)
        self.out = nn.Linear(2 * dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """x (N, T', C), valid (N, T', 1) -> (N, T', C)."""
        x = torch.where(valid, F.glu(self.gated(self.norm(x)), dim=-1), 0.0)
        x = self.depthwise(x.transpose(1, 2)[:, :, None])[:, :, 0].transpose(1, 2)
        return self.dropout(self.out(F.silu(self.depthwise_norm(x))))


class FireRedLayer(nn.Module):
    """Half a feed-forward step, self-attention, convolution, half a feed-forward step, norm."""

    def __init__(self, config: FireRedConfig) -> None:
        super().__init__()
        self.feed_forward_1 = FeedForward(config.dim, config.ff_dim, config.dropout)
        self.attention = DistanceAttention(config.dim, config.num_heads)
        self.dropout = nn.Dropout(config.dropout)
        self.convolution = WideConvModule(config.dim, config.kernel_size, config.dropout)
        self.feed_forward_2 = FeedForward(config.dim, config.ff_dim, config.dropout)
        self.norm = nn.LayerNorm(config.dim)
        self.apply(initialise)
        start_small(self.feed_forward_1[-2], self.attention.out)
        start_small(self.convolution.out, self.feed_forward_2[-2])

    def forward(self, x: Tensor, distances: Tensor, valid: Tensor) -> Tensor:
        """x (N, T', C), distances as in DistanceAttention, valid (N, T', 1) -> (N, T', C)."""
        x = x + 0.5 * self.feed_forward_1(x)
        x = x + self.dropout(self.attention(x, distances, valid.transpose(1, 2)[:, None]))
        x = x + self.convolution(x, valid)
        return self.norm(x + 0.5 * self.feed_forward_2(x))


class FireRedEncoder(nn.Module):
    """The encoder, for whole utterances."""

    can_stream = False
    chunk_unit = 1

    def __init__(self, config: FireRedConfig, num_bins: int) -> None:
        super().__init__()
        if config.dim % config.num_heads or config.dim % 2:
            raise ConfigError(
                f"encoder.dim: {config.dim} channels do not divide into {config.num_heads} heads, or are odd"
            )
        if config.kernel_size % 2 == 0:
            raise ConfigError(f"encoder.kernel_size: {config.kernel_size} is even, expected odd")
        if config.chunk.dynamic:
            raise ConfigError(
                "encoder.chunk.dynamic: true, and an encoder of type firered takes whole utterances; "
                "expected false"
            )
        self.config = config
        self.dim = config.dim
        self.num_bins = num_bins
        self.front = ValidSubsampling(num_bins, config.dim, "conv2d", config.subsampling_channels)
        self.subsampling = self.front.rate
        self.overlap_frames = self.front.window - self.front.rate
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(FireRedLayer(config) for _ in range(config.num_layers))
        self.front.apply(initialise)

    def init_state(self, n: int, width: int, delay: int = 0) -> FireRedState:
        """Raises ConfigError: there are no streams."""
        raise _only_whole("a stream")

    def flush_frames(self, delay: int) -> int:
        """0: whole utterances need no padding."""
        return 0

    def forward(
        self,
        x: Tensor,
        x_lens: Tensor,
        state: FireRedState | None = None,
        chunk: int | Tensor = 0,
        left: int | Tensor = -1,
        right: int | Tensor = 0,
    ) -> tuple[Tensor, Tensor, FireRedState]:
        """Encode whole utterances.

        x (N, T, F): padded at the end.  x_lens (N,): valid frames.  state: None.  chunk: 0.  left, right:
        ignored, as there are no chunks.

        Returns y (N, T', C), zero from y_lens (N,) on, where T' = (T - overlap_frames) // subsampling and at
        least 1, and a state that cannot be continued.  Raises ConfigError for a state and for chunks.
        """
        if state is not None:
            raise _only_whole("a state")
        if int(chunk):
            raise _only_whole(f"a chunk of {int(chunk)} frames")
        x = torch.where(valid_mask(x_lens, x.shape[1])[..., None], x, 0.0)
        y, y_lens = self.front(x), self.front.num_frames(x_lens)
        length = y.shape[1]
        valid = valid_mask(y_lens, length)[..., None]
        distances = torch.arange(length - 1, -length, -1, device=y.device)[None]
        sines = sinusoids(distances, self.dim).to(y.dtype)
        y = self.dropout(y)
        for layer in self.layers:
            y = layer(y, sines, valid)
        return torch.where(valid, y, 0.0), y_lens, FireRedState(y_lens)


def _only_whole(what: str) -> ConfigError:
    return ConfigError(
        f"encoder.type: firered takes whole utterances, not {what}; decode without chunks, or use an encoder "
        "of another type"
    )
