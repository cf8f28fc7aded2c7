"""A head that counts words, to tell whether the last word received so far is complete.

Each encoder frame h_t has a weight alpha_t = sigmoid(w . h_t + b), and the weights of an utterance should
add up to the number of its words (integrate and fire, arXiv:1905.11235). As the head also learns the number
of complete words in a prefix, the sum rises by one where a word ends; asr/decode/policies.py checks whether
it did so just before the end of the audio received so far (Simul-Whisper, arXiv:2406.10052).

The encoder's output is detached, so the head sends no gradient to other parameters. It can be trained with
the model, or afterwards: a run with `train.init` and a low learning rate keeps everything else close to what
it was.

N utterances · T encoder frames · C channels · U tokens · V units
"""

import torch
from torch import Tensor, nn

FIRST_BIAS = -2.2
"""Starts with one word in ten frames."""


class Fire(nn.Module):
    """The head. It starts without random numbers, so other parameters start the same with or without it."""

    word_starts: Tensor | None
    """Units before which a word is complete (V,); training sets them, and only training needs them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dim))
        self.bias = nn.Parameter(torch.full((1,), FIRST_BIAS))
        self.register_buffer("word_starts", None, persistent=False)

    def forward(self, y: Tensor) -> Tensor:
        """y (N, T, C) -> alpha (N, T)."""
        # not a matrix product, so it stays float32 in bf16 training and in int8 bundles
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

        y (N, T, C), y_lens (N,), tokens (N, U) padded with 0, token_lens (N,). token_ends (N, U): the first
        encoder frame after each token, or (N, 0). With ends, the loss is the mean over the whole utterance
        and a prefix, whose words are those that end in it. A prefix is a whole number of chunks of `chunk`
        frames, as in a stream, or any length for 0; in evaluation, it is about half the utterance.
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
        """Which tokens (N, U) are the last of a word: the next token starts a word, or there is none."""
        assert self.word_starts is not None, "word_starts is set at the start of training"
        index = torch.arange(tokens.shape[1], device=tokens.device)
        next_starts = self.word_starts[tokens].roll(-1, 1) & (index < token_lens[:, None] - 1)
        return next_starts | (index == token_lens[:, None] - 1)


def _total(alpha: Tensor, lens: Tensor) -> Tensor:
    """The sum of the first lens (N,) weights of alpha (N, T)."""
    inside = torch.arange(alpha.shape[1], device=alpha.device) < lens[:, None]
    return torch.where(inside, alpha, 0.0).sum(1)


def _draw_prefix(y_lens: Tensor, chunk: int, random: bool) -> Tensor:
    """The length of a prefix of each utterance in frames (N,): whole chunks; the last may be short."""
    share = torch.rand(len(y_lens), device=y_lens.device) if random else 0.5
    chunks = (y_lens * share / chunk).long() + 1
    return torch.minimum(chunks * chunk, y_lens)
