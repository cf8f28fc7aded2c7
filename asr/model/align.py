"""Forced alignment: when the best CTC path emits each token of a known text (Graves et al., ICML 2006).

Segmental and chunked decoders get their fixed alignments from here (arXiv:2210.14742, arXiv:2309.08436).
asr/decode/align.py does the same for one utterance, without torch. A segmental decoder can then refine the
ends by its own probabilities (boundaries.py).

N utterances · S samples · T encoder frames · U tokens · V units, blank is 0
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from asr.context import WHOLE, Context
from asr.errors import ConfigError
from asr.losses import BLANK, ctc_feasible
from asr.model.boundaries import likeliest_ends
from asr.model.hybrid import HybridModel
from asr.model.masks import valid_mask
from asr.model.segmental import SegmentalDecoder


class Frames(NamedTuple):
    """The frames of the tokens of N utterances; (N, U) each, padded with 0."""

    start: Tensor
    """First frame."""

    end: Tensor
    """One past the last frame; blank frames may lie between two tokens."""

    score: Tensor
    """Mean log-probability of the token over its frames."""


class Span(NamedTuple):
    """The time span of a token, in seconds from the start of its utterance."""

    start_s: float
    end_s: float
    score: float


def forced_alignment(log_probs: Tensor, y_lens: Tensor, tokens: Tensor, token_lens: Tensor) -> Frames:
    """The frames of each token on the best path.

    log_probs (N, T, V), y_lens (N,), tokens (N, U) without blank, token_lens (N,). Utterances with too few
    frames for their tokens (`ctc_feasible`) have no path and get 0 everywhere.
    """
    start, end = torch.zeros_like(tokens), torch.zeros_like(tokens)
    score = log_probs.new_zeros(tokens.shape)
    possible = ctc_feasible(y_lens, tokens, token_lens) & (token_lens > 0)
    for n in possible.nonzero()[:, 0].tolist():
        num_tokens = int(token_lens[n])
        found = _align_one(log_probs[n, : y_lens[n]], tokens[n, :num_tokens])
        for rows, values in zip((start, end, score), found, strict=True):
            rows[n, :num_tokens] = values
    return Frames(start, end, score)


def _align_one(log_probs: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log_probs (T, V), tokens (U,), both at least 1 -> start, end, score (U,)."""
    from torchaudio.functional import forced_align  # it supports a batch of one only

    paths, path_scores = forced_align(log_probs[None].contiguous(), tokens[None], blank=BLANK)
    path, scores = paths[0], path_scores[0]
    spoken, changes = path != BLANK, path[1:] != path[:-1]
    start = (spoken & F.pad(changes, (1, 0), value=True)).nonzero()[:, 0]
    end = (spoken & F.pad(changes, (0, 1), value=True)).nonzero()[:, 0] + 1
    total = F.pad(scores.double().cumsum(0), (1, 0))
    return start, end, ((total[end] - total[start]) / (end - start)).to(scores.dtype)


def segments_near(
    decoder: SegmentalDecoder,
    y: Tensor,
    y_lens: Tensor,
    tokens: Tensor,
    token_lens: Tensor,
    frames: Frames,
) -> Frames:
    """The likeliest segments with ends near those of CTC; each begins where the previous one ends.

    y (N, T, C); frames: the result of `forced_alignment`; the rest as there. A score covers the token and
    the length of its segment. Utterances without a path keep their 0.
    """
    rows = (frames.end[:, :1] > 0).any(1).nonzero()[:, 0]
    if not len(rows):
        return frames
    y, y_lens, tokens, token_lens, near = (x[rows] for x in (y, y_lens, tokens, token_lens, frames.end))
    end, score = likeliest_ends(decoder, y, y_lens, tokens, token_lens, near)
    columns = (F.pad(end, (1, 0))[:, :-1], end, score)
    outside = ~valid_mask(token_lens, tokens.shape[1])
    pairs = zip(frames, columns, strict=True)
    return Frames(*(old.index_copy(0, rows, new.masked_fill(outside, 0)) for old, new in pairs))


class Aligner:
    """Aligns with the CTC head of a trained model, and optionally refines with its segmental decoder."""

    def __init__(
        self,
        model: HybridModel,
        device: torch.device | str,
        context: Context = WHOLE,
        segments: bool = False,
    ) -> None:
        """context: what attention sees, as in a stream.  segments: refine with the decoder. Raises
        ConfigError if the model lacks the CTC head or the segmental decoder that is needed."""
        model.require_ctc("alignment")
        decoder = model.decoder
        if segments and not isinstance(decoder, SegmentalDecoder):
            raise ConfigError(
                f"alignment by segments: this model's decoder is of type {decoder.config.type}, expected "
                "segmental; leave out --segments to align by CTC"
            )
        self.segmental = decoder if segments and isinstance(decoder, SegmentalDecoder) else None
        self.model = model.to(device).eval()
        self.device = torch.device(device)
        self.frame_s = model.frame_s
        self.context = context

    @torch.inference_mode()
    def __call__(
        self, samples: Sequence[NDArray[np.float32]], tokens: Sequence[Sequence[int]]
    ) -> list[list[Span] | None]:
        """Waveforms (S,) of any lengths and their tokens -> a span for each token.

        None for an utterance with too few frames for its tokens. Utterances do not affect one another.
        """
        lens = torch.tensor([len(x) for x in samples], device=self.device)
        # padding changes nothing, and ensures that the batch has at least one frame
        shortest = torch.zeros(self.model.fbank.frame_samples)
        batch = pad_sequence([*map(torch.as_tensor, samples), shortest], batch_first=True)[:-1]
        rows = [torch.tensor(row, dtype=torch.long) for row in tokens]
        targets = pad_sequence(rows, batch_first=True).to(self.device)
        target_lens = torch.tensor([len(row) for row in rows], device=self.device)
        x, x_lens = self.model.features(batch.to(self.device, torch.float32), lens)
        y, y_lens = self.model.encode(x, x_lens, self.context)
        frames = forced_alignment(self.model.ctc_log_probs(y), y_lens, targets, target_lens)
        if self.segmental:
            frames = segments_near(self.segmental, y, y_lens, targets, target_lens, frames)
        possible = ctc_feasible(y_lens, targets, target_lens).tolist()
        columns = [values.tolist() for values in frames]
        return [
            self._spans(len(x), [column[n][: len(row)] for column in columns]) if possible[n] else None
            for n, (x, row) in enumerate(zip(samples, tokens, strict=True))
        ]

    def _spans(self, num_samples: int, columns: Sequence[Sequence[float]]) -> list[Span]:
        """Frames -> seconds. The last frame may extend beyond the end of the audio; a token must not."""
        duration_s = num_samples / self.model.fbank.config.sample_rate
        return [
            Span(start * self.frame_s, min(end * self.frame_s, duration_s), score)
            for start, end, score in zip(*columns, strict=True)
        ]
