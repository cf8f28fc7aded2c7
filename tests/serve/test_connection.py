"""Clients that come in crowds, say nothing, read nothing or vanish; and a server that leaves."""

import asyncio
import json
import socket
import struct
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openai
import pytest
from starlette.websockets import WebSocket
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from asr.audio import Floats
from asr.runtime import Bundle
from asr.runtime.utterance import Utterance
from asr.serve.background import Background

from .clients import MULTIPART, closed, served, wait, wav


def _floats(samples: Floats) -> bytes:
    return samples.astype("<f4").tobytes()


def _talk(server: Background, sound: Floats, num_blocks: int = 9) -> str:
    """The text of a sherpa client."""
    with connect(server.websocket("/sherpa"), ping_interval=None) as client:
        for block in np.array_split(sound, num_blocks):
            client.send(_floats(block))
        client.send("Done")
        return _rest(client)


def _rest(client: ClientConnection) -> str:
    texts = []
    while (message := client.recv(timeout=60)) != "Done!":
        result = json.loads(message)
        texts += [result["text"]] if result["is_final"] else []
    return " ".join(texts)


def test_clients_together_have_the_texts_that_each_has_alone(server: Background, sound: Floats):
    sounds = [np.roll(sound, 7000 * n)[: 40000 + 5000 * n] for n in range(6)]
    alone = [_talk(server, x) for x in sounds]
    assert len(set(alone)) == 6
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda x: _talk(server, x), sounds))
    assert together == alone


def test_a_crowd_is_told_to_come_back(bundle: Bundle, sound: Floats, text: str):
    with served(bundle, max_streams=1) as server, connect(server.websocket("/sherpa")) as client:
        client.send(_floats(sound[:16000]))
        for path in ("/", "/sherpa", "/vosk", "/v1/realtime"):
            with pytest.raises(InvalidStatus) as refused:
                connect(server.websocket(path))
            assert refused.value.response.status_code == 503
            assert refused.value.response.headers["Retry-After"]
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{server.http}/v1/audio/transcriptions", b"x")
        assert (caught.value.code, caught.value.headers["Retry-After"]) == (503, "1")
        client.send(_floats(sound[16000:]))
        client.send("Done")
        assert _rest(client) == text


@pytest.mark.parametrize("path", ["/sherpa", "/vosk", "/v1/realtime"])
def test_a_websocket_needs_a_key(bundle: Bundle, path: str):
    with served(bundle, keys=("secret",)) as server:
        for url, headers in (
            (path, {}),
            (path, {"Authorization": "Bearer wrong"}),
            (path, {"Authorization": "Basic secret"}),
            (f"{path}?api_key=wrong", {}),
            (path, {"Sec-WebSocket-Protocol": "realtime, openai-insecure-api-key.wrong"}),
        ):
            with pytest.raises(InvalidStatus) as refused:
                connect(server.websocket(url), additional_headers=headers)
            assert refused.value.response.status_code == 401
        with connect(server.websocket(path), additional_headers={"Authorization": "Bearer secret"}):
            pass
        with connect(server.websocket(f"{path}?api_key=secret")):
            pass
        protocols: list[Any] = ["realtime", "openai-insecure-api-key.secret"]  # OpenAI's JavaScript
        with connect(server.websocket(path), subprotocols=protocols) as client:
            assert client.subprotocol == "realtime"


def test_keys_are_not_logged(bundle: Bundle, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO"), served(bundle, keys=("secret",)) as server:
        with connect(server.websocket("/sherpa?api_key=secret")) as client:
            client.send("Done")
            _rest(client)
        wait(server, lambda: "/sherpa" in caplog.text)
    assert "WEBSOCKET /sherpa 1000" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("path", "message"),
    [("/sherpa", None), ("/vosk", '{"config": {}}'), ("/v1/realtime", '{"type": "session.update"}')],
)
def test_who_says_nothing_is_sent_away(bundle: Bundle, path: str, message: str | None):
    with served(bundle, first_audio_s=0.2) as server, connect(server.websocket(path)) as client:
        assert closed(client, message) == (1008, "nothing was heard for 0.2 s")


REQUEST = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize("begun", [b"", REQUEST[:10], REQUEST, REQUEST + REQUEST[:10]])
def test_who_asks_nothing_is_sent_away(bundle: Bundle, begun: bytes):
    with served(bundle, first_audio_s=1) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
            client.sendall(begun)
            answer = b""
            while data := client.recv(4096):
                answer += data
        assert answer.count(b"HTTP/1.1 200 OK") == begun.count(REQUEST)


