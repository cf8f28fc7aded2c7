"""Zipformer encoder (Yao et al., arXiv:2310.11230): stacks of layers at several frame rates.

The front gives 50 frames a second. A stack takes every `rate` of them together, goes through its layers,
and repeats what comes out; a learnt share of it replaces what went in. Stacks have as many channels as suits
their rate: channels are cut, or zeros are added. At the end two frames become one, 25 a second.

Public icefall checkpoints are of this form (asr/convert/icefall.py). The non-causal form takes whole
utterances, the causal one streams with any chunk that is a multiple of `chunk_multiple`, and streaming equals
the masked whole utterance to rounding errors: also where the reference's own streaming hears what pads the
end of an utterance. Padding changes nothing here.

N streams · T feature frames · T' frames of the front or of a stack · F mel bins · C channels · H heads · D
channels per head · K kernel · W cached steps: a step is `chunk_multiple` encoder frames, a whole number of
frames in every stack
"""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.errors import ConfigError
from asr.model.layers import keep
from asr.model.masks import ChunkConfig, context_mask, valid_mask
from asr.model.state import State
from asr.model.zipformer_convolution import Edges
from asr.model.zipformer_front import OVERLAP, RATE, SIDE, ZipformerFront
from asr.model.zipformer_layer import Bypass, LayerSizes, Past, Sight, ZipformerLayer, compact_positions
from asr.model.zipformer_training import Rates, feature_masks, layer_skip


def _each(*values: int) -> list[int]:
    return field(default_factory=lambda: list(values))  # type: ignore[return-value]


@dataclass(kw_only=True, slots=True)
class ZipformerConfig:
    """Sizes, one for each stack where there is a list; the defaults are those of the published M."""

    type: Literal["zipformer"] = "zipformer"
    """The key in ENCODERS."""

    dims: list[int] = _each(192, 256, 384, 512, 384, 256)
    """C, channels; the encoder's output has as many as the widest stack."""

    unmasked_dims: list[int] = _each(192, 192, 256, 256, 256, 192)
    """Channels that training never masks."""

    rates: list[int] = _each(1, 2, 4, 8, 4, 2)
    """Frames of the front (50 a second) per frame of the stack."""

    depths: list[int] = _each(2, 2, 3, 4, 3, 2)
    """Layers."""

    num_heads: list[int] = _each(4, 4, 4, 8, 4, 4)
    """H."""

    query_dims: list[int] = _each(32, 32, 32, 32, 32, 32)
    """D of queries and keys."""

    value_dims: list[int] = _each(12, 12, 12, 12, 12, 12)
    """D of values."""

    position_head_dims: list[int] = _each(4, 4, 4, 4, 4, 4)
    """D of the queries for positions."""

    position_dim: int = 48
    """Channels of the table of positions, an even number."""

    ff_dims: list[int] = _each(512, 768, 1024, 1536, 1024, 768)
    """Hidden channels of the second of three feed-forward modules; the first has 3/4, the third 5/4 of it."""

    kernel_sizes: list[int] = _each(31, 31, 15, 15, 15, 31)
    """K, odd."""

    causal: bool = False
    """Whether convolutions see nothing beyond their chunk, so that the encoder can stream."""

    dropout: float = 0.1
    """Of feed-forward modules and the front, once training has seen 20,000 batches; at first three times it."""

    chunk: ChunkConfig = field(default_factory=lambda: ChunkConfig(dynamic=False))
    """The contexts of training."""

    @property
    def dim(self) -> int:
        """Channels of the output."""
        return max(self.dims)

    @property
    def num_layers(self) -> int:
        """Of all stacks."""
        return sum(self.depths)


