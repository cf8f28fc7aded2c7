"""The prompt of Whisper, and what it may answer (Radford et al., arXiv:2212.04356, sections 2.3 and 4.5).

The decoder is given the preceding text, if any, then the start of the transcript, the language, the task and
whether to write timestamps. It answers with text and, if requested, with a pair of timestamps around each
stretch of it:

    <|startofprev|> ... <sos/eos> <|en|> <|transcribe|>
    <|0.00|> text <|2.40|> <|2.40|> text <|5.00|> <sos/eos>

B hypotheses · U tokens written so far · V units
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from asr.decode.scorer import BLANK, UNK, Ints
from asr.errors import ConfigError

Doubles = NDArray[np.float64]

SOS_EOS = 1
"""As input the start of the transcript, as output the end of the text."""

SPACE = "▁"


NO_SPEECH = tuple(
    re.findall(
        r"\S+",
        '" # ( ) * + / : ; < = > @ [ \\ ] ^ _ ` { | } ~ 「 」 『 』 << >> <<< >>> -- --- -( -[ (\' (" (( )) '
        "((( ))) [[ ]] {{ }} ♪♪ ♪♪♪",
    )
)
"""Signs that mark speakers, noises and music in subtitles."""

MUSIC = tuple("♩♪♫♬♭♮♯")
"""Signs whose first byte pieces begin no spoken letter."""


@dataclass(frozen=True, kw_only=True)
class Specials:
    """The units that are not text."""

    start: int
    """Start of the transcript: the decoder may predict it instead of `SOS_EOS`, but never should."""

    languages: dict[str, int]
    """By code such as "en"; empty in English-only models."""

    translate: int
    transcribe: int
    start_lm: int
    start_previous: int
    no_speech: int
    no_timestamps: int

    timestamps: int
    """The first timestamp unit; all units after it are timestamps, too."""

    space: int | None
    """The unit that is a space, if there is one."""

    @classmethod
    def of(cls, symbols: Sequence[str]) -> "Specials":
        """Find them by name; raises ConfigError if the units are not Whisper's."""
        ids = {symbol: i for i, symbol in enumerate(symbols)}
        try:
            start, translate = ids["<|startoftranscript|>"], ids["<|translate|>"]
            return cls(
                start=start,
                languages={
                    symbols[i][2:-2]: i
                    for i in range(start + 1, translate)
                    if not symbols[i].startswith("<|unused-")
                },
                translate=translate,
                transcribe=ids["<|transcribe|>"],
                start_lm=ids["<|startoflm|>"],
                start_previous=ids["<|startofprev|>"],
                no_speech=ids["<|nospeech|>"],
                no_timestamps=ids["<|notimestamps|>"],
                timestamps=ids["<|0.00|>"],
                space=ids.get(SPACE),
            )
        except KeyError as error:
            raise ConfigError(f"tokens.txt: no unit {error.args[0]}; expected the units of Whisper") from None

    @property
    def others(self) -> tuple[int, ...]:
        """Units that are never part of an answer."""
        tasks = (self.translate, self.transcribe, self.start_lm, self.start_previous, self.start)
        return (*tasks, self.no_speech)

    def is_text(self, num_tokens: int) -> NDArray[np.bool_]:
        """Which units are text (V,)."""
        text = np.arange(num_tokens) < self.start
        text[[BLANK, SOS_EOS, UNK]] = False
        return text


@dataclass(frozen=True, kw_only=True, slots=True)
class WhisperOptions:
    """How the decoder is prompted for a window, and how its answer is searched."""

    language: str | None = "auto"
    """A code such as "en"; "auto" lets the model detect it; None for English-only models, which take none."""

    task: Literal["transcribe", "translate"] = "transcribe"
    """translate: into English."""

    timestamps: bool = True

    prompt: tuple[int, ...] = ()
    """Preceding text, or a sample of the style; only the end is used, up to half of the context."""

    prefix: tuple[int, ...] = ()
    """The beginning of the answer."""

    suppress_space: bool = True
    """The answer neither begins with a space unit nor is it empty."""

    suppress: tuple[int, ...] | None = ()
    """Units to suppress, besides those that are not text; None: suppress no unit at all."""

    max_first_time: int | None = 50
    """The latest first timestamp, in encoder frames; None: no limit."""

    max_tokens: int | None = None
    """Maximum tokens of an answer; None: half of the decoder's context."""

    beam: int = 5
    """Hypotheses kept; 1 takes the best token each time."""

    patience: float = 1.0
    """The search stops once patience * beam hypotheses have ended (arXiv:2204.05424)."""

    length_penalty: float | None = None
    """Scores are divided by ((5 + tokens) / 6) to this power (arXiv:1609.08144); None: by the tokens."""

    def __post_init__(self) -> None:
        if self.beam < 1 or round(self.beam * self.patience) < 1:
            raise ConfigError(
                f"beam is {self.beam} and patience {self.patience:g}, expected a product of at least 1"
            )
        if self.task not in ("transcribe", "translate"):
            raise ConfigError(f"task is {self.task}, expected transcribe or translate")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(f"max_tokens is {self.max_tokens}, expected at least 1")


