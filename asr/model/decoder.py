"""Label-synchronous decoder: a pre-norm Transformer that attends to the encoder's output (arXiv:1706.03762).

Its options cover the decoders of WeNet (arXiv:2012.05481), icefall, NeMo's Canary (arXiv:2406.19674), Whisper
(arXiv:2212.04356) and FireRedASR-AED (arXiv:2501.14350).

N utterances or hypotheses · B hypotheses of N utterances · U tokens · T encoder frames · V units · C
channels · L layers · H heads · D channels per head
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from asr.decode.scorer import Chunking
from asr.errors import ConfigError
from asr.losses import label_smoothed_cross_entropy
from asr.model.attention import CrossAttention, Rotation, SelfAttention, sinusoids
from asr.model.layers import FeedForward, initialise
from asr.model.masks import window_mask
from asr.model.state import State

SOS_EOS = 1
"""The unit that starts and ends a token sequence; asr/tokens.py gives it this id."""

Pairs = Sequence[tuple[Tensor, Tensor]]
"""The keys and values of every layer."""

ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU, "gelu": nn.GELU}


@dataclass(kw_only=True, slots=True)
class DecoderConfig:
    """Size of the attention decoder."""

    type: Literal["transformer", "segmental", "chunked", "whisper", "none"] = "transformer"
    """The key in DECODERS: attention to all frames, to segments or to chunks; "none" is no decoder."""

    dim: int = 256
    """C; may differ from that of the encoder."""

    num_layers: int = 6
    """L."""

    num_heads: int = 4
    """H, which must divide dim; with rotary positions dim / H must be even."""

    attention_dim: int = 0
    """Channels of all heads together; 0: the same as dim."""

    ff_dim: int = 1024
    """Hidden channels of the feed-forward module of a layer."""

    activation: Literal["silu", "relu", "gelu"] = "silu"
    """Activation of the feed-forward module."""

    positions: Literal["rotary", "sinusoid", "learnt"] = "rotary"
    """Rotate queries and keys, or add sinusoids (arXiv:1706.03762) or a learnt table to the embedding."""

    num_positions: int = 448
    """Size of the table of learnt positions: the most tokens of a text, sos/eos included."""

    embedding_norm: bool = False
    """Normalise the embedding."""

    final_norm: bool = True
    """Normalise the output of the last layer."""

    dropout: float = 0.1
    """Dropout after the embedding and every module of a layer, and within the feed-forward modules."""

    left_tokens: int = -1
    """Past tokens that a token attends to in each layer; -1: all. As rotary positions are relative, a limit
    can also be set after training; it keeps long output within the text lengths seen in training."""

    prompt: list[str] = field(default_factory=list)
    """Units that follow sos/eos before every text and are no part of it: they select the language or task of
    a multilingual or multitask model. Searches and bundles use it; training does not add it."""

    reverse_layers: int = 0
    """L of a second, right-to-left decoder for rescoring (U2++); 0: none."""

    def guide(self) -> "Guide":
        """The default guide: all heads of the last layer."""
        return Guide(self.num_layers - 1, tuple(range(self.num_heads)))


class Guide(NamedTuple):
    """The heads whose attention tells where in the audio the decoder is, for streaming policies and word
    times."""

    layer: int
    heads: tuple[int, ...]
    others: tuple["Guide", ...] = ()
    """The heads of other layers, if any."""

    def of(self, layer: int) -> list[int]:
        return [head for part in (self, *self.others) if part.layer == layer for head in part.heads]


class Window(NamedTuple):
    """The encoder frames each token may attend to, from start up to, not including, end; (N, U) int64."""

    start: Tensor
    end: Tensor


class Order(NamedTuple):
    """The position of each of U tokens and the tokens that it sees, if these are not all up to itself."""

    positions: Tensor
    """(N, U) int64."""

    visible: Tensor
    """(N, U, W + U), the W tokens of the state first; each token sees itself."""


class Decoded(NamedTuple):
    """The decoder's output after each of U tokens."""

    logits: Tensor
    """(N, U, V), of the next token."""

    attention: Tensor
    """(N, U, T), the mean attention of the guide's heads; (N, U, 0) without a guide."""

    state: "DecoderState"


