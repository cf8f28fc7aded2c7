"""Clients that mean harm: they get no memory, no time of the others, and no line of the log of their own."""

import contextlib
import re
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from websockets.sync.client import connect

from asr.audio import Floats
from asr.runtime import Bundle
from asr.runtime.utterance import Utterance
from asr.serve import engine, files
from asr.serve import server as listening
from asr.serve.background import Background

from .clients import MULTIPART, held, served, wait, wav

CONTINUATION, TEXT, BINARY, PING, PONG = 0, 1, 2, 9, 10

UPGRADE = (
    "Host: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
)


def _frame(kind: int, data: bytes = b"", is_last: bool = True) -> bytes:
    size = bytes([0x80 | len(data)]) if len(data) < 126 else b"\xfe" + struct.pack(">H", len(data))
    return bytes([0x80 * is_last | kind]) + size + bytes(4) + data


def _connected(server: Background, request: bytes, buffer: int = 0) -> socket.socket:
    """A client that has sent a request."""
    client = socket.socket()
    if buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    client.settimeout(30)
    client.connect(("127.0.0.1", server.port))
    client.sendall(request)
    return client


def _upgraded(server: Background, buffer: int = 0) -> socket.socket:
    client = _connected(server, f"GET /sherpa HTTP/1.1\r\n{UPGRADE}\r\n".encode(), buffer)
    _until(client, b"\r\n\r\n")
    return client


def _until(client: socket.socket, end: bytes = b"") -> bytes:
    """What the server says until `end`, or until it closes the connection."""
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while not (end and said.endswith(end)) and (data := client.recv(1 if end else 4096)):
            said += data
    return said


def _post(file: bytes, **fields: str) -> bytes:
    parts = [f'name="{name}"\r\n\r\n{value}'.encode() for name, value in {"model": "tiny", **fields}.items()]
    parts.append(b'name="file"; filename="a"\r\n\r\n' + file)
    body = (
        b"".join(b"--b\r\nContent-Disposition: form-data; " + part + b"\r\n" for part in parts) + b"--b--\r\n"
    )
    head = f"Host: x\r\nContent-Length: {len(body)}\r\nContent-Type: {MULTIPART}"
    return f"POST /v1/audio/transcriptions HTTP/1.1\r\n{head}\r\n\r\n".encode() + body


def _done(client: socket.socket) -> bytes:
    """The last messages of a sherpa client."""
    client.sendall(_frame(TEXT, b"Done"))
    return _until(client, b"Done!")


