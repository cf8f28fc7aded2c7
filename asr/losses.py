"""Losses. Each returns one number per utterance, in nats, summed over what the utterance contains.

Weighting happens in `asr/model/hybrid.py`, normalisation in the training step.

N utterances · T encoder frames · U tokens · V units, blank is 0
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from asr.errors import ConfigError

BLANK = 0


@dataclass(kw_only=True, slots=True)
class LossConfig:
    """Weights of the hybrid loss (Watanabe et al., "Hybrid CTC/Attention Architecture", arXiv:1609.06773)."""

    ctc: float | None = 0.3
    """Weight of the CTC loss; null builds no CTC head, for attention-only models."""

    attention: float = 0.7
    """Weight of the decoder's cross-entropy."""

    reverse: float = 0.3
    """Share of the right-to-left decoder, if there is one, in the attention loss (U2++)."""

    label_smoothing: float = 0.1
    """Probability mass of the decoder's target that is spread evenly over all units."""

    quantity: float = 0.0
    """Weight of the loss of a word-counting head (asr/model/fire.py); 0 builds none. The head learns the same
    with a small weight such as 0.01, which keeps its gradient out of the norm that optim.clip_norm limits."""

    consistency: float = 0.0
    """Weight of the consistency of two differently masked views of an utterance (CR-CTC, arXiv:2410.05101); 0
    is off. A step then computes every utterance twice, with separate masks, and other losses are means of
    both: lower data.max_batch_s. The paper uses a fifth of the weight of ctc and 2.5 times the time masks:
    augment.spec_augment.num_time_masks=25 and max_time_share=0.375."""

    def __post_init__(self) -> None:
        for name in ("attention", "quantity", "consistency"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected 0 or more")
        if self.ctc is not None and not self.ctc >= 0:
            raise ConfigError(f"ctc is {self.ctc}; expected 0 or more, or null for no CTC head")
        if self.consistency and not self.ctc:
            raise ConfigError(
                f"consistency is {self.consistency} and ctc is {self.ctc}; without a CTC loss "
                "the posteriors only learn to agree; give ctc a weight"
            )

    @property
    def views(self) -> int:
        """How many versions of each utterance a training step needs."""
        return 2 if self.consistency > 0 else 1


def ctc_loss(log_probs: Tensor, x_lens: Tensor, tokens: Tensor, token_lens: Tensor) -> Tensor:
    """-log p(tokens | x) of each utterance, in nats.

    log_probs (N, T, V), x_lens (N,), tokens (N, U) without blank (0), token_lens (N,). Returns (N,).
    An utterance with too few frames for its tokens (`ctc_feasible`) gives 0, not inf, and no gradient, so
    that one bad transcript cannot end a run.
    """
    return F.ctc_loss(
        log_probs.transpose(0, 1),
        tokens,
        x_lens,
        token_lens,
        blank=BLANK,
        reduction="none",
        zero_infinity=True,
    )


def ctc_feasible(x_lens: Tensor, tokens: Tensor, token_lens: Tensor) -> Tensor:
    """Whether there is a frame for every token and for the blank between equal neighbours; (N,) bool."""
    repeated = tokens[:, 1:] == tokens[:, :-1]
    inside = torch.arange(repeated.shape[1], device=tokens.device) < token_lens[:, None] - 1
    repeats = (repeated & inside).sum(1)
    return token_lens + repeats <= x_lens


def consistency_loss(log_probs: Tensor, x_lens: Tensor) -> Tensor:
    """The divergence between the posteriors of two views of each utterance (CR-CTC, arXiv:2410.05101).

    log_probs (2 N, T, V): all first views, then all second ones; x_lens (2 N,), the same for both. Returns
    (N,): sum over frames of KL(second || first) + KL(first || second), in nats. Each view is the target of
    the other, without gradient through the target.
    """
    other = log_probs.roll(len(log_probs) // 2, 0).detach()
    divergence = (other.exp() * (other - log_probs)).sum(-1)
    inside = torch.arange(log_probs.shape[1], device=log_probs.device) < x_lens[:, None]
    return torch.where(inside, divergence, 0.0).sum(1).view(2, -1).sum(0)


def label_smoothed_cross_entropy(
    log_probs: Tensor, targets: Tensor, target_lens: Tensor, smoothing: float
) -> Tensor:
    """Cross-entropy with (1 - smoothing) * target + smoothing * uniform over all V units, in nats.

    log_probs (N, U, V), targets (N, U), target_lens (N,). Returns (N,), sums over the first target_lens
    positions.
    """
    target = log_probs.gather(-1, targets[..., None]).squeeze(-1)
    loss = -(1 - smoothing) * target - smoothing * log_probs.mean(-1)
    inside = torch.arange(targets.shape[1], device=targets.device) < target_lens[:, None]
    return torch.where(inside, loss, 0.0).sum(1)


def transducer_loss(
    logits: Tensor, x_lens: Tensor, tokens: Tensor, token_lens: Tensor, blank: int = BLANK
) -> Tensor:
    """-log p(tokens | x) over the T x (U + 1) lattice of a transducer (Graves, arXiv:1211.3711), in nats.

    logits (N, T, U + 1, V) before the softmax; x_lens (N,) and token_lens (N,), whose maxima are T and U;
    tokens (N, U). Returns (N,).
    """
    from torchaudio.functional import rnnt_loss

    return rnnt_loss(
        logits.contiguous(), tokens.int(), x_lens.int(), token_lens.int(), blank=blank, reduction="none"
    )
