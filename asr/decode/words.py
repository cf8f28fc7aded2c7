"""The words that tokens spell: where one begins, and when each was spoken.

V units
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from asr.decode.scorer import UNK, Hypothesis


class Word(NamedTuple):
    """A word and its time."""

    word: str
    start_s: float
    end_s: float
    confidence: float
    """The confidence of its least certain token."""


Spell = Callable[[Sequence[int]], list[tuple[str, int, int]]]
"""Token ids -> (word, index of its first token, index after its last), like Tokenizer.words."""


def word_starts(spell: Spell, num_tokens: int) -> NDArray[np.bool_]:
    """Units before which a word is complete (V,): placed between two other units, they split them."""
    return np.array([len(spell((UNK, unit, UNK))) > 1 for unit in range(num_tokens)])


def words(hypothesis: Hypothesis, spell: Spell, frame_s: float) -> list[Word]:
    """The words of a hypothesis, each from the frame of its first token to the end of its last.

    frame_s: seconds per encoder frame.
    """
    frames, confidence = hypothesis.frames, hypothesis.confidence
    ends = hypothesis.ends or [frame + 1 for frame in frames]
    return [
        Word(word, frames[first] * frame_s, ends[end - 1] * frame_s, min(confidence[first:end]))
        for word, first, end in spell(hypothesis.tokens)
    ]
