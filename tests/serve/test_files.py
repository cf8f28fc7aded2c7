"""OpenAI's file API, by OpenAI's own client."""

import io
import json
import re
import socket
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import soundfile

from asr.audio import Floats
from asr.errors import AudioError, ConfigError
from asr.runtime import Bundle, Event
from asr.runtime.transcript import to_srt, to_vtt
from asr.serve.background import Background

from .clients import MULTIPART, served, wav


@pytest.fixture(scope="module")
def client(server: Background) -> openai.OpenAI:
    return _client(server)


def _client(server: Background, key: str = "any", retries: int = 0) -> openai.OpenAI:
    return openai.OpenAI(api_key=key, base_url=f"{server.http}/v1", max_retries=retries)


def _ask(client: openai.OpenAI, data: bytes, **options: Any) -> Any:
    options = {"model": "tiny", "file": ("a.wav", data), **options}
    return client.audio.transcriptions.create(**options)


def test_a_file_has_the_text_of_a_stream(client: openai.OpenAI, sound: Floats, text: str):
    found = _ask(client, wav(sound))
    assert found.text == text
    assert found.usage.seconds == 5.0


@pytest.mark.parametrize("kind", ["FLAC", "OGG"])
def test_files_are_known_by_their_content(client: openai.OpenAI, sound: Floats, kind: str, text: str):
    found = _ask(client, wav(sound, kind=kind))
    assert found.text == text or kind == "OGG"  # which loses something
    assert found.text


def test_each_format(client: openai.OpenAI, sound: Floats, finals: list[Event], text: str):
    data = wav(sound)
    assert _ask(client, data, response_format="text") == f"{text}\n"
    assert _ask(client, data, response_format="srt") == "\n".join(to_srt(finals)) + "\n"
    assert _ask(client, data, response_format="vtt") == "\n".join(to_vtt(finals)) + "\n"


def test_everything_that_clients_expect_of_a_verbose_answer(
    client: openai.OpenAI, sound: Floats, finals: list[Event]
):
    both = ["word", "segment"]
    found = _ask(client, wav(sound), response_format="verbose_json", timestamp_granularities=both)
    assert (found.duration, found.language) == (5.0, "unknown")
    assert [(x.id, x.text.strip()) for x in found.segments] == list(enumerate(x.text for x in finals))
    assert {len(x.model_dump()) for x in found.segments} == {10}
    assert all(x.avg_logprob < 0 < x.compression_ratio for x in found.segments)
    words = [word for event in finals for word in event.words]
    assert [x.word for x in found.words] == [x.word for x in words]
    np.testing.assert_allclose([x.start for x in found.words], [x.start_s for x in words], atol=1e-3)
    only = _ask(client, wav(sound), response_format="verbose_json")
    assert only.segments
    assert only.words is None


@pytest.mark.parametrize("value", ["word", "word,segment", '["word"]'])
def test_granularities_of_other_clients(client: openai.OpenAI, sound: Floats, value: str):
    more = {"timestamp_granularities": value}
    found = _ask(client, wav(sound), response_format="verbose_json", extra_body=more)
    assert found.words
    assert bool(found.segments) == ("segment" in value)


def test_utterances_come_as_they_end(client: openai.OpenAI, sound: Floats, finals: list[Event], text: str):
    answer = client.audio.transcriptions.with_raw_response.create(
        model="tiny", file=("a", wav(sound)), stream=True
    )
    assert answer.headers["X-Accel-Buffering"] == "no"
    events: Any = list(answer.parse())
    assert [x.delta.strip() for x in events[:-1]] == [x.text for x in finals]
    assert "".join(x.delta for x in events[:-1]) == events[-1].text == text


def test_a_recording_without_samples_has_no_text(client: openai.OpenAI):
    with pytest.warns(UserWarning, match="holds no samples"):
        assert _ask(client, wav(np.zeros(0, np.float32))).text == ""
    with pytest.warns(UserWarning, match="holds no samples"):
        events = list(_ask(client, wav(np.zeros(0, np.float32)), stream=True))
    assert [x.type for x in events] == ["transcript.text.done"]


def test_unknown_fields_are_ignored(client: openai.OpenAI, sound: Floats, text: str):
    more = {"hotwords": "lion", "chunking_strategy[type]": "server_vad", "languages[]": "en"}
    assert _ask(client, wav(sound), prompt="x", temperature=0.2, extra_body=more).text == text
    unset = dict.fromkeys(("language", "prompt", "temperature", "response_format", "stream"), "")
    assert _ask(client, wav(sound), extra_body=unset).text == text
    events = _ask(client, wav(sound), extra_body={"stream": "1"})
    assert "transcript.text.done" in str(events)


