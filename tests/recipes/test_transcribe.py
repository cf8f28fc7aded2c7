import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr.audio import blocks, write
from asr.errors import AudioError
from asr.microphone import Block, Device
from asr.runtime import Bundle, Stream, StreamConfig
from export.verify import made_sound
from recipes import sources
from recipes.cli import main
from recipes.sources import Complaints, Settings, find_sources, meter, paced

Result = tuple[int, str, str]


@pytest.fixture
def asr(tiny_bundles: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """`asr transcribe BUNDLE ...` -> exit status, standard output, standard error."""

    def run(*args: object) -> Result:
        status = main(["transcribe", str(tiny_bundles / "cpu-fp32"), *map(str, args)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three audio files, one of them in a subfolder, and one other file."""
    sound = made_sound(9.0, 16000)
    path = tmp_path / "sounds"
    (path / "below").mkdir(parents=True)
    write(path / "a.wav", sound[:48000])
    stereo = np.repeat(np.stack([sound[:60000], sound[:60000]], 1), 3, axis=0)
    soundfile.write(path / "b.flac", stereo, 44100)
    write(path / "below" / "c.wav", sound[60000:])
    (path / "broken.wav").write_bytes(b"RIFFnothing")
    (path / "notes.txt").write_text("not sound")
    return path


def expected(tiny_bundles: Path, path: Path) -> list[str]:
    stream = Stream(Bundle.load(tiny_bundles / "cpu-fp32"), StreamConfig())
    events = [event for block in blocks(path) for event in stream.accept(block)] + stream.finish()
    return [event.text for event in events if event.final]


def test_a_file_becomes_lines_on_standard_output(asr, tiny_bundles: Path, folder: Path):
    status, out, err = asr(folder / "a.wav")
    assert (status, err) == (0, "")
    assert out.splitlines() == expected(tiny_bundles, folder / "a.wav") != []


def test_another_rate_and_stereo_are_no_matter(asr, tiny_bundles: Path, folder: Path):
    status, out, _ = asr(folder / "b.flac")
    assert status == 0
    assert out.splitlines() == expected(tiny_bundles, folder / "b.flac") != []
    assert asr(folder / "b.flac", "--channel", "right")[1] == out
    assert asr(folder / "b.flac", "--channel", "7")[0] == 2


@pytest.mark.parametrize(
    ("format_", "sign"), [("txt", ""), ("srt", "-->"), ("vtt", "WEBVTT"), ("json", '"words"')]
)
def test_formats_and_output_files(asr, folder: Path, tmp_path: Path, format_: str, sign: str):
    path = tmp_path / f"out.{format_}"
    assert asr(folder / "a.wav", "--format", format_, "-o", path) == (0, "", "")
    text = path.read_text(encoding="utf-8")
    assert sign in text
    assert asr(folder / "a.wav", "--format", format_)[1] == text


def test_a_bad_file_does_not_stop_the_others(asr, folder: Path, tmp_path: Path):
    out = tmp_path / "out"
    status, printed, err = asr(folder, "-o", out, "--recursive", "--format", "json")
    assert (status, printed) == (3, "")
    assert "broken.wav" in err
    assert "3 transcribed" in err
    assert "1 could not be used" in err
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert files == ["a.json", "b.json", "below/c.json"]
    for name in files:
        for line in (out / name).read_text(encoding="utf-8").splitlines():
            assert json.loads(line)["final"]


def test_several_files_are_named_on_standard_output(asr, folder: Path):
    _, out, _ = asr(folder / "a.wav", folder / "b.flac")
    assert {line.partition(": ")[0] for line in out.splitlines()} == {
        str(folder / "a.wav"),
        str(folder / "b.flac"),
    }
    _, out, _ = asr(folder / "a.wav", folder / "b.flac", "--format", "json")
    assert json.loads(out.splitlines()[0])["source"] == str(folder / "a.wav")


@pytest.mark.parametrize("encoding", ["s16le", "f32le"])
def test_raw_samples_on_standard_input(
    asr, tiny_bundles: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
):
    samples, _ = soundfile.read(folder / "a.wav", dtype="int16")
    data = samples.astype("<i2") if encoding == "s16le" else (samples / 32768).astype("<f4")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data.tobytes())))
    status, out, _ = asr("-", "--encoding", encoding)
    assert status == 0
    assert out.splitlines() == expected(tiny_bundles, folder / "a.wav")


def test_modes_and_context_can_be_chosen(asr, folder: Path):
    outs = {
        asr(folder / "a.wav", *options)[1]
        for options in ([], ["--mode", "rescore"], ["--chunk-ms", "160"], ["--left-chunks", "0"])
    }
    assert len(outs) > 1
    chunk = ("--chunk-ms", "80")
    assert asr(folder / "a.wav", *chunk, "--look-ahead", "2")[1] != asr(folder / "a.wav", *chunk)[1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "pass sound files"),
        (["--mic", "a.wav"], "pass sound files"),
        (["a.wav", "--format", "doc"], "no such format"),
        (["-", "a.wav"], "combined with files"),
        (["a.wav", "b.wav", "--format", "srt"], "need a folder"),
        (["x/a.wav", "y/a.wav", "-o", "out"], "several sources"),
        (["missing.wav"], "missing.wav: not found"),
        (["a.wav", "--mode", "magic"], "no such mode"),
        (["a.wav", "--left-chunks", "x"], "left-chunks"),
        (["a.wav", "--left-chunks", "-5"], "--left-chunks -5: expected 0 or more, or -1"),
        (["a.wav", "--look-ahead", "-1"], "look_ahead is -1, expected 0 or more"),
    ],
)
def test_mistakes_are_one_line(
    asr, args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    status, out, err = asr(*args)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_an_unusable_output_is_told_before_any_work(asr, folder: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    status, _, err = asr(folder / "a.wav", "-o", tmp_path / "file" / "out.txt")
    assert status == 2
    assert "file" in err


@pytest.mark.parametrize("through_a_link", [False, True])
def test_a_source_is_never_overwritten(asr, folder: Path, through_a_link: bool):
    out = folder / ("link.txt" if through_a_link else "a.wav")
    if through_a_link:
        out.symlink_to(folder / "a.wav")
    before = (folder / "a.wav").read_bytes()
    status, _, err = asr(folder / "a.wav", "-o", out)
    assert status == 2
    assert f"{out}: is a source; choose another file with -o" in err
    assert (folder / "a.wav").read_bytes() == before


def test_an_empty_folder_says_so(asr, tmp_path: Path, folder: Path):
    shutil.rmtree(folder / "below")
    assert "no sound files" in asr(tmp_path)[2]
    assert "--recursive" in asr(tmp_path)[2]


def test_a_failure_leaves_no_half_transcript(asr, folder: Path, tmp_path: Path):
    out = tmp_path / "out.txt"
    assert asr(folder / "broken.wav", "-o", out)[0] == 2
    assert not list(tmp_path.glob("*out*"))


class Interrupted(io.BytesIO):
    """Standard input of a program that is then told to end."""

    def __init__(self, data: bytes, number: int) -> None:
        super().__init__(data)
        self._number = number

    def read1(self, size: int = -1) -> bytes:
        if data := super().read1(size):
            return data
        os.kill(os.getpid(), self._number)
        time.sleep(5)
        raise AssertionError("the signal was ignored")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_what_standard_input_has_said(
    asr, tiny_bundles: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    samples, _ = soundfile.read(folder / "a.wav", dtype="int16")
    stdin = io.TextIOWrapper(Interrupted(samples.astype("<i2").tobytes(), number))
    monkeypatch.setattr(sys, "stdin", stdin)
    status, _, err = asr("-", "-o", tmp_path / "out.txt")
    assert (status, err) == (130, "asr: interrupted\n")
    assert (tmp_path / "out.txt").read_text().splitlines() == expected(tiny_bundles, folder / "a.wav")


def test_sigterm_leaves_no_half_transcript(
    asr, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sources, "paced", lambda *_: iter([os.kill(os.getpid(), signal.SIGTERM)]))
    assert asr(folder / "a.wav", "--realtime", "-o", tmp_path / "out.txt")[0] == 130
    assert not list(tmp_path.glob("*out*"))


def test_a_full_disk_is_told_in_one_line_that_names_the_file(folder: Path, tiny_bundles: Path):
    code = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
    code += "from recipes.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "transcribe", str(tiny_bundles / "cpu-fp32"), "a.wav"]
    for args, name in (["-o", "out.txt"], "out.txt"), ([], "output"):
        with (folder / "printed").open("w") as out:
            pipes = {"stdout": out, "stderr": subprocess.PIPE, "text": True, "cwd": folder}
            done = subprocess.run([*command, *args], check=False, **pipes)  # type: ignore[call-overload]
        assert (done.returncode, done.stderr) == (2, f"asr: {name}: file too large\n")
        assert not list(folder.glob("*out.txt*"))


def test_the_longest_names_are_written_and_longer_ones_told_before_any_work(
    asr, folder: Path, tmp_path: Path
):
    status, _, _ = asr(folder / "a.wav", "-o", tmp_path / f"{'x' * 251}.txt")
    assert (status, len(list(tmp_path.glob("x*.txt")))) == (0, 1)
    status, _, err = asr(folder / "a.wav", "-o", tmp_path / f"{'x' * 252}.txt")
    assert status == 2
    assert "xxx.txt: file name too long" in err


def test_a_closed_pipe_is_quiet(asr, folder: Path, monkeypatch: pytest.MonkeyPatch):
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", Closed())
        status, _, err = asr(folder / "a.wav")
    assert (status, err) == (141, "")


def test_partial_texts_are_shown_on_a_terminal_and_cleared(
    asr, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", screen)
        _, out, _ = asr(folder / "below" / "c.wav", "--chunk-ms", "160")
    assert screen.getvalue().count("\x1b[12C") > 1
    assert screen.getvalue().endswith("\r\x1b[K")
    assert "\x1b" not in out


def test_partial_texts_are_lines_where_a_file_is_played_without_a_terminal(
    asr, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("time.sleep", lambda _: None)
    _, read, _ = asr(folder / "a.wav")
    status, played, words = asr(folder / "a.wav", "--realtime")
    assert (status, played) == (0, read)
    assert " s  " in words


class FakeMicrophone:
    """A stand-in for asr.microphone with its own audio; the user interrupts at the end."""

    def __init__(
        self,
        sound: np.ndarray,
        lag_s: float = 0.0,
        error: type[BaseException] | Exception = KeyboardInterrupt,
    ) -> None:
        self.sound, self.lag_s, self.error = sound, lag_s, error or KeyboardInterrupt()

    def devices(self) -> list[Device]:
        return [Device(0, "Built-in", 2, 48000, True), Device(3, "Headset", 1, 16000, False)]

    def level_db(self, samples: np.ndarray) -> float:
        return -30.0

    def microphone_blocks(self, device: object, sample_rate: int, block_ms: int):
        assert device == "3"
        for start in range(0, len(self.sound), sample_rate * block_ms // 1000):
            samples = self.sound[start : start + sample_rate * block_ms // 1000]
            yield Block(samples, self.lag_s, overflowed=False)
        raise self.error


def test_the_microphone_is_transcribed_until_an_interrupt(
    asr, tiny_bundles: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    sound = np.concatenate(list(blocks(folder / "a.wav")))
    monkeypatch.setitem(sys.modules, "asr.microphone", FakeMicrophone(sound, lag_s=3.0))
    status, out, err = asr("--mic", "--device", "3")
    assert status == 0
    assert out.splitlines() == expected(tiny_bundles, folder / "a.wav")
    assert err.count("3.0 s behind") == 1
    assert asr("--list-devices")[1] == "  0  Built-in  (default)\n  3  Headset\n"
    assert main(["transcribe", "--list-devices"]) == 0  # without a bundle


def test_a_microphone_that_is_pulled_out_leaves_what_was_said_and_is_told(
    asr, tiny_bundles: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sound = np.concatenate(list(blocks(folder / "a.wav")))
    fake = FakeMicrophone(sound, error=AudioError("microphone 'Headset' has stopped"))
    monkeypatch.setitem(sys.modules, "asr.microphone", fake)
    status, out, err = asr("--mic", "--device", "3")
    assert status == 2
    assert out.splitlines() == expected(tiny_bundles, folder / "a.wav")
    assert err == "asr: microphone 'Headset' has stopped\n"
    assert asr("--mic", "--device", "3", "-o", tmp_path / "said.txt")[0] == 2
    assert (tmp_path / "said.txt").read_text() == out


@pytest.mark.parametrize("lag_s", [0.0, 3.0])
def test_every_loss_of_a_microphone_is_told(lag_s: float, monkeypatch: pytest.MonkeyPatch, capsys):
    """At once, or together with others when enough time has passed since the last message, or at the end."""
    clock = [0.0]
    monkeypatch.setattr(sources.time, "monotonic", lambda: clock[0])
    complaints = Complaints()
    lost = np.random.default_rng(0).random(400) < 0.1
    for is_lost in lost:
        clock[0] += 0.1
        complaints.hear(Block(np.zeros(10, np.float32), lag_s, bool(is_lost), 0.5 * is_lost))
    complaints.end()
    told = capsys.readouterr().err
    times = [1 if word == "once" else int(word) for word in re.findall(r"lost (\w+)", told)]
    assert sum(times) == lost.sum()
    assert sum(map(float, re.findall(r"([\d.]+) s of it here", told))) == pytest.approx(0.5 * lost.sum())
    assert told.count("\n") <= 5
    assert ("3.0 s behind" in told) == ("too slow for this model" in told) == (lag_s > 0)


def test_meter():
    assert [meter(level) for level in (-90.0, -60.0, -30.0, 0.0, 6.0)] == [
        f"[{'#' * n}{'-' * (10 - n)}]" for n in (0, 0, 5, 10, 10)
    ]


def test_paced_blocks_come_when_they_would_be_spoken(monkeypatch: pytest.MonkeyPatch):
    clock, slept = itertools.count(100.0, 0.01), []
    monkeypatch.setattr(sources.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sources.time, "sleep", slept.append)
    assert len(list(paced(iter([np.zeros(1600, np.float32)] * 3), 16000))) == 3
    np.testing.assert_allclose(slept, [0.09, 0.18, 0.27], atol=1e-9)


def test_folders_keep_their_structure(folder: Path):
    found = find_sources([str(folder)], True, Settings())
    assert [str(source.output) for source in found] == ["a", "b", "below/c", "broken"]
    assert len(find_sources([str(folder)], False, Settings())) == 3
