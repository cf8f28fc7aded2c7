"""The decoding modes: one table of them, and one function that runs any of them on waveforms.

Every mode gives each token the encoder frame at which the best CTC alignment emits it, and a confidence: the
highest CTC posterior of the token in the frames aligned to it, and in modes with the decoder the geometric
mean of that and the decoder's probability of the token, weighted like the score (the decoder alone in modes
attention and chunked). Models without a CTC head have the decoder-only modes, which place a token where the
decoder's attention peaks. This is rough: seldom off by words, often by tenths of a second. Mode whisper uses
the best path through the attention of several heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from asr.context import WHOLE, Context
from asr.decode.chunked import ChunkedSearch
from asr.decode.config import SearchConfig
from asr.decode.ctc import CtcGreedy, CtcPrefixBeam, advance_all
from asr.decode.joint import search
from asr.decode.online import OnlineSearch, StartSearch, search_online
from asr.decode.policies import align_att, ed_att
from asr.decode.prompt import with_prompt
from asr.decode.rescore import rescore
from asr.decode.scorer import Floats, Hypothesis, Scorer
from asr.decode.segmental import label_synchronous, segmental, segmental_simple
from asr.decode.speculative import greedy
from asr.decode.triggered import Triggered
from asr.decode.unbounded import unbounded
from asr.decode.whisper_windows import hear
from asr.errors import ConfigError

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
    """The most probable CTC token sequences."""
    searches = [CtcPrefixBeam(config.beam, config.tokens_per_frame) for _ in log_probs]
    advance_all(searches, log_probs)
    return [x.nbest(config.nbest) for x in searches]


def attention(
    scorer: Scorer, log_probs: Sequence[Floats], memory: Any, config: SearchConfig
) -> list[list[Hypothesis]]:
    """Beam search by the decoder alone; CTC bounds it (guards.py), and with a beam of 1 drafts its text."""
    config = replace(config, ctc_weight=0.0)
    write = greedy if config.beam == 1 and scorer.has_ctc else search
    return write(scorer, log_probs, memory, config)


def two_pass(
    scorer: Scorer, log_probs: Sequence[Floats], memory: Any, config: SearchConfig
) -> list[list[Hypothesis]]:
    """All that the CTC prefix beam holds at the end, rescored by the decoder."""
    first = ctc_prefix(scorer, log_probs, memory, replace(config, nbest=config.beam))
    return [nbest[: config.nbest] for nbest in rescore(scorer, memory, first, config)]


AT_END: dict[str, Mode] = {
    "ctc-greedy": ctc_greedy,
    "ctc-prefix": ctc_prefix,
    "attention": attention,
    "unbounded": unbounded,
    "joint": search,
    "rescore": two_pass,
    "segmental-label": label_synchronous,
}
"""Modes that search whole utterances."""

FIRST_PASS = ("ctc-greedy", "ctc-prefix")
"""Modes without the decoder, which have an answer at any time."""

ONLINE: dict[str, StartSearch] = {
    "alignatt": align_att,
    "edatt": ed_att,
    "triggered": Triggered,
    "segmental": segmental,
    "segmental-simple": segmental_simple,
    "chunked": ChunkedSearch,
}
"""Modes whose decoder writes while frames arrive."""

OF_SAMPLES = {"whisper": hear}
"""Modes that run the encoder themselves, window by window."""

MODES = (*AT_END, *OF_SAMPLES, *ONLINE)

DEFAULT = "ctc-prefix"
"""The default for models with a CTC head; for others it is the first mode that they support."""

NEEDS = {
    **dict.fromkeys(FIRST_PASS, ""),
    **dict.fromkeys(("segmental", "segmental-simple", "segmental-label"), "segmental"),
    "chunked": "chunked",
    "whisper": "whisper",
}
"""The type of decoder that a mode needs, unless it is the ordinary one, which attends to everything."""


WITHOUT_CTC = ("attention", "unbounded")
"""The modes of the ordinary decoder that need no CTC head."""

NEVER_CTC = (*WITHOUT_CTC, "whisper")
"""All modes that need no CTC head."""


def modes_for(decoder: str, has_ctc: bool = True) -> list[str]:
    """The modes of a model with that type of decoder, with or without a CTC head."""
    modes = [mode for mode in MODES if NEEDS.get(mode, "transformer") in ("", decoder)]
    return [mode for mode in modes if has_ctc or mode in NEVER_CTC]


def check_name(mode: str) -> None:
    """Raise ConfigError if there is no such mode; "" stands for the default of the model."""
    if mode and mode not in MODES:
        raise ConfigError(f"no such mode: {mode}; expected one of {', '.join(MODES)}")


def check_mode(mode: str, decoder: str, has_ctc: bool = True) -> None:
    """Raise ConfigError if there is no such mode, or if a model with that type of decoder, with or without a
    CTC head, does not support it."""
    check_name(mode)
    possible = modes_for(decoder, has_ctc)
    if mode in possible:
        return
    use = f"use one of {', '.join(possible)}" if possible else "it has a search of its own"
    if not has_ctc and mode not in NEVER_CTC:
        raise ConfigError(f"mode {mode}: this model has no CTC head, which it needs; {use}")
    needs = NEEDS.get(mode, "transformer")
    raise ConfigError(f"mode {mode}: this model's decoder is of type {decoder}, expected {needs}; {use}")


def mode_of(scorer: Scorer, mode: str = "") -> str:
    """The given mode, or the model's default; raises ConfigError like `check_mode`."""
    possible = modes_for(scorer.decoder_type, scorer.has_ctc)
    mode = mode or (DEFAULT if scorer.has_ctc else next(iter(possible), DEFAULT))
    check_mode(mode, scorer.decoder_type, scorer.has_ctc)
    return mode


