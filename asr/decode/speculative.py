"""Greedy attention decoding in few decoder calls: the decoder verifies the best CTC path as a draft.

One call gives the decoder's prediction after every token of a draft. The draft is accepted as far as it
agrees; at the first mismatch the decoder's own token is written, and the rest of the draft is realigned after
it. Every token is thus the decoder's most likely one given those before it, so the answer is that of beam
search with a beam of 1, whatever the draft says; a bad draft only costs time. There is one exception: matrix
products over one token and over several may round differently, which matters where two units are equally
likely, or, with 8-bit activations, whose scale is set per call, nearly so.

Blockwise parallel decoding (Stern et al., arXiv:1811.03115) and aggressive decoding (Ge et al.,
arXiv:2205.10350), with CTC as the draft.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from asr.decode.config import SearchConfig
from asr.decode.guards import LENGTH, REPETITION, repeats
from asr.decode.joint import Answers, Finished
from asr.decode.prompt import prompt_ids
from asr.decode.scorer import BLANK, Floats, Hypothesis, Ints, Scorer, Step
from asr.decode.step import steps

ROWS = 8
"""Utterances verified in one call: bounds the memory for the logits of their drafts."""


def greedy(
    scorer: Scorer, log_probs: Sequence[Floats], memory: Any, config: SearchConfig
) -> list[list[Hypothesis]]:
    """The answers of joint.search with a beam of 1 and a CTC weight of 0; the model must have a CTC head."""
    texts = [Text.begin(n, x, config) for n, x in enumerate(log_probs)]
    heard = [text for text, x in zip(texts, log_probs, strict=True) if len(x)]
    for start in range(0, len(heard), ROWS):
        write(scorer, heard[start : start + ROWS], memory, config)
    return [text.answers.nbest(config) for text in texts]


class Draft:
    """The CTC tokens of an utterance, and how far the written text has advanced in them."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = np.array(tokens, np.int64)
        self._distances = np.arange(len(tokens) + 1)
        """Edit distance between the written text and each prefix of the draft."""
        self._is_last = np.zeros(len(tokens) + 1, bool)
        """Whether a prefix ends with the last written token on a shortest edit path."""
        self._next = 0
        """Where the rest begins, if the draft has been right since `rest` was last called."""

    def write(self, token: int) -> None:
        """Align to one more token."""
        old, same, column = self._distances, self._tokens == token, np.arange(len(self._distances))
        new = np.append(old[0] + 1, np.minimum(old[1:] + 1, old[:-1] + ~same))
        self._distances = np.minimum.accumulate(new - column) + column
        self._is_last = np.append(False, same & (self._distances[1:] == old[:-1]))
        self._next += 1

    def rest(self) -> list[int]:
        """The draft after the prefix nearest to the written text; ties prefer a prefix that ends in the same
        token, then the one closest to where the draft was expected to go on."""
        far = np.abs(np.arange(len(self._distances)) - self._next)
        self._next = int(np.lexsort((far, ~self._is_last, self._distances))[0])
        return self._tokens[self._next :].tolist()


@dataclass
class Text:
    """The text written so far for one utterance."""

    utterance: int
    answers: Answers
    draft: Draft
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    most_drafted: int = sys.maxsize
    """Maximum length of a draft: where CTC is often wrong, long drafts are verified for nothing."""

    @classmethod
    def begin(cls, utterance: int, log_probs: Floats, config: SearchConfig) -> "Text":
        answers = Answers.begin(log_probs, config, Hypothesis((), 0.0))
        return cls(utterance, answers, Draft(answers.ctc_tokens))

    def drafted(self) -> list[int]:
        """What the decoder is to verify next, as far as there is room for it."""
        return self.draft.rest()[: min(self.answers.max_tokens - len(self.tokens), self.most_drafted)]

    def check(self, said: Step, drafted: list[int], sos_eos: int, config: SearchConfig) -> bool:
        """Write what the decoder predicts while it agrees with the draft, and one token more; return whether
        the text goes on.  said: the best units after the last token and each drafted one (U + 1, k)."""
        for u, (ids, values) in enumerate(zip(said.ids, said.log_probs, strict=True)):
            best = int(ids[0] == BLANK and len(ids) > 1)
            token, value = int(ids[best]), float(values[best])
            if token == BLANK or value == -np.inf or not self._append(token, value, sos_eos, config):
                return False
            if u < len(drafted) and token != drafted[u]:
                break
        if drafted:
            self.most_drafted = max(2 * u, len(drafted) // 2, 1)
        return True

    def _append(self, token: int, value: float, sos_eos: int, config: SearchConfig) -> bool:
        """Write one token. Returns whether the text goes on: not after sos/eos, nor once a guard stops it."""
        self.log_probs.append(value)
        values = np.array(self.log_probs)
        score = float(values.sum())
        if token == sos_eos:
            self.answers.finished.append(Finished(score, tuple(self.tokens), values, 0))
            return False
        self.tokens.append(token)
        self.draft.write(token)
        if len(self.tokens) > self.answers.max_tokens:
            self.answers.guard = LENGTH
        elif repeats(np.array([self.tokens]), [self.answers.ctc_tokens], config)[0]:
            self.answers.guard = REPETITION
        return not self.answers.guard


def write(scorer: Scorer, texts: list[Text], memory: Any, config: SearchConfig) -> None:
    """Write several texts to their ends. The state is kept up to the length of the shortest; the decoder
    rereads the rest of longer ones in the next call, where it costs little."""
    shown = [scorer.sos_eos, *prompt_ids(config)]
    state, num_known = scorer.start(memory, np.array([x.utterance for x in texts])), 0
    while texts:
        drafts = [text.drafted() for text in texts]
        rows = [[*shown, *x.tokens, *draft][num_known:] for x, draft in zip(texts, drafts, strict=True)]
        said = steps(scorer, state, _padded(rows), min(2, scorer.num_tokens), config)
        goes_on = []
        for b, (text, draft) in enumerate(zip(texts, drafts, strict=True)):
            new = slice(len(rows[b]) - len(draft) - 1, len(rows[b]))
            here = Step(said.ids[b, new], said.log_probs[b, new], said.attention, None)
            goes_on.append(text.check(here, draft, scorer.sos_eos, config))
        texts = [text for text, more in zip(texts, goes_on, strict=True) if more]
        if texts:
            num_known = min(len(shown) + len(x.tokens) for x in texts) - 1
            state = scorer.select(scorer.rewind(said.state, num_known), np.flatnonzero(goes_on))


def _padded(rows: Sequence[Sequence[int]]) -> Ints:
    padded = np.full((len(rows), max(map(len, rows))), BLANK, np.int64)
    for given, row in zip(padded, rows, strict=True):
        given[: len(row)] = row
    return padded
