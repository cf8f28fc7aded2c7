import itertools
import json

import pytest

from asr.decode.words import Word
from asr.runtime import Event
from asr.runtime.transcript import FORMATS, MAX_CUE_S, MAX_LETTERS, as_dict, clock, cues


def event(text: str, start_s: float = 0.0, word_s: float = 0.4, joined: bool = False) -> Event:
    """Words of equal length; `joined` ones are single letters, as ideographs are."""
    parts = list(text.replace(" ", "")) if joined else text.split()
    words = tuple(
        Word(word, start_s + i * word_s, start_s + (i + 1) * word_s, 0.9) for i, word in enumerate(parts)
    )
    return Event(text, True, words[0].start_s, words[-1].end_s, words)


LONG = event(" ".join(f"word{i}" for i in range(40)))


def test_srt():
    lines = list(FORMATS["srt"]([event("hello there", 1.0), event("again", 3661.25)]))
    assert lines == [
        "1\n00:00:01,000 --> 00:00:02,000\nhello there\n",
        "2\n01:01:01,250 --> 01:01:02,250\nagain\n",
    ]


def test_vtt_escapes_what_would_be_markup():
    assert list(FORMATS["vtt"]([event("a<b & c", 0.5)])) == [
        "WEBVTT\n",
        "00:00:00.500 --> 00:00:01.700\na&lt;b &amp; c\n",
    ]


def test_json_is_one_object_a_line():
    (line,) = FORMATS["json"]([event("grüße 你", 0.1 + 0.2)])
    data = json.loads(line)
    assert "grüße 你" in line
    assert data["start_s"] == 0.3
    assert data["words"][1] == {"word": "你", "start_s": 0.7, "end_s": 1.1, "confidence": 0.9}
    assert data == as_dict(event("grüße 你", 0.3))


def test_text_is_a_line_an_utterance():
    assert list(FORMATS["txt"]([event("a b"), event("c", 9.0)])) == ["a b", "c"]


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_is_no_error(name: str):
    assert list(FORMATS[name]([])) == (["WEBVTT\n"] if name == "vtt" else [])


def test_cues_are_short_complete_and_in_order():
    found = list(cues([LONG, event("next", 16.1)]))
    assert " ".join(cue.text for cue in found) == LONG.text + " next"
    assert len(found) > 3
    for cue in found:
        assert len(cue.text) <= MAX_LETTERS
        assert 0 < cue.end_s - cue.start_s <= MAX_CUE_S
    for cue, following in itertools.pairwise(found):
        assert cue.end_s <= following.start_s


def test_text_without_spaces_stays_without():
    text = "你" * 100
    found = list(cues([event(text, joined=True, word_s=0.05)]))
    assert "".join(cue.text for cue in found) == text
    assert len(found) == 2


def test_a_long_word_is_a_cue_of_its_own():
    found = list(cues([event("a " + "x" * 200 + " b")]))
    assert [len(cue.text) for cue in found] == [1, 200, 1]


def test_subtitles_come_as_soon_as_the_next_one_begins():
    seen = []

    def events():
        for i in range(3):
            seen.append(i)
            yield event(f"utterance {i}", 10.0 * i)

    next(iter(FORMATS["srt"](events())))
    assert seen == [0, 1]


def test_clock():
    assert clock(0.0004, ".") == "00:00:00.000"
    assert clock(59.9996, ",") == "00:01:00,000"
    assert clock(100 * 3600, ".") == "100:00:00.000"