def unspoken(symbols: Sequence[str]) -> tuple[int, ...]:
    """Units that are kept out of transcripts: signs that occur in subtitles but not in speech. Hyphens and
    single quotes may occur within a word but not before it."""
    ids = {symbol: i for i, symbol in enumerate(symbols)}
    found = [_first(ids, [f"{SPACE}{sign}", SPACE]) for sign in "-'"]
    for before in ("", SPACE):
        found += [ids.get(before + sign.replace("<", "<0x3C>")) for sign in NO_SPEECH]
        for sign in MUSIC:
            data = [f"<0x{x:02X}>" for x in sign.encode()]
            parts = [before + x for x in (sign, data[0] + data[1], data[0])]
            found.append(_first(ids, [*parts, before]))
    return tuple(sorted({i for i in found if i is not None}))


def _first(ids: Mapping[str, int], names: Sequence[str]) -> int | None:
    """The id of the first name that exists."""
    return next((ids[name] for name in names if name in ids), None)


def language_unit(specials: Specials, language: str) -> int:
    """The unit of a language; raises ConfigError for one that the model does not know."""
    if language not in specials.languages:
        raise ConfigError(f"language is {language}, expected one of {', '.join(specials.languages)}")
    return specials.languages[language]


def before_start(specials: Specials, options: WhisperOptions, context: int) -> list[int]:
    """The prompt up to the start of the transcript, for a decoder of `context` tokens."""
    if not options.prompt:
        return [SOS_EOS]
    return [specials.start_previous, *options.prompt[-(context // 2 - 1) :], SOS_EOS]


def behind_start(
    specials: Specials, options: WhisperOptions, language: str | None, context: int
) -> list[int]:
    """The prompt after the start of the transcript, in a language, up to where the answer continues."""
    tokens = []
    if language is not None:
        task = specials.translate if options.task == "translate" else specials.transcribe
        tokens += [language_unit(specials, language), task]
    if not options.timestamps:
        tokens.append(specials.no_timestamps)
    room = context if options.max_tokens is None else max(context // 2 - options.max_tokens, 1)
    return [*tokens, *options.prefix[-room:]]


class Rules:
    """Which tokens may come next, and their probabilities normalised over these."""

    def __init__(self, specials: Specials, options: WhisperOptions, num_tokens: int) -> None:
        self.specials, self.options = specials, options
        self._text = specials.is_text(num_tokens)
        self._never = _mask([BLANK, UNK], num_tokens)
        if options.suppress is not None:
            self._never[[*specials.others, *options.suppress]] = True
        if options.timestamps:
            self._never[specials.no_timestamps] = True
        self._empty = _mask([SOS_EOS, *([] if specials.space is None else [specials.space])], num_tokens)
        self._late = np.zeros(num_tokens, bool)
        if options.max_first_time is not None:
            self._late[specials.timestamps + options.max_first_time + 1 :] = True

    def __call__(self, log_probs: Doubles, written: Ints) -> Doubles:
        """log_probs (B, V) of the next token after the answers so far, written (B, U) -> log-probabilities
        (B, V), -inf for tokens that are not allowed."""
        out = np.where(self._never, -np.inf, log_probs)
        if not written.shape[1] and self.options.suppress_space:
            out[:, self._empty] = -np.inf
        if self.options.timestamps:
            for row, tokens in zip(out, written, strict=True):
                self._keep_times(row, tokens)
        return log_softmax(out)

    def _keep_times(self, row: Doubles, tokens: Ints) -> None:
        """Timestamps come first, in pairs except for the first and the last, never go back, and are forced
        where all of them together are more likely than any other token."""
        first = self.specials.timestamps
        is_time = tokens >= first
        if not len(tokens):
            row[:first] = -np.inf
            row[self._late] = -np.inf
        elif is_time[-1] and (len(tokens) < 2 or is_time[-2]):
            row[first:] = -np.inf
        elif is_time[-1]:
            row[self._text] = -np.inf
        if is_time.any():
            ends = is_time[-1] and not is_time[-2:-1].all()
            # text has a duration, and what follows it may begin where it ends
            row[first : tokens[is_time][-1] + (not ends)] = -np.inf
        chances = log_softmax(row)
        if np.logaddexp.reduce(chances[first:]) > chances[:first].max():
            row[:first] = -np.inf


def log_softmax(x: Doubles) -> Doubles:
    """Over the last axis; -inf stays -inf."""
    highest = x.max(-1, keepdims=True)
    return x - highest - np.log(np.exp(x - highest).sum(-1, keepdims=True))


def _mask(ids: Sequence[int], num_tokens: int) -> NDArray[np.bool_]:
    mask = np.zeros(num_tokens, bool)
    mask[list(ids)] = True
    return mask