@dataclass(frozen=True)
class DecoderState(State):
    """Keys and values of the tokens so far, U in every hypothesis of a batch."""

    keys: Tensor
    """(N, L, H, U, D), rotated if positions are rotary."""

    values: Tensor
    """(N, L, H, U, D)."""


class DecoderLayer(nn.Module):
    """Causal self-attention, cross-attention, feed-forward, each pre-norm and residual."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim)
        self.attention = SelfAttention(config.dim, config.num_heads, config.attention_dim)
        self.cross_norm = nn.LayerNorm(config.dim)
        self.cross = CrossAttention(config.dim, config.num_heads, config.attention_dim)
        activation = ACTIVATIONS[config.activation]
        self.feed_forward = FeedForward(config.dim, config.ff_dim, config.dropout, activation)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        past: tuple[Tensor, Tensor],
        memory: tuple[Tensor, Tensor],
        visible: Tensor,
        heard: Tensor,
        rotation: Rotation | None,
        heads: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """x (B, U, C); past, memory: keys, values; visible, heard: masks.

        Returns the new x, keys and values, and the attention (B, heads, U, T) of `heads`, if there are any.
        """
        y, keys, values = self.attention(self.attention_norm(x), *past, rotation, visible)
        x = x + self.dropout(y)
        query = self.cross_norm(x)
        listening = []
        if heads:
            y, weights = self.cross.listen(query, *memory, heard, heads)
            listening = [weights]
        else:
            y = self.cross(query, *memory, heard)
        x = x + self.dropout(y)
        return x + self.feed_forward(x), keys, values, listening


class TransformerDecoder(nn.Module):
    """p(next token | tokens so far, encoder output): one forward for training, rescoring and decoding."""

    chunking: Chunking | None = None
    """The chunks of a chunked decoder."""

    def __init__(self, config: DecoderConfig, num_tokens: int, memory_dim: int) -> None:
        super().__init__()
        self.head_dim = _head_dim(config)
        self.config = config
        self.guide = config.guide()
        self.embedding = nn.Embedding(num_tokens, config.dim)
        has_table = config.positions == "learnt"
        if has_table and config.num_positions < 1:
            raise ConfigError(f"decoder.num_positions: {config.num_positions}, expected at least 1")
        self.positions = nn.Embedding(config.num_positions, config.dim) if has_table else None
        # equals an eps of 1e-5 before the embedding is scaled by sqrt(dim), as in other model families
        eps = 1e-5 * config.dim
        self.embedding_norm = nn.LayerNorm(config.dim, eps) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.cross = nn.Linear(memory_dim, 2 * config.num_layers * config.num_heads * self.head_dim)
        self.norm = nn.LayerNorm(config.dim) if config.final_norm else nn.Identity()
        self.out = nn.Linear(config.dim, num_tokens)
        self.apply(initialise)
        nn.init.normal_(self.embedding.weight, std=config.dim**-0.5)
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=config.dim**-0.5)

    @property
    def max_tokens(self) -> int:
        """The most tokens that a text may have, sos/eos included; 0: no limit."""
        return self.config.num_positions if self.config.positions == "learnt" else 0

    def memory(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder output y (N, T, C) -> cross_keys, cross_values (N, L, H, T, D), once per utterance."""
        parts = self.cross(y).unflatten(-1, (2, self.config.num_layers, self.config.num_heads, -1))
        keys, values = parts.permute(2, 0, 3, 4, 1, 5)
        return keys, values

    def init_state(self, n: int) -> DecoderState:
        """The state of n empty hypotheses."""
        config = self.config
        empty = self.embedding.weight.new_zeros(n, config.num_layers, config.num_heads, 0, self.head_dim)
        return DecoderState(empty, empty)

    def forward(
        self,
        tokens: Tensor,
        cross_keys: Tensor,
        cross_values: Tensor,
        y_lens: Tensor,
        state: DecoderState | None = None,
        window: Window | None = None,
        guide: Guide | None = None,
        order: Order | None = None,
    ) -> Decoded:
        """Extend N hypotheses by U tokens each.

        tokens (N, U), sos/eos first; cross_keys, cross_values from `memory`, one row per hypothesis; y_lens
        (N,): valid encoder frames; with 0 the decoder is a language model.  state: what the previous call
        returned, None before the first token.  window: the frames that each token attends to, None for all.
        guide: the heads whose attention is returned.  order: None if each token follows the one before it and
        sees all of them.  Raises ConfigError if a text is longer than the table of positions.
        """
        if state is None:
            state = self.init_state(tokens.shape[0])
        past, memory = _layers(state.keys, state.values), _layers(cross_keys, cross_values)
        logits, attention, present = self.extend(tokens, memory, y_lens, past, window, guide, order)
        keys, values = (torch.stack(tensors, dim=1) for tensors in zip(*present, strict=True))
        return Decoded(logits, attention, DecoderState(keys, values))

    def extend(
        self,
        tokens: Tensor,
        memory: Pairs,
        y_lens: Tensor,
        past: Pairs,
        window: Window | None = None,
        guide: Guide | None = None,
        order: Order | None = None,
    ) -> tuple[Tensor, Tensor, Pairs]:
        """As `forward`, with keys and values per layer, which avoids copies.

        tokens (B, U): B / N adjacent hypotheses of each utterance; memory (N, H, T, D) and y_lens (N,);
        past (B, H, W, D).

        Returns logits (B, U, V), attention (B, U, T), and the past of the next call.
        """
        x, listening, present = self._through(tokens, memory, y_lens, past, window, guide, order)
        attention = torch.cat(listening, 1).mean(1) if listening else x.new_zeros(*x.shape[:2], 0)
        return self.out(self.norm(x)), attention, present

    def listen(self, tokens: Tensor, cross_keys: Tensor, cross_values: Tensor, y_lens: Tensor) -> Tensor:
        """As `forward` -> the attention (N, H, U, T) of each head of the guide when it predicts what follows
        each token."""
        state = self.init_state(tokens.shape[0])
        past, memory = _layers(state.keys, state.values), _layers(cross_keys, cross_values)
        return torch.cat(self._through(tokens, memory, y_lens, past, None, self.guide, None)[1], 1)

    def _through(
        self,
        tokens: Tensor,
        memory: Pairs,
        y_lens: Tensor,
        past: Pairs,
        window: Window | None,
        guide: Guide | None,
        order: Order | None,
    ) -> tuple[Tensor, list[Tensor], Pairs]:
        """x (B, U, C) after all layers, the attention of the guide's heads, and the next past."""
        width = past[0][0].shape[2]
        if self.positions is not None and not torch.compiler.is_exporting():
            end = width + tokens.shape[1] if order is None else int(order.positions.max()) + 1
            _require_positions(end, self.config.num_positions)
        positions, visible = order or in_order(tokens, width, self.config.left_tokens)
        window = window or Window(torch.zeros_like(y_lens)[:, None], y_lens[:, None])
        heard = window_mask(*window, memory[0][0].shape[2])[:, None]
        x = self._embed(tokens, positions)
        rotation = Rotation.at(positions, self.head_dim) if self.config.positions == "rotary" else None
        listening, present = [], []
        for i, (layer, before, audio) in enumerate(zip(self.layers, past, memory, strict=True)):
            heads = guide.of(i) if guide else ()
            x, keys, values, weights = layer(x, before, audio, visible[:, None], heard, rotation, heads)
            listening += weights
            present.append((keys, values))
        return x, listening, present

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.embedding(tokens) * math.sqrt(self.config.dim)
        if self.positions is not None:
            x = x + self.positions(positions)
        elif self.config.positions == "sinusoid":
            x = x + sinusoids(positions, self.config.dim).to(x.dtype)
        return self.dropout(self.embedding_norm(x))

    def log_probs(self, logits: Tensor) -> Tensor:
        """logits (..., V) -> log-probabilities of the next token."""
        return logits.log_softmax(-1)

    def loss(
        self,
        y: Tensor,
        y_lens: Tensor,
        tokens: Tensor,
        token_lens: Tensor,
        token_ends: Tensor,
        smoothing: float,
    ) -> Tensor:
        """-log p(tokens, eos | y) of each utterance (N,), label-smoothed, in nats.

        y (N, T, C), y_lens (N,), tokens (N, U) padded with 0, token_lens (N,). token_ends (N, U): the first
        encoder frame after each token, for decoders that learn from an alignment; this one does not.
        """
        sos = tokens.new_full((len(tokens), 1), SOS_EOS)  # also if there is no token
        targets = torch.cat([tokens, torch.zeros_like(sos)], dim=1).scatter(1, token_lens[:, None], SOS_EOS)
        logits = self(torch.cat([sos, tokens], dim=1), *self.memory(y), y_lens).logits
        return label_smoothed_cross_entropy(
            self.log_probs(logits.float()), targets, token_lens + 1, smoothing
        )


