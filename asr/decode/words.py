"""The words that tokens spell: where one begins, and when each was said.

V units
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from asr.decode.scorer import UNK, Hypothesis


class Word(NamedTuple):
    """A word, and where it is."""

    word: str
    start_s: float
    end_s: float
    confidence: float
    """That of its least certain token."""


Spell = Callable[[Sequence[int]], list[tuple[str, int, int]]]
"""Token ids -> (word, its first token, the one behind its last), as Tokenizer.words."""


def word_starts(spell: Spell, num_tokens: int) -> NDArray[np.bool_]:
    """Units before which a word is complete (V,): they part two others."""
    return np.array([len(spell((UNK, unit, UNK))) > 1 for unit in range(num_tokens)])


def words(hypothesis: Hypothesis, spell: Spell, frame_s: float) -> list[Word]:
    """The words of a hypothesis, from the frame of the first token to the end of that of the last.

    frame_s: seconds per encoder frame.
    """
    frames, confidence = hypothesis.frames, hypothesis.confidence
    ends = hypothesis.ends or [frame + 1 for frame in frames]
    return [
        Word(word, frames[first] * frame_s, ends[end - 1] * frame_s, min(confidence[first:end]))
        for word, first, end in spell(hypothesis.tokens)
    ]
