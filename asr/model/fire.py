"""A head that counts words: is the last word of what has arrived complete?

Each encoder frame h_t has a weight alpha_t = sigmoid(w . h_t + b), and the weights of an utterance should
add up to the number of its words (integrate and fire, arXiv:1905.11235). Taught the number of words that are
complete in a prefix, too, their sum rises by one where a word ends; asr/decode/policies.py asks whether it
did so just before the end of what has arrived (Simul-Whisper, arXiv:2406.10052).

The encoder's output is detached: no other parameter gets a gradient from here, so that the head changes
nothing else. It can be trained with the model, or afterwards: a training with `train.init` and a low learning
rate keeps everything else close to what it was.

N utterances · T encoder frames · C channels · U tokens · V units
"""

import torch
from torch import Tensor, nn

FIRST_BIAS = -2.2
"""A word in ten frames, to begin with."""


class Fire(nn.Module):
    """Its parameters start without random numbers, so that those of all else are what they are without it."""

    word_starts: Tensor | None
    """Units before which a word is complete (V,); training sets them, nothing else needs them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dim))
        self.bias = nn.Parameter(torch.full((1,), FIRST_BIAS))
        self.register_buffer("word_starts", None, persistent=False)

    def forward(self, y: Tensor) -> Tensor:
        """y (N, T, C) -> alpha (N, T)."""
        # no matrix product, so that it stays float32 in bf16 training and in int8 bundles
        return ((y.float() * self.weight).sum(-1) + self.bias).sigmoid()

    def loss(
        self,
        y: Tensor,
        y_lens: Tensor,
        tokens: Tensor,
        token_lens: Tensor,
        token_ends: Tensor,
        chunk: int = 0,
    ) -> Tensor:
        """The quantity loss of each utterance (N,), in words: |sum of alpha - number of words|.

        y (N, T, C), y_lens (N,), tokens (N, U) padded with 0, token_lens (N,). token_ends (N, U): the encoder
        frame behind each token, or (N, 0); with them it is the mean of that of the whole and that of a
        prefix, whose words are those that end in it. Prefixes are as long as what a stream hears in chunks of
        `chunk` frames, 0 for any length; in evaluation, about half the utterance.
        """
        alpha, ends_word = self(y.detach()), self.ends_of_words(tokens, token_lens)
        whole = (_total(alpha, y_lens) - ends_word.sum(1)).abs()
        if not token_ends.shape[1]:
            return whole
        part = _draw_prefix(y_lens, max(chunk, 1), self.training)
        inside = torch.minimum(token_ends, y_lens[:, None]) <= part[:, None]
        prefix = (_total(alpha, part) - (ends_word & inside).sum(1)).abs()
        return (whole + prefix) / 2

    def ends_of_words(self, tokens: Tensor, token_lens: Tensor) -> Tensor:
        """Which tokens (N, U) are the last of a word: the next one begins another, or there is none."""
        assert self.word_starts is not None, "word_starts is set at the start of training"
        index = torch.arange(tokens.shape[1], device=tokens.device)
        next_starts = self.word_starts[tokens].roll(-1, 1) & (index < token_lens[:, None] - 1)
        return next_starts | (index == token_lens[:, None] - 1)


def _total(alpha: Tensor, lens: Tensor) -> Tensor:
    """The sum of the first lens (N,) weights of alpha (N, T)."""
    inside = torch.arange(alpha.shape[1], device=alpha.device) < lens[:, None]
    return torch.where(inside, alpha, 0.0).sum(1)


def _draw_prefix(y_lens: Tensor, chunk: int, random: bool) -> Tensor:
    """Frames of a prefix of each utterance (N,): whole chunks, of which the last may be short."""
    share = torch.rand(len(y_lens), device=y_lens.device) if random else 0.5
    chunks = (y_lens * share / chunk).long() + 1
    return torch.minimum(chunks * chunk, y_lens)