def _nan() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.array([0.0, np.nan] * 800), 16000, format="WAV", subtype="FLOAT")
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "audio: is empty"),
        (b"<!doctype html>", "looks like HTML"),
        (b"RIFF\x24\x00\x00\x00WAVEfmt ", "truncated WAV header"),
        (_nan(), "NaN"),
        (b"fLaC" + bytes(100), "damaged"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_no_sound_is_refused_once(client: openai.OpenAI, data: bytes, match: str, stream: bool):
    patient = client.with_options(max_retries=2)
    with pytest.raises(openai.BadRequestError, match=match) as caught:
        _ask(patient, data, stream=stream)
    assert (caught.value.param, caught.value.code) == ("file", "invalid_audio")
    assert re.fullmatch("[0-9a-f]{32}", caught.value.request_id or "")


@pytest.mark.parametrize(
    ("options", "status", "param"),
    [
        ({"model": "whisper-1"}, 404, "model"),
        ({"model": ""}, 404, "model"),
        ({"response_format": "docx"}, 400, "response_format"),
        ({"temperature": "abc"}, 400, "temperature"),
        ({"temperature": "nan"}, 400, "temperature"),
        ({"timestamp_granularities": ["letter"]}, 400, "timestamp_granularities[]"),
        ({"extra_body": {"stream": "maybe"}}, 400, "stream"),
    ],
)
def test_each_wrong_field_is_named(
    client: openai.OpenAI, sound: Floats, options: dict[str, Any], status: int, param: str
):
    with pytest.raises(openai.APIStatusError) as caught:
        _ask(client, wav(sound), **options)
    assert (caught.value.status_code, caught.value.param) == (status, param)  # type: ignore[attr-defined]


def _post(server: Background, body: bytes, kind: str) -> tuple[int, Any]:
    request = urllib.request.Request(f"{server.http}/v1/audio/transcriptions", body, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def _part(name: str, value: bytes, file: str = "") -> bytes:
    filename = f'; filename="{file}"' if file else ""
    head = f'--b\r\nContent-Disposition: form-data; name="{name}"{filename}\r\n\r\n'
    return head.encode() + value + b"\r\n"


END = b"--b--\r\n"


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (_part("model", b"tiny") + END, MULTIPART, "expected one file"),
        (_part("file", b"x", "a") * 2 + END, MULTIPART, "got 2"),
        (_part("file", b"x") + END, MULTIPART, "expected one file"),
        (b"{}", "application/json", "expected one file"),
        (_part("file", b"x", "a") * 50 + END, MULTIPART, "Too many files"),
        (_part("x", b"x") * 10000 + END, MULTIPART, "Too many fields"),
        (_part("x", bytes(2**17)) + END, MULTIPART, "exceeded maximum size"),
        (b"nonsense", MULTIPART, ""),
        (b"", "multipart/form-data", "boundary"),
        (_part("model", b"x", "a") + _part("file", b"x", "a") + END, MULTIPART, "model"),
        (_part("model", b"+2AA-") + END, f"{MULTIPART}; charset=utf-7", "in 'utf-7', expected UTF-8"),
        (_part("model", b"x") + END, f"{MULTIPART}; charset=punycode", "in 'punycode', expected UTF-8"),
    ],
)
def test_each_wrong_form_is_refused(server: Background, body: bytes, kind: str, message: str):
    status, answer = _post(server, body, kind)
    assert status == 400
    assert message in answer["error"]["message"]
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_large_and_long_files_are_refused(bundle: Bundle, sound: Floats):
    with served(bundle, max_upload_mb=0.1, max_audio_s=3) as server:
        client = _client(server)
        with pytest.raises(openai.APIStatusError, match=r"larger than 0\.1 MB") as caught:
            _ask(client, wav(sound))
        assert caught.value.status_code == 413
        silence = wav(np.zeros(16000 * 600, np.float32), kind="FLAC")
        assert len(silence) < 2**16
        with pytest.raises(openai.APIStatusError, match="longer than 3 s") as caught:
            _ask(client, silence)
        assert caught.value.status_code == 413


