"""The modes of decoding: one dict, and the one function that runs any of them on waveforms.

Every mode says for each token at which encoder frame it is emitted, by the best CTC alignment, and how sure
it is: the highest CTC posterior of the token in the frames aligned to it, and in modes with the decoder the
geometric mean of that and of the decoder's probability of the token, weighted as the score is (the decoder
alone in mode attention).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from asr.context import WHOLE, Context
from asr.decode.config import SearchConfig
from asr.decode.ctc import CtcGreedy, CtcPrefixBeam, advance_all
from asr.decode.joint import search
from asr.decode.rescore import rescore
from asr.decode.scorer import Floats, Hypothesis, Scorer

Mode = Callable[[Scorer, Sequence[Floats], Any, SearchConfig], list[list[Hypothesis]]]


def ctc_greedy(
    scorer: Scorer, log_probs: Sequence[Floats], memory: Any, config: SearchConfig
) -> list[list[Hypothesis]]:
    """The best CTC path."""
    searches = [CtcGreedy() for _ in log_probs]
    for x, frames in zip(searches, log_probs, strict=True):
        x.advance(frames)
    return [x.nbest(config.nbest) for x in searches]


def ctc_prefix(
    scorer: Scorer, log_probs: Sequence[Floats], memory: Any, config: SearchConfig
) -> list[list[Hypothesis]]:
    """The best CTC token sequences."""
    searches = [CtcPrefixBeam(config.beam, config.tokens_per_frame) for _ in log_probs]
    advance_all(searches, log_probs)
    return [x.nbest(config.nbest) for x in searches]


def attention(
    scorer: Scorer, log_probs: Sequence[Floats], memory: Any, config: SearchConfig
) -> list[list[Hypothesis]]:
    """Beam search by the decoder alone; CTC only bounds it (guards.py)."""
    return search(scorer, log_probs, memory, replace(config, ctc_weight=0.0))


def two_pass(
    scorer: Scorer, log_probs: Sequence[Floats], memory: Any, config: SearchConfig
) -> list[list[Hypothesis]]:
    """All that the CTC prefix beam holds at the end, rescored by the decoder."""
    first = ctc_prefix(scorer, log_probs, memory, replace(config, nbest=config.beam))
    return [nbest[: config.nbest] for nbest in rescore(scorer, memory, first, config)]


MODES: dict[str, Mode] = {
    "ctc-greedy": ctc_greedy,
    "ctc-prefix": ctc_prefix,
    "attention": attention,
    "joint": search,
    "rescore": two_pass,
}


def decode(
    scorer: Scorer,
    mode: str,
    samples: Sequence[Floats],
    config: SearchConfig,
    context: Context = WHOLE,
) -> list[list[Hypothesis]]:
    """The n-best list of each waveform, best first; at least one hypothesis, without tokens for silence of
    length 0."""
    heard = [n for n, x in enumerate(samples) if len(x)]
    answers = [[Hypothesis((), 0.0)] for _ in samples]
    if heard:
        log_probs, memory = scorer.encode([samples[n] for n in heard], context)
        for n, nbest in zip(heard, MODES[mode](scorer, log_probs, memory, config), strict=True):
            answers[n] = nbest
    return answers


class Word(NamedTuple):
    """A word, and where it is."""

    word: str
    start_s: float
    end_s: float
    confidence: float
    """That of its least certain token."""


def words(
    hypothesis: Hypothesis, spell: Callable[[Sequence[int]], list[tuple[str, int, int]]], frame_s: float
) -> list[Word]:
    """The words of a hypothesis, from the frame of the first token to the end of that of the last.

    spell: token ids -> (word, its first token, the one behind its last), as Tokenizer.words. frame_s:
    seconds per encoder frame.
    """
    frames, confidence = hypothesis.frames, hypothesis.confidence
    return [
        Word(word, frames[first] * frame_s, (frames[end - 1] + 1) * frame_s, min(confidence[first:end]))
        for word, first, end in spell(hypothesis.tokens)
    ]
