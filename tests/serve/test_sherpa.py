"""sherpa-onnx's streaming websocket, by its own C++ client, and by one that does what it should not."""

import json
import subprocess
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.sync.client import ClientConnection, connect

from asr.audio import Floats
from asr.runtime import Bundle, Event, open_stream
from asr.serve.background import Background

from .clients import SOME, closed, held, served, wav


@pytest.mark.parametrize("path", ["/", "/sherpa"])
def test_texts_are_those_of_a_stream(server: Background, sound: Floats, finals: list[Event], path: str):
    with connect(server.websocket(path), compression=None) as client:
        for block in np.array_split(sound, 13):
            client.send(block.astype("<f4").tobytes())
        results = _results(client, "Done")
    ended = [x for x in results if x["is_final"]]
    assert [x["text"] for x in ended] == [x.text for x in finals]
    assert [x["segment"] for x in ended] == list(range(len(finals)))
    assert [x["start_time"] for x in ended] == [round(x.start_s, 3) for x in finals]
    assert [x["is_eof"] for x in results] == [False] * (len(results) - 1) + [True]
    assert all(len(x["tokens"]) == len(x["timestamps"]) for x in results)
    assert len(results) > len(ended)


def test_the_client_of_sherpa_onnx(server: Background, sound: Floats, finals: list[Event], tmp_path: Path):
    path = tmp_path / "a.wav"
    path.write_bytes(wav(sound))
    program = Path(sysconfig.get_path("scripts")) / "sherpa-onnx-online-websocket-client"
    command = [program, "--server-ip=127.0.0.1", f"--server-port={server.port}", "--seconds-per-message=0.1"]
    done = subprocess.run([*command, path], capture_output=True, text=True, timeout=60, check=True)
    said = done.stdout + done.stderr
    assert all(f'"text": "{event.text}"' in said for event in finals), said
    assert "Done!" in said


def test_all_that_the_format_has(server: Background, sound: Floats):
    names = "text tokens timestamps ys_probs lm_probs context_scores segment words start_time is_final is_eof"
    with connect(server.websocket("/sherpa")) as client:
        client.send(sound.astype("<f4").tobytes())
        assert all(list(x) == names.split() for x in _results(client, "Done"))


def test_several_utterances_may_end_at_the_end(bundle: Bundle, sound: Floats):
    config = replace(SOME, chunk_ms=5120)
    stream = open_stream(bundle, config)
    assert not stream.accept(sound)
    expected = [x.text for x in stream.finish() if x.final and x.text]
    assert len(expected) > 1
    with served(bundle, stream=config) as server, connect(server.websocket("/sherpa")) as client:
        client.send(sound.astype("<f4").tobytes())
        results = _results(client, "Done")
    assert [x["text"] for x in results] == expected
    assert [x["segment"] for x in results] == list(range(len(expected)))
    assert [x["is_eof"] for x in results] == [False] * (len(results) - 1) + [True]


@pytest.mark.parametrize("num_samples", [0, 1, 300])
def test_next_to_nothing(server: Background, bundle: Bundle, num_samples: int):
    samples = np.zeros(num_samples, np.float32)
    stream = open_stream(bundle, SOME)
    expected = [x.text for x in stream.accept(samples) + stream.finish() if x.final]
    with connect(server.websocket("/sherpa")) as client:
        client.send(samples.tobytes())
        (last,) = _results(client, "Done")
        assert [last["text"]] == (expected or [""])
        assert (last["is_final"], last["is_eof"]) == (True, True)
    assert client.close_code == 1000


def test_done_at_once_and_twice_and_sound_after_it(server: Background, sound: Floats):
    with connect(server.websocket("/sherpa")) as client:
        with held(server):
            client.send("Done")
            client.send("Done")
            client.send(sound[:800].astype("<f4").tobytes())
        (last,) = _results(client, None)
        assert (last["text"], last["is_eof"]) == ("", True)
        assert closed(client) == (1000, "")


@pytest.mark.parametrize(
    ("message", "code", "reason"),
    [
        (bytes(7), 1003, "7 bytes, expected float32"),
        ("hello", 1003, "or Done"),
        ("", 1003, "or Done"),
        ("done", 1003, "or Done"),
        (np.array([0, np.nan, np.inf], "<f4").tobytes(), 1007, "2 samples are NaN or infinite"),
        (bytes(2**20 + 4), 1009, ""),
    ],
)
def test_what_is_not_understood_ends_the_connection(
    server: Background, message: str | bytes, code: int, reason: str
):
    with connect(server.websocket("/sherpa"), compression=None) as client:
        client.send(np.zeros(320, "<f4").tobytes())
        found = closed(client, message)
    assert found[0] == code
    assert reason in found[1]


def _results(client: ClientConnection, last: str | None) -> list[dict[str, Any]]:
    """Everything up to `Done!`, after saying what comes last."""
    if last:
        client.send(last)
    found = []
    while (message := client.recv(timeout=30)) != "Done!":
        found.append(json.loads(message))
    return found
