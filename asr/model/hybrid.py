"""The model: features, encoder, CTC head and attention decoder, trained together (arXiv:1609.06773).

N utterances · S samples · T feature or encoder frames · U tokens · V units · F mel bins · C channels
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from asr.context import WHOLE, Context
from asr.errors import ConfigError
from asr.features import Cmvn, Fbank, FbankConfig
from asr.losses import LossConfig, consistency_loss, ctc_loss
from asr.model.decoder import TransformerDecoder, reverse
from asr.model.encoder import Encoder
from asr.model.fire import Fire
from asr.model.layers import initialise
from asr.nemo_features import NemoFbank
from asr.whisper_features import WhisperFbank

FEATURES: dict[str, type[Fbank | WhisperFbank | NemoFbank]] = {
    "kaldi": Fbank,
    "whisper": WhisperFbank,
    "nemo": NemoFbank,
}
"""By features.type."""


class Loss(NamedTuple):
    """Sums over a batch, in nats; divide by num_tokens for values that do not depend on the batch size."""

    total: Tensor
    ctc: Tensor
    attention: Tensor
    quantity: Tensor
    """The loss of the word-counting head, in words; 0 without one."""

    num_tokens: Tensor
    """All tokens, plus one sos/eos per utterance."""


class HybridModel(nn.Module):
    """An encoder and a decoder; optionally a CTC head, a right-to-left decoder (U2++) and a head that counts
    words."""

    def __init__(
        self,
        features: FbankConfig,
        encoder: Encoder,
        decoder: TransformerDecoder,
        loss: LossConfig,
        num_tokens: int,
        reverse_decoder: TransformerDecoder | None = None,
    ) -> None:
        super().__init__()
        self.loss = loss
        self.fbank = FEATURES[features.type](features)
        self.cmvn = Cmvn(features.num_bins)
        self.encoder = encoder
        self.num_tokens = num_tokens
        self.ctc = nn.Linear(encoder.dim, num_tokens).apply(initialise) if loss.ctc is not None else None
        self.decoder = decoder
        self.reverse_decoder = reverse_decoder
        self.fire = Fire(encoder.dim) if loss.quantity > 0 else None

    @torch.no_grad()
    def features(self, samples: Tensor, sample_lens: Tensor) -> tuple[Tensor, Tensor]:
        """samples (N, S) in [-1, 1], sample_lens (N,) -> x (N, T, F), x_lens (N,); always float32."""
        with torch.autocast(samples.device.type, enabled=False):
            x, x_lens = self.fbank(samples, sample_lens)
            return self.cmvn(x), x_lens

    def require_ctc(self, what: str) -> None:
        """Raise ConfigError if there is no CTC head."""
        if self.ctc is None:
            raise ConfigError(
                f"{what}: this model has no CTC head, which times the tokens; use a model with loss.ctc"
            )

    @property
    def frame_s(self) -> float:
        """Seconds of audio per encoder frame."""
        return self.encoder.subsampling * self.fbank.config.shift_ms / 1000

    def frames_behind(self, times_s: Tensor) -> Tensor:
        """Times in seconds -> the first encoder frame that starts at or after each, int64."""
        return (times_s / self.frame_s - 1e-3).ceil().long()

    def encode(self, x: Tensor, x_lens: Tensor, context: Context = WHOLE) -> tuple[Tensor, Tensor]:
        """x (N, T, F), x_lens (N,) -> y (N, T / subsampling, C), y_lens (N,), for whole utterances."""
        y, y_lens, _ = self.encoder(x, x_lens, None, *context)
        return y, y_lens

    def ctc_log_probs(self, y: Tensor) -> Tensor:
        """y (N, T, C) -> (N, T, V), or (N, T, 0) without a CTC head."""
        if self.ctc is None:
            return y[..., :0].float()
        return self.ctc(y).float().log_softmax(-1)

    def forward(
        self,
        x: Tensor,
        x_lens: Tensor,
        tokens: Tensor,
        token_lens: Tensor,
        context: Context = WHOLE,
        token_ends: Tensor | None = None,
        views: int = 1,
    ) -> Loss:
        """The loss of a batch: x, x_lens from `features`, tokens (N, U) padded with 0, token_lens (N,).

        token_ends (N, U): the first encoder frame after each token, if there is an alignment.  views: 2 if
        the second half of the batch is another view of the first; losses are then means of both views.
        total = w_ctc * ctc + w_attention * attention + w_quantity * quantity + w_consistency * consistency,
        all summed over the utterances; consistency is the mean of both directions.
        """
        y, y_lens = self.encode(x, x_lens, context)
        ctc, consistency = self._ctc_losses(y, y_lens, tokens, token_lens, views)
        ends = tokens[:, :0] if token_ends is None else token_ends
        attention = self._attention_loss(y, y_lens, tokens, token_lens, ends).sum()
        total = (self.loss.ctc or 0.0) * ctc + self.loss.attention * attention
        total, quantity = total + self.loss.consistency * consistency, torch.zeros_like(ctc)
        if self.fire:
            quantity = self.fire.loss(y, y_lens, tokens, token_lens, ends, context.chunk).sum()
            total = total + self.loss.quantity * quantity
        sums = (total, ctc, attention, quantity, token_lens.sum() + len(token_lens))
        return Loss(*(value / views for value in sums)) if views > 1 else Loss(*sums)

    def _ctc_losses(
        self, y: Tensor, y_lens: Tensor, tokens: Tensor, token_lens: Tensor, views: int
    ) -> tuple[Tensor, Tensor]:
        """The CTC loss and the consistency of two views; 0 without a CTC head or with one view."""
        none = y.new_zeros((), dtype=torch.float32)
        if self.ctc is None:
            return none, none
        log_probs = self.ctc_log_probs(y)
        ctc = ctc_loss(log_probs, y_lens, tokens, token_lens).sum()
        return ctc, consistency_loss(log_probs, y_lens).sum() if views == 2 else none

    def _attention_loss(
        self, y: Tensor, y_lens: Tensor, tokens: Tensor, token_lens: Tensor, token_ends: Tensor
    ) -> Tensor:
        """(1 - r) * left to right + r * right to left, (N,)."""
        smoothing, share = self.loss.label_smoothing, self.loss.reverse
        loss = self.decoder.loss(y, y_lens, tokens, token_lens, token_ends, smoothing)
        if self.reverse_decoder is None:
            return loss
        mirrored = reverse(tokens, token_lens)
        mirror = self.reverse_decoder.loss(y, y_lens, mirrored, token_lens, token_ends, smoothing)
        return (1 - share) * loss + share * mirror