def test_a_body_of_unknown_length_is_counted(bundle: Bundle):
    with served(bundle, max_upload_mb=0.1) as server:
        client = _client(server)
        chunks = iter([_part("model", b"tiny"), _part("file", bytes(2**18), "a"), b"--b--\r\n"])
        answer = client._client.post(
            f"{server.http}/v1/audio/transcriptions",
            content=chunks,
            headers={"Content-Type": "multipart/form-data; boundary=b"},
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")


def test_an_upload_may_not_take_for_ever(bundle: Bundle):
    head = f"Host: x\r\nContent-Length: 99\r\nContent-Type: {MULTIPART}"
    with (
        served(bundle, upload_s=0.2) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=30) as client,
    ):
        client.sendall(f"POST /v1/audio/transcriptions HTTP/1.1\r\n{head}\r\n\r\n--b".encode())
        answer = b""
        while b'"upload_timeout"' not in answer:
            data = client.recv(4096)
            assert data, answer
            answer += data
    assert answer.startswith(b"HTTP/1.1 400 ")


def test_models_are_listed(client: openai.OpenAI):
    assert [x.id for x in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="this server has tiny"):
        client.models.retrieve("../tiny")


def test_a_key_is_needed_if_there_are_any(bundle: Bundle, sound: Floats, text: str):
    with served(bundle, keys=("first", "second")) as server:
        assert _ask(_client(server, "second"), wav(sound)).text == text
        for ask in (
            lambda c: _ask(c, wav(sound)),
            lambda c: c.models.list(),
            lambda c: c.models.retrieve("x"),
        ):
            with pytest.raises(openai.AuthenticationError, match="key is missing or wrong"):
                ask(_client(server, "third"))
        with urllib.request.urlopen(f"{server.http}/livez") as answer:
            assert answer.status == 200


def test_a_key_may_have_any_letters(bundle: Bundle):
    with served(bundle, keys=("schlüssel",)) as server:
        for key, status in (("schlüssel", b"200"), ("schlussel", b"401"), ("schlÃ¼ssel", b"401")):
            head = f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n\r\n"
            with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
                client.sendall(head.encode())
                assert client.recv(4096).startswith(b"HTTP/1.1 " + status)


def test_a_model_that_cannot_stream_is_served_too(whole_bundle: Path, sound: Floats):
    from asr.runtime import StreamConfig, open_stream

    bundle = Bundle.load(whole_bundle)
    stream = open_stream(bundle)
    events = stream.accept(sound) + stream.finish()
    with served(bundle, stream=StreamConfig()) as server:
        assert _ask(_client(server), wav(sound)).text == " ".join(x.text for x in events)


@pytest.mark.parametrize(
    ("error", "match"),
    [(AudioError("the rest is gone"), "the rest is gone"), (RuntimeError("secret"), "internal error")],
)
def test_an_error_within_a_stream_is_told(
    client: openai.OpenAI, sound: Floats, monkeypatch: pytest.MonkeyPatch, error: Exception, match: str
):
    from asr.serve import files

    def broken(*args: Any, **options: Any) -> Any:
        yield sound
        raise error

    monkeypatch.setattr(files, "blocks", broken)
    events = _ask(client, wav(sound), stream=True)
    assert next(events).type == "transcript.text.delta"
    with pytest.raises(openai.APIError, match=match):
        list(events)


def test_a_language_that_the_model_does_not_know(
    client: openai.OpenAI, sound: Floats, monkeypatch: pytest.MonkeyPatch
):
    """Whisper says so when it begins to decode."""
    from asr.serve import files

    def unknown(*args: Any, **options: Any) -> Any:
        raise ConfigError("language is xx, expected one of en")
        yield

    monkeypatch.setattr(files, "blocks", unknown)
    with pytest.raises(openai.BadRequestError, match="language is xx") as caught:
        _ask(client, wav(sound), language="xx")
    assert (caught.value.param, caught.value.code) == ("language", "invalid_value")


def test_our_own_errors_do_not_show_themselves(
    client: openai.OpenAI, sound: Floats, monkeypatch: pytest.MonkeyPatch
):
    from asr.serve import files

    def broken(*args: Any) -> Any:
        raise RuntimeError("secret")

    monkeypatch.setattr(files, "_answer", broken)
    with pytest.raises(openai.InternalServerError, match="internal error") as caught:
        _ask(client, wav(sound))
    assert "secret" not in str(caught.value.body)
    assert caught.value.request_id


def test_other_routes_answer_in_the_same_form(server: Background):
    for path, status in (("/", 404), ("/v1/nothing", 404), ("/v1/audio/transcriptions", 405)):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(server.http + path)
        assert caught.value.code == status
        assert "error" in json.load(caught.value)
