"""The options of a search."""

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
    """Options of all modes; each mode reads those that apply to it."""

    beam: int = 10
    """Hypotheses kept per utterance."""

    nbest: int = 1
    """Maximum number of hypotheses returned per utterance."""

    ctc_weight: float = 0.3
    """Weight of the CTC log-probability in modes that score with CTC and the decoder; the decoder has the
    rest."""

    reverse_weight: float = 0.3
    """Mode rescore: weight of the right-to-left decoder, if there is one; the other decoder has the rest."""

    length_penalty: float = 0.0
    """Mode unbounded divides final scores by ((length_offset + tokens) / (length_offset + 1)) to this power.
    Mode whisper does so with an offset of 5, and divides by the number of tokens if this is 0."""

    length_offset: float = 0.0
    """See `length_penalty`; arXiv:1609.08144 uses 5."""

    prompt: tuple[int | str, ...] | None = None
    """Units given to the decoder after sos/eos, as names or ids; None: the prompt of the model. They are
    never part of the text. For modes attention, unbounded, joint and rescore."""

    language: str = "auto"
    """Mode whisper: a language code such as "en"; "auto" lets the model detect it."""

    task: Literal["transcribe", "translate"] = "transcribe"
    """Mode whisper: "translate" means into English."""

    timestamps: bool = False
    """Mode whisper: the model writes the start and end of each stretch of text as timestamp units."""

    patience: float = 1.0
    """Mode whisper: the search stops once patience * beam hypotheses have ended."""

    temperature: float = 1.0
    """Divides the decoder's logits in modes attention, unbounded, joint, alignatt and edatt."""

    eos_scale: float = 1.0
    """Multiplies the log-probability of sos/eos in the same modes; below 1, texts end sooner."""

    extra_tokens: int = 0
    """The decoder may write this many tokens more than there are encoder frames, for long frames, ..."""

    max_tokens: int = 0
    """... but never more than this in all; 0: no further limit."""

    tokens_per_frame: int = 10
    """Number of most likely tokens per frame that the CTC prefix beam search considers."""

    margin_frames: int = 6
    """Mode alignatt holds back tokens whose attention peaks in the latest `margin_frames` encoder frames."""

    recent_share: float = 0.1
    """Mode edatt holds back tokens with at least this share of their attention on the latest ..."""

    recent_frames: int = 2
    """... `recent_frames` encoder frames."""

    detect_truncation: bool = False
    """Modes alignatt and edatt ask a word-counting head whether the audio so far ends with a complete word.
    If so, they write every allowed token; if not, never the last word, even if the text seems to end."""

    trigger_frames: int = 8
    """Mode triggered: encoder frames of look-ahead beyond the CTC spike of a token."""

    length_factor: float = 1.5
    """The decoder may write this many tokens for each token of the CTC best path, ..."""

    length_margin: int = 10
    """... plus this many, within the limits of `extra_tokens` and `max_tokens`."""

    max_repeats: int = 4
    """The decoder may write a phrase of up to `max_phrase` tokens this many times in a row, or more often if
    the CTC best path does."""

    max_phrase: int = 8

    length_model: LengthKind = "neural"
    """Segmental modes, the model of segment lengths: the network, length counts per token from training, or
    none."""

    length_scale: float = 1.0
    """Weight of the log-probability of the length model."""

    recombine: Recombine = "max"
    """The score of a text that can be cut into segments or chunks in several ways: that of the best way, or
    the sum of all."""

    min_emit: float = 0.01
    """Segmental modes try no segment end whose probability, given that the segment has lasted so long, is
    lower, except at the end of the utterance; 0 tries all, at many times the cost."""

    max_labels_per_chunk: int = 0
    """Mode chunked: maximum number of tokens per chunk; 0: as many as the decoder's step has frames."""

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
        """The maximum number of tokens that the decoder may write for num_frames encoder frames."""
        most = num_frames + self.extra_tokens
        return min(most, self.max_tokens) if self.max_tokens else most

    def penalise(self, score: Doubles, num_tokens: NDArray[np.int64]) -> Doubles:
        """Scores divided by the length penalty; num_tokens does not count sos/eos."""
        if not self.length_penalty:
            return score
        lens = (self.length_offset + num_tokens) / (self.length_offset + 1)
        penalised = score / np.where(lens > 0, lens, 1) ** self.length_penalty
        return np.where(lens > 0, penalised, -np.inf)  # else divided by nothing

    def blend(self, attention: Doubles, ctc: Doubles) -> Doubles:
        """(1 - w) attention + w ctc, in log-probabilities; a term of weight 0 may be -inf."""
        if self.ctc_weight in (0.0, 1.0):
            return ctc.copy() if self.ctc_weight else attention.copy()
        return (1 - self.ctc_weight) * attention + self.ctc_weight * ctc
