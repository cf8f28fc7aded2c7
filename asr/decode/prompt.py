"""The decoder's prompt after sos/eos: a language, a task, and the like.

A prompt is no part of an answer: neither its tokens nor their log-probabilities are.

B hypotheses
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from asr.decode.config import SearchConfig
from asr.decode.scorer import Ints, Scorer
from asr.errors import ConfigError


def with_prompt(scorer: Scorer, config: SearchConfig) -> SearchConfig:
    """The same options with the prompt as ids; ConfigError if a unit is unknown, or if the prompt leaves no
    room for a token."""
    units = scorer.prompt if config.prompt is None else config.prompt
    ids = tuple(_id(unit, scorer.symbols, scorer.num_tokens) for unit in units)
    most = config.max_tokens
    if scorer.max_tokens:
        room = scorer.max_tokens - len(ids) - 1
        if room < 1:
            raise ConfigError(
                f"prompt: {len(ids)} units, and the decoder takes {scorer.max_tokens} tokens in all; "
                "shorten it"
            )
        most = min(most or room, room)
    return replace(config, prompt=ids, max_tokens=most)


def _id(unit: int | str, symbols: Sequence[str], num_tokens: int) -> int:
    if isinstance(unit, int) and 0 <= unit < num_tokens:
        return unit
    if unit not in symbols:
        raise ConfigError(f"prompt: no unit {unit} among the {num_tokens} of the model; see its tokens.txt")
    return symbols.index(str(unit))


def prompt_ids(config: SearchConfig) -> tuple[int, ...]:
    """The prompt of options as ids, either from `with_prompt` or given as ids."""
    return tuple(int(unit) for unit in config.prompt or ())


def begin(scorer: Scorer, memory: Any, owner: Ints, before: Sequence[int]) -> tuple[Any, int]:
    """The decoder state of hypotheses of utterances owner (B,) after sos/eos and all but the last of the
    tokens `before`, and the token to feed next."""
    shown = [scorer.sos_eos, *before]
    state = scorer.start(memory, owner)
    if before:
        state = scorer.step(state, np.tile(np.array(shown[:-1], np.int64), (len(owner), 1)), 1).state
    return state, shown[-1]
