"""Label-synchronous beam search by the attention decoder, alone or jointly with CTC.

All hypotheses have the same number of tokens. One decoder step extends those of all utterances at once; the
decoder's most likely tokens are candidates (pre-selection), each candidate is scored by

    score(g c) = (1 - w) log p_attention(g c) + w log Psi_ctc(g c)

and the best `beam` survive. Those that end with eos are finished. Both terms only fall as a hypothesis
grows, so an utterance is done when its finished hypotheses score at least as well as everything that still
grows. With w = 0 this is attention beam search, with w = 1 and room for all tokens it is the search for the
best CTC token sequence.

The scores of hypotheses that the guards (guards.py) cut off are remembered. If no finished hypothesis is
better, the decoder would have run away; the answer is then that of the CTC prefix beam search, and names the
guard. Without a CTC head, hypotheses that are cut off are dropped as long as any other finishes; if none
does, the best of them is the answer. Tokens are then placed where the decoder's attention peaks.

N utterances · B hypotheses of all of them · K candidates of each · U tokens so far.

Watanabe et al., "Hybrid CTC/Attention Architecture for End-to-End Speech Recognition", 2017;
arXiv:1609.06773.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from asr.decode.align import ctc_log_prob, locate
from asr.decode.config import SearchConfig
from asr.decode.ctc import CtcGreedy, CtcPrefixBeam
from asr.decode.guards import LENGTH, REPETITION, max_tokens, repeats
from asr.decode.prefix_score import CtcPrefixScorer, PrefixState
from asr.decode.prompt import begin, prompt_ids
from asr.decode.scorer import BLANK, Floats, Hypothesis, Ints, Scorer
from asr.decode.step import step

Doubles = NDArray[np.float64]


Allows = Callable[[Floats], NDArray[np.bool_]]
"""Attention of B hypotheses (B, T) -> whether each may write its next token (B,)."""

NOTHING = Hypothesis((), 0.0)


def search(
    scorer: Scorer, log_probs: Sequence[Floats], memory: Any, config: SearchConfig
) -> list[list[Hypothesis]]:
    """At most `config.nbest` hypotheses of each utterance, best first.

    log_probs (T_n, V) of each utterance of `memory`. One without frames has no tokens, and skips the decoder.
    """
    return Search(scorer, log_probs, memory, config).finish()


class Search:
    """The token-by-token search over several utterances, continuing the text already `written`."""

    def __init__(
        self,
        scorer: Scorer,
        log_probs: Sequence[Floats],
        memory: Any,
        config: SearchConfig,
        written: Hypothesis = NOTHING,
        allows: Allows | None = None,
    ) -> None:
        """allows: called for every token; `Live.free` and `Finished.free` count those before its first no."""
        self.scorer, self.config, self.allows = scorer, config, allows
        self.answers = [Answers.begin(x, config, written) for x in log_probs]
        self.live: Live | None = None
        """None when the search is over."""
        owner = np.array([n for n, x in enumerate(log_probs) if len(x)], np.int64)
        self._ctc = CtcPrefixScorer(log_probs) if config.ctc_weight and len(owner) else None
        self._first = scorer.sos_eos
        if len(owner):
            self.live = self._begin(memory, owner, written.tokens)

    def _begin(self, memory: Any, owner: Ints, written: tuple[int, ...]) -> "Live":
        """A hypothesis for each utterance that has frames; what is written is fed in at once."""
        tokens = np.tile(np.array(written, np.int64), (len(owner), 1))
        log_probs = np.zeros(tokens.shape)
        prompt = prompt_ids(self.config)
        state, self._first = begin(self.scorer, memory, owner, (*prompt, *written))
        prefix = self._ctc.start(owner) if self._ctc else None
        if written:
            scores = self.scorer.score(memory, owner, tokens.tolist(), prompt=prompt)
            log_probs += [x[:-1] for x in scores]
        for token in tokens.T:
            prefix = self._ctc.extend(prefix, token) if self._ctc and prefix else None
        nowhere = np.zeros(tokens.shape, np.int64)
        return Live(owner, tokens, log_probs, state, prefix, np.full(len(owner), len(written)), nowhere)

    def finish(self) -> list[list[Hypothesis]]:
        """Search to the end: the answers for each utterance."""
        while self.live:
            self.extend()
        return [x.nbest(self.config) for x in self.answers]

    def extend(self) -> None:
        """Append one token to every hypothesis; those that end or are cut off go to `answers`."""
        live, ctc, scorer, config = self.live, self._ctc, self.scorer, self.config
        assert live is not None
        last = live.tokens[:, -1] if live.tokens.shape[1] else np.full(len(live), self._first)
        pool = min(scorer.num_tokens, config.beam + config.beam // 2 + 1)
        candidates, log_probs, attention, state = step(scorer, live.state, last, pool, config)
        values = log_probs.astype(np.float64)
        scores = live.log_probs.sum(1, keepdims=True) + values
        if ctc and live.prefix:
            psi = ctc.score(live.prefix, candidates)
            psi = np.where(candidates == scorer.sos_eos, ctc.end(live.prefix)[:, None], psi)
            scores = config.blend(scores, psi)
        scores[candidates == BLANK] = -np.inf

        row, column = choose(scores, live.owner, config.beam)
        owner, token, score = live.owner[row], candidates[row, column], scores[row, column]
        tokens = np.concatenate((live.tokens[row], token[:, None]), 1)
        values = np.concatenate((live.log_probs[row], values[row, column, None]), 1)
        free = live.free
        if self.allows:
            free = free + ((free == live.tokens.shape[1]) & self.allows(attention))
        places = np.concatenate((live.places, listened(attention)[:, None]), 1)[row]
        ends = Ends(score, tokens, values, free[row], places)
        grows = self._sort_out(owner, ends)
        if not grows.any():
            self.live = None
            return
        index = row[grows]
        prefix = ctc.extend(live.prefix.select(index), token[grows]) if ctc and live.prefix else None
        state = scorer.select(state, index)
        self.live = Live(
            owner[grows], tokens[grows], values[grows], state, prefix, free[index], places[grows]
        )

    def _sort_out(self, owner: Ints, ends: "Ends") -> NDArray[np.bool_]:
        """Which hypotheses keep growing; those that end, or that the guards cut off, go to `answers`."""
        tokens, score = ends.tokens, ends.score
        grows = tokens[:, -1] != self.scorer.sos_eos
        for b in np.flatnonzero(~grows):
            self.answers[owner[b]].finished.append(ends.row(int(b), tokens.shape[1] - 1))
        loops = repeats(tokens, [self.answers[n].ctc_tokens for n in owner], self.config)
        for n in np.unique(owner):
            answer = self.answers[n]
            here, too_long = grows & (owner == n), tokens.shape[1] > answer.max_tokens
            cut = here & (loops | too_long)
            guard = LENGTH if too_long else REPETITION
            grows[cut] = False
            answer.keep_cut([ends.row(int(b), tokens.shape[1]) for b in np.flatnonzero(cut)], guard)
            if not answer.judge(score[here & ~cut], score[cut], guard, self.config.nbest):
                grows[here] = False
        return grows


@dataclass(frozen=True)
class Live:
    """B hypotheses that still grow, grouped by utterance."""

    owner: Ints
    """Their utterance (B,)."""
    tokens: Ints
    """(B, U)"""
    log_probs: Doubles
    """Decoder log-probabilities of each token (B, U)."""
    state: Any
    prefix: PrefixState | None
    free: Ints
    """How many of the first tokens were allowed (B,)."""
    places: Ints
    """The frame with the most attention for each token (B, U)."""

    def __len__(self) -> int:
        return len(self.owner)


class Finished(NamedTuple):
    """A hypothesis that has ended."""

    score: float
    tokens: tuple[int, ...]
    log_probs: Doubles
    """Decoder log-probabilities of each token and of eos."""
    free: int
    """How many of the first tokens were allowed."""
    places: tuple[int, ...] = ()
    """The frame with the most attention for each token."""


class Ends(NamedTuple):
    """B hypotheses, each including its new token."""

    score: Doubles
    tokens: Ints
    log_probs: Doubles
    free: Ints
    places: Ints

    def row(self, b: int, num_tokens: int) -> Finished:
        """The first num_tokens tokens of hypothesis b, as an answer."""
        tokens, places = (tuple(x[b, :num_tokens].tolist()) for x in (self.tokens, self.places))
        return Finished(
            float(self.score[b]), tokens, self.log_probs[b], min(int(self.free[b]), num_tokens), places
        )


@dataclass
class Answers:
    """What the search knows about one utterance."""

    log_probs: Floats
    ctc_tokens: tuple[int, ...]
    max_tokens: int
    written: Hypothesis
    """What every answer begins with."""
    finished: list[Finished] = field(default_factory=list)
    guard: str = ""
    """Which guard stopped the search, if one did."""
    cut: tuple[Finished, str] | None = None
    """Without CTC, the best hypothesis that a guard removed, and the guard."""

    @classmethod
    def begin(cls, log_probs: Floats, config: SearchConfig, written: Hypothesis) -> "Answers":
        if not log_probs.shape[1]:
            return cls(log_probs, (), max_tokens(None, len(log_probs), config), written)
        greedy = CtcGreedy()
        greedy.advance(log_probs)
        tokens = greedy.best().tokens
        return cls(log_probs, tokens, max_tokens(len(tokens), len(log_probs), config), written)

    @property
    def has_ctc(self) -> bool:
        return bool(self.log_probs.shape[1])

    def keep_cut(self, removed: Sequence[Finished], guard: str) -> None:
        """Without CTC, remember the best of what a guard removed, in case nothing finishes."""
        for found in removed if not self.has_ctc else ():
            if self.cut is None or found.score > self.cut[0].score:
                self.cut = found, guard

    def judge(self, grows: Doubles, cut: Doubles, guard: str, count: int) -> bool:
        """Whether to go on, given the scores of the growing hypotheses and of those that `guard` removed.

        A runaway hypothesis that was no better than the rest is simply dropped.
        """
        scores = sorted((x.score for x in self.finished), reverse=True)
        best = grows.max(initial=-np.inf)
        if self.has_ctc and cut.max(initial=-np.inf) > max(best, *scores[:1], -np.inf):
            self.guard = guard
        return not self.guard and (len(scores) < count or scores[count - 1] < best)

    def nbest(self, config: SearchConfig) -> list[Hypothesis]:
        """The finished hypotheses, or those of CTC if a guard stopped the search."""
        finished = sorted(self.finished, key=lambda x: -x.score)[: config.nbest]
        if finished and not self.guard:
            return [hypothesis(self.log_probs, x, config) for x in finished]
        if not self.has_ctc:
            answer, guard = self.cut or (None, "")
            return [replace(hypothesis(self.log_probs, answer, config), guard=guard) if answer else NOTHING]
        beam = CtcPrefixBeam(config.beam, config.tokens_per_frame)
        beam.advance(self.log_probs)
        heard = {x.tokens: x for x in map(self._behind, beam.nbest(config.nbest))}
        return [replace(x, guard=self.guard) for x in heard.values()]

    def _behind(self, heard: Hypothesis) -> Hypothesis:
        """The text already written, followed by the later tokens of a CTC hypothesis."""
        if not self.written.tokens:
            return heard
        first = bisect_right(heard.frames, self.written.frames[-1])
        tokens = self.written.tokens + heard.tokens[first:]
        score = ctc_log_prob(self.log_probs, tokens)
        return Hypothesis(
            tokens,
            score,
            {"ctc": score},
            self.written.frames + heard.frames[first:],
            self.written.confidence + heard.confidence[first:],
        )


def hypothesis(frames: Floats, found: Finished, config: SearchConfig) -> Hypothesis:
    """An answer, aligned to the CTC log-probabilities `frames` (T, V), or without CTC by the attention.

    found.log_probs (U + 1,), or (U,) without an end: decoder log-probabilities of the tokens and of eos.
    """
    tokens, log_probs = found.tokens, found.log_probs
    parts = {"attention": float(log_probs.sum())}
    if frames.shape[1]:
        parts = {"ctc": ctc_log_prob(frames, tokens), **parts}
        starts, peaks = locate(frames, tokens)
        confidence = np.exp(config.blend(log_probs[: len(tokens)], peaks))
    else:
        starts = tuple(np.maximum.accumulate(np.array(found.places, np.int64)).tolist())
        confidence = np.exp(log_probs[: len(tokens)])
    return Hypothesis(tokens, found.score, parts, starts, tuple(confidence.tolist()))


def listened(attention: Floats) -> Ints:
    """attention (B, T) -> the frame with the most (B,)."""
    return attention.argmax(1) if attention.shape[1] else np.zeros(len(attention), np.int64)


def choose(scores: Doubles, owner: Ints, beam: int) -> tuple[Ints, Ints]:
    """Row and column of the `beam` best of the scores (B, K) of each utterance, best first, without -inf."""
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    rows, columns = [], []
    for start, part in zip(starts, np.split(scores, starts[1:]), strict=True):
        order = np.argsort(-part, axis=None, kind="stable")[:beam]
        order = order[part.ravel()[order] > -np.inf]
        rows.append(start + order // part.shape[1])
        columns.append(order % part.shape[1])
    return np.concatenate(rows), np.concatenate(columns)
