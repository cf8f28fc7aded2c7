"""Vosk's websocket, by a client that waits for an answer to each message, as all stock clients do."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from asr.audio import Floats, Resampler
from asr.runtime import Bundle, Event, open_stream
from asr.serve.background import Background

from .clients import SOME, closed, pcm, served

EOF = json.dumps({"eof": 1})


def _say(client: ClientConnection, message: bytes | str) -> dict[str, Any]:
    """Send, and wait for the answer; nothing else may come."""
    client.send(message)
    answer = json.loads(client.recv(timeout=30))
    with pytest.raises((TimeoutError, ConnectionClosed)):
        client.recv(timeout=0)
    return dict(answer)


def _configure(client: ClientConnection, **config: Any) -> None:
    client.send(json.dumps({"config": {"sample_rate": 16000, **config}}))


def _blocks(sound: Floats) -> Iterator[bytes]:
    return (pcm(block) for block in np.array_split(sound, 17))


def test_each_message_has_one_answer(server: Background, sound: Floats, text: str):
    with connect(server.websocket("/vosk")) as client:
        _configure(client)
        answers = [_say(client, block) for block in _blocks(sound)] + [_say(client, EOF)]
        assert closed(client) == (1000, "")
    assert " ".join(x["text"] for x in answers if x.get("text")) == text
    assert {key for x in answers for key in x} == {"partial", "text"}
    assert any(x.get("partial") for x in answers)


def test_it_may_be_what_the_root_speaks(bundle: Bundle, sound: Floats):
    with served(bundle, compat="vosk") as server, connect(server.websocket("/")) as client:
        assert "partial" in _say(client, pcm(sound[:3200]))


def test_words_have_times(server: Background, sound: Floats, finals: list[Event]):
    with connect(server.websocket("/vosk")) as client:
        _configure(client, words=True)
        answers = [_say(client, block) for block in _blocks(sound)] + [_say(client, EOF)]
    found = [word for x in answers for word in x.get("result", [])]
    expected = [word for event in finals for word in event.words]
    assert [(x["word"], x["start"]) for x in found] == [(x.word, round(x.start_s, 3)) for x in expected]
    assert {key for x in found for key in x} == {"conf", "start", "end", "word"}


def test_alternatives(server: Background, sound: Floats):
    with connect(server.websocket("/vosk")) as client:
        _configure(client, max_alternatives=3)
        answers = [_say(client, block) for block in _blocks(sound)] + [_say(client, EOF)]
    finals = [x["alternatives"] for x in answers if "alternatives" in x]
    assert any(x[0]["text"] and 0 < x[0]["confidence"] < 1 for x in finals)
    assert all("result" not in x[0] for x in finals)


def test_alternatives_with_words(server: Background, sound: Floats, finals: list[Event]):
    with connect(server.websocket("/vosk")) as client:
        _configure(client, max_alternatives=3, words=True)
        answers = [_say(client, block) for block in _blocks(sound)] + [_say(client, EOF)]
    words = [word for x in answers if "alternatives" in x for word in x["alternatives"][0].get("result", [])]
    assert [x["word"] for x in words] == [word.word for event in finals for word in event.words]
    assert {key for x in words for key in x} == {"start", "end", "word"}


def test_null_is_as_good_as_nothing(server: Background, sound: Floats):
    with connect(server.websocket("/vosk")) as client:
        _configure(client, words=None, max_alternatives=None, sample_rate=None)
        assert "partial" in _say(client, pcm(sound[:1600]))


def test_samples_are_8_khz_unless_told_otherwise(server: Background, bundle: Bundle, sound: Floats):
    narrow = Resampler(16000, 8000)
    samples = np.concatenate([narrow.accept(sound), narrow.finish()])
    heard = np.frombuffer(pcm(samples), "<i2").astype(np.float32) / 32768
    wide, stream = Resampler(8000, 16000), open_stream(bundle, SOME)
    events = stream.accept(wide.accept(heard)) + stream.accept(wide.finish()) + stream.finish()
    with connect(server.websocket("/vosk")) as client:
        answers = [_say(client, pcm(samples)), _say(client, EOF)]
    expected = [x.text for x in events if x.final and x.text]
    assert " ".join(x["text"] for x in answers if x.get("text")) == " ".join(expected)


def test_a_reset_begins_anew(server: Background, sound: Floats):
    with connect(server.websocket("/vosk")) as client:
        _configure(client)
        texts = []
        for _ in range(2):
            answers = [_say(client, block) for block in _blocks(sound)] + [
                _say(client, json.dumps({"reset": 1}))
            ]
            texts.append(" ".join(x["text"] for x in answers if x.get("text")))
        assert _say(client, EOF) == {"text": ""}
    assert texts[0] == texts[1] != ""


def test_times_count_from_the_beginning_after_a_reset_too(
    server: Background, sound: Floats, finals: list[Event]
):
    with connect(server.websocket("/vosk")) as client:
        _configure(client, words=True)
        found = []
        for _ in range(3):
            said = [*_blocks(sound), json.dumps({"reset": 1})]
            found += [x for message in said for x in _say(client, message).get("result", [])]
    words = [word for event in finals for word in event.words]
    expected = [round(word.start_s + 5.0 * n, 3) for n in range(3) for word in words]
    assert [x["start"] for x in found] == expected
    assert [x["end"] for x in found][-1] == round(words[-1].end_s + 10.0, 3)


def test_a_path_in_the_configuration_is_ignored(server: Background, sound: Floats, text: str):
    with connect(server.websocket("/vosk")) as client:
        _configure(client, model="/etc/passwd", phrase_list=["x"], other=1)
        answers = [_say(client, pcm(sound)), _say(client, EOF)]
    assert " ".join(x["text"] for x in answers if x.get("text")) == text


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (bytes(3), 1003),
        ("nonsense", 1003),
        ("[1]", 1003),
        ("{}", 1003),
        ("[" * 100_000, 1003),
        ('{"config": {"sample_rate": "fast"}}', 1003),
        ('{"config": {"sample_rate": 1e400}}', 1003),
        ('{"config": {"sample_rate": 0}}', 1007),
        ('{"config": {"sample_rate": 2147483647}}', 1007),
    ],
)
def test_what_is_not_understood_ends_the_connection(server: Background, message: str | bytes, code: int):
    with connect(server.websocket("/vosk")) as client:
        found = closed(client, message)
    assert found[0] == code
    assert found[1]


def test_unknown_commands_are_ignored(server: Background, sound: Floats):
    with connect(server.websocket("/vosk")) as client:
        client.send('{"unknown": 1}')
        client.send('{"config": []}')
        assert "partial" in _say(client, pcm(sound[:1600]))
