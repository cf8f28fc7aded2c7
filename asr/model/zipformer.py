"""Zipformer encoder (Yao et al., arXiv:2310.11230): stacks of layers at several frame rates.

The front gives 50 frames a second. A stack merges each `rate` of them into one, applies its layers, and
repeats the output at the original rate; a learnt share of it replaces the input. Stacks differ in their
number of channels: between them, channels are cut or zeros added. At the end two frames become one, 25 a
second.

Public icefall checkpoints are of this form (asr/convert/icefall.py). The non-causal form takes whole
utterances. The causal one streams with any chunk that is a multiple of `chunk_unit`, and streaming equals the
masked whole utterance up to rounding errors. Padding changes nothing here, whereas in the reference's own
streaming the padding at the end of an utterance has an effect.

N streams · T feature frames · T' frames of the front or of a stack · F mel bins · C channels · H heads · D
channels per head · K kernel · W cached steps: a step is `chunk_unit` encoder frames, a whole number of
frames in every stack
"""

import math
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.errors import ConfigError
from asr.model.masks import ChunkConfig, context_mask, valid_mask
from asr.model.zipformer_convolution import Edges
from asr.model.zipformer_front import OVERLAP, RATE, SIDE, ZipformerFront
from asr.model.zipformer_layer import LayerSizes, Past, Sight, compact_positions
from asr.model.zipformer_stack import Downsample, Stack, latest_channels, with_channels
from asr.model.zipformer_state import Layout, ZipformerState
from asr.model.zipformer_training import Rates, feature_masks, layer_skip


@dataclass(kw_only=True, slots=True)
class ZipformerConfig:
    """Sizes, lists with one entry per stack; the defaults are those of the published M."""

    type: Literal["zipformer"] = "zipformer"
    """The key in ENCODERS."""

    dims: list[int] = field(default_factory=[192, 256, 384, 512, 384, 256].copy)
    """C, channels; the encoder's output has those of the widest stack."""

    unmasked_dims: list[int] = field(default_factory=[192, 192, 256, 256, 256, 192].copy)
    """Channels that training never masks."""

    rates: list[int] = field(default_factory=[1, 2, 4, 8, 4, 2].copy)
    """Frames of the front (50 a second) per frame of the stack."""

    depths: list[int] = field(default_factory=[2, 2, 3, 4, 3, 2].copy)
    """Number of layers."""

    num_heads: list[int] = field(default_factory=[4, 4, 4, 8, 4, 4].copy)
    """H."""

    query_dims: list[int] = field(default_factory=[32, 32, 32, 32, 32, 32].copy)
    """D of queries and keys."""

    value_dims: list[int] = field(default_factory=[12, 12, 12, 12, 12, 12].copy)
    """D of values."""

    position_head_dims: list[int] = field(default_factory=[4, 4, 4, 4, 4, 4].copy)
    """D of the positional queries."""

    position_dim: int = 48
    """Channels of the table of positions; must be even."""

    ff_dims: list[int] = field(default_factory=[512, 768, 1024, 1536, 1024, 768].copy)
    """Hidden channels of the second of three feed-forward modules; the first has 3/4, the third 5/4 of it."""

    kernel_sizes: list[int] = field(default_factory=[31, 31, 15, 15, 15, 31].copy)
    """K; must be odd."""

    causal: bool = False
    """Convolutions see nothing beyond the end of their chunk, so the encoder can stream."""

    dropout: float = 0.1
    """Dropout of the front and the feed-forward modules from batch 20,000 on; starts at three times this."""

    chunk: ChunkConfig = field(default_factory=lambda: ChunkConfig(dynamic=False))
    """The contexts of training."""

    @property
    def dim(self) -> int:
        """Channels of the output."""
        return max(self.dims)

    @property
    def num_layers(self) -> int:
        """The layers of all stacks."""
        return sum(self.depths)


