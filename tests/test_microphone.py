"""The microphone, with a stand-in for PortAudio, and (slow) with a real PulseAudio source."""

import builtins
import ctypes.util
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import soundfile
import soxr

from asr import microphone
from asr.errors import AudioError, MissingExtra
from asr.microphone import FLOOR_DB, devices, level_db, microphone_blocks


class FakePortAudio(ModuleType):
    """Replaces sounddevice, as far as the tests need: no clock and no thread (a test calls `deliver`, and so
    decides what has arrived before the next block is read), no times for the callback, and only the rates
    in `rates` can be opened."""

    class PortAudioError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("sounddevice")
        self.default = SimpleNamespace(device=[2, -1])
        self.rates = {16000, 48000}
        self.on_open: list[tuple[np.ndarray, bool]] = []
        self.streams: list[SimpleNamespace] = []
        self.names = ["Loudspeaker", "Webcam", "Headset", "Headset of Ann"]

    def query_devices(self) -> list[dict]:
        inputs = [0, 2, 1, 1]
        return [
            {"name": n, "max_input_channels": c, "default_samplerate": 48000.0}
            for n, c in zip(self.names, inputs, strict=True)
        ]

    def check_input_settings(self, *, device, channels, dtype, samplerate) -> None:
        if samplerate not in self.rates:
            raise self.PortAudioError("Invalid sample rate")

    def InputStream(self, **options):
        if self.names[options["device"]] == "Webcam":
            raise self.PortAudioError("Device unavailable [PaErrorCode -9985]")
        stream = FakeStream(**options)
        self.streams.append(stream)
        for samples, overflow in self.on_open:
            stream.deliver(samples, overflow)
        return stream


class FakeStream(SimpleNamespace):
    active = True
    is_open = False

    def __enter__(self):
        self.is_open = True
        return self

    def __exit__(self, *_):
        self.is_open = False

    def deliver(self, samples, overflow=False) -> None:
        buffer = np.array(samples, np.float32)[:, None]
        self.callback(buffer, len(buffer), None, SimpleNamespace(input_overflow=overflow))
        buffer[:] = np.nan  # PortAudio's buffer is invalid after its callback returns


@pytest.fixture
def portaudio(monkeypatch) -> FakePortAudio:
    fake = FakePortAudio()
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    return fake


def test_only_inputs_are_listed_and_the_default_is_marked(portaudio):
    assert [(d.index, d.name, d.channels, d.sample_rate, d.is_default) for d in devices()] == [
        (1, "Webcam", 2, 48000, False),
        (2, "Headset", 1, 48000, True),
        (3, "Headset of Ann", 1, 48000, False),
    ]


def test_blocks_come_in_order_and_closing_releases_the_device(portaudio):
    portaudio.on_open = [(np.full(1600, i / 8), False) for i in range(5)]
    stream = microphone_blocks()
    got = list(islice(stream, 5))
    assert [block.samples[0] for block in got] == [0, 1 / 8, 2 / 8, 3 / 8, 4 / 8]
    assert all(block.samples.shape == (1600,) and block.samples.dtype == np.float32 for block in got)
    assert not any(block.overflowed for block in got)
    opened = portaudio.streams[0]
    assert (opened.samplerate, opened.blocksize, opened.channels, opened.device) == (16000, 1600, 1, 2)
    assert opened.is_open
    stream.close()
    assert not opened.is_open


@pytest.mark.parametrize(
    ("device", "index"), [(None, 2), ("", 2), (3, 3), ("3", 3), ("ann", 3), ("headset", 2)]
)
def test_a_device_is_found_by_number_by_name_or_by_default(device, index, portaudio):
    portaudio.on_open = [(np.zeros(10), False)]
    next(microphone_blocks(device))
    assert portaudio.streams[0].device == index


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("violin", "no microphone 'violin'; available: 1 'Webcam', 2 'Headset', 3 'Headset of Ann'"),
        (0, "no microphone '0'; available: 1 'Webcam'"),
        ("head", "2 microphones match 'head'; available"),
        ("webcam", "microphone 'Webcam': Device unavailable .* is it in use, or unplugged"),
    ],
)
def test_a_device_that_cannot_be_used_names_those_there_are(device, message, portaudio):
    with pytest.raises(AudioError, match=message):
        next(microphone_blocks(device))


def test_a_machine_without_microphones_says_so(portaudio, monkeypatch):
    monkeypatch.setattr(portaudio, "query_devices", list)
    assert devices() == []
    with pytest.raises(AudioError, match="no microphone found"):
        next(microphone_blocks())


def test_a_device_of_another_rate_is_resampled(portaudio):
    portaudio.rates = {48000}
    sound = np.sin(np.arange(48000) / 20).astype(np.float32)
    portaudio.on_open = [(part, False) for part in np.split(sound, 10)]
    got = np.concatenate([block.samples for block in islice(microphone_blocks(), 10)])
    wanted = soxr.resample(sound, 48000, 16000)
    assert portaudio.streams[0].blocksize == 4800
    assert len(wanted) - len(got) < 800
    np.testing.assert_allclose(got, wanted[: len(got)], atol=1e-6)


def test_what_a_slow_reader_loses_is_reported_with_the_next_block(portaudio, monkeypatch):
    monkeypatch.setattr(microphone, "QUEUE_S", 0.5)
    portaudio.on_open = [(np.full(1600, i), False) for i in range(7)]  # 5 fit, 2 are lost
    stream = microphone_blocks()
    kept = list(islice(stream, 5))
    portaudio.streams[0].deliver(np.full(1600, 7))
    portaudio.streams[0].deliver(np.full(1600, 8))
    kept += list(islice(stream, 2))
    assert [block.samples[0] for block in kept] == [0, 1, 2, 3, 4, 7, 8]
    assert [block.overflowed for block in kept] == [False] * 5 + [True, False]


