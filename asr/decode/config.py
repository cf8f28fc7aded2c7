"""How far and by what weights to search."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from asr.errors import ConfigError

Doubles = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """The options of every mode; a mode reads those that concern it."""

    beam: int = 10
    """Hypotheses kept of each utterance."""

    nbest: int = 1
    """Hypotheses returned of each utterance, at most."""

    ctc_weight: float = 0.3
    """Share of the CTC log-probability in the score of modes joint and rescore; the decoder has the rest."""

    reverse_weight: float = 0.3
    """Share of the right-to-left decoder in the decoders' score in mode rescore, where there is one."""

    length_penalty: float = 0.0
    """Mode unbounded divides a score by the number of tokens to this power, at the end."""

    tokens_per_frame: int = 10
    """Likeliest tokens of a frame that the CTC prefix beam considers."""

    length_factor: float = 1.5
    """The decoder may write this many tokens for each of the CTC best path, ..."""

    length_margin: int = 10
    """... and as many more, but never more than there are encoder frames."""

    max_repeats: int = 4
    """The decoder may write a phrase of up to `max_phrase` tokens this many times in a row, the CTC as often
    as it likes."""

    max_phrase: int = 8

    def __post_init__(self) -> None:
        for name in ("beam", "nbest", "tokens_per_frame", "max_repeats", "max_phrase"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("ctc_weight", "reverse_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 0 to 1")

    def blend(self, attention: Doubles, ctc: Doubles) -> Doubles:
        """(1 - w) attention + w ctc, of log-probabilities; a part without weight may be -inf."""
        if self.ctc_weight in (0.0, 1.0):
            return ctc.copy() if self.ctc_weight else attention.copy()
        return (1 - self.ctc_weight) * attention + self.ctc_weight * ctc