class Zipformer(nn.Module):
    """The encoder: one forward for training, decoding and streaming."""

    subsampling = 2 * RATE
    overlap_frames = OVERLAP
    """Feature frames of a call that come again in the next call of a stream."""

    def __init__(self, config: ZipformerConfig, num_bins: int) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.dim = config.dim
        self.num_bins = num_bins
        self.step = math.lcm(2, *config.rates)
        """Frames of the front that make a whole number of frames in every stack and in the output."""
        self.chunk_unit = self.step // 2
        """Every chunk is a multiple of this many encoder frames."""
        self.can_stream = config.causal
        self.front = ZipformerFront(num_bins, config.dims[0])
        sizes = layer_sizes(config)
        self.stacks = nn.ModuleList(
            Stack(size, rate, [layer_skip(i, len(sizes), rate, layer, depth) for layer in range(depth)])
            for i, (size, rate, depth) in enumerate(zip(sizes, config.rates, config.depths, strict=True))
        )
        self.downsample = Downsample(2)
        self.batch_count = 0.0
        """Batches seen in training, for the schedules (asr/model/schedule.py)."""
        self.layout = Layout(sizes, config.rates, config.depths, self.step)

    def init_state(self, n: int, width: int, delay: int = 0) -> ZipformerState:
        """The state of n new streams that cache `width` encoder frames: left * chunk, or more.

        Raises ConfigError for a delay. An encoder that is not causal takes only a width of 0, for whole
        utterances.
        """
        _refuse_look_ahead("delay", delay)
        if width and not self.config.causal:
            raise ConfigError("encoder.causal: false, so it cannot stream; encode whole utterances")
        zeros = self.front.out.weight.new_zeros
        return ZipformerState(
            frames=self.front.init_frames(n),
            memory=zeros(n, -(-width // self.chunk_unit), self.layout.memory_dim),
            convolutions=zeros(n, self.layout.convolutions_dim),
            offset=zeros(n, dtype=torch.int64),
        )

    def flush_frames(self, delay: int) -> int:
        """Padding frames that the last call of a stream needs after its own, to flush all output."""
        return SIDE * RATE

    def forward(
        self,
        x: Tensor,
        x_lens: Tensor,
        state: ZipformerState | None = None,
        chunk: int | Tensor = 0,
        left: int | Tensor = -1,
        right: int | Tensor = 0,
    ) -> tuple[Tensor, Tensor, ZipformerState]:
        """Encode a whole utterance, or the next chunks of one.

        x (N, T, F): padded at the end.  x_lens (N,): valid frames.  state: what the previous call returned;
        None for a whole utterance.  chunk: encoder frames per attention chunk, a multiple of `chunk_unit`; 0
        for the whole utterance.  left: chunks of left context, -1 for all; the state must be wide enough for
        them.  Both may be int64 scalar tensors.  right: 0.

        In a stream, T is a multiple of chunk * subsampling plus `overlap_frames`, which come again at the
        start of the next call. x_lens is T while a stream goes on, or 0 for one that waits; less is the end
        of the utterance: either calls continue until less than 9 frames are left, which yield nothing, or the
        last call takes all of them, followed by `flush_frames` padding frames.

        Returns y (N, T', C), zero from y_lens (N,) on, and the state for the next call. Raises ConfigError
        for look-ahead, for other chunks, and for any chunks if the encoder is not causal.
        """
        self._check_context(chunk, right)
        if state is None:
            state = self.init_state(x.shape[0], 0)
            x = F.pad(x, (0, 0, 0, self.flush_frames(0)))
        if x.shape[1] < OVERLAP + RATE:
            x = F.pad(x, (0, 0, 0, OVERLAP + RATE - x.shape[1]))
        x = torch.where(valid_mask(x_lens, x.shape[1])[..., None], x, 0.0)
        rates = Rates.at(self.batch_count, self.config.dropout) if self.training else None
        y, lens, frames = self.front(x, x_lens, state.frames, rates)
        length = y.shape[1]
        y = F.pad(y, (0, 0, 0, -length % self.step))
        y, pasts = self._stacks(y, lens, state, chunk, left, rates)
        y = self.downsample(y, lens)[:, : (length + 1) // 2]
        y_lens = (lens + 1) // 2
        y = torch.where(valid_mask(y_lens, y.shape[1])[..., None], y, 0.0)
        steps = (lens + self.step - 1) // self.step
        memory, convolutions = self.layout.pack(state.memory, pasts, steps)
        return y, y_lens, ZipformerState(frames, memory, convolutions, state.offset + y_lens)

    def _stacks(
        self,
        x: Tensor,
        lens: Tensor,
        state: ZipformerState,
        chunk: int | Tensor,
        left: int | Tensor,
        rates: Rates | None,
    ) -> tuple[Tensor, list[list[Past]]]:
        """Apply all stacks: x (N, T', C) for the first -> (N, T', C) of all, and what their layers keep."""
        config = self.config
        sights = {
            rate: self._sight(rate, x.shape[1], lens, state, chunk, left)
            for rate in sorted(set(config.rates))
        }
        masks: list[Tensor | None] = [None] * len(config.dims)
        if rates:
            masks = [*feature_masks(x, config.dims, config.unmasked_dims)]
        pasts, outputs = self.layout.unpack(state.memory, state.convolutions), []
        kept: list[list[Past]] = []
        for i, stack in enumerate(self.stacks):
            x = with_channels(x, config.dims[i])
            x, present = stack(x, lens, pasts[i], sights[config.rates[i]], rates, masks[i])
            outputs.append(x)
            kept.append(present)
        return latest_channels(outputs), kept

    def _sight(
        self,
        rate: int,
        length: int,
        lens: Tensor,
        state: ZipformerState,
        chunk: int | Tensor,
        left: int | Tensor,
    ) -> Sight:
        """What the layers of a rate see; `length` and lens (N,) are at the rate of the front."""
        width, length = state.memory.shape[1] * (self.step // rate), length // rate
        lens, offset, size = (lens + rate - 1) // rate, 2 * state.offset // rate, 2 * chunk // rate
        return Sight(
            lens,
            valid_mask(lens, length)[..., None],
            context_mask(offset, lens, width, length, size, left)[:, None],
            compact_positions(1 - width - length, length, self.config.position_dim, lens.device),
            Edges.at(offset, lens, length, size),
        )

    def _check_context(self, chunk: int | Tensor, right: int | Tensor) -> None:
        if isinstance(right, int):
            _refuse_look_ahead("right", right)
        if not isinstance(chunk, int) or chunk <= 0:
            return
        if not self.config.causal:
            raise ConfigError("encoder.causal: false, so it has no chunks; encode whole utterances")
        if chunk % self.chunk_unit:
            near = -(-chunk // self.chunk_unit) * self.chunk_unit
            raise ConfigError(
                f"chunk: {chunk} encoder frames, not a multiple of {self.chunk_unit} as encoder.rates "
                f"demand; take {near}"
            )


def layer_sizes(config: ZipformerConfig) -> list[LayerSizes]:
    """The sizes of the layers of each stack."""
    columns = zip(
        config.dims,
        config.num_heads,
        config.query_dims,
        config.value_dims,
        config.position_head_dims,
        config.ff_dims,
        config.kernel_sizes,
        strict=True,
    )
    return [LayerSizes._make((*sizes, config.position_dim, config.causal)) for sizes in columns]


def _check(config: ZipformerConfig) -> None:
    sizes = {
        f.name: getattr(config, f.name) for f in fields(config) if isinstance(getattr(config, f.name), list)
    }
    for name, values in sizes.items():
        if len(values) != len(config.dims) or min(values, default=0) < 1:
            raise ConfigError(
                f"encoder.{name}: {values}, expected {len(config.dims)} positive numbers, one for each stack "
                "as in encoder.dims"
            )
    if even := [k for k in config.kernel_sizes if k % 2 == 0]:
        raise ConfigError(f"encoder.kernel_sizes: {even[0]} is even, expected odd numbers")
    if any(u > d for u, d in zip(config.unmasked_dims, config.dims, strict=True)):
        raise ConfigError(f"encoder.unmasked_dims: {config.unmasked_dims}, beyond encoder.dims {config.dims}")
    if config.position_dim % 2:
        raise ConfigError(f"encoder.position_dim: {config.position_dim} is odd, expected an even number")
    if config.chunk.dynamic and not config.causal:
        raise ConfigError("encoder.chunk.dynamic: true needs encoder.causal true; set it to false")
    multiple = math.lcm(2, *config.rates) // 2
    if config.chunk.dynamic and (not config.chunk.chunks or any(x % multiple for x in config.chunk.chunks)):
        raise ConfigError(
            f"encoder.chunk.chunks: {config.chunk.chunks}, expected multiples of {multiple} encoder frames "
            "as encoder.rates demand"
        )
    _refuse_look_ahead("encoder.chunk.max_right", config.chunk.max_right)


def _refuse_look_ahead(name: str, value: int) -> None:
    if value:
        raise ConfigError(f"{name}: {value}, and layers of a Zipformer cannot look ahead; expected 0")
