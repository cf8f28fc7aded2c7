"""`asr serve` as a program."""

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from asr.errors import ConfigError
from recipes.cli import main
from recipes.serve import _keys


def test_sigterm_lets_clients_finish(tiny_bundles: Path):
    command = [sys.executable, "-m", "recipes.cli", "serve", str(tiny_bundles / "cpu-fp32"), "--port", "0"]
    program = subprocess.Popen([*command, "--name", "tiny"], stderr=subprocess.PIPE, text=True)
    assert program.stderr
    try:
        said = program.stderr.readline()
        found = re.match(r"tiny at http://127\.0\.0\.1:(\d+), for 32 clients at a time$", said)
        assert found, said
        with connect(f"ws://127.0.0.1:{found[1]}/sherpa", open_timeout=60) as client:
            client.send(np.random.default_rng(0).normal(0, 0.1, 16000).astype("<f4").tobytes())
            assert client.recv(timeout=30)
            program.send_signal(signal.SIGTERM)
            client.send("Done")
            with pytest.raises(ConnectionClosed):
                assert [client.recv(timeout=30) for _ in range(100)][-1]
        assert program.wait(30) == 0
    finally:
        program.kill()
        log = program.communicate()[1]
    assert "Traceback" not in log
    assert "WEBSOCKET /sherpa" in log


def test_a_second_signal_ends_it_at_once(tiny_bundles: Path):
    command = [sys.executable, "-m", "recipes.cli", "serve", str(tiny_bundles / "cpu-fp32"), "--port", "0"]
    program = subprocess.Popen([*command, "--drain-s", "600"], stderr=subprocess.PIPE, text=True)
    assert program.stderr
    try:
        found = re.search(r"http://127\.0\.0\.1:(\d+),", program.stderr.readline())
        assert found
        head = "Host: x\r\nContent-Length: 99\r\nContent-Type: multipart/form-data; boundary=b"
        with socket.create_connection(("127.0.0.1", int(found[1])), timeout=60) as client:
            client.sendall(f"POST /v1/audio/transcriptions HTTP/1.1\r\n{head}\r\n\r\n".encode())
            assert _status(found[1], until=lambda x: x["streams"] == 1)["ready"]
            program.send_signal(signal.SIGTERM)
            assert _status(found[1], until=lambda x: not x["ready"])["streams"] == 1
            program.send_signal(signal.SIGTERM)
            assert program.wait(60) == 0
            assert client.recv(4096).startswith(b"HTTP/1.1 503 ")
    finally:
        program.kill()
        log = program.communicate()[1]
    assert "Traceback" not in log


def _status(port: str, until: Callable[[Any], bool]) -> Any:
    """What /readyz says once something is true of it."""
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz") as answer:
                status = json.load(answer)
        except urllib.error.HTTPError as error:
            status = json.load(error)
        if until(status):
            return status


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("", "KEYS: holds no keys"),
        ("first\n\n  # of the second client\nsecond\n", "KEYS:3: expected a key without spaces"),
        ("#first\n", "KEYS:1: expected a key without spaces, and no comments"),
        ("first\nsome words\n", "KEYS:2: expected a key without spaces"),
    ],
)
def test_a_file_of_keys_holds_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: str, message: str
):
    """Each word would let clients in."""
    monkeypatch.chdir(tmp_path)
    path = Path("KEYS")
    path.write_text("\ufefffirst\r\n second \n\n", encoding="utf-8")
    assert _keys(path) == ("first", "second")
    path.write_text(keys)
    with pytest.raises(ConfigError, match=message):
        _keys(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "reachable from elsewhere; pass --keys FILE, or --insecure"),
        (["--host", "example.invalid"], "reachable from elsewhere"),
        (["--host", "nowhere.invalid", "--insecure"], "nowhere.invalid:6006: "),
        (["--port", "99999"], "127.0.0.1:99999: "),
        (["--keys", "KEYS"], "holds no keys; write one per line"),
        (["--keys", "missing"], "missing: no such file or directory"),
        (["--compat", "x"], "compat is x, expected one of sherpa, vosk"),
        (["--max-streams", "0"], "max_streams is 0, expected 1 or more"),
        (["--max-audio-s", "0"], "max_audio_s is 0.0, expected more than 0"),
        (["--drain-s", "-1"], "drain_s is -1.0, expected 0 or more"),
        (["--chunk-ms", "7"], "a chunk of 7 ms is not a multiple"),
        (["--mode", "x"], "x"),
    ],
)
def test_what_cannot_be_served_is_said_at_once(
    tiny_bundles: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
):
    monkeypatch.chdir(tmp_path)
    Path("KEYS").write_text("\n")
    assert main(["serve", str(tiny_bundles / "cpu-fp32"), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_port_in_use(tiny_bundles: Path, capsys: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        assert main(["serve", str(tiny_bundles / "cpu-fp32"), "--port", port]) == 2
    assert f"127.0.0.1:{port}: address already in use" in capsys.readouterr().err


def test_an_experiment_is_not_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["serve", str(tmp_path)]) == 2
    assert "model.json" in capsys.readouterr().err
