"""The Conformer encoder of public WeNet checkpoints (Zhang et al., arXiv:2012.05481, arXiv:2106.05642).

It differs from asr/model/conformer.py in its positions, the cache of the convolution module, and its front:

- a score adds the product of the query with the sinusoid of the key's *absolute* position to that of query
  and key, with a separate query bias for each; nothing is shifted (compare arXiv:1901.02860). A stream must
  therefore know its offset;
- the convolution caches its input before the gate, so zeros before an utterance pass through the gate;
- the subsampling convolutions are not padded. An encoder frame needs later feature frames, so calls overlap:
  (c - 1) * subsampling + window feature frames give c encoder frames, the stream advances by
  c * subsampling, and the last `overlap_frames` come again in the next call.

Batch norm and symmetric convolutions are for old checkpoints, the latter for whole utterances only.

N streams · T feature frames · T' encoder frames · F mel bins · C channels · L layers · H heads · D channels
per head · W cached frames · K kernel
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.errors import ConfigError
from asr.model.attention import join_heads, sinusoids, split_heads
from asr.model.layers import initialise
from asr.model.macaron import MacaronLayer
from asr.model.masks import ChunkConfig, context_mask, valid_mask
from asr.model.state import State

CONVOLUTIONS = {
    "conv2d": ((3, 2), (3, 2)),
    "conv2d6": ((3, 2), (5, 3)),
    "conv2d8": ((3, 2), (3, 2), (3, 2)),
}
"""Kernel and stride of the subsampling convolutions, the same in time and frequency."""


@dataclass(kw_only=True, slots=True)
class WenetConformerConfig:
    """Size and training context; the defaults are those of the published U2++ models."""

    type: Literal["wenet-conformer"] = "wenet-conformer"
    """The key in ENCODERS."""

    dim: int = 256
    """C, channels of every layer; must be even."""

    num_layers: int = 12
    """L."""

    num_heads: int = 4
    """H, which must divide dim."""

    ff_dim: int = 2048
    """Hidden channels of both feed-forward modules of a layer."""

    kernel_size: int = 8
    """K of the convolution module; must be odd if `causal` is false."""

    causal: bool = True
    """The convolution sees only the current frame and the past; if false, symmetric and cannot stream."""

    norm: Literal["layer_norm", "batch_norm"] = "layer_norm"
    """Norm within the convolution module."""

    input_layer: Literal["conv2d", "conv2d6", "conv2d8"] = "conv2d"
    """The subsampling: 4, 6 or 8 feature frames per encoder frame."""

    dropout: float = 0.1
    """Dropout after the front and every module of a layer, and within the feed-forward modules."""

    chunk: ChunkConfig = field(default_factory=ChunkConfig)
    """The attention contexts of training."""


@dataclass(frozen=True)
class WenetConformerState(State):
    """What a stream remembers, besides the frames that it passes again."""

    keys: Tensor
    """(N, L, H, W, D), without positions."""

    values: Tensor
    """(N, L, H, W, D)."""

    conv: Tensor
    """(N, L, C, K - 1), before the gate; empty if the convolution is symmetric."""

    offset: Tensor
    """(N,) int64: encoder frames so far."""

    def widen(self, num_frames: int) -> Self:
        """Make room for num_frames more cached frames, before each call if left context is unlimited."""
        pad = (0, 0, num_frames, 0)
        return replace(self, keys=F.pad(self.keys, pad), values=F.pad(self.values, pad))


class Sight(NamedTuple):
    """What all layers of one call share."""

    lens: Tensor
    """(N,) valid encoder frames."""

    valid: Tensor
    """(N, T', 1), True for valid frames."""

    mask: Tensor
    """(N, 1, T', W + T')."""

    positions: Tensor
    """(N, W + T', C), the sinusoids of the keys."""


class ValidSubsampling(nn.Module):
    """(N, T, F) -> (N, T', C): unpadded convolutions, each followed by ReLU."""

    def __init__(self, num_bins: int, dim: int, input_layer: str, inner_dim: int | None = None) -> None:
        """inner_dim: channels of the convolutions, None for dim."""
        super().__init__()
        inner_dim = inner_dim or dim
        self.steps = CONVOLUTIONS[input_layer]
        layers: list[nn.Module] = []
        channels, self.rate, self.window = 1, 1, 1
        for kernel, stride in self.steps:
            layers += [nn.Conv2d(channels, inner_dim, kernel, stride), nn.ReLU()]
            channels = inner_dim
            num_bins = (num_bins - kernel) // stride + 1
            self.window += (kernel - 1) * self.rate
            self.rate *= stride
        if num_bins < 1:
            raise ConfigError(
                f"encoder.input_layer: {input_layer} needs more mel bins than features.num_bins"
            )
        self.convolutions = nn.Sequential(*layers)
        self.out = nn.Linear(inner_dim * num_bins, dim)

    def num_frames(self, x_lens: Tensor) -> Tensor:
        """Feature frames -> encoder frames, element by element."""
        return ((x_lens - self.window) // self.rate + 1).clamp(min=0)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, T, F); gives one encoder frame if T is shorter than a window."""
        x = F.pad(x, (0, 0, 0, max(self.window - x.shape[1], 0)))
        return self.out(self.convolutions(x[:, None]).transpose(1, 2).flatten(2))


class KeyPositionAttention(nn.Module):
    """Self-attention whose scores depend on the absolute position of the key."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.project = nn.Linear(dim, 3 * dim)
        self.position = nn.Linear(dim, dim, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(num_heads, dim // num_heads))
        self.position_bias = nn.Parameter(torch.zeros(num_heads, dim // num_heads))
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, sight: Sight) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, T', C); keys, values (N, H, W, D) of the past.

        Returns y (N, T', C), and keys and values with those of x appended, (N, H, W + T', D).
        """
        q, k, v = (split_heads(part, self.num_heads) for part in self.project(x).chunk(3, dim=-1))
        keys = torch.cat([keys, k], dim=2)
        values = torch.cat([values, v], dim=2)
        p = split_heads(self.position(sight.positions), self.num_heads)
        # (q + u) k + (q + v) p is one product over twice as many channels
        queries = torch.cat([q + self.content_bias[:, None], q + self.position_bias[:, None]], dim=-1)
        y = F.scaled_dot_product_attention(
            queries, torch.cat([keys, p], dim=-1), values, sight.mask, scale=q.shape[-1] ** -0.5
        )
        return self.out(join_heads(y)), keys, values


class InputConvModule(nn.Module):
    """The convolution module that caches its input, causal or symmetric."""

    def __init__(self, config: WenetConformerConfig) -> None:
        super().__init__()
        dim, kernel_size = config.dim, config.kernel_size
        self.sides = 0 if config.causal else kernel_size // 2
        self.norm = nn.LayerNorm(dim)
        self.gated = nn.Linear(dim, 2 * dim)
        self.depthwise = nn.Conv2d(dim, dim, (1, kernel_size), padding=(0, self.sides), groups=dim)
        self.depthwise_norm = nn.BatchNorm1d(dim) if config.norm == "batch_norm" else nn.LayerNorm(dim)
        self.out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, past: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, T', C), past (N, C, K - 1 or 0), valid (N, T', 1).

        Returns (N, T', C), and the module's normed input (N, C, K - 1 + T'), whose end a stream keeps.
        """
        seen = torch.cat([past.transpose(1, 2), self.norm(x)], dim=1)
        x = F.glu(self.gated(seen), dim=-1)
        if self.sides:  # padding is not zero after a gate with a bias, and must not be seen
            x = torch.where(valid, x, 0.0)
        x = self.depthwise(x.transpose(1, 2)[:, :, None])[:, :, 0]
        if isinstance(self.depthwise_norm, nn.BatchNorm1d):
            x = self.depthwise_norm(x).transpose(1, 2)
        else:
            x = self.depthwise_norm(x.transpose(1, 2))
        return self.dropout(self.out(F.silu(x))), seen.transpose(1, 2)


def wenet_layer(config: WenetConformerConfig) -> MacaronLayer:
    attention = KeyPositionAttention(config.dim, config.num_heads)
    return MacaronLayer(config.dim, config.ff_dim, config.dropout, attention, InputConvModule(config))


class WenetConformer(nn.Module):
    """The encoder (encoder.py): one forward for training, decoding and streaming."""

    chunk_unit = 1

    def __init__(self, config: WenetConformerConfig, num_bins: int) -> None:
        super().__init__()
        if config.dim % config.num_heads or config.dim % 2:
            raise ConfigError(
                f"encoder.dim: {config.dim} channels do not divide into {config.num_heads} heads, or are odd"
            )
        if not config.causal and config.kernel_size % 2 == 0:
            raise ConfigError(
                f"encoder.kernel_size: {config.kernel_size} is even, expected odd where causal is false"
            )
        _refuse_look_ahead("encoder.chunk.max_right", config.chunk.max_right)
        self.config = config
        self.can_stream = config.causal
        self.dim = config.dim
        self.head_dim = config.dim // config.num_heads
        self.num_bins = num_bins
        self.front = ValidSubsampling(num_bins, config.dim, config.input_layer)
        self.subsampling = self.front.rate
        self.overlap_frames = self.front.window - self.front.rate
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(wenet_layer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.dim)
        self.front.apply(initialise)

    def init_state(self, n: int, width: int, delay: int = 0) -> WenetConformerState:
        """The state of n new streams that cache `width` encoder frames: left * chunk, or more.

        Raises ConfigError if the convolution is symmetric, and for look-ahead.
        """
        _refuse_look_ahead("delay", delay)
        self._require_causal()
        return self._empty_state(n, width)

    def flush_frames(self, delay: int) -> int:
        """0: a frame is output as soon as all that it sees has arrived."""
        return 0

    def forward(
        self,
        x: Tensor,
        x_lens: Tensor,
        state: WenetConformerState | None = None,
        chunk: int | Tensor = 0,
        left: int | Tensor = -1,
        right: int | Tensor = 0,
    ) -> tuple[Tensor, Tensor, WenetConformerState]:
        """Encode a whole utterance, or the next chunks of one.

        x (N, T, F): padded at the end.  x_lens (N,): valid frames; in any but the last call of a stream, a
        multiple of chunk * subsampling plus `overlap_frames`, which come again at the start of the next call;
        less than a window yields nothing.  state: what the previous call returned; None at the start of an
        utterance.  chunk: encoder frames per attention chunk, 0 for the whole utterance.  left: chunks of
        left context, -1 for all; the state must be wide enough for them. Both may be int64 scalar tensors.
        right: 0.

        Returns y (N, T', C), zero from y_lens (N,) on, and the state for the next call, where T' =
        (T - overlap_frames) // subsampling and at least 1.  Raises ConfigError for a state if the convolution
        is symmetric, and for look-ahead.
        """
        _refuse_look_ahead("right", int(right))
        if state is None:
            state = self._empty_state(x.shape[0], 0)
        else:
            self._require_causal()
        x = torch.where(valid_mask(x_lens, x.shape[1])[..., None], x, 0.0)
        y = self.front(x) * math.sqrt(self.dim)
        sight = self._sight(y, self.front.num_frames(x_lens), state, chunk, left)
        y = self.dropout(y)
        kept = []
        pasts = zip(*(past.unbind(1) for past in (state.keys, state.values, state.conv)), strict=True)
        for layer, past in zip(self.layers, pasts, strict=True):
            y, *present = layer(y, *past, sight)
            kept.append(present)
        keys, values, conv = (torch.stack(tensors, dim=1) for tensors in zip(*kept, strict=True))
        y = torch.where(sight.valid, self.norm(y), 0.0)
        return y, sight.lens, WenetConformerState(keys, values, conv, state.offset + sight.lens)

    def _sight(
        self, y: Tensor, y_lens: Tensor, state: WenetConformerState, chunk: int | Tensor, left: int | Tensor
    ) -> Sight:
        length, width = y.shape[1], state.keys.shape[3]
        mask = context_mask(state.offset, y_lens, width, length, chunk, left)
        keys = state.offset[:, None] + torch.arange(-width, length, device=y.device)
        positions = sinusoids(keys, self.dim).to(y.dtype)
        return Sight(y_lens, valid_mask(y_lens, length)[..., None], mask[:, None], positions)

    def _empty_state(self, n: int, width: int) -> WenetConformerState:
        config = self.config
        zeros = self.norm.weight.new_zeros
        cache = (n, config.num_layers, config.num_heads, width, self.head_dim)
        past = config.kernel_size - 1 if config.causal else 0
        return WenetConformerState(
            keys=zeros(cache),
            values=zeros(cache),
            conv=zeros(n, config.num_layers, config.dim, past),
            offset=zeros(n, dtype=torch.int64),
        )

    def _require_causal(self) -> None:
        if not self.config.causal:
            raise ConfigError(
                "encoder.causal: false, and a symmetric convolution cannot stream; encode whole utterances"
            )


def _refuse_look_ahead(name: str, chunks: int) -> None:
    if chunks:
        raise ConfigError(
            f"{name}: {chunks}, and layers of wenet-conformer cannot look ahead; expected 0, or encoder.type "
            "conformer"
        )