def test_what_the_device_loses_is_reported(portaudio):
    portaudio.on_open = [(np.zeros(1600), overflow) for overflow in (False, True, False)]
    assert [block.overflowed for block in islice(microphone_blocks(), 3)] == [False, True, False]


def test_the_lag_is_how_long_a_block_has_waited(portaudio, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(microphone.time, "monotonic", lambda: now[0])
    portaudio.on_open = [(np.zeros(1600), False)] * 2
    stream = microphone_blocks()
    assert next(stream).lag_s == 0
    now[0] += 2.5
    assert next(stream).lag_s == 2.5


@pytest.mark.parametrize(
    ("active", "message"), [(False, "'Headset' has stopped"), (True, "'Headset' delivers nothing")]
)
def test_a_device_that_falls_silent_is_an_error_and_no_endless_wait(active, message, portaudio, monkeypatch):
    monkeypatch.setattr(microphone, "SILENT_S", 0.02)
    portaudio.on_open = [(np.zeros(1600), False)]
    stream = microphone_blocks()
    next(stream)
    portaudio.streams[0].active = active
    with pytest.raises(AudioError, match=message):
        next(stream)
    assert not portaudio.streams[0].is_open


@pytest.mark.parametrize(
    ("raised", "error", "message"),
    [
        (
            ModuleNotFoundError("No module named 'sounddevice'"),
            MissingExtra,
            r"pip install 'asr-toolkit\[mic\]'",
        ),
        (OSError("PortAudio library not found"), AudioError, "apt-get install libportaudio2"),
    ],
)
def test_what_is_not_installed_is_named_with_the_line_that_installs_it(raised, error, message, monkeypatch):
    import_ = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "sounddevice":
            raise raised
        return import_(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(error, match=message):
        devices()


def test_levels_in_decibels():
    sine = np.sin(np.arange(16000) * 2 * np.pi / 160).astype(np.float32)
    assert level_db(np.ones(10, np.float32)) == 0
    assert level_db(sine) == pytest.approx(-3.01, abs=0.01)
    assert level_db(sine / 10) == pytest.approx(-23.01, abs=0.01)
    assert level_db(np.zeros(10, np.float32)) == level_db(np.zeros(0, np.float32)) == FLOOR_DB


# A real source: PulseAudio's null sink, whose monitor is the microphone

PULSE_MODULES = (
    "module-native-protocol-unix auth-anonymous=1",
    "module-null-sink sink_name=spk rate=16000 channels=1",
    "module-remap-source master=spk.monitor source_name=mic",
)
RECORD = """
import sys
from itertools import islice
import numpy as np
from asr.microphone import devices, microphone_blocks
print([d.name for d in devices()], file=sys.stderr)
got = []
for block in microphone_blocks(sys.argv[1]):
    if not got:
        print("listening", flush=True)
    got.append(block)
    if len(got) == 40:
        break
print(max(b.lag_s for b in got), sum(b.overflowed for b in got))
np.save(sys.argv[2], np.concatenate([b.samples for b in got]))
"""


@pytest.fixture
def pulseaudio():
    """A separate PulseAudio with its own home: the environment in which its microphone exists."""
    for program in ("pulseaudio", "paplay", "pactl"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")
    if importlib.util.find_spec("sounddevice") is None or not ctypes.util.find_library("portaudio"):
        pytest.skip("sounddevice or libportaudio2 is not installed")
    if not list(Path("/usr/lib").glob("**/libasound_module_pcm_pulse.so")):
        pytest.skip("libasound2-plugins is not installed")
    home = Path(tempfile.mkdtemp(prefix="pulse"))  # short, because a socket's path must be
    (home / ".asoundrc").write_text("pcm.!default { type pulse }\nctl.!default { type pulse }\n")
    env = {**os.environ, "HOME": str(home), "XDG_RUNTIME_DIR": str(home), "PULSE_SOURCE": "mic"}
    loads = [part for module in PULSE_MODULES for part in ("-L", module)]
    command = ["pulseaudio", "-n", "--daemonize=no", "--exit-idle-time=-1", *loads]
    server = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            if not subprocess.run(["pactl", "info"], env=env, capture_output=True).returncode:
                break
            time.sleep(0.1)
        else:
            pytest.skip("pulseaudio does not start here")
        yield env
    finally:
        server.terminate()
        server.wait(10)
        shutil.rmtree(home)


@pytest.mark.slow
def test_a_real_source_is_heard_sample_for_sample(pulseaudio, tmp_path):
    sound = (np.random.default_rng(0).standard_normal(32000) * 3000).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", np.concatenate([np.zeros(8000, np.int16), sound]), 16000)
    command = [sys.executable, "-c", RECORD, "default", str(tmp_path / "heard.npy")]
    recorder = subprocess.Popen(
        command, env=pulseaudio, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert recorder.stdout is not None
    assert recorder.stdout.readline().strip() == "listening", recorder.communicate()[1]
    subprocess.run(["paplay", "--device=spk", tmp_path / "a.wav"], env=pulseaudio, check=True)
    out, err = recorder.communicate(timeout=30)
    assert recorder.returncode == 0, err
    lag_s, overflowed = out.split()
    heard = np.load(tmp_path / "heard.npy")
    assert len(heard) == 64000
    wanted = sound.astype(np.float32) / 32768
    at = int(np.correlate(heard, wanted[:4000], mode="valid").argmax())
    np.testing.assert_allclose(heard[at : at + len(wanted)], wanted, atol=1e-4)
    assert float(lag_s) < 1
    assert overflowed == "0"