@dataclass(frozen=True)
class ZipformerState(State):
    """What a stream remembers, besides the frames that it gives again; all layers of all stacks in one."""

    frames: Tensor
    """(N, channels, 3, F'): what the ConvNeXt layer of the front sees to its left."""

    memory: Tensor
    """(N, W, sum over layers): keys and values of `chunk_multiple` encoder frames in each of W rows."""

    convolutions: Tensor
    """(N, sum over layers): what both convolutions of each layer see to their left."""

    offset: Tensor
    """(N,) int64: encoder frames so far."""

    def widen(self, num_frames: int, chunk_multiple: int) -> Self:
        """Make room for num_frames more cached encoder frames."""
        return replace(self, memory=F.pad(self.memory, (0, 0, -(-num_frames // chunk_multiple), 0)))


class Downsample(nn.Module):
    """Several frames become one, their weighted mean."""

    def __init__(self, rate: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(rate))

    def forward(self, x: Tensor, lens: Tensor) -> Tensor:
        """x (N, T', C), where T' is a multiple of the rate, lens (N,) -> (N, T' / rate, C).

        The last frame that counts stands for those that are missing behind it.
        """
        last = x[torch.arange(len(x), device=x.device), (lens - 1).clamp(min=0)]
        x = torch.where(valid_mask(lens, x.shape[1])[..., None], x, last[:, None])
        rows = x.unflatten(1, (-1, len(self.scores)))
        return (rows * self.scores.softmax(0).to(x.dtype)[:, None]).sum(2)


class Stack(nn.Module):
    """Layers at one rate."""

    def __init__(self, sizes: LayerSizes, skips: list, rate: int) -> None:
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
        """x (N, T', C), lens (N,) at the rate of the front; mask (N, 1, C) of channels, in training."""
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


class Zipformer(nn.Module):
    """The encoder: one forward for training, decoding and streaming."""

    subsampling = 2 * RATE
    overlap_frames = OVERLAP
    """Feature frames of a call that the next call of a stream must be given again."""

    batches: Tensor

    def __init__(self, config: ZipformerConfig, num_bins: int) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.dim = config.dim
        self.num_bins = num_bins
        self.step = math.lcm(2, *config.rates)
        """Frames of the front that make a whole number of frames in every stack and in the output."""
        self.chunk_multiple = self.step // 2
        """Encoder frames that divide every chunk."""
        self.front = ZipformerFront(num_bins, config.dims[0])
        self.stacks = nn.ModuleList(_stack(config, i) for i in range(len(config.dims)))
        self.downsample = Downsample(2)
        self.register_buffer("batches", torch.zeros(()), persistent=False)
        layers = [(stack.rate, layer) for stack in self.stacks for layer in stack.layers]
        self._memory_sizes = [sum(layer.memory_dims) * self.step // rate for rate, layer in layers]
        sides = [layer.convolution_1.past_frames for _, layer in layers]
        dims = [len(layer.bypass.scale) for _, layer in layers]
        self._conv_shapes = [(2, dim, side) for dim, side in zip(dims, sides, strict=True)]

    def set_batch_count(self, batches: float) -> None:
        """How much training has seen, in batches of 600 s of audio: what all schedules are functions of."""
        self.batches.fill_(batches)

    def init_state(self, n: int, width: int, delay: int = 0) -> ZipformerState:
        """The state of n new streams that cache `width` encoder frames: left * chunk, or more.

        Raises ConfigError for a delay, and where the encoder is not causal: then a width of 0 is all there
        is, for whole utterances.
        """
        _refuse_look_ahead("delay", delay)
        if width and not self.config.causal:
            raise ConfigError("encoder.causal: false, and such a Zipformer cannot stream; encode whole utterances")
        zeros = self.front.out.weight.new_zeros
        return ZipformerState(
            frames=self.front.init_frames(n),
            memory=zeros(n, -(-width // self.chunk_multiple), sum(self._memory_sizes)),
            convolutions=zeros(n, sum(map(math.prod, self._conv_shapes))),
            offset=zeros(n, dtype=torch.int64),
        )

    def flush_frames(self, delay: int) -> int:
        """Feature frames that the last call of a stream needs behind its own, so that all comes out."""
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

        x (N, T, F): padded at the end.  x_lens (N,): frames that count.  state: what the previous call
        returned; None at the start of an utterance that is given whole.  chunk: encoder frames per attention
        chunk, a multiple of `chunk_multiple`; 0 for the whole utterance.  left: chunks of left context, -1
        for all; the state must be wide enough for them.  Both may be int64 scalar tensors.  right: 0.

        With a state, what comes out is what T frames allow: at most (T - overlap_frames) // subsampling
        encoder frames, which must be a multiple of the chunk while a stream goes on. The next call begins
        subsampling frames later for each of them, so that x_lens, T while frames are to come, are those that
        are left. The end of a stream takes calls until less than 9 frames are left, which are nothing, or one
        with `flush_frames` more frames that do not count.

        Returns y (N, T', C), zero behind y_lens (N,), and the state for the next call. Raises ConfigError
        for look-ahead, other chunks, and chunks of an encoder that is not causal.
        """
        self._check_context(chunk, right)
        if state is None:
            state = self.init_state(x.shape[0], 0)
            x = F.pad(x, (0, 0, 0, self.flush_frames(0)))
        x = F.pad(x, (0, 0, 0, max(OVERLAP + RATE - x.shape[1], 0)))
        x = torch.where(valid_mask(x_lens, x.shape[1])[..., None], x, 0.0)
        rates = Rates.at(self.batches, self.config.dropout) if self.training else None
        y, lens, frames = self.front(x, x_lens, state.frames, rates)
        length = y.shape[1]
        y = F.pad(y, (0, 0, 0, -length % self.step))
        y, pasts = self._stacks(y, lens, state, chunk, left, rates)
        y = self.downsample(y, lens)[:, : (length + 1) // 2]
        y_lens = (lens + 1) // 2
        y = torch.where(valid_mask(y_lens, y.shape[1])[..., None], y, 0.0)
        return y, y_lens, self._remember(state, frames, pasts, lens)

    def _stacks(
        self,
        x: Tensor,
        lens: Tensor,
        state: ZipformerState,
        chunk: int | Tensor,
        left: int | Tensor,
        rates: Rates | None,
    ) -> tuple[Tensor, list[Past]]:
        """Through all stacks: x (N, T', C) of the first -> (N, T', C) of all, and what their layers keep."""
        config = self.config
        sights = {
            rate: self._sight(rate, x.shape[1], lens, state, chunk, left) for rate in sorted(set(config.rates))
        }
        masks: list[Tensor | None] = [None] * len(config.dims)
        if rates:
            masks = [*feature_masks(x[:, :1, :1], config.dims, config.unmasked_dims)]
        pasts, kept, outputs = self._pasts(state), [], []
        for stack, dim, depth, mask in zip(self.stacks, config.dims, config.depths, masks, strict=True):
            x = F.pad(x, (0, dim - x.shape[2]))
            own, pasts = pasts[:depth], pasts[depth:]
            x, present = stack(x, lens, own, sights[stack.rate], rates, mask)
            kept += present
            outputs.append(x)
        return _latest(outputs), kept

    def _sight(
        self,
        rate: int,
        length: int,
        lens: Tensor,
        state: ZipformerState,
        chunk: int | Tensor,
        left: int | Tensor,
    ) -> Sight:
        """What the layers of a rate see; `length` and lens (N,) at the rate of the front."""
        width, length = state.memory.shape[1] * (self.step // rate), length // rate
        lens, offset, size = (lens + rate - 1) // rate, 2 * state.offset // rate, 2 * chunk // rate
        return Sight(
            lens,
            valid_mask(lens, length)[..., None],
            context_mask(offset, lens, width, length, size, left)[:, None],
            compact_positions(1 - width - length, length - 1, self.config.position_dim, lens.device),
            Edges.at(offset, lens, length, size),
        )

    def _pasts(self, state: ZipformerState) -> list[Past]:
        rates = [stack.rate for stack in self.stacks for _ in stack.layers]
        memories = state.memory.split(self._memory_sizes, dim=2)
        sizes = [math.prod(shape) for shape in self._conv_shapes]
        convolutions = state.convolutions.split(sizes, dim=1)
        return [
            Past(memory.unflatten(2, (self.step // rate, -1)).flatten(1, 2), convolution.unflatten(1, shape))
            for rate, memory, convolution, shape in zip(
                rates, memories, convolutions, self._conv_shapes, strict=True
            )
        ]

    def _remember(self, state: ZipformerState, frames: Tensor, pasts: list[Past], lens: Tensor) -> ZipformerState:
        rates = [stack.rate for stack in self.stacks for _ in stack.layers]
        rows = [
            past.memory.unflatten(1, (-1, self.step // rate)).flatten(2)
            for past, rate in zip(pasts, rates, strict=True)
        ]
        new = torch.cat(rows, dim=2).to(state.memory.dtype)
        memory = torch.cat([state.memory, new], dim=1)
        steps = (lens + self.step - 1) // self.step
        return ZipformerState(
            frames,
            keep(memory, steps, state.memory.shape[1], dim=1),
            torch.cat([past.convolutions.flatten(1) for past in pasts], dim=1),
            state.offset + (lens + 1) // 2,
        )

    def _check_context(self, chunk: int | Tensor, right: int | Tensor) -> None:
        if isinstance(right, int):
            _refuse_look_ahead("right", right)
        if not isinstance(chunk, int) or chunk <= 0:
            return
        if not self.config.causal:
            raise ConfigError("encoder.causal: false, and such a Zipformer has no chunks; encode whole utterances")
        if chunk % self.chunk_multiple:
            near = -(-chunk // self.chunk_multiple) * self.chunk_multiple
            raise ConfigError(
                f"chunk: {chunk} encoder frames are not a multiple of {self.chunk_multiple}, as encoder.rates "
                f"need; take {near}"
            )


def _stack(config: ZipformerConfig, i: int) -> Stack:
    sizes = LayerSizes(
        dim=config.dims[i],
        num_heads=config.num_heads[i],
        query_dim=config.query_dims[i],
        value_dim=config.value_dims[i],
        position_head_dim=config.position_head_dims[i],
        position_dim=config.position_dim,
        ff_dim=config.ff_dims[i],
        kernel_size=config.kernel_sizes[i],
        causal=config.causal,
    )
    rate, depth = config.rates[i], config.depths[i]
    skips = [layer_skip(i, len(config.dims), rate, layer, depth) for layer in range(depth)]
    return Stack(sizes, skips, rate)


def _latest(outputs: list[Tensor]) -> Tensor:
    """Every channel from the last of the stacks that has it."""
    pieces, dim = [], 0
    for y in reversed(outputs):
        if y.shape[2] > dim:
            pieces.append(y[..., dim:])
            dim = y.shape[2]
    return torch.cat(pieces, dim=-1)


def _check(config: ZipformerConfig) -> None:
    sizes = {f.name: getattr(config, f.name) for f in fields(config) if isinstance(getattr(config, f.name), list)}
    for name, values in sizes.items():
        if len(values) != len(config.dims) or min(values, default=0) < 1:
            raise ConfigError(
                f"encoder.{name}: {values}, expected a positive number for each of the {len(config.dims)} stacks "
                "of encoder.dims"
            )
    if even := [k for k in config.kernel_sizes if k % 2 == 0]:
        raise ConfigError(f"encoder.kernel_sizes: {even[0]} is even, expected odd numbers")
    if any(u > d for u, d in zip(config.unmasked_dims, config.dims, strict=True)):
        raise ConfigError(f"encoder.unmasked_dims: {config.unmasked_dims}, more than encoder.dims {config.dims}")
    if config.position_dim % 2:
        raise ConfigError(f"encoder.position_dim: {config.position_dim} is odd, expected an even number")
    if config.chunk.dynamic and not config.causal:
        raise ConfigError("encoder.chunk.dynamic: true needs encoder.causal true; set it to false")
    _refuse_look_ahead("encoder.chunk.max_right", config.chunk.max_right)


def _refuse_look_ahead(name: str, value: int) -> None:
    if value:
        raise ConfigError(f"{name}: {value}, and layers of a Zipformer cannot look ahead; expected 0")