def test_answers_to_pings_that_nobody_reads_are_dropped(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    waiting = []

    def watched(protocol: Any) -> None:
        answer(protocol)
        waiting.append(protocol.transport.get_write_buffer_size())

    answer = listening._WebSocket.handle_ping
    monkeypatch.setattr(listening, "MAX_FRAMES", 10**9)
    monkeypatch.setattr(listening._WebSocket, "handle_ping", watched)
    with served(bundle) as server:
        client = _upgraded(server, buffer=4096)
        for _ in range(200):
            client.sendall(_frame(PING, bytes(125)) * 400)
        wait(server, lambda: len(waiting) == 80_000)
        client.close()
    assert 2**16 < max(waiting) < 2**18


@pytest.mark.parametrize("kind", [PING, PONG, CONTINUATION])
def test_frames_without_a_message_have_a_limit(
    server: Background, monkeypatch: pytest.MonkeyPatch, kind: int
):
    monkeypatch.setattr(listening, "MAX_FRAMES", 10)
    if kind == CONTINUATION:
        begin, part = _frame(BINARY, is_last=False), _frame(CONTINUATION, is_last=False)
        few, many = begin + part * 8 + _frame(CONTINUATION), begin + part * 10
    else:
        few, many = _frame(kind) * 9 + _frame(BINARY), _frame(kind) * 10
    client = _upgraded(server)
    client.sendall(few * 5)
    assert b'"is_eof": true' in _done(client)
    client.close()
    client = _upgraded(server)
    client.sendall(many)
    assert b"Done!" not in _until(client)
    wait(server, lambda: not server.hub.engine.num_streams)


def test_a_connection_is_read_little_by_little(server: Background, monkeypatch: pytest.MonkeyPatch):
    sizes = []

    def watched(protocol: Any, data: bytes) -> None:
        sizes.append(len(data))
        read(protocol, data)

    read = listening._WebSocket.data_received
    monkeypatch.setattr(listening._WebSocket, "data_received", watched)
    client = _upgraded(server)
    with held(server):
        client.sendall(_frame(PING) * 4000)
    assert _done(client)
    client.close()
    assert max(sizes) <= listening.READ_BYTES < sum(sizes)


@pytest.mark.parametrize(
    "headers",
    ["Cookie: " + "a" * 9000, "\r\n".join(f"X-{n}: a" for n in range(150)), "Content-Length: 4"],
)
def test_requests_that_websockets_does_not_read_are_refused(server: Background, headers: str):
    client = _connected(server, f"GET /sherpa HTTP/1.1\r\n{UPGRADE}{headers}\r\n\r\n".encode())
    assert _until(client).startswith(b"HTTP/1.1 400 ")


def test_what_follows_a_request_stays_in_the_connection(
    bundle: Bundle, sound: Floats, monkeypatch: pytest.MonkeyPatch
):
    num_read, at_end = [0], []

    def read(protocol: Any, data: bytes) -> None:
        num_read[0] += len(data)
        told(protocol, data)

    def answered(*args: Any) -> Any:
        at_end.append(num_read[0])
        return answer(*args)

    told, answer = listening._Http.data_received, files._answer
    monkeypatch.setattr(listening._Http, "data_received", read)
    monkeypatch.setattr(files, "_answer", answered)
    request = _post(wav(np.zeros(16000 * 100, np.float32), kind="FLAC"))
    with served(bundle) as server, ThreadPoolExecutor(1) as pool:
        client = _connected(server, request)
        sending = pool.submit(lambda: [client.sendall(bytes(2**16)) for _ in range(200)])
        assert isinstance(sending.exception(60), OSError)  # in the end it is no request
    assert at_end[0] - len(request) < 4 * listening.READ_BYTES


@pytest.mark.parametrize("size", [3000, None])
@pytest.mark.parametrize("stream", ["false", "true"])
def test_who_goes_before_the_answer_leaves_one_line(
    bundle: Bundle,
    sound: Floats,
    model: threading.Event,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    size: int | None,
    stream: str,
):
    """size: bytes of the request that are sent."""
    gone = []

    def losing(protocol: Any, error: Any) -> None:
        lose(protocol, error)
        gone.append(protocol.client)

    lose = listening._Http.connection_lost
    monkeypatch.setattr(listening._Http, "connection_lost", losing)
    with served(bundle) as server, caplog.at_level("INFO"):
        model.clear()
        client = _connected(server, _post(wav(sound), stream=stream)[:size])
        heard_s = 1.0 if size else 2.0
        wait(server, lambda: server.hub.engine.num_streams == 1 and server.hub.engine.audio_s >= heard_s)
        address = client.getsockname()
        client.close()
        wait(server, lambda: address in gone)
        model.set()
        wait(server, lambda: "transcriptions" in caplog.text and not server.hub.engine.num_streams)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert " 499, " in caplog.text


def test_a_path_is_one_line_of_the_log(server: Background, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO"):
        client = _connected(server, b"GET /x%0Afake%1b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        _until(client)
        client = _connected(server, f"GET /y%0Afake HTTP/1.1\r\n{UPGRADE}\r\n".encode())
        _until(client)
        wait(server, lambda: "/y" in caplog.text)
    assert " GET /x%0Afake%1b 404, " in caplog.text
    assert " WEBSOCKET /y%0Afake " in caplog.text


def test_the_log_and_the_client_have_the_same_id(server: Background, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO"):
        with connect(server.websocket("/sherpa")) as client:
            assert client.response
            request_id = client.response.headers["x-request-id"]
        wait(server, lambda: request_id in caplog.text)
    assert re.fullmatch("[0-9a-f]{32}", request_id)


@pytest.mark.parametrize(
    ("target", "name", "error"),
    [(Utterance, "advance", StopIteration()), (engine, "_do", RuntimeError("secret"))],
)
def test_no_error_stops_the_engine(
    server: Background,
    sound: Floats,
    monkeypatch: pytest.MonkeyPatch,
    target: Any,
    name: str,
    error: Exception,
):
    """A future may not hold StopIteration; and the code around the streams may have bugs, too."""

    def broken(*args: Any) -> Any:
        raise error

    samples = _frame(BINARY, sound[:15000].astype("<f4").tobytes())
    with monkeypatch.context() as patch:
        patch.setattr(target, name, broken)
        client = _upgraded(server)
        client.sendall(samples)
        assert _until(client, b"internal error")
        client.close()
    client = _upgraded(server)
    client.sendall(samples)
    assert b'"is_eof": true' in _done(client)
