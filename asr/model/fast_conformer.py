"""Fast Conformer, the encoder of public NeMo checkpoints (Rekesh et al., arXiv:2305.05084).

A Conformer with an encoder frame every 80 ms, narrow kernels, and the relative positions of Transformer-XL.
Differences from asr/model/conformer.py:

- the subsampling (masked_subsampling.py) and the positions (relative_attention.py);
- `context` limits attention for long recordings, with memory linear in time (limited_attention.py);
- `causal` makes subsampling and convolutions causal, so that it can stream ("cache-aware", Noroozi et al.,
  arXiv:2312.17279). An encoder frame sees feature frames only up to its own first one, while a stream is fed
  whole encoder frames: the subsampling keeps the rest for the next call, and the last call needs
  `flush_frames` more.

N streams · T feature frames · T' encoder frames · F mel bins · C channels · L layers · H heads · D channels
per head · W cached frames · P feature frames kept for the subsampling · K kernel
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.errors import ConfigError
from asr.model.layers import ConvModule, Norm, initialise, keep
from asr.model.limited_attention import Window
from asr.model.macaron import MacaronLayer
from asr.model.masked_subsampling import MaskedSubsampling
from asr.model.masks import ChunkConfig, context_mask
from asr.model.relative_attention import RelativeAttention, Sight
from asr.model.state import State


@dataclass(kw_only=True, slots=True)
class FastConformerConfig:
    """Size and training context; the defaults are a streaming model with the sizes of the published L."""

    type: Literal["fast-conformer"] = "fast-conformer"
    """The key in ENCODERS."""

    dim: int = 512
    """C, channels of every layer; must be even."""

    num_layers: int = 17
    """L."""

    num_heads: int = 8
    """H, which must divide dim."""

    ff_dim: int = 2048
    """Hidden channels of both feed-forward modules of a layer."""

    kernel_size: int = 9
    """K of the convolution module; must be odd if `causal` is false."""

    subsampling: Literal[4, 8] = 8
    """Feature frames per encoder frame."""

    subsampling_channels: int = 256
    """Channels of the subsampling convolutions."""

    causal: bool = True
    """Subsampling and convolution see only the past; if false, they are symmetric and cannot stream."""

    norm: Norm = "layer_norm"
    """Norm within the convolution module."""

    bias: bool = True
    """Whether the linear maps and convolutions of the layers have a bias."""

    scale_input: bool = True
    """Multiply the input of the first layer by the square root of dim."""

    context: list[int] = field(default_factory=lambda: [-1, -1])
    """Encoder frames that a frame sees before and after itself when whole utterances are encoded, for
    example [128, 128]; [-1, -1] is all."""

    global_tokens: int = 0
    """With a limited `context`, how many first frames see all and are seen by all; not for streams."""

    dropout: float = 0.1
    """Dropout after the front and every module of a layer, and within the feed-forward modules."""

    chunk: ChunkConfig = field(default_factory=ChunkConfig)
    """The attention contexts of training."""

    def __post_init__(self) -> None:
        if len(self.context) != 2 or (self.context != [-1, -1] and min(self.context) < 0):
            raise ConfigError(f"context is {self.context}; expected [left, right] in frames, or [-1, -1]")
        if self.global_tokens and (self.context == [-1, -1] or self.chunk.dynamic):
            raise ConfigError(
                f"global_tokens is {self.global_tokens}; expected 0, or a limited context and "
                "chunk.dynamic: false"
            )


@dataclass(frozen=True)
class FastConformerState(State):
    """What a stream remembers."""

    frames: Tensor
    """(N, P, F) feature frames."""

    keys: Tensor
    """(N, L, H, W, D), without positions."""

    values: Tensor
    """(N, L, H, W, D)."""

    conv: Tensor
    """(N, L, C, K - 1), after the gate; empty if the convolution is symmetric."""

    offset: Tensor
    """(N,) int64: encoder frames so far."""

    def widen(self, num_frames: int) -> Self:
        """Make room for num_frames more cached frames, before each call if left context is unlimited."""
        pad = (0, 0, num_frames, 0)
        return replace(self, keys=F.pad(self.keys, pad), values=F.pad(self.values, pad))


def fast_conformer_layer(config: FastConformerConfig) -> MacaronLayer:
    dim, dropout, bias = config.dim, config.dropout, config.bias
    attention = RelativeAttention(dim, config.num_heads, bias)
    convolution = ConvModule(
        dim, config.kernel_size, dropout, causal=config.causal, norm=config.norm, bias=bias
    )
    return MacaronLayer(dim, config.ff_dim, dropout, attention, convolution, bias)


class FastConformer(nn.Module):
    """The encoder: one forward for training, decoding and streaming."""

    overlap_frames = 0
    chunk_unit = 1

    def __init__(self, config: FastConformerConfig, num_bins: int) -> None:
        super().__init__()
        if config.dim % config.num_heads or config.dim % 2:
            raise ConfigError(
                f"encoder.dim: {config.dim} channels do not divide into {config.num_heads} heads, or are odd"
            )
        if not config.causal and config.kernel_size % 2 == 0:
            raise ConfigError(
                f"encoder.kernel_size: {config.kernel_size} is even, expected odd where causal is false"
            )
        self.config = config
        self.dim = config.dim
        self.head_dim = config.dim // config.num_heads
        self.num_bins = num_bins
        self.subsampling = config.subsampling
        self.can_stream = config.causal and not config.global_tokens
        self.front = MaskedSubsampling(
            num_bins, config.subsampling_channels, config.dim, config.subsampling, config.causal
        )
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(fast_conformer_layer(config) for _ in range(config.num_layers))
        self.front.apply(initialise)

    def init_state(self, n: int, width: int, delay: int = 0) -> FastConformerState:
        """The state of n new streams that cache `width` encoder frames: left * chunk, or more.

        Raises ConfigError if the encoder cannot stream, and for look-ahead beyond the chunk.
        """
        if not self.can_stream:
            why = "global_tokens" if self.config.causal else "causal: false"
            raise ConfigError(f"encoder: a model with {why} cannot stream; encode whole utterances")
        if delay:
            raise ConfigError(
                f"right: {delay} frames of look-ahead, and layers of fast-conformer see only their chunk; "
                "expected 0, and a longer chunk"
            )
        return self._empty_state(n, width)

    def flush_frames(self, delay: int) -> int:
        """Padding frames that the last call of a stream needs after its own, to flush all output."""
        return self.subsampling

    def forward(
        self,
        x: Tensor,
        x_lens: Tensor,
        state: FastConformerState | None = None,
        chunk: int | Tensor = 0,
        left: int | Tensor = -1,
        right: int | Tensor = 0,
    ) -> tuple[Tensor, Tensor, FastConformerState]:
        """Encode a whole utterance, or the next chunks of one.

        x (N, T, F): at least one frame, padded at the end.  x_lens (N,): valid frames; in a stream all T, a
        multiple of chunk * subsampling; in its last call fewer by at least `flush_frames`; 0 for a stream
        without input.  state: what the previous call returned; None at the start of an utterance.
        chunk: encoder frames per attention chunk, 0 for the context that the configuration sets for whole
        utterances.  left: chunks of left context, -1 for all; the state must be wide enough for them.  right:
        chunks of look-ahead, 0 in a stream. The three may be int64 scalar tensors.

        Returns y (N, T', C), zero from y_lens (N,) on, and the state for the next call. Raises ConfigError
        for chunks if there are global tokens.
        """
        if state is None:
            state = self._empty_state(x.shape[0], 0)
            y = self.front.whole(x, x_lens)
            lens = self.front.num_frames(x_lens)
            sight = self._sight_at_once(y, lens, state, chunk, left, right)
        else:
            y, lens = self._advance(x, x_lens, state)
            mask = self._mask(y, lens, state, chunk, left, right)
            sight = Sight.of_mask(lens, mask, self.dim)
        frames = keep(torch.cat([state.frames, x], dim=1), x_lens, state.frames.shape[1], dim=1)
        if self.config.scale_input:
            y = y * math.sqrt(self.dim)
        y = self.dropout(y)
        kept = []
        pasts = zip(*(past.unbind(1) for past in (state.keys, state.values, state.conv)), strict=True)
        for layer, past in zip(self.layers, pasts, strict=True):
            y, *present = layer(y, *past, sight)
            kept.append(present)
        keys, values, conv = (torch.stack(tensors, dim=1) for tensors in zip(*kept, strict=True))
        y = torch.where(sight.valid, y, 0.0)
        return y, lens, FastConformerState(frames, keys, values, conv, state.offset + lens)

    def _advance(self, x: Tensor, x_lens: Tensor, state: FastConformerState) -> tuple[Tensor, Tensor]:
        """The next encoder frames of a stream before the first layer, (N, T', C), and how many are valid."""
        length = (x.shape[1] + self.subsampling - 1) // self.subsampling
        window = torch.cat([state.frames, x], dim=1)
        window = F.pad(window, (0, 0, 0, length * self.subsampling - x.shape[1]))
        done = state.offset * self.subsampling
        y = self.front(window, done - self.front.past_frames, done + x_lens)
        lens = (self.front.num_frames(done + x_lens) - state.offset).clamp(max=length)
        return y, torch.where(x_lens > 0, lens, 0)

    def _sight_at_once(
        self,
        y: Tensor,
        lens: Tensor,
        state: FastConformerState,
        chunk: int | Tensor,
        left: int | Tensor,
        right: int | Tensor,
    ) -> Sight:
        """The sight for whole utterances: a window if the configuration limits the context, else a mask.

        An exported graph always has a mask, as the number of blocks is unknown when it is traced.
        """
        config, is_exporting = self.config, torch.compiler.is_exporting()
        if is_exporting and config.global_tokens:
            raise ConfigError("encoder.global_tokens: a model with them cannot be exported; expected 0")
        if config.context[0] >= 0 and not int(chunk) and not is_exporting:
            window = Window(config.context[0], config.context[1], config.global_tokens)
            return Sight.of_window(lens, y.shape[1], window, self.dim)
        if config.global_tokens:
            raise ConfigError(f"chunk: {int(chunk)}; expected 0, as a model with global_tokens has no chunks")
        return Sight.of_mask(lens, self._mask(y, lens, state, chunk, left, right), self.dim)

    def _mask(
        self,
        y: Tensor,
        lens: Tensor,
        state: FastConformerState,
        chunk: int | Tensor,
        left: int | Tensor,
        right: int | Tensor,
    ) -> Tensor:
        """(N, T', W + T'). A limited context of whole utterances equals chunks of one frame."""
        if self.config.context[0] >= 0:
            at_once = torch.as_tensor(chunk) == 0
            limits = (1, *self.config.context)
            chunk, left, right = (
                torch.where(at_once, limit, torch.as_tensor(given))
                for limit, given in zip(limits, (chunk, left, right), strict=True)
            )
        return context_mask(state.offset, lens, state.keys.shape[3], y.shape[1], chunk, left, right)

    def _empty_state(self, n: int, width: int) -> FastConformerState:
        config = self.config
        zeros = self.front.out.weight.new_zeros
        cache = (n, config.num_layers, config.num_heads, width, self.head_dim)
        past = config.kernel_size - 1 if config.causal else 0
        return FastConformerState(
            frames=zeros(n, self.front.past_frames, self.num_bins),
            keys=zeros(cache),
            values=zeros(cache),
            conv=zeros(n, config.num_layers, config.dim, past),
            offset=zeros(n, dtype=torch.int64),
        )
