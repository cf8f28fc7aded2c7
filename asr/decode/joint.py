"""Label-synchronous beam search by the attention decoder, alone or jointly with CTC.

All hypotheses have the same number of tokens. One decoder step extends those of all utterances at once; the
decoder's likeliest tokens are candidates (pre-selection), and each is scored by

    score(g c) = (1 - w) log p_attention(g c) + w log Psi_ctc(g c)

of which the best `beam` survive. Those that end, with eos, are finished. Both terms only fall as a
hypothesis grows, so an utterance is done when its finished hypotheses are at least as good as everything
that still grows. With w = 0 it is attention beam search, with w = 1 and room for all tokens the search for
the best CTC token sequence.

What the guards (guards.py) cut off is remembered by its score. If nothing that finished is better than
that, the decoder would have run away, and the answer is that of the CTC prefix beam, saying which guard it
was.

N utterances · B hypotheses of all of them · K candidates of each · U tokens so far.

Watanabe et al., "Hybrid CTC/Attention Architecture for End-to-End Speech Recognition", 2017;
arXiv:1609.06773.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asr.decode.align import ctc_log_prob, locate
from asr.decode.config import SearchConfig
from asr.decode.ctc import CtcGreedy, CtcPrefixBeam
from asr.decode.guards import LENGTH, REPETITION, max_tokens, repeats
from asr.decode.prefix_score import CtcPrefixScorer, PrefixState
from asr.decode.scorer import BLANK, Floats, Hypothesis, Ints, Scorer

Doubles = NDArray[np.float64]


def search(
    scorer: Scorer, log_probs: Sequence[Floats], memory: Any, config: SearchConfig
) -> list[list[Hypothesis]]:
    """At most `config.nbest` hypotheses of each utterance, best first.

    log_probs (T_n, V) of each utterance of `memory`. One without frames has no tokens, and is not shown to
    the decoder.
    """
    answers = [_Answers.begin(x, config) for x in log_probs]
    owner = np.array([n for n, x in enumerate(log_probs) if len(x)], np.int64)
    if len(owner):
        ctc = CtcPrefixScorer(log_probs) if config.ctc_weight else None
        live: _Live | None = _Live(
            owner,
            np.zeros((len(owner), 0), np.int64),
            np.zeros((len(owner), 0)),
            scorer.start(memory, owner),
            ctc.start(owner) if ctc else None,
        )
        while live:
            live = _extend(scorer, ctc, live, answers, config)
    return [x.nbest(config) for x in answers]


@dataclass(frozen=True)
class _Live:
    """B hypotheses that still grow, those of an utterance side by side."""

    owner: Ints
    """Their utterance (B,)."""
    tokens: Ints
    """(B, U)"""
    log_probs: Doubles
    """The decoder's, of each token (B, U)."""
    state: Any
    prefix: PrefixState | None

    def __len__(self) -> int:
        return len(self.owner)


@dataclass
class _Answers:
    """What the search knows of one utterance."""

    log_probs: Floats
    ctc_tokens: tuple[int, ...]
    max_tokens: int
    finished: list[tuple[float, tuple[int, ...], Doubles]] = field(default_factory=list)
    """Score, tokens, and the decoder's log-probability of each and of eos."""
    guard: str = ""
    """Which guard stopped the search, if one did."""

    @classmethod
    def begin(cls, log_probs: Floats, config: SearchConfig) -> "_Answers":
        greedy = CtcGreedy()
        greedy.advance(log_probs)
        tokens = greedy.best().tokens
        return cls(log_probs, tokens, max_tokens(len(tokens), len(log_probs), config))

    def judge(self, grows: Doubles, cut: Doubles, guard: str, count: int) -> bool:
        """Whether to go on, given the scores of what grows and of what `guard` removed.

        A runaway that was no better than the rest is merely gone.
        """
        scores = sorted((x[0] for x in self.finished), reverse=True)
        best = grows.max(initial=-np.inf)
        if cut.max(initial=-np.inf) > max(best, *scores[:1], -np.inf):
            self.guard = guard
        return not self.guard and (len(scores) < count or scores[count - 1] < best)

    def nbest(self, config: SearchConfig) -> list[Hypothesis]:
        """What finished, or the CTC hypotheses if a guard stopped the search."""
        finished = sorted(self.finished, key=lambda x: -x[0])[: config.nbest]
        if finished and not self.guard:
            return [hypothesis(self.log_probs, *x, config) for x in finished]
        beam = CtcPrefixBeam(config.beam, config.tokens_per_frame)
        beam.advance(self.log_probs)
        return [replace(x, guard=self.guard) for x in beam.nbest(config.nbest)]


