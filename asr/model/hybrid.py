"""The model: features, encoder, CTC head and attention decoder, trained together (arXiv:1609.06773).

N utterances · S samples · T feature or encoder frames · U tokens · V units · F mel bins · C channels
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from asr.context import WHOLE, Context
from asr.features import Cmvn, Fbank, FbankConfig
from asr.losses import LossConfig, ctc_loss, label_smoothed_cross_entropy
from asr.model.conformer import Conformer
from asr.model.decoder import TransformerDecoder
from asr.model.layers import initialise

SOS_EOS = 1
"""The unit that starts and ends a token sequence; asr/tokens.py puts it there."""


class Loss(NamedTuple):
    """Sums over a batch, in nats: divide by num_tokens for a number that does not depend on the batch."""

    total: Tensor
    ctc: Tensor
    attention: Tensor
    num_tokens: Tensor
    """Tokens and one sos/eos per utterance."""


class HybridModel(nn.Module):
    """An encoder with two heads."""

    def __init__(
        self,
        features: FbankConfig,
        encoder: Conformer,
        decoder: TransformerDecoder,
        loss: LossConfig,
        num_tokens: int,
    ) -> None:
        super().__init__()
        self.loss = loss
        self.fbank = Fbank(features)
        self.cmvn = Cmvn(features.num_bins)
        self.encoder = encoder
        self.ctc = nn.Linear(encoder.dim, num_tokens)
        self.decoder = decoder
        self.ctc.apply(initialise)

    @torch.no_grad()
    def features(self, samples: Tensor, sample_lens: Tensor) -> tuple[Tensor, Tensor]:
        """samples (N, S) in [-1, 1], sample_lens (N,) -> x (N, T, F), x_lens (N,); always float32."""
        with torch.autocast(samples.device.type, enabled=False):
            x, x_lens = self.fbank(samples, sample_lens)
            return self.cmvn(x), x_lens

    def encode(self, x: Tensor, x_lens: Tensor, context: Context = WHOLE) -> tuple[Tensor, Tensor]:
        """x (N, T, F), x_lens (N,) -> y (N, T / subsampling, C), y_lens (N,), for whole utterances."""
        y, y_lens, _ = self.encoder(x, x_lens, None, *context)
        return y, y_lens

    def ctc_log_probs(self, y: Tensor) -> Tensor:
        """y (N, T, C) -> (N, T, V)."""
        return self.ctc(y).float().log_softmax(-1)

    def forward(
        self, x: Tensor, x_lens: Tensor, tokens: Tensor, token_lens: Tensor, context: Context = WHOLE
    ) -> Loss:
        """The loss of a batch: `features` of it, then its tokens (N, U) padded with 0, token_lens (N,).

        total = w_ctc * ctc + w_attention * attention, all summed over the utterances.
        """
        y, y_lens = self.encode(x, x_lens, context)
        ctc = ctc_loss(self.ctc_log_probs(y), y_lens, tokens, token_lens).sum()
        attention = self._attention_loss(y, y_lens, tokens, token_lens).sum()
        total = self.loss.ctc * ctc + self.loss.attention * attention
        return Loss(total, ctc, attention, token_lens.sum() + len(token_lens))

    def _attention_loss(self, y: Tensor, y_lens: Tensor, tokens: Tensor, token_lens: Tensor) -> Tensor:
        sos = tokens.new_full((len(tokens), 1), SOS_EOS)  # also where there is not one token
        targets = torch.cat([tokens, torch.zeros_like(sos)], dim=1).scatter(1, token_lens[:, None], SOS_EOS)
        logits, _ = self.decoder(torch.cat([sos, tokens], dim=1), *self.decoder.memory(y), y_lens)
        log_probs = logits.float().log_softmax(-1)
        return label_smoothed_cross_entropy(log_probs, targets, token_lens + 1, self.loss.label_smoothing)
