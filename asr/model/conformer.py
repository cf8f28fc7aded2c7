"""Conformer encoder (Gulati et al., arXiv:2005.08100) that trains at once and streams with any chunk.

Causal convolutions, LayerNorm and rotary positions make a chunk depend on nothing but the past and itself, so
streaming equals the masked whole utterance to rounding errors (tests/model/test_streaming.py).

N streams · T feature frames · T' encoder frames · F mel bins · C channels · L layers · H heads · D channels
per head · W cached frames · P feature frames kept for the subsampling · K kernel
"""

from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from asr.errors import ConfigError
from asr.model.attention import Rotation, SelfAttention
from asr.model.layers import ConvModule, FeedForward, initialise, keep, start_small
from asr.model.masks import ChunkConfig, context_mask, valid_mask
from asr.model.state import State
from asr.model.subsampling import Subsampling


@dataclass(kw_only=True, slots=True)
class ConformerConfig:
    """Size and training context of a Conformer; Fast Conformer is `subsampling: 8` (arXiv:2305.05084)."""

    type: Literal["conformer"] = "conformer"
    """The key in ENCODERS."""

    dim: int = 256
    """C, channels of every layer."""

    num_layers: int = 12
    """L."""

    num_heads: int = 4
    """H, which divides dim into even parts."""

    ff_dim: int = 1024
    """Hidden channels of both feed-forward modules of a layer."""

    kernel_size: int = 15
    """K, encoder frames that the convolution sees: the present one and those before."""

    subsampling: Literal[4, 8] = 4
    """Feature frames per encoder frame."""

    subsampling_channels: int = 64
    """Channels of the subsampling convolutions."""

    dropout: float = 0.1
    """Behind every module of a layer, and within the feed-forward modules."""

    chunk: ChunkConfig = field(default_factory=ChunkConfig)
    """The attention contexts of training."""

    checkpoint_activations: bool = False
    """Keep the inputs of layers only and compute the rest again backwards: less memory, a third more time."""


@dataclass(frozen=True)
class ConformerState(State):
    """What a stream remembers: nothing else of the past matters."""

    frames: Tensor
    """(N, P, F) feature frames."""

    keys: Tensor
    """(N, L, H, W, D), rotated."""

    values: Tensor
    """(N, L, H, W, D)."""

    conv: Tensor
    """(N, L, C, K - 1), behind the gate."""

    offset: Tensor
    """(N,) int64: encoder frames so far."""

    def widen(self, num_frames: int) -> Self:
        """Make room for num_frames more cached frames: before each call, left context without limit."""
        pad = (0, 0, num_frames, 0)
        return replace(self, keys=F.pad(self.keys, pad), values=F.pad(self.values, pad))


class Context(NamedTuple):
    """What all layers of one call share."""

    lens: Tensor
    """(N,) encoder frames that count."""

    mask: Tensor
    """(N, 1, T', W + T')."""

    rotation: Rotation


class ConformerLayer(nn.Module):
    """Half a feed-forward step, self-attention, convolution, half a feed-forward step, norm."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.feed_forward_1 = FeedForward(config.dim, config.ff_dim, config.dropout)
        self.attention_norm = nn.LayerNorm(config.dim)
        self.attention = SelfAttention(config.dim, config.num_heads)
        self.dropout = nn.Dropout(config.dropout)
        self.convolution = ConvModule(config.dim, config.kernel_size, config.dropout)
        self.feed_forward_2 = FeedForward(config.dim, config.ff_dim, config.dropout)
        self.norm = nn.LayerNorm(config.dim)
        self.apply(initialise)
        start_small(self.feed_forward_1[-2], self.attention.out)
        start_small(self.convolution.out, self.feed_forward_2[-2])

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, conv: Tensor, context: Context
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (N, T', C); keys, values (N, H, W, D), conv (N, C, K - 1) of this layer. Returns all anew."""
        width, conv_width = keys.shape[2], conv.shape[2]
        x = x + 0.5 * self.feed_forward_1(x)
        y, keys, values = self.attention(self.attention_norm(x), keys, values, context.rotation, context.mask)
        x = x + self.dropout(y)
        y, conv = self.convolution(x, conv)
        x = x + y
        x = x + 0.5 * self.feed_forward_2(x)
        keys, values = (keep(past, context.lens, width, dim=2) for past in (keys, values))
        return self.norm(x), keys, values, keep(conv, context.lens, conv_width, dim=2)


