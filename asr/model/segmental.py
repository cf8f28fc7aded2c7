"""Segmental attention decoder: each token attends only to frames between two boundaries (arXiv:2210.14742).

    0 = t_0 < t_1 < ... < t_S = T        token s attends to frames t_{s-1} + 1 .. t_s

    p(a, t | x) = prod_s p(t_s | t_{s-1}, a_{s-1}, x) p(a_s | a_1 .. a_{s-1}, segments 1 .. s, x)

A length model predicts at each frame whether the segment ends there. At the last frame it certainly ends, and
with it the sequence: by a token, or by sos/eos, which cannot occur elsewhere. The probabilities of all texts
and boundaries thus sum to one. Attention costs one product per frame, however many tokens there are.

The model learns from an alignment, which gives t. In the paper, the length model and the decoder are
recurrent. Here the decoder is the Transformer of decoder.py, with the same parameters, and the length model
knows only the last token and the time since it, so all frames of all hypotheses form one batch.

N utterances or hypotheses · U tokens · T encoder frames, counted from 1 where they end a segment · V units ·
C channels of the encoder · M longest segment that is heard as a whole
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.errors import ConfigError
from asr.losses import label_smoothed_cross_entropy
from asr.model.decoder import SOS_EOS, DecoderConfig, TransformerDecoder, Window
from asr.model.layers import initialise
from asr.model.masks import valid_mask

FIRST_UNIT = SOS_EOS + 1
"""The first unit that is neither blank nor sos/eos."""

PRIOR = 10.0
"""Pseudo-count: segments of the average length distribution that are added to the counts of each token."""


@dataclass(kw_only=True, slots=True)
class SegmentalConfig(DecoderConfig):
    """Size of the segmental decoder; fields shared with DecoderConfig have the same meaning."""

    type: Literal["transformer", "segmental", "chunked"] = "segmental"

    max_segment_frames: int = 32
    """In a longer segment, the token attends only to the last frames, this many: silence comes first."""

    length_dim: int = 128
    """Hidden channels of the length model."""

    length_weight: float = 1.0
    """Weight of the length model in the loss of the decoder."""

    def __post_init__(self) -> None:
        for name in ("max_segment_frames", "length_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.length_weight < 0:
            raise ConfigError(f"length_weight is {self.length_weight}, expected at least 0")
        if self.reverse_layers:
            raise ConfigError(
                f"reverse_layers is {self.reverse_layers}; a segmental decoder does not rescore, set it to 0"
            )


class LengthModel(nn.Module):
    """Models segment lengths: by a network over encoder frames, and by counts from training."""

    counts: Tensor

    def __init__(self, num_tokens: int, memory_dim: int, dim: int, max_frames: int) -> None:
        super().__init__()
        self.frame = nn.Linear(memory_dim, dim)
        self.embedding = nn.Embedding(num_tokens, dim)
        self.duration = nn.Embedding(max_frames, dim)
        self.out = nn.Linear(dim, 1)
        self.register_buffer("counts", torch.zeros(num_tokens, max_frames))
        self.apply(initialise)

    def forward(self, y: Tensor, labels: Tensor, durations: Tensor) -> Tensor:
        """The log-odds (...) that a segment ends at its frame.

        y (..., C): that frame; labels (...): the token before the segment, sos/eos for the first one;
        durations (...): frames of the segment so far, including this one.
        """
        duration = self.duration(durations.clamp(1, self.duration.num_embeddings) - 1)
        return self.out(torch.tanh(self.frame(y) + self.embedding(labels) + duration))[..., 0].float()

    @torch.no_grad()
    def count(self, labels: Tensor, durations: Tensor) -> None:
        """Count segments (R,) of these labels and lengths; lengths above the maximum count as it."""
        index = labels * self.counts.shape[1] + durations.clamp(1, self.counts.shape[1]) - 1
        self.counts.view(-1).index_add_(0, index, torch.ones_like(index, dtype=self.counts.dtype))

    def log_lengths(self) -> Tensor:
        """log p(length | token) (V, M) for 1 to M frames, from the counts."""
        average = self.counts.sum(0) + 1
        smooth = self.counts + PRIOR * average / average.sum()
        return smooth.log() - smooth.sum(1, keepdim=True).log()


class SegmentalDecoder(TransformerDecoder):
    """p(next token | tokens so far, its segment), and a model of segment lengths."""

    config: SegmentalConfig

    def __init__(self, config: SegmentalConfig, num_tokens: int, memory_dim: int) -> None:
        super().__init__(config, num_tokens, memory_dim)
        self.length = LengthModel(num_tokens, memory_dim, config.length_dim, config.max_segment_frames)

    def log_probs(self, logits: Tensor) -> Tensor:
        """logits (..., V) -> for tokens, log-probabilities given that the sequence does not end here; for
        sos/eos, that of ending here if this is the last frame; for blank, -inf."""
        eos = logits[..., SOS_EOS:].log_softmax(-1)[..., :1]
        never = torch.full_like(eos, -torch.inf)
        return torch.cat([never, eos, logits[..., FIRST_UNIT:].log_softmax(-1)], -1)

    def loss(
        self,
        y: Tensor,
        y_lens: Tensor,
        tokens: Tensor,
        token_lens: Tensor,
        token_ends: Tensor,
        smoothing: float,
    ) -> Tensor:
        """-log p(tokens, boundaries | y) of each utterance (N,), label-smoothed, in nats.

        As TransformerDecoder.loss, plus `length_weight` times the loss of the length model.
        token_ends (N, U): the first encoder frame after each token, repaired by `fit_ends`. An utterance with
        more tokens than frames gives 0. Raises ConfigError without an alignment. In training, counts lengths.
        """
        if tokens.shape[1] and not token_ends.shape[1]:
            raise ConfigError(
                "decoder.type: a segmental decoder learns from an alignment, and these utterances have none; "
                "make one with asr align"
            )
        ends = fit_ends(token_ends, token_lens, y_lens)
        starts = F.pad(ends, (1, 0))[:, :-1]
        fits = (token_lens <= y_lens) & (y_lens > 0)
        # if the last token ends at the last frame, no frame is left for sos/eos
        num_segments = (token_lens + (starts.gather(1, token_lens[:, None])[:, 0] < y_lens)) * fits
        inputs = F.pad(tokens, (1, 0), value=SOS_EOS)
        targets = F.pad(tokens, (0, 1)).scatter(1, token_lens[:, None], SOS_EOS)
        if self.training:
            inside = valid_mask(num_segments, targets.shape[1])
            self.length.count(targets[inside], (ends - starts)[inside])

        window = Window(torch.maximum(starts, ends - self.config.max_segment_frames), ends)
        logits = self(inputs, *self.memory(y), y_lens, window=window).logits.float()
        log_probs = label_log_probs(logits, is_last=ends == y_lens[:, None])
        label_loss = label_smoothed_cross_entropy(log_probs, targets, num_segments, smoothing)
        length_loss = self._length_loss(y, y_lens, inputs, starts, ends)
        return label_loss + self.config.length_weight * torch.where(fits, length_loss, 0.0)

    def _length_loss(self, y: Tensor, y_lens: Tensor, inputs: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
        """-log p of ending or going on at each frame but the last (N,); segments (N, U + 1) as in `loss`."""
        frames = torch.arange(1, y.shape[1] + 1, device=y.device).expand(len(y), -1).contiguous()
        segment = torch.searchsorted(ends, frames).clamp(max=ends.shape[1] - 1)
        durations = frames - starts.gather(1, segment)
        log_odds = self.length(y, inputs.gather(1, segment), durations)
        is_end = (ends.gather(1, segment) == frames).to(log_odds.dtype)
        loss = F.binary_cross_entropy_with_logits(log_odds, is_end, reduction="none")
        return torch.where(frames < y_lens[:, None], loss, 0.0).sum(1)


def end_odds(logits: Tensor) -> Tensor:
    """logits (..., V) -> log-odds (...) that sos/eos ends the sequence, at the last frame."""
    return logits[..., SOS_EOS] - logits[..., FIRST_UNIT:].logsumexp(-1)


def label_log_probs(logits: Tensor, is_last: Tensor) -> Tensor:
    """Log-probabilities (N, U, V) of the unit that ends a segment. Units that cannot get 0: blank, and
    sos/eos unless is_last (N, U), that is, at the last frame."""
    ends = end_odds(logits)
    units = logits[..., FIRST_UNIT:].log_softmax(-1)
    units = units + torch.where(is_last, F.logsigmoid(-ends), 0.0)[..., None]
    eos = torch.where(is_last, F.logsigmoid(ends), 0.0)[..., None]
    return torch.cat([torch.zeros_like(eos), eos, units], -1)


def fit_ends(token_ends: Tensor, token_lens: Tensor, y_lens: Tensor) -> Tensor:
    """Boundaries at least a frame apart, as near to token_ends (N, U) as y_lens (N,) frames allow.

    Returns (N, U + 1): those of the first token_lens (N,) tokens, then y_lens. Undefined for utterances with
    more tokens than frames.
    """
    index = torch.arange(token_ends.shape[1], device=token_ends.device)
    earliest = torch.cummax((token_ends - index).clamp(min=1), dim=1).values + index
    latest = y_lens[:, None] - (token_lens[:, None] - 1 - index)
    ends = torch.minimum(earliest, latest).clamp(min=0)
    inside = valid_mask(token_lens, token_ends.shape[1])
    return torch.cat([torch.where(inside, ends, y_lens[:, None]), y_lens[:, None]], 1)
