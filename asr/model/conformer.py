"""Conformer encoder (Gulati et al., arXiv:2005.08100), trained on whole utterances, streaming with any chunk.

With causal convolutions, LayerNorm and rotary positions, a chunk depends only on the past, itself, and the
look-ahead of attention. With look-ahead, a stream is a shift register: every layer holds back R frames until
the keys that they see are known, so layer l lags by l * R frames. Streaming therefore equals the masked whole
utterance up to rounding errors (tests/model/test_streaming.py, test_look_ahead.py).

N streams · T feature frames · T' encoder frames · F mel bins · C channels · L layers · H heads · D channels
per head · W cached frames · R frames held back · P feature frames kept for the subsampling · K kernel
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from asr.errors import ConfigError
from asr.model.attention import Rotation, SelfAttention
from asr.model.layers import ConvModule, FeedForward, append, initialise, keep, start_small
from asr.model.masks import ChunkConfig, context_mask, valid_mask
from asr.model.state import State
from asr.model.subsampling import Subsampling


@dataclass(kw_only=True, slots=True)
class ConformerConfig:
    """Size and training context of a Conformer; Fast Conformer has a class of its own."""

    type: Literal["conformer"] = "conformer"
    """The key in ENCODERS."""

    dim: int = 256
    """C, channels of every layer."""

    num_layers: int = 12
    """L."""

    num_heads: int = 4
    """H; dim / H must be even."""

    ff_dim: int = 1024
    """Hidden channels of both feed-forward modules of a layer."""

    kernel_size: int = 15
    """K, the encoder frames that the causal convolution sees: the current one and K - 1 before it."""

    subsampling: Literal[4, 8] = 4
    """Feature frames per encoder frame."""

    subsampling_channels: int = 64
    """Channels of the subsampling convolutions."""

    dropout: float = 0.1
    """Dropout after every module of a layer and within the feed-forward modules."""

    chunk: ChunkConfig = field(default_factory=ChunkConfig)
    """The attention contexts of training."""

    checkpoint_activations: bool = False
    """Store only the inputs of layers and recompute the rest in the backward pass: less memory, a third more
    time."""


@dataclass(frozen=True)
class ConformerState(State):
    """All that a stream remembers of the past."""

    frames: Tensor
    """(N, P, F) feature frames."""

    keys: Tensor
    """(N, L, H, W, D), rotated."""

    values: Tensor
    """(N, L, H, W, D)."""

    pending: Tensor
    """(N, L, R, C): the frames held back, after the first feed-forward module, ..."""

    queries: Tensor
    """... and their queries (N, L, H, R, D), rotated. R is 0, or the full look-ahead of a layer."""

    conv: Tensor
    """(N, L, C, K - 1), after the gate."""

    offset: Tensor
    """(N,) int64: encoder frames so far, at the first layer."""

    def widen(self, num_frames: int) -> Self:
        """Make room for num_frames more cached frames, before each call if left context is unlimited."""
        pad = (0, 0, num_frames, 0)
        return replace(self, keys=F.pad(self.keys, pad), values=F.pad(self.values, pad))


class Sight(NamedTuple):
    """Which frames a layer has in one call, and which of them see each other."""

    lens: Tensor
    """(N,) valid new frames of the call."""

    mask: Tensor
    """(N, 1, T', W + T'): output frames by input frames."""

    exists: Tensor
    """(N, T', 1): False for output frames before the utterance."""

    rotation: Rotation
    """Of the input; shared by all layers, since shifting all frames of a layer keeps their distances."""


class Past(NamedTuple):
    """What a layer remembers: the fields of ConformerState without L."""

    keys: Tensor
    values: Tensor
    pending: Tensor
    queries: Tensor
    conv: Tensor


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

    def forward(self, x: Tensor, past: Past, sight: Sight) -> tuple[Tensor, Past]:
        """x (N, T', C) -> y (N, T', C), delayed by R frames, and what the next call needs."""
        sizes = x.shape[1], past.pending.shape[1]
        x = x + 0.5 * self.feed_forward_1(x)
        normed = self.attention_norm(x)
        queries, keys, values = self.attention.extend(normed, past.keys, past.values, sight.rotation)
        x, pending = append(past.pending, x, 1).split(sizes, 1)
        queries, waiting = append(past.queries, queries, 2).split(sizes, 2)
        x = x + self.dropout(self.attention.attend(queries, keys, values, sight.mask))
        y, conv = self.convolution(x, past.conv, sight.exists)
        x = x + y
        x = x + 0.5 * self.feed_forward_2(x)
        keys, values, conv = (
            keep(seen, sight.lens, before.shape[2], dim=2)
            for seen, before in ((keys, past.keys), (values, past.values), (conv, past.conv))
        )
        return self.norm(x), Past(keys, values, pending, waiting, conv)


class Conformer(nn.Module):
    """The encoder (encoder.py): one forward for training, decoding and streaming."""

    overlap_frames = 0
    can_stream = True
    chunk_unit = 1

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

    def init_state(self, n: int, width: int, delay: int = 0) -> ConformerState:
        """The state of n new streams that cache `width` encoder frames: left * chunk + delay, or more.

        delay: R, right * chunk; or 0 if one call gets the whole utterance.
        """
        config = self.config
        zeros = self.front.out.weight.new_zeros
        heads = (n, config.num_layers, config.num_heads)
        return ConformerState(
            frames=zeros(n, self.front.past_frames, self.num_bins),
            keys=zeros(*heads, width, self.head_dim),
            values=zeros(*heads, width, self.head_dim),
            pending=zeros(n, config.num_layers, delay, config.dim),
            queries=zeros(*heads, delay, self.head_dim),
            conv=zeros(n, config.num_layers, config.dim, config.kernel_size - 1),
            offset=zeros(n, dtype=torch.int64),
        )

    def flush_frames(self, delay: int) -> int:
        """Padding frames that the last call of a stream needs after its own, to flush all output."""
        return self.config.num_layers * delay * self.subsampling

    def forward(
        self,
        x: Tensor,
        x_lens: Tensor,
        state: ConformerState | None = None,
        chunk: int | Tensor = 0,
        left: int | Tensor = -1,
        right: int | Tensor = 0,
    ) -> tuple[Tensor, Tensor, ConformerState]:
        """Encode a whole utterance, or the next chunks of one.

        x (N, T, F): at least one frame, padded at the end.  x_lens (N,): valid frames; in any but the last
        call of a stream, a multiple of chunk * subsampling, 0 included.  state: what the previous call
        returned; None at the start of an utterance.  chunk: encoder frames per attention chunk, 0 for the
        whole utterance.  left: chunks of left context, -1 for all; the state must be wide enough for them.
        right: chunks that every layer looks ahead.  The three may be int64 scalar tensors.

        A stream with look-ahead holds back R = right * chunk frames per layer. Until its last call, x_lens
        must be T; the last call appends at least `flush_frames` padding frames.

        Returns y (N, ceil(T / subsampling), C), zero from y_lens (N,) on, and the state for the next call.
        """
        if state is None:
            state = self.init_state(x.shape[0], 0)
        x = torch.where(valid_mask(x_lens, x.shape[1])[..., None], x, 0.0)
        frames = torch.cat([state.frames, x], dim=1)
        y = self.dropout(self.front(x, state.frames))
        lens = (x_lens + self.subsampling - 1) // self.subsampling
        sights = self._sights(lens, y.shape[1], state, chunk, left, right)
        kept = []
        for layer, past, sight in zip(self.layers, _unstack(state), sights, strict=True):
            y, present = self._run(layer, y, past, sight)
            kept.append(present)
        y, y_lens = self._shift(y, lens, state)
        past = _stack(kept)
        frames = keep(frames, x_lens, self.front.past_frames, dim=1)
        return y, y_lens, ConformerState(frames, *past, state.offset + lens)

    def _sights(
        self,
        lens: Tensor,
        length: int,
        state: ConformerState,
        chunk: int | Tensor,
        left: int | Tensor,
        right: int | Tensor,
    ) -> list[Sight]:
        """What each layer sees; lens (N,) of `length` frames are valid in the first one.

        Each further layer lags by R frames, so it has R more valid ones when a stream ends.
        """
        width, delay, num_layers = state.keys.shape[3], state.pending.shape[2], self.config.num_layers
        step = torch.arange(length, device=lens.device)
        rotation = Rotation.at(state.offset[:, None] + step, self.head_dim)
        # without a delay, all layers share one mask
        late = torch.arange(num_layers if delay else 1, device=lens.device) * delay
        offsets = state.offset[:, None] - late
        ends = (lens[:, None] + late).clamp(max=length)
        mask = context_mask(offsets.flatten(), ends.flatten(), width, length, chunk, left, right, delay)
        masks = mask.unflatten(0, ends.shape).expand(-1, num_layers, -1, -1).split(1, dim=1)
        exists = (offsets[:, None] + step[:, None] >= delay).expand(-1, -1, num_layers).split(1, dim=2)
        return [Sight(lens, *pair, rotation) for pair in zip(masks, exists, strict=True)]

    def _shift(self, y: Tensor, lens: Tensor, state: ConformerState) -> tuple[Tensor, Tensor]:
        """Drop frames before the utterance from y (N, T', C) of the last layer; zero those after its end."""
        length = y.shape[1]
        late = self.config.num_layers * state.pending.shape[2]
        first = (late - state.offset).clamp(0, length)
        y_lens = ((lens + late).clamp(max=length) - first).clamp(min=0)
        y = keep(F.pad(y, (0, 0, 0, length)), first, length, dim=1)
        return torch.where(valid_mask(y_lens, length)[..., None], y, 0.0), y_lens

    def _run(self, layer: nn.Module, x: Tensor, past: Past, sight: Sight) -> tuple[Tensor, Past]:
        if self.config.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(layer, x, past, sight, use_reentrant=False)
        return layer(x, past, sight)


def _unstack(state: ConformerState) -> list[Past]:
    """The past of each layer. In an exported graph, one split is faster than a squeeze per layer, ..."""
    fields = (state.keys, state.values, state.pending, state.queries, state.conv)
    parts = (x.flatten(1, 2).split([x.shape[2]] * x.shape[1], dim=1) for x in fields)
    return [Past(*tensors) for tensors in zip(*parts, strict=True)]


def _stack(pasts: Sequence[Past]) -> Past:
    """... and one reshape is faster than an unsqueeze per layer."""
    fields = zip(*pasts, strict=True)
    return Past(*(torch.cat(x, dim=1).unflatten(1, (len(x), x[0].shape[1])) for x in fields))