class Conformer(nn.Module):
    """The encoder: one forward for training, decoding and streaming."""

    overlap_frames = 0
    """Feature frames of a call that the next call of a stream must be given again."""

    def __init__(self, config: ConformerConfig, num_bins: int) -> None:
        super().__init__()
        if config.dim % (2 * config.num_heads):
            raise ConfigError(
                f"encoder.dim: {config.dim} channels do not divide into {config.num_heads} heads of even size"
            )
        self.config = config
        self.dim = config.dim
        self.head_dim = config.dim // config.num_heads
        self.num_bins = num_bins
        self.subsampling = config.subsampling
        self.front = Subsampling(num_bins, config.subsampling_channels, config.dim, config.subsampling)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(ConformerLayer(config) for _ in range(config.num_layers))
        self.front.apply(initialise)

    def init_state(self, n: int, width: int) -> ConformerState:
        """The state of n new streams that cache `width` encoder frames: left * chunk, or more."""
        config = self.config
        zeros = self.front.out.weight.new_zeros
        cache = (n, config.num_layers, config.num_heads, width, self.head_dim)
        return ConformerState(
            frames=zeros(n, self.front.past_frames, self.num_bins),
            keys=zeros(cache),
            values=zeros(cache),
            conv=zeros(n, config.num_layers, config.dim, config.kernel_size - 1),
            offset=zeros(n, dtype=torch.int64),
        )

    def forward(
        self,
        x: Tensor,
        x_lens: Tensor,
        state: ConformerState | None = None,
        chunk: int | Tensor = 0,
        left: int | Tensor = -1,
    ) -> tuple[Tensor, Tensor, ConformerState]:
        """Encode a whole utterance, or the next chunks of one.

        x (N, T, F): at least one frame, padded at the end.  x_lens (N,): frames that count; in a stream that
        goes on, a multiple of chunk * subsampling, 0 included.  state: what the previous call returned; None
        at the start of an utterance.  chunk: encoder frames per attention chunk, 0 for the whole utterance.
        left: chunks of left context, -1 for all; the state must be wide enough for them. Both may be int64
        scalar tensors.

        Returns y (N, ceil(T / subsampling), C), zero behind y_lens (N,), and the state for the next call.
        """
        if state is None:
            state = self.init_state(x.shape[0], 0)
        x = torch.where(valid_mask(x_lens, x.shape[1])[..., None], x, 0.0)
        frames = torch.cat([state.frames, x], dim=1)
        y = self.dropout(self.front(x, state.frames))
        context = self._context(y, (x_lens + self.subsampling - 1) // self.subsampling, state, chunk, left)
        kept = []
        pasts = zip(*(past.unbind(1) for past in (state.keys, state.values, state.conv)), strict=True)
        for layer, past in zip(self.layers, pasts, strict=True):
            y, *present = self._run(layer, y, *past, context)
            kept.append(present)
        keys, values, conv = (torch.stack(tensors, dim=1) for tensors in zip(*kept, strict=True))
        y = torch.where(valid_mask(context.lens, y.shape[1])[..., None], y, 0.0)
        frames = keep(frames, x_lens, self.front.past_frames, dim=1)
        offset = state.offset + context.lens
        return y, context.lens, ConformerState(frames, keys, values, conv, offset)

    def _context(
        self, y: Tensor, y_lens: Tensor, state: ConformerState, chunk: int | Tensor, left: int | Tensor
    ) -> Context:
        length, width = y.shape[1], state.keys.shape[3]
        mask = context_mask(state.offset, y_lens, width, length, chunk, left)
        positions = state.offset[:, None] + torch.arange(length, device=y.device)
        return Context(y_lens, mask[:, None], Rotation.at(positions, self.head_dim))

    def _run(self, layer: nn.Module, *args: Tensor | Context) -> tuple[Tensor, ...]:
        if self.config.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(layer, *args, use_reentrant=False)
        return layer(*args)
