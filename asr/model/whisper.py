"""Whisper's encoder (Radford et al., arXiv:2212.04356): a Transformer over a window of fixed length.

Two convolutions, the second of which halves the frame rate, fixed sinusoids, pre-norm layers, and a final
norm. There is no mask: encoder and decoder attend to the silence that fills the window, too, so all frames of
y are valid.

In published models, key projections have no bias. Here they have one, which changes nothing: it adds the same
value to all scores of a query.

N utterances · T feature frames · T' encoder frames · F mel bins · C channels
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.errors import ConfigError
from asr.model.attention import SelfAttention
from asr.model.decoder import DecoderConfig, Guide
from asr.model.layers import FeedForward, initialise, start_small
from asr.model.masks import ChunkConfig
from asr.model.state import State


@dataclass(kw_only=True, slots=True)
class WhisperConfig:
    """Size; the defaults are those of the published base model."""

    type: Literal["whisper"] = "whisper"
    """The key in ENCODERS."""

    dim: int = 512
    """C; must be even."""

    num_layers: int = 6

    num_heads: int = 8
    """Must divide dim."""

    ff_dim: int = 2048
    """Hidden channels of the feed-forward module of a layer."""

    window: int = 1500
    """T', the encoder frames of a window: half the number of feature frames in features.window_s."""

    dropout: float = 0.0
    """Dropout after the front and every module of a layer, and within the feed-forward modules."""

    chunk: ChunkConfig = field(default_factory=lambda: ChunkConfig(dynamic=False))
    """`dynamic` must be false, as the encoder takes whole windows."""


@dataclass(kw_only=True, slots=True)
class WhisperDecoderConfig(DecoderConfig):
    """A decoder that asr/decode/whisper.py prompts; the defaults are those of the base model."""

    type: Literal["whisper"] = "whisper"

    dim: int = 512

    num_heads: int = 8

    ff_dim: int = 2048

    activation: Literal["silu", "relu", "gelu"] = "gelu"

    positions: Literal["rotary", "sinusoid", "learnt"] = "learnt"

    dropout: float = 0.0

    alignment_heads: list[list[int]] = field(default_factory=list)
    """[layer, head], counted from 0, of the heads that follow the speech and give word times; by default, all
    heads of the second half of the layers."""

    def __post_init__(self) -> None:
        for pair in self.alignment_heads:
            if len(pair) != 2 or not (0 <= pair[0] < self.num_layers and 0 <= pair[1] < self.num_heads):
                raise ConfigError(
                    f"alignment_heads has {pair}; expected [layer, head] of {self.num_layers} layers and "
                    f"{self.num_heads} heads, from 0 on"
                )

    def guide(self) -> Guide:
        heads: dict[int, list[int]] = {}
        for layer, head in self.alignment_heads:
            heads.setdefault(layer, []).append(head)
        if not heads:
            layers = range(self.num_layers // 2, self.num_layers)
            heads = {layer: list(range(self.num_heads)) for layer in layers}
        first, *others = (Guide(layer, tuple(found)) for layer, found in sorted(heads.items()))
        return first._replace(others=tuple(others))


@dataclass(frozen=True)
class WhisperState(State):
    """Empty: windows are independent."""


class WhisperLayer(nn.Module):
    """Self-attention and feed-forward, each pre-norm and residual."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim)
        self.attention = SelfAttention(config.dim, config.num_heads)
        self.dropout = nn.Dropout(config.dropout)
        self.feed_forward = FeedForward(config.dim, config.ff_dim, config.dropout, nn.GELU)
        self.apply(initialise)
        start_small(self.attention.out, self.feed_forward[-2])

    def forward(self, x: Tensor) -> Tensor:
        """x (N, T', C) -> the same shape."""
        past = x.new_zeros(len(x), self.attention.num_heads, 0, x.shape[2] // self.attention.num_heads)
        y, _, _ = self.attention(self.attention_norm(x), past, past, None, None)
        x = x + self.dropout(y)
        return x + self.feed_forward(x)


class WhisperEncoder(nn.Module):
    """The encoder, for whole windows; it cannot stream."""

    subsampling = 2
    overlap_frames = 0
    can_stream = False
    chunk_unit = 1

    positions: Tensor

    def __init__(self, config: WhisperConfig, num_bins: int) -> None:
        super().__init__()
        if config.dim % config.num_heads or config.dim % 2:
            raise ConfigError(
                f"encoder.dim: {config.dim} channels do not divide into {config.num_heads} heads, or are odd"
            )
        if config.chunk.dynamic:
            raise ConfigError(
                "encoder.chunk.dynamic: true, and an encoder of type whisper takes whole windows; "
                "expected false"
            )
        self.config = config
        self.dim = config.dim
        self.num_bins = num_bins
        self.front = nn.ModuleList(
            [
                nn.Conv1d(num_bins, config.dim, 3, padding=1),
                nn.Conv1d(config.dim, config.dim, 3, stride=2, padding=1),
            ]
        )
        self.register_buffer("positions", sinusoid_table(config.window, config.dim), persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(WhisperLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.dim)

    def init_state(self, n: int, width: int, delay: int = 0) -> WhisperState:
        """Raises ConfigError: there are no streams."""
        raise ConfigError(
            "encoder.type: whisper takes whole windows and cannot stream; encode whole utterances, or use an "
            "encoder of another type"
        )

    def flush_frames(self, delay: int) -> int:
        """0: a window is complete."""
        return 0

    def forward(
        self,
        x: Tensor,
        x_lens: Tensor,
        state: WhisperState | None = None,
        chunk: int | Tensor = 0,
        left: int | Tensor = -1,
        right: int | Tensor = 0,
    ) -> tuple[Tensor, Tensor, WhisperState]:
        """Encode a window of each utterance.

        x (N, T, F), T = 2 * window: features of type whisper, which fill the window.  x_lens (N,): ignored,
        as the encoder also sees the silence after an utterance.  chunk: 0.  left, right: ignored.

        Returns y (N, T', C), y_lens (N,), all T', and an empty state.  Raises ConfigError for chunks and for
        any other T.
        """
        if int(chunk):
            raise ConfigError(
                f"chunk: {int(chunk)} frames, and an encoder of type whisper takes whole windows; expected 0"
            )
        window = self.config.window
        if x.shape[1] != self.subsampling * window:
            raise ConfigError(
                f"encoder.window: {window} frames need {self.subsampling * window} feature frames, not "
                f"{x.shape[1]}; set features.type to whisper and features.window_s to the same length"
            )
        y = x.transpose(1, 2)
        for convolution in self.front:
            y = F.gelu(convolution(y))
        y = self.dropout(y.transpose(1, 2) + self.positions)
        for layer in self.layers:
            y = layer(y)
        return self.norm(y), torch.full_like(x_lens, window), WhisperState()


def sinusoid_table(length: int, dim: int) -> Tensor:
    """(length, dim): sines of all wavelengths, 2 pi to 10000 * 2 pi, then their cosines."""
    scale = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2 - 1))
    angle = torch.arange(length, dtype=torch.float64)[:, None] * scale
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()
