"""OpenAI's Realtime websocket for transcription, by OpenAI's own client."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import openai
import pytest

from asr.audio import Floats, Resampler
from asr.runtime import Bundle, Event, open_stream
from asr.runtime.utterance import Utterance
from asr.serve.background import Background

from .clients import SOME, pcm

KIND = "conversation.item.input_audio_transcription"


@contextmanager
def _session(server: Background, turns: str | None = None) -> Iterator[Any]:
    """A client whose session takes 16 kHz."""
    client = openai.OpenAI(api_key="any", base_url=f"{server.http}/v1")
    with client.realtime.connect(extra_query={"intent": "transcription"}) as connection:
        assert connection.recv().type == "session.created"
        _update(connection, {"type": turns} if turns else None)
        updated = connection.recv()
        assert updated.type == "session.updated"
        assert updated.session.audio.input.format.rate == 16000
        yield connection


def _update(connection: Any, turns: Any, **format_: Any) -> None:
    audio = {"format": {"type": "audio/pcm", "rate": 16000, **format_}, "turn_detection": turns}
    connection.session.update(session={"type": "transcription", "audio": {"input": audio}})


def _append(connection: Any, sound: Floats) -> None:
    for block in np.array_split(sound, 11):
        connection.input_audio_buffer.append(audio=base64.b64encode(pcm(block)).decode())


def _until(connection: Any, kind: str) -> list[Any]:
    events = [connection.recv()]
    while events[-1].type != kind:
        events.append(connection.recv())
    return events


def test_an_item_is_what_was_committed(server: Background, sound: Floats, text: str):
    with _session(server) as connection:
        for number in (1, 2):
            _append(connection, sound)
            connection.input_audio_buffer.commit()
            events = _until(connection, f"{KIND}.completed")
            assert [x.type for x in events] == [
                "input_audio_buffer.committed",
                "conversation.item.added",
                f"{KIND}.delta",
                f"{KIND}.completed",
            ]
            assert events[0].previous_item_id == ("item_1" if number == 2 else None)
            assert (events[-1].item_id, events[-1].transcript) == (f"item_{number}", text)
            assert events[-1].usage.seconds == 5.0
            assert "".join(x.delta for x in events if x.type == f"{KIND}.delta") == text


def test_with_turns_an_item_is_an_utterance(server: Background, sound: Floats, finals: list[Event]):
    with _session(server, "server_vad") as connection:
        _append(connection, sound)
        events = [x for _ in finals[:-1] for x in _until(connection, f"{KIND}.completed")]
        connection.input_audio_buffer.commit()
        events += _until(connection, f"{KIND}.completed")
    assert [x.transcript for x in events if x.type == f"{KIND}.completed"] == [x.text for x in finals]
    stopped = [x.audio_end_ms for x in events if x.type == "input_audio_buffer.speech_stopped"]
    assert stopped == [round(1000 * x.end_s) for x in finals]
    started = [x.item_id for x in events if x.type == "input_audio_buffer.speech_started"]
    assert started == [f"item_{i + 1}" for i in range(len(finals))]
    assert len({x.event_id for x in events}) == len(events)


def test_what_is_cleared_is_not_told(server: Background, sound: Floats, text: str):
    with _session(server) as connection:
        _append(connection, sound[:30000])
        connection.input_audio_buffer.clear()
        assert connection.recv().type == "input_audio_buffer.cleared"
        _append(connection, sound)
        connection.input_audio_buffer.commit()
        assert _until(connection, f"{KIND}.completed")[-1].transcript == text


def test_with_turns_only_what_had_ended_is_told(
    server: Background, bundle: Bundle, sound: Floats, finals: list[Event]
):
    ended = [x.text for x in open_stream(bundle, SOME).accept(sound[:50000]) if x.final and x.text]
    with _session(server, "server_vad") as connection:
        _append(connection, sound[:50000])
        connection.input_audio_buffer.clear()
        before = _until(connection, "input_audio_buffer.cleared")
        _append(connection, sound)
        after = [x for _ in finals[:-1] for x in _until(connection, f"{KIND}.completed")]
    assert [x.transcript for x in before if x.type == f"{KIND}.completed"] == ended
    assert any(x.type == "input_audio_buffer.speech_started" for x in after)
    assert [x.transcript for x in after if x.type == f"{KIND}.completed"] == [x.text for x in finals[:-1]]


def test_times_count_from_the_beginning_of_the_session(
    server: Background, sound: Floats, finals: list[Event]
):
    with _session(server, "server_vad") as connection:
        _append(connection, sound)
        connection.input_audio_buffer.clear()
        _until(connection, "input_audio_buffer.cleared")
        events = []
        for _ in range(2):
            _append(connection, sound)
            connection.input_audio_buffer.commit()
            events += [x for _ in finals for x in _until(connection, f"{KIND}.completed")]
    for edge, when in (("started", "start"), ("stopped", "end")):
        kind = f"input_audio_buffer.speech_{edge}"
        found = [getattr(x, f"audio_{when}_ms") for x in events if x.type == kind]
        times = [getattr(x, f"{when}_s") for x in finals]
        assert found == [round(1000 * (5.0 * n + time)) for n in (1, 2) for time in times]


@pytest.mark.parametrize("turns", ["server_vad", "semantic_vad", None])
def test_each_commit_has_an_item(server: Background, monkeypatch: pytest.MonkeyPatch, turns: str | None):
    """Even if nothing was said: the client waits for it."""
    monkeypatch.setattr(Utterance, "advance", lambda *_: [])
    monkeypatch.setattr(Utterance, "end", lambda *_: [])
    with _session(server, turns) as connection:
        for number in (1, 2):
            _append(connection, np.zeros(80, np.float32))
            connection.input_audio_buffer.commit()
            events = _until(connection, f"{KIND}.completed")
            assert (events[0].type, events[0].item_id) == ("input_audio_buffer.committed", f"item_{number}")
            assert events[-1].transcript == ""


def test_sessions_of_the_beta(server: Background, sound: Floats):
    """As `client.beta.realtime` of OpenAI's client, and most voice agents, speak of transcription."""
    narrow = Resampler(16000, 24000)
    samples = np.concatenate([narrow.accept(sound), narrow.finish()])
    client = openai.OpenAI(api_key="any", base_url=f"{server.http}/v1")
    with client.realtime.connect(extra_query={"intent": "transcription"}) as connection:
        assert connection.recv().type == "session.created"
        transcription = {"model": "gpt-4o-transcribe", "language": "en", "prompt": ""}
        wanted = {"input_audio_format": "pcm16", "input_audio_transcription": transcription}
        for turns in ({"type": "server_vad", "threshold": 0.5}, None):
            session = {**wanted, "turn_detection": turns}
            connection._connection.send(
                json.dumps({"type": "transcription_session.update", "session": session})
            )
            updated = json.loads(connection._connection.recv())
            assert updated["type"] == "transcription_session.updated"
            assert updated["session"]["input_audio_format"] == "pcm16"
            assert bool(updated["session"]["turn_detection"]) == bool(turns)
        _append(connection, samples)
        connection.input_audio_buffer.commit()
        events = _until(connection, f"{KIND}.completed")
    assert [x.type for x in events].count(f"{KIND}.completed") == 1
    assert events[-1].transcript
    assert events[-1].usage.seconds == 5.0


