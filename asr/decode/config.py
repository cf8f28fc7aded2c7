"""How far and by what weights to search."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from asr.errors import ConfigError

Doubles = NDArray[np.float64]

LengthKind = Literal["neural", "static", "none"]
Recombine = Literal["max", "sum"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """The options of every mode; a mode reads those that concern it."""

    beam: int = 10
    """Hypotheses kept of each utterance."""

    nbest: int = 1
    """Hypotheses returned of each utterance, at most."""

    ctc_weight: float = 0.3
    """Share of the CTC log-probability in the score of modes with both; the decoder has the rest."""

    reverse_weight: float = 0.3
    """Share of the right-to-left decoder in the decoders' score in mode rescore, where there is one."""

    length_penalty: float = 0.0
    """Mode unbounded divides a score by the number of tokens, ..."""

    length_offset: float = 0.0
    """... of which it counts so many more, and divides by one more than these, to that power, at the end: by
    ((length_offset + tokens) / (length_offset + 1)) ** length_penalty; 5 is that of arXiv:1609.08144."""

    prompt: tuple[int | str, ...] | None = None
    """Units that the decoder is shown behind sos/eos, as names or ids; None: those of the model. They are
    never a part of the text. For modes attention, unbounded, joint and rescore."""

    language: str = "auto"
    """Mode whisper: a code, as in "en"; "auto" asks the model."""

    task: Literal["transcribe", "translate"] = "transcribe"
    """Mode whisper: translate is into English."""

    timestamps: bool = False
    """Mode whisper: the model writes when each stretch of text begins and ends, as units among the text."""

    patience: float = 1.0
    """Mode whisper: the search ends when so many times `beam` hypotheses have ended."""

    temperature: float = 1.0
    """The decoder's logits are divided by this where it writes token by token."""

    eos_scale: float = 1.0
    """Its log-probability of the end of the text is multiplied by this; below 1, texts end sooner."""

    extra_tokens: int = 0
    """The decoder may write so many tokens more than there are encoder frames, where these are long, ..."""

    max_tokens: int = 0
    """... but never more than this; 0: whatever the frames allow."""

    tokens_per_frame: int = 10
    """Likeliest tokens of a frame that the CTC prefix beam considers."""

    margin_frames: int = 6
    """Mode alignatt writes no token whose place is in the last so many encoder frames that have arrived."""

    recent_share: float = 0.1
    """Mode edatt writes no token that pays so large a share of its attention to the last ..."""

    recent_frames: int = 2
    """... so many encoder frames that have arrived."""

    detect_truncation: bool = False
    """Modes alignatt and edatt ask a head of the model whether what has arrived ends with a word: then they
    write all that they may, and otherwise never the last word of a text that seems to have ended."""

    trigger_frames: int = 8
    """Encoder frames behind its CTC spike that a token hears in mode triggered."""

    length_factor: float = 1.5
    """The decoder may write this many tokens for each of the CTC best path, ..."""

    length_margin: int = 10
    """... and as many more, but never more than there are encoder frames."""

    max_repeats: int = 4
    """The decoder may write a phrase of up to `max_phrase` tokens this many times in a row, the CTC as often
    as it likes."""

    max_phrase: int = 8

    length_model: LengthKind = "neural"
    """What says how long segments are, in the segmental modes: the network, counts of each token's lengths in
    training, or nothing."""

    length_scale: float = 1.0
    """Weight of its log-probability."""

    recombine: Recombine = "max"
    """A text that is cut in several ways, into segments or chunks, is as probable as the best of them, or as
    all together."""

    min_emit: float = 0.01
    """Where a segment that has lasted until then ends less probably than this, no end is tried, except that
    of the utterance; 0 tries all, at many times the cost."""

    max_labels_per_chunk: int = 0
    """A chunked decoder may write so many tokens while it hears a chunk; 0: as many as its step has
    frames."""

    def __post_init__(self) -> None:
        for name in ("temperature", "eos_scale"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected more than 0")
        for name in ("beam", "nbest", "tokens_per_frame", "recent_frames", "max_repeats", "max_phrase"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in (
            "margin_frames",
            "recent_share",
            "trigger_frames",
            "max_labels_per_chunk",
            "length_scale",
            "length_offset",
            "max_tokens",
            "extra_tokens",
        ):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 0 or more")
        for name in ("ctc_weight", "reverse_weight", "min_emit"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 0 to 1")
        for name, kind in (("length_model", LengthKind), ("recombine", Recombine)):
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(f"{name} is {getattr(self, name)}, expected {' or '.join(get_args(kind))}")

    def most_tokens(self, num_frames: int) -> int:
        """The most tokens that the decoder may write in so many encoder frames."""
        most = num_frames + self.extra_tokens
        return min(most, self.max_tokens) if self.max_tokens else most

    def penalise(self, score: Doubles, num_tokens: NDArray[np.int64]) -> Doubles:
        """Scores of texts of so many tokens, without sos/eos, divided by the length penalty."""
        if not self.length_penalty:
            return score
        lens = (self.length_offset + num_tokens) / (self.length_offset + 1)
        penalised = score / np.where(lens > 0, lens, 1) ** self.length_penalty
        return np.where(lens > 0, penalised, -np.inf)  # else divided by nothing

    def blend(self, attention: Doubles, ctc: Doubles) -> Doubles:
        """(1 - w) attention + w ctc, of log-probabilities; a part without weight may be -inf."""
        if self.ctc_weight in (0.0, 1.0):
            return ctc.copy() if self.ctc_weight else attention.copy()
        return (1 - self.ctc_weight) * attention + self.ctc_weight * ctc