def test_who_falls_silent_is_sent_away(bundle: Bundle):
    with served(bundle, idle_s=0.2) as server, connect(server.websocket("/sherpa")) as client:
        client.send(bytes(64))
        assert closed(client) == (1008, "nothing was heard for 0.2 s")


def test_who_reads_nothing_is_sent_away(bundle: Bundle, sound: Floats):
    with served(bundle, send_s=0.2) as server:
        client = _raw(server, buffer=4096)
        heard = json.dumps({"type": "x" * 50})
        frame = bytes([0x81, 0x80 | len(heard)]) + bytes(4) + heard.encode()
        with pytest.raises(OSError, match=r"reset|pipe"):
            _send_for_ever(client, frame)  # each is answered by an error, until the answers fill the way back
        wait(server, lambda: server.hub.engine.num_streams == 0)
        client.close()


def _send_for_ever(client: socket.socket, frame: bytes) -> None:
    while True:
        client.sendall(frame)


def test_who_vanishes_leaves_nothing_behind(server: Background, sound: Floats, text: str):
    before = len(_connections(server))
    for n in range(200):
        client = _raw(server)
        client.sendall(bytes([0x82, 0xFE]) + struct.pack(">H", 6400) + bytes(6404))
        if n % 2:  # a reset instead of an end
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    wait(server, lambda: server.hub.engine.num_streams == 0 and len(_connections(server)) <= before)
    assert _talk(server, sound) == text


def _connections(server: Background) -> set[Any]:
    return {task for task in asyncio.all_tasks(server.loop) if "run_asgi" in repr(task)}


def _raw(server: Background, buffer: int = 0) -> socket.socket:
    """A websocket on which everything is possible."""
    path = "/v1/realtime" if buffer else "/sherpa"
    client = socket.socket()
    if buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    client.settimeout(30)
    client.connect(("127.0.0.1", server.port))
    head = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13"
    key = "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="
    client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n{head}\r\n{key}\r\n\r\n".encode())
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        answer += client.recv(1)
    assert b" 101 " in answer
    return client


def test_faster_than_real_time_is_slowed_down(server: Background, sound: Floats):
    """A minute of audio at once: it waits in the connection, not in the server."""
    long = np.tile(sound, 12)
    assert _talk(server, long, 12 * 50) == _talk(server, long, 10)


def _age(server: Background, seconds: float) -> None:
    """Let time pass for a server that no other test uses."""
    now = server.loop.time
    setattr(server.loop, "time", lambda: now() + seconds)  # noqa: B010
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0.01), server.loop).result(30)


def test_audio_may_wait_for_minutes(bundle: Bundle, sound: Floats, text: str, model: threading.Event):
    """Pongs of the client, and what else it sends, stand behind its audio."""
    with served(bundle) as server, connect(server.websocket("/sherpa")) as client:
        model.clear()
        for block in np.array_split(sound, 9):
            client.send(_floats(block))
        wait(server, lambda: server.hub.engine.audio_s > 1)  # a second to warm up
        for _ in range(9):
            _age(server, 60)
        model.set()
        client.send("Done")
        assert _rest(client) == text


def test_pings_are_answered_while_the_model_is_busy(bundle: Bundle, sound: Floats, model: threading.Event):
    with served(bundle) as server, connect(server.websocket("/sherpa")) as client:
        model.clear()
        client.send(_floats(sound))
        assert client.ping().wait(30)
        with urllib.request.urlopen(f"{server.http}/readyz") as answer:
            assert json.load(answer)["streams"] >= 1
        model.set()
        client.send("Done")
        assert _rest(client)


def test_one_stream_that_fails_does_not_fail_the_others(
    server: Background, sound: Floats, text: str, monkeypatch: pytest.MonkeyPatch
):
    advance, seen = Utterance.advance, []

    def first_is_broken(utterance: Utterance, *args: Any) -> Any:
        seen.append(utterance)
        if utterance is seen[0]:
            raise RuntimeError("secret")
        return advance(utterance, *args)

    monkeypatch.setattr(Utterance, "advance", first_is_broken)
    with connect(server.websocket("/sherpa")) as first, connect(server.websocket("/sherpa")) as second:
        first.send(_floats(sound[:20000]))
        assert closed(first) == (1011, "internal error")
        second.send(_floats(sound))
        second.send("Done")
        assert _rest(second) == text