def _head_dim(config: DecoderConfig) -> int:
    """D. Raises ConfigError if the channels do not divide into heads."""
    rotary = config.positions == "rotary"
    name = "attention_dim" if config.attention_dim and config.dim % 2 == 0 else "dim"
    channels = getattr(config, name)
    if channels < 1 or config.dim % 2 or channels % (config.num_heads * (1 + rotary)):
        raise ConfigError(
            f"decoder.{name}: {channels} channels do not divide into {config.num_heads} heads"
            f"{' of even size' if rotary else ', or are odd'}"
        )
    return int(channels // config.num_heads)


def _require_positions(end: int, num_positions: int) -> None:
    if end > num_positions:
        raise ConfigError(
            f"decoder.num_positions: {num_positions} positions were learnt, and a text has {end} tokens, its "
            f"beginning included; search with max_tokens at most {num_positions - 1}"
        )


def _layers(keys: Tensor, values: Tensor) -> Pairs:
    """(N, L, ...) each -> a pair for each layer."""
    return list(zip(keys.unbind(1), values.unbind(1), strict=True))


def in_order(tokens: Tensor, width: int, left: int = -1) -> Order:
    """The order of tokens (N, U) after `width` others: each sees itself and `left` tokens before it, -1 for
    all. One row for all hypotheses."""
    return in_tree(tokens.new_full((1, tokens.shape[1]), tokens.shape[1]), width, left)


def in_tree(ends: Tensor, width: int = 0, left: int = -1) -> Order:
    """The order of tokens in trees, depth first, after `width` others that all of them follow: each sees
    itself and, of those above it, the last `left`, -1 for all. ends (N, U): where the descendants of each
    token end."""
    step = torch.arange(ends.shape[1], device=ends.device)
    above = (step <= step[:, None]) & (step[:, None] < ends[:, None])
    visible = torch.cat([above.new_ones(*above.shape[:2], width), above], 2)
    positions = visible.sum(2) - 1
    if left >= 0:
        before = torch.arange(width, device=ends.device).expand(len(ends), -1)
        keys = torch.cat([before, positions], 1)
        visible = visible & (positions[:, :, None] - keys[:, None] <= left)
    return Order(positions, visible)


def reverse(tokens: Tensor, token_lens: Tensor) -> Tensor:
    """tokens (N, U) -> the first token_lens[n] tokens of each row reversed; padding stays in place."""
    index = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    mirrored = token_lens[:, None] - 1 - index
    return tokens.gather(1, torch.where(mirrored < 0, index, mirrored))
