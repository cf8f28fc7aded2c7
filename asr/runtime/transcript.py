"""Final events as text, subtitles or JSON.

Subtitles are cut between words, so that a cue is short enough to read: at most `MAX_LETTERS` letters and
`MAX_CUE_S` seconds. Each format is a function from events to the lines of a file.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from asr.decode.words import Word
from asr.runtime.events import Event

MAX_LETTERS = 84
"""Two lines of 42, as is common in broadcasting."""

MAX_CUE_S = 7.0
MIN_CUE_S = 1.0
"""A cue stays at least this long, unless the next one begins."""


@dataclass(frozen=True)
class Cue:
    """One subtitle."""

    start_s: float
    end_s: float
    text: str


def cues(events: Iterable[Event]) -> Iterator[Cue]:
    """Subtitles in order without overlap, each yielded once the start of the next is known."""
    previous: tuple[float, float, str] | None = None
    for part in (part for event in events for part in _split(event)):
        if previous:
            yield _cue(*previous, following_s=part[0])
        previous = part
    if previous:
        yield _cue(*previous, following_s=math.inf)


def _cue(start_s: float, end_s: float, text: str, following_s: float) -> Cue:
    end_s = min(max(end_s, start_s + MIN_CUE_S), following_s)
    return Cue(start_s, max(end_s, start_s), text)


def _split(event: Event) -> Iterator[tuple[float, float, str]]:
    """(start, end, text) of the cues of one event; the text keeps its inner spaces."""
    spans = _spans(event)
    first = 0
    for i, (word, _, end) in enumerate(spans):
        start_word, begin, _ = spans[first]
        following = spans[i + 1] if i + 1 < len(spans) else None
        is_full = following and (
            following[2] - begin > MAX_LETTERS or following[0].end_s - start_word.start_s > MAX_CUE_S
        )
        if following is None or is_full:
            yield start_word.start_s, word.end_s, event.text[begin:end].strip()
            first = i + 1


def _spans(event: Event) -> list[tuple[Word, int, int]]:
    """Where each word stands in the text."""
    spans, position = [], 0
    for word in event.words:
        begin = event.text.find(word.word, position)
        begin = position if begin < 0 else begin
        position = begin + len(word.word)
        spans.append((word, begin, position))
    return spans


def to_txt(events: Iterable[Event]) -> Iterator[str]:
    """One line per utterance."""
    return (event.text for event in events)


def to_srt(events: Iterable[Event]) -> Iterator[str]:
    for number, cue in enumerate(cues(events), start=1):
        yield f"{number}\n{clock(cue.start_s, ',')} --> {clock(cue.end_s, ',')}\n{cue.text}\n"


def to_vtt(events: Iterable[Event]) -> Iterator[str]:
    yield "WEBVTT\n"
    for cue in cues(events):
        text = cue.text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        yield f"{clock(cue.start_s, '.')} --> {clock(cue.end_s, '.')}\n{text}\n"


def to_json(events: Iterable[Event]) -> Iterator[str]:
    """One object per utterance, each on its own line."""
    return (json.dumps(as_dict(event), ensure_ascii=False) for event in events)


def as_dict(event: Event) -> dict[str, object]:
    """An event with times rounded to milliseconds."""
    return {
        "text": event.text,
        "final": event.final,
        "start_s": round(event.start_s, 3),
        "end_s": round(event.end_s, 3),
        "words": [
            {
                "word": word.word,
                "start_s": round(word.start_s, 3),
                "end_s": round(word.end_s, 3),
                "confidence": round(word.confidence, 4),
            }
            for word in event.words
        ],
    }


def clock(time_s: float, point: str) -> str:
    """3661.5 -> 01:01:01,500 with "," and 01:01:01.500 with "."."""
    total_ms = round(time_s * 1000)
    seconds, ms = divmod(total_ms, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}{point}{ms:03}"


FORMATS: dict[str, Callable[[Iterable[Event]], Iterator[str]]] = {
    "txt": to_txt,
    "srt": to_srt,
    "vtt": to_vtt,
    "json": to_json,
}
