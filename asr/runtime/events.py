"""The events of a stream: texts, and when their words were spoken."""

from dataclasses import dataclass, replace

from asr.decode.scorer import Hypothesis
from asr.decode.words import Word, words
from asr.tokens import Tokenizer


@dataclass(frozen=True, slots=True)
class Event:
    """The text of an utterance: partial, to be replaced by the next event, or final."""

    text: str
    final: bool
    start_s: float
    """Start of the first word, from the start of the stream."""

    end_s: float
    """End of the last word."""

    words: tuple[Word, ...]


def make_event(
    hypothesis: Hypothesis, tokenizer: Tokenizer, frame_s: float, first_frame: int, final: bool
) -> Event:
    """The event of a hypothesis whose utterance starts at encoder frame first_frame of the stream."""
    frames, ends = (tuple(first_frame + x for x in part) for part in (hypothesis.frames, hypothesis.ends))
    found = tuple(words(replace(hypothesis, frames=frames, ends=ends), tokenizer.words, frame_s))
    start_s = found[0].start_s if found else first_frame * frame_s
    end_s = found[-1].end_s if found else start_s
    return Event(tokenizer.decode(hypothesis.tokens), final, start_s, end_s, found)