def decode(
    scorer: Scorer,
    mode: str,
    samples: Sequence[Floats],
    config: SearchConfig,
    context: Context = WHOLE,
) -> list[list[Hypothesis]]:
    """The n-best list of each waveform, best first, with at least one hypothesis, which is empty for a
    waveform of length 0."""
    mode, config = mode_of(scorer, mode), with_prompt(scorer, config)
    heard = [n for n, x in enumerate(samples) if len(x)]
    answers = [[Hypothesis((), 0.0)] for _ in samples]
    if heard:
        found = _search(scorer, mode, [samples[n] for n in heard], config, context)
        for n, nbest in zip(heard, found, strict=True):
            answers[n] = nbest
    return answers


def _search(
    scorer: Scorer, mode: str, samples: Sequence[Floats], config: SearchConfig, context: Context
) -> list[list[Hypothesis]]:
    if mode in OF_SAMPLES:
        return OF_SAMPLES[mode](scorer, samples, config, context)
    log_probs, memory = scorer.encode(samples, context)
    return search_encoded(scorer, mode, log_probs, memory, config, context)


def search_encoded(
    scorer: Scorer,
    mode: str,
    log_probs: Sequence[Floats],
    memory: Any,
    config: SearchConfig,
    context: Context = WHOLE,
) -> list[list[Hypothesis]]:
    """The n-best list of each already encoded utterance, in a mode that the model supports."""
    if mode in ONLINE:
        return search_online(ONLINE[mode], scorer, log_probs, memory, config, context.chunk)
    return AT_END[mode](scorer, log_probs, memory, config)


class AtEnd:
    """A mode that searches whole utterances, as an OnlineSearch: CTC answers until the end, if any."""

    def __init__(self, mode: str, scorer: Scorer, config: SearchConfig) -> None:
        self._mode, self._scorer, self._config = mode, scorer, config
        greedy = mode == "ctc-greedy"
        self._ctc: CtcGreedy | CtcPrefixBeam | None = None
        if scorer.has_ctc:
            self._ctc = CtcGreedy() if greedy else CtcPrefixBeam(config.beam, config.tokens_per_frame)
        self._memory: Any = None
        self._log_probs: list[Floats] = []

    def advance(self, memory: Any, log_probs: Floats) -> None:
        if self._ctc:
            self._ctc.advance(log_probs)
        if self._mode not in FIRST_PASS:
            self._memory = memory
            self._log_probs.append(log_probs)

    def best(self) -> Hypothesis:
        return self._ctc.best() if self._ctc else Hypothesis((), 0.0)

    def finish(self) -> list[Hypothesis]:
        if not self._log_probs:
            return self._ctc.nbest(self._config.nbest) if self._ctc else [self.best()]
        whole = np.concatenate(self._log_probs)
        return AT_END[self._mode](self._scorer, [whole], self._memory, self._config)[0]


def start_search(mode: str, scorer: Scorer, config: SearchConfig) -> OnlineSearch:
    """The search of any mode for one utterance that arrives piece by piece; ConfigError like `mode_of`."""
    mode, config = mode_of(scorer, mode), with_prompt(scorer, config)
    return ONLINE[mode](scorer, config) if mode in ONLINE else AtEnd(mode, scorer, config)
