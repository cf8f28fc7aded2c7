"""Chunked attention decoder: it attends to one window of frames after another (arXiv:2309.08436).

The decoder emits labels and EOC, the end of a chunk, which shares the id of sos/eos:

    p(y_s | y_<s, window of chunk k_s),    k_0 = 0,    k_s+1 = k_s + [y_s = EOC]

and ends with the EOC of the last chunk. This is a transducer whose frames are chunks and whose blank is EOC;
the cost of a label does not depend on the length of the utterance. The parameters have the names of those of
TransformerDecoder, so that training can start from a decoder with global attention.

It learns from an alignment: a label belongs to the chunk whose step contains its last frame.

N utterances · T encoder frames · U labels · K chunks · S = K + U symbols
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from asr.decode.scorer import Chunking
from asr.errors import ConfigError
from asr.losses import label_smoothed_cross_entropy
from asr.model.decoder import SOS_EOS, DecoderConfig, Order, TransformerDecoder, Window
from asr.model.masks import valid_mask


@dataclass(kw_only=True, slots=True)
class ChunkedConfig(DecoderConfig):
    """Size of the decoder, and of the chunks that it attends to, in encoder frames."""

    type: Literal["chunked"] = "chunked"

    step_frames: int = 25
    """Frames by which the window advances."""

    window_frames: int = 30
    """Frames of the window, counted from the start of the step; those beyond the step are look-ahead."""

    left_frames: int = 0
    """Frames before the step that the decoder also attends to."""

    hears_eoc: bool = True
    """Whether past EOCs are part of the decoder's input. If not, chunk borders affect a prediction only by
    the frames that it attends to."""

    def __post_init__(self) -> None:
        if self.step_frames < 1:
            raise ConfigError(f"step_frames is {self.step_frames}, expected at least 1")
        if self.window_frames < self.step_frames:
            raise ConfigError(
                f"window_frames is {self.window_frames}, expected at least step_frames, {self.step_frames}, "
                "or some frames are in no window"
            )
        if self.left_frames < 0:
            raise ConfigError(f"left_frames is {self.left_frames}, expected at least 0")
        if self.left_tokens >= 0 and not self.hears_eoc:
            raise ConfigError(f"left_tokens is {self.left_tokens}, expected -1 where hears_eoc is false")
        if self.reverse_layers:
            raise ConfigError(
                f"reverse_layers is {self.reverse_layers}, expected 0: a chunked decoder does not rescore"
            )


class Targets(NamedTuple):
    """Labels and ends of chunks in the order in which they are emitted, (N, S)."""

    symbols: Tensor
    """Labels and SOS_EOS for EOC, padded with 0."""

    lens: Tensor
    """K + U of each utterance (N,)."""

    chunks: Tensor
    """The chunk that each symbol is emitted in: the number of EOCs before it."""

    num_labels: Tensor
    """The number of labels before each symbol."""


def insert_borders(
    tokens: Tensor, token_lens: Tensor, token_ends: Tensor, num_frames: Tensor, step: int, max_chunks: int
) -> Targets:
    """Labels tokens (N, U), the first token_lens (N,) of each row, with the ends of chunks between them.

    token_ends (N, U): one past the last frame of each label, so that label u is in chunk
    (token_ends[u] - 1) // step; clamped to the utterance and made non-decreasing. num_frames (N,): an
    utterance has K = ceil(num_frames / step) chunks, at most max_chunks.
    """
    num_chunks = -(-num_frames // step)
    size = tokens.shape[1] + max_chunks
    ends = torch.minimum(token_ends.clamp(min=1), num_frames[:, None].clamp(min=1)).cummax(1).values
    label = torch.arange(tokens.shape[1], device=tokens.device)
    place = label + (ends - 1) // step
    place = place.where(label < token_lens[:, None], size)  # padding goes past the end
    symbols = tokens.new_full((len(tokens), size + 1), SOS_EOS).scatter(1, place, tokens)
    is_label = torch.zeros_like(symbols, dtype=torch.bool).scatter(1, place, True)[:, :size]
    lens = token_lens + num_chunks
    num_labels = is_label.cumsum(1) - is_label.long()
    chunks = torch.arange(size, device=tokens.device) - num_labels
    return Targets(symbols[:, :size].where(valid_mask(lens, size), 0), lens, chunks, num_labels)


class ChunkedDecoder(TransformerDecoder):
    """p(next label or EOC | labels, or labels and EOCs, so far, one window of the encoder's output)."""

    def __init__(self, config: ChunkedConfig, num_tokens: int, memory_dim: int) -> None:
        super().__init__(config, num_tokens, memory_dim)
        self.chunking = Chunking(
            config.step_frames, config.window_frames, config.left_frames, config.hears_eoc
        )

    def loss(
        self,
        y: Tensor,
        y_lens: Tensor,
        tokens: Tensor,
        token_lens: Tensor,
        token_ends: Tensor,
        smoothing: float,
    ) -> Tensor:
        """-log p(labels and EOCs | y) of each utterance (N,), label-smoothed, in nats.

        As TransformerDecoder.loss. Raises ConfigError if the batch has no alignment.
        """
        if tokens.shape[1] and not token_ends.shape[1]:
            raise ConfigError(
                "decoder.type: a chunked decoder learns from label times, and a batch has none; "
                "run asr align on the manifests of data.train and data.valid, and use its output"
            )
        assert self.chunking
        step = self.chunking.step
        targets = insert_borders(tokens, token_lens, token_ends, y_lens, step, -(-y.shape[1] // step))
        sos = tokens.new_full((len(tokens), 1), SOS_EOS)
        inputs, order = torch.cat([sos, targets.symbols], dim=1)[:, :-1], None
        if not self.chunking.hears_eoc:
            inputs = torch.cat([sos, tokens], dim=1).gather(1, targets.num_labels)
            order = _last_asked(targets)
        window = self.windows(targets, y_lens)
        logits = self(inputs, *self.memory(y), y_lens, window=window, order=order).logits
        return label_smoothed_cross_entropy(
            logits.float().log_softmax(-1), targets.symbols, targets.lens, smoothing
        )

    def windows(self, targets: Targets, y_lens: Tensor) -> Window:
        """The frames that the decoder attends to for each symbol."""
        assert self.chunking
        first = targets.chunks * self.chunking.step
        end = torch.minimum(first + self.chunking.window, y_lens[:, None])
        return Window((first - self.chunking.left).clamp(min=0), end)


def _last_asked(targets: Targets) -> Order:
    """The order for a decoder that does not see EOC: its input repeats the last label until the next one.

    A repeated label keeps its position. Of each earlier label, only the last repetition is visible: the one
    that emitted the next label.
    """
    num_labels = targets.num_labels
    writes = targets.symbols != SOS_EOS
    before = num_labels[:, None, :] < num_labels[:, :, None]
    itself = torch.eye(num_labels.shape[1], dtype=torch.bool, device=num_labels.device)
    return Order(num_labels, (writes[:, None, :] & before) | itself)