def hypothesis(
    frames: Floats, score: float, tokens: tuple[int, ...], log_probs: Doubles, config: SearchConfig
) -> Hypothesis:
    """An answer, aligned to the CTC log-probabilities `frames` (T, V).

    log_probs (U + 1,), or (U,) without an end: the decoder's, of the tokens and of eos.
    """
    starts, peaks = locate(frames, tokens)
    parts = {"ctc": ctc_log_prob(frames, tokens), "attention": float(log_probs.sum())}
    confidence = np.exp(config.blend(log_probs[: len(tokens)], peaks))
    return Hypothesis(tokens, score, parts, starts, tuple(confidence.tolist()))


def _extend(
    scorer: Scorer,
    ctc: CtcPrefixScorer | None,
    live: _Live,
    answers: Sequence[_Answers],
    config: SearchConfig,
) -> _Live | None:
    """Append one token to every hypothesis; those that end or are cut go to `answers`. None when all are
    done."""
    last = live.tokens[:, -1] if live.tokens.shape[1] else np.full(len(live), scorer.sos_eos)
    pool = min(scorer.num_tokens, config.beam + config.beam // 2 + 1)
    candidates, values, _, state = scorer.step(live.state, last, pool)
    scores = live.log_probs.sum(1, keepdims=True) + values
    if ctc and live.prefix:
        psi = ctc.score(live.prefix, candidates)
        psi = np.where(candidates == scorer.sos_eos, ctc.end(live.prefix)[:, None], psi)
        scores = config.blend(scores, psi)
    scores[candidates == BLANK] = -np.inf

    row, column = _best(scores, live.owner, config.beam)
    owner, token, score = live.owner[row], candidates[row, column], scores[row, column]
    tokens = np.concatenate((live.tokens[row], token[:, None]), 1)
    log_probs = np.concatenate((live.log_probs[row], values[row, column, None]), 1)
    grows = token != scorer.sos_eos
    for b in np.flatnonzero(~grows):
        answers[owner[b]].finished.append((float(score[b]), tuple(tokens[b, :-1].tolist()), log_probs[b]))
    loops = repeats(tokens, [answers[n].ctc_tokens for n in owner], config)
    for n in np.unique(owner):
        here, too_long = grows & (owner == n), tokens.shape[1] > answers[n].max_tokens
        cut = here & (loops | too_long)
        guard = LENGTH if too_long else REPETITION
        grows[cut] = False
        if not answers[n].judge(score[here & ~cut], score[cut], guard, config.nbest):
            grows[here] = False
    if not grows.any():
        return None
    index = row[grows]
    prefix = ctc.extend(live.prefix.select(index), token[grows]) if ctc and live.prefix else None
    return _Live(owner[grows], tokens[grows], log_probs[grows], scorer.select(state, index), prefix)


def _best(scores: Doubles, owner: Ints, beam: int) -> tuple[Ints, Ints]:
    """Row and column of the `beam` best of the scores (B, K) of each utterance, best first, without -inf."""
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    rows, columns = [], []
    for start, part in zip(starts, np.split(scores, starts[1:]), strict=True):
        order = np.argsort(-part, axis=None, kind="stable")[:beam]
        order = order[part.ravel()[order] > -np.inf]
        rows.append(start + order // part.shape[1])
        columns.append(order % part.shape[1])
    return np.concatenate(rows), np.concatenate(columns)