def test_an_error_names_the_event(server: Background):
    with _session(server) as connection:
        for given, told in (("mine", "mine"), (7, None), ("\ud800", None)):
            connection._connection.send(json.dumps({"type": "x", "event_id": given}))
            assert connection.recv().error.event_id == told


def _with_format(**format_: Any) -> dict[str, Any]:
    return {"type": "session.update", "session": {"audio": {"input": {"format": format_}}}}


def _with_turns(turns: Any) -> dict[str, Any]:
    return {"type": "session.update", "session": {"audio": {"input": {"turn_detection": turns}}}}


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ({"type": "input_audio_buffer.commit"}, "input_audio_buffer_commit_empty"),
        ({"type": "response.create"}, "unknown_type"),
        ({"kind": "x"}, "unknown_type"),
        ({"type": "input_audio_buffer.append", "audio": "no base64!"}, "invalid_value"),
        ({"type": "input_audio_buffer.append", "audio": 7}, "invalid_value"),
        ({"type": "input_audio_buffer.append", "audio": "AAAA"}, "invalid_value"),
        ({"type": "session.update", "session": []}, "invalid_value"),
        ({"type": "session.update", "session": {"audio": {"input": None}}}, "invalid_value"),
        (_with_format(type="audio/pcmu"), "invalid_value"),
        (_with_format(rate="x"), "invalid_value"),
        (_with_format(rate=1), "invalid_audio"),
        (_with_turns(False), "invalid_value"),
        (_with_turns({"type": "none"}), "invalid_value"),
        (_with_turns({"type": ["server_vad"]}), "invalid_value"),
        (
            {"type": "transcription_session.update", "session": {"input_audio_format": "g711_ulaw"}},
            "invalid_value",
        ),
    ],
)
def test_the_session_goes_on_after_an_error(
    server: Background, sound: Floats, text: str, message: dict[str, Any], code: str
):
    with _session(server) as connection:
        connection.send(message)
        error = connection.recv()
        assert (error.type, error.error.code) == ("error", code)
        assert error.error.message
        _append(connection, sound)
        connection.input_audio_buffer.commit()
        assert _until(connection, f"{KIND}.completed")[-1].transcript == text


@pytest.mark.parametrize("message", ["nonsense", "[]", "7", '{"type": []}', "[" * 100_000, b"\xff\x00"])
def test_what_is_no_object_is_an_error_too(server: Background, message: str | bytes):
    with _session(server) as connection:
        connection._connection.send(message)
        assert connection.recv().error.code == "unknown_type"
