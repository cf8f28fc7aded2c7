"""Endpointing by the blanks of CTC.

A frame whose most likely unit is blank counts as silence: between two words of fluent speech CTC emits some
tenths of a second of blanks, in a pause more. The rules work on single frames, so that where an utterance
ends does not depend on chunks.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from asr.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class EndpointConfig:
    """The three rules, in seconds."""

    trailing_s: float = 0.8
    """Silence after speech that ends an utterance."""

    silence_s: float = 2.4
    """Silence without any speech after which an utterance restarts."""

    max_s: float = 20.0
    """Length after which the next blank ends an utterance, so that no unit is cut in two; without a blank it
    ends a quarter later. This bounds memory."""

    def __post_init__(self) -> None:
        for name in ("trailing_s", "silence_s", "max_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected more than 0 seconds")


class Ending(Enum):
    """Which rule ended an utterance."""

    PAUSE = "silence after speech"
    SILENCE = "silence without speech"
    LENGTH = "maximum length"


class Endpointer:
    """Counts the frames of one utterance; `reset` at the start of the next."""

    def __init__(self, config: EndpointConfig, frame_s: float) -> None:
        self._trailing = max(round(config.trailing_s / frame_s), 1)
        self._silence = max(round(config.silence_s / frame_s), 1)
        self._longest = max(round(config.max_s / frame_s), 1)
        self.reset()

    def reset(self) -> None:
        self._num_frames = 0
        self._num_blanks = 0  # trailing blanks
        self.has_speech = False

    def advance(self, is_blank: Iterable[bool]) -> tuple[int, Ending] | None:
        """Take the next frames, up to the one at which a rule ends the utterance.

        Returns how many were taken, and the rule; None if all were taken and the utterance goes on.
        """
        for taken, blank in enumerate(is_blank, start=1):
            self._num_frames += 1
            self._num_blanks = self._num_blanks + 1 if blank else 0
            self.has_speech |= not blank
            ending = self._rule()
            if ending:
                return taken, ending
        return None

    def _rule(self) -> Ending | None:
        if self.has_speech and self._num_blanks >= self._trailing:
            return Ending.PAUSE
        if not self.has_speech and self._num_blanks >= self._silence:
            return Ending.SILENCE
        is_long = self._num_frames >= self._longest * (1 if self._num_blanks else 1.25)
        return Ending.LENGTH if is_long else None