def test_who_is_there_may_finish_when_the_server_leaves(bundle: Bundle, sound: Floats, text: str):
    with served(bundle, drain_s=30) as server, connect(server.websocket("/sherpa")) as client:
        client.send(_floats(sound[:30000]))
        client.recv(timeout=30)
        server.loop.call_soon_threadsafe(server.hub.drain)
        wait(server, lambda: not server.hub.is_ready)
        with pytest.raises(InvalidStatus) as refused:
            connect(server.websocket("/sherpa"))
        assert refused.value.response.status_code == 503
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{server.http}/readyz")
        assert caught.value.code == 503
        client.send(_floats(sound[30000:]))
        client.send("Done")
        assert _rest(client) == text


def test_who_does_not_finish_has_the_text_so_far(bundle: Bundle, sound: Floats, text: str):
    with served(bundle, drain_s=0.1) as server, connect(server.websocket("/sherpa")) as client:
        client.send(_floats(sound))
        heard_s = 1.0 + len(sound) / 16000  # one second to warm up
        wait(server, lambda: server.hub.engine.audio_s > heard_s - 1e-6)
        server.loop.call_soon_threadsafe(server.hub.drain)
        assert _rest(client) == text
        assert closed(client) == (1001, "the server is leaving")


def test_a_server_leaves_who_sends_without_end(bundle: Bundle):
    frame = bytes([0x82, 0xFE]) + struct.pack(">H", 6400) + bytes(6404)
    with served(bundle, drain_s=0.1) as server, ThreadPoolExecutor(1) as pool:
        client = _raw(server)
        sending = pool.submit(_send_for_ever, client, frame)
        wait(server, lambda: server.hub.engine.num_streams == 1)
        server.loop.call_soon_threadsafe(server.hub.drain)
        wait(server, lambda: server.hub.engine.num_streams == 0)
        assert not server.hub.is_overdue
        client.shutdown(socket.SHUT_RDWR)
        assert isinstance(sending.exception(30), OSError)


def test_a_server_leaves_whose_upload_has_no_end(bundle: Bundle):
    head = f"Host: x\r\nContent-Length: 99\r\nContent-Type: {MULTIPART}"
    with (
        served(bundle, drain_s=0.1) as server,
        socket.create_connection(("127.0.0.1", server.port)) as client,
    ):
        client.sendall(f"POST /v1/audio/transcriptions HTTP/1.1\r\n{head}\r\n\r\n".encode())
        wait(server, lambda: server.hub.engine.num_streams == 1)
        server.loop.call_soon_threadsafe(server.hub.drain)
        answer = b""
        while b"the server is leaving" not in answer:
            data = client.recv(4096)
            assert data, answer
            answer += data
        assert not server.hub.is_overdue


def test_who_is_being_told_goodbye_still_counts(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    """A server that leaves once nobody is there would cut it short, with code 1012."""
    counts = []

    async def watched(websocket: WebSocket, *args: Any) -> None:
        counts.append(websocket.app.state.hub.engine.num_streams)
        await close(websocket, *args)

    close = WebSocket.close
    monkeypatch.setattr(WebSocket, "close", watched)
    with served(bundle) as server, connect(server.websocket("/sherpa")) as client:
        client.send("Done")
        _rest(client)
        assert closed(client) == (1000, "")
        wait(server, lambda: server.hub.engine.num_streams == 0)
    assert counts == [1]


def test_a_file_does_not_keep_a_server(bundle: Bundle, sound: Floats):
    long = np.tile(sound, 200)
    with served(bundle, drain_s=0.1) as server, ThreadPoolExecutor(2) as pool:
        client = openai.OpenAI(api_key="any", base_url=f"{server.http}/v1", max_retries=0)
        options = {"model": "tiny", "file": ("a.flac", wav(long, kind="FLAC"))}
        plain = pool.submit(client.audio.transcriptions.create, **options)
        streamed = pool.submit(lambda: list(client.audio.transcriptions.create(**options, stream=True)))
        wait(server, lambda: server.hub.engine.audio_s > 10)
        server.loop.call_soon_threadsafe(server.hub.drain)
        with pytest.raises(openai.InternalServerError, match="the server is leaving"):
            plain.result(60)
        with pytest.raises(openai.APIError, match="the server is leaving"):
            streamed.result(60)
