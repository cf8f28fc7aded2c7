"""One loader for every audio file: what it accepts, warns about and refuses, and its memory."""

import errno
import io
import os
import stat
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from asr.audio import AudioInfo, blocks, info, raw_blocks, read, write
from asr.containers import AudioWarning
from asr.errors import AudioError

RATE = 16000


def tone(num_samples: int, rate: int = RATE, hz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(num_samples) / rate)).astype(np.float32)


def encode(samples: np.ndarray, rate: int = RATE, format: str = "WAV", subtype: str = "PCM_16") -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=format, subtype=subtype)
    return stream.getvalue()


def wav(
    data: bytes, size: int | None = None, rate: int = RATE, channels: int = 1, codec: int = 1, align: int = 2
) -> bytes:
    """A WAV built by hand, so that any field of its header can be wrong."""
    size = len(data) if size is None else size
    fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, codec, channels, rate, rate * align & 0xFFFFFFFF, align, 16)
    return (
        struct.pack("<4sI4s", b"RIFF", 36 + len(data), b"WAVE")
        + fmt
        + struct.pack("<4sI", b"data", size)
        + data
    )


PCM = (tone(400) * 32768).astype("<i2").tobytes()
FLOATS = tone(400)


def with_value(at: int, value: float, dtype: str = "<f4") -> bytes:
    samples = FLOATS.astype(dtype)
    samples[at:] = value
    return (
        wav(samples.tobytes(), codec=3, align=samples.itemsize)[:34]
        + struct.pack("<H", 8 * samples.itemsize)
        + (wav(samples.tobytes(), codec=3, align=samples.itemsize)[36:])
    )


REFUSED = {
    "empty": (b"", r"is empty \(0 bytes\)"),
    "half a header": (wav(PCM)[:20], "truncated WAV header; copy or record the file again"),
    "header up to the format": (wav(PCM)[:30], "truncated WAV header"),
    "no data chunk": (wav(PCM)[:36], "truncated WAV header"),
    "riff only": (b"RIFF", "truncated WAV header"),
    "flac header cut": (encode(tone(400), format="FLAC")[:20], r"damaged, or in an unsupported format"),
    "ogg header cut": (b"OggS\0\2" + bytes(20), r"damaged, or in an unsupported format"),
    "rate 0": (wav(PCM, rate=0), "sample rate is 0 Hz, expected 4000 to 384000 Hz"),
    "rate 2**31 - 1": (wav(PCM, rate=2**31 - 1), "sample rate is 2147483647 Hz, expected"),
    "flac at 655350 Hz": (encode(tone(400), 655350, "FLAC"), "sample rate is 655350 Hz, expected"),
    "rate 3999": (wav(PCM, rate=3999), "sample rate is 3999 Hz"),
    "no channels": (wav(PCM, channels=0), "has 0 channels, expected 1 to 8"),
    "30000 channels": (wav(PCM, channels=30000), "has 30000 channels, expected 1 to 8"),
    "9 channels": (wav(PCM, channels=9, align=18), "has 9 channels"),
    "frames of 0 bytes": (wav(PCM, align=0), "damaged WAV header"),
    "ima adpcm": (
        encode(tone(505), subtype="IMA_ADPCM"),
        "WAV codec 0x0011, expected PCM, float, A-law, mu-law; conv",
    ),
    "ms adpcm": (encode(tone(500), subtype="MS_ADPCM"), "WAV codec 0x0002"),
    "gsm": (encode(tone(320), subtype="GSM610"), "WAV codec 0x0031"),
    "aiff": (encode(tone(400), format="AIFF"), r"not a known audio format \(it starts with 46 4f 52 4d"),
    "html": (b"\n<!DOCTYPE html><html>", "looks like HTML: a failed download"),
    "json": (b'{"error": "no"}', "looks like JSON: a failed download"),
    "git lfs": (
        b"version https://git-lfs.github.com/spec/v1\n",
        "looks like a Git LFS pointer: run git lfs pull",
    ),
    "jpeg": (b"\xff\xd8\xff\xe0" + bytes(30), "looks like a JPEG"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(30), "looks like a PNG"),
    "zip": (b"PK\x03\x04" + bytes(30), "looks like a ZIP archive: unpack it"),
    "m4a": (b"\0\0\0\x20ftypM4A " + bytes(30), r"looks like MP4 or M4A; convert it: ffmpeg -i .* out\.wav"),
    "webm": (b"\x1aE\xdf\xa3" + bytes(30), "looks like WebM"),
    "text": (b"hello, this is no sound", "looks like text: 'hello, this is no so'"),
    "nan": (
        with_value(390, np.nan),
        r"10 of 400 frames are NaN or infinite, the first is number 390 \(0\.024 s\)",
    ),
    "infinity in float64": (
        with_value(0, -np.inf, "<f8"),
        "400 of 400 frames are NaN or infinite, the first is number 0",
    ),
}

WARNED = {
    "header only": (wav(b""), 0, "holds no samples"),
    "no samples, then a LIST chunk": (wav(b"LIST\x04\0\0\0INFO", size=0), 0, "holds no samples"),
    "cut off": (
        wav(PCM[:248], size=800 * 2),
        124,
        "16 % of the declared audio is there; the file was cut off",
    ),
    "data size too small": (
        wav(PCM * 3, size=len(PCM)),
        400,
        "the header says 800 bytes of audio, 2,400 are there; the rest is unused",
    ),
    "data size 0": (wav(PCM, size=0), 400, "says 0 bytes of audio, 800 are there and are used"),
    "beyond 1": (with_value(200, 1e6), 400, r"float samples up to 1e\+06, beyond \[-1, 1\]; scaled down"),
    "clipped": (wav(b"\xff\x7f" * 300 + PCM[:200]), 400, "75 % of the samples are at full scale"),
}

ACCEPTED = {
    "plain": wav(PCM),
    "data size 0xFFFFFFFF": wav(PCM, size=0xFFFFFFFF),
    "data size of sox in a pipe": wav(PCM, size=0x7FFFF000),
    "a tag after the audio": wav(PCM + b"TAG" + bytes(125), size=len(PCM)),
    "odd trailing byte": wav(PCM + b"\x01"),
    "24 bit": encode(FLOATS, subtype="PCM_24"),
    "32 bit": encode(FLOATS, subtype="PCM_32"),
    "8 bit": encode(FLOATS, subtype="PCM_U8"),
    "float": encode(FLOATS, subtype="FLOAT"),
    "double": encode(FLOATS, subtype="DOUBLE"),
    "mu-law": encode(FLOATS, subtype="ULAW"),
    "a-law": encode(FLOATS, subtype="ALAW"),
    "wavex": encode(FLOATS, format="WAVEX"),
    "rf64": encode(FLOATS, format="RF64"),
    "flac": encode(FLOATS, format="FLAC"),
    "sphere": encode(FLOATS, format="NIST"),
    "stereo": encode(np.stack([FLOATS, FLOATS], 1)),
    "8 channels": encode(np.stack([FLOATS] * 8, 1)),
}


@pytest.fixture
def put(tmp_path):
    def write_bytes(data: bytes, name: str = "a.wav") -> str:
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    return write_bytes


ENTRIES = {
    "read": read,
    "blocks": lambda source: np.concatenate([np.zeros(0), *blocks(source, 0.005)]),
    "bytes": lambda source: read(io.BytesIO(Path(source).read_bytes())),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_by_name(name, entry, put):
    data, message = REFUSED[name]
    assert len(data) < 4096
    with pytest.raises(AudioError, match=message) as error:
        ENTRIES[entry](put(data))
    assert str(error.value).startswith("audio: " if entry == "bytes" else "/")
    assert "a.wav: " in str(error.value) or entry == "bytes"


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", WARNED)
def test_what_is_there_is_used_with_a_warning(name, entry, put):
    data, num_samples, message = WARNED[name]
    with pytest.warns(AudioWarning, match=message) as caught:
        samples = ENTRIES[entry](put(data))
    assert len(caught) == 1
    assert len(samples) == num_samples
    assert np.abs(samples).max(initial=0) <= 1


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", ACCEPTED)
def test_every_encoding_gives_the_same_samples_without_a_warning(name, entry, put):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        samples = ENTRIES[entry](put(ACCEPTED[name]))
    np.testing.assert_allclose(samples, FLOATS, atol=0.02 if name in ("8 bit", "mu-law", "a-law") else 1e-4)


@pytest.mark.parametrize("name", ["a.raw", "a.mp3", "a", "a b'ü.txt"])
def test_the_name_of_a_file_says_nothing(name, put):
    np.testing.assert_allclose(read(put(ACCEPTED["flac"], name)), FLOATS, atol=1e-4)


@pytest.mark.parametrize(
    ("format", "subtype"), [("OGG", "OPUS"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")]
)
def test_lossy_formats_are_read(format, subtype, put):
    path = put(encode(tone(3 * RATE), RATE, format, subtype))
    samples = read(path)
    np.testing.assert_allclose(samples, soundfile.read(path, dtype="float32")[0], atol=1e-6)
    assert abs(len(samples) - 3 * RATE) < 2000
    assert np.sqrt(np.mean(samples**2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.1)


@pytest.mark.parametrize("rate", [4000, 8000, 11025, 22050, 44100, 96000, 384000])
def test_resampling_in_blocks_equals_resampling_at_once(rate, put):
    path = put(encode(tone(rate + 17, rate), rate))
    once = soxr.resample(soundfile.read(path, dtype="float32")[0], rate, RATE)
    np.testing.assert_array_equal(read(path), once)
    parts = list(blocks(path, 0.1))
    assert {len(part) for part in parts[:-1]} == {1600}
    np.testing.assert_array_equal(np.concatenate(parts), once)


def test_channels_are_mixed_or_chosen(put):
    left, right = tone(400), tone(400, hz=1000)
    path = put(encode(np.stack([left, right], 1)))
    for channel, wanted in [
        ("mix", (left + right) / 2),
        ("left", left),
        ("right", right),
        (1, right),
        ("0", left),
    ]:
        np.testing.assert_allclose(read(path, channel=channel), wanted, atol=1e-4)
    with pytest.raises(AudioError, match="has 2 channels, no channel 2"):
        read(path, channel=2)
    with pytest.raises(AudioError, match="channel 'centre' is not one of mix, left, right"):
        read(path, channel="centre")


def test_info_counts_what_is_there(put):
    assert info(put(wav(PCM))) == AudioInfo(0.025, 16000, 1)
    assert info(put(wav(PCM[:160], size=800))).duration_s == 0.005
    flac = bytearray(ACCEPTED["flac"])
    flac[21] &= 0xF0  # no number of samples, as from an encoder that writes to a pipe
    flac[22:26] = bytes(4)
    assert info(put(bytes(flac))).duration_s == 0.025
    np.testing.assert_allclose(read(put(bytes(flac))), FLOATS, atol=1e-4)


def test_a_flac_cut_off_is_used_as_far_as_it_goes(put):
    noise = np.random.default_rng(0).standard_normal(RATE).astype(np.float32) * 0.1
    data = encode(noise, format="FLAC")
    with pytest.warns(AudioWarning, match="% of the declared audio is there"):
        samples = read(put(data[: len(data) * 6 // 10]))
    assert 0.4 * RATE < len(samples) < 0.65 * RATE
    np.testing.assert_allclose(samples, noise[: len(samples)], atol=1e-4)


# What is not a file


def test_paths_that_are_no_file_say_so(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_bytes(b"")
    for name, message in {
        ".": "is a directory, expected a sound file",
        "fifo": "is a pipe or a device, expected a file",
        "loop": "too many links",
        "dangling": "dangling: not found",
        "missing.wav": "missing.wav: not found",
        "file/a.wav": "a part of the path is a file",
        "x" * 300: "file name too long",
    }.items():
        for entry in (read, info, lambda path: next(blocks(path))):
            with pytest.raises(AudioError, match=message):
                entry(tmp_path / name)


def test_a_file_one_may_not_read_says_so(put, monkeypatch):
    path = put(wav(PCM))

    def refuse(*_args):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(AudioError, match="permission denied"):
        read(path)


# Bounds


def test_reading_at_once_is_limited_in_seconds_and_in_decoded_bytes(put):
    path = put(encode(np.zeros((RATE * 20, 2)), format="FLAC"))  # 1 KB of file, 2.5 MB decoded
    assert os.path.getsize(path) < 2000
    with pytest.raises(AudioError, match=r"longer than 10 s .* the limit here; split it"):
        read(path, max_s=10)
    with pytest.raises(AudioError, match=r"longer than 8 s \(1,024,000 bytes decoded\)"):
        read(path, max_bytes=1_024_000)
    assert len(read(path, max_s=20)) == 20 * RATE
    assert sum(map(len, blocks(path))) == 20 * RATE


def test_three_hours_need_no_more_memory_than_three_minutes(tmp_path):
    program = (
        "import resource, sys; from asr.audio import blocks;"
        "n = sum(len(b) for b in blocks(sys.argv[1])); import sys;"
        "print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for minutes in (3, 180):
        path = tmp_path / f"{minutes}.wav"
        path.write_bytes(wav(b"", size=minutes * 60 * 8000 * 2, rate=8000))
        os.truncate(path, 44 + minutes * 60 * 8000 * 2)  # silence that takes no space on disk
        done = subprocess.run(
            [sys.executable, "-c", program, path], check=True, capture_output=True, text=True
        )
        num_samples, peak = map(int, done.stdout.split())
        assert num_samples == minutes * 60 * RATE  # 8 kHz in, 16 kHz out
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 8 * 1024  # KiB; the samples would be 675,000


# Raw samples


class Dribble(io.RawIOBase):
    """A pipe: every read returns a different number of bytes."""

    def __init__(self, data: bytes) -> None:
        self.data, self.turn = data, 0

    def read(self, size: int = -1) -> bytes:
        self.turn += 1
        size = min(size, 1 + self.turn * 7 % 13)
        piece, self.data = self.data[:size], self.data[size:]
        return piece


@pytest.mark.parametrize("encoding", ["s16le", "f32le"])
@pytest.mark.parametrize("make", [io.BytesIO, Dribble, lambda data: io.BufferedReader(io.BytesIO(data))])
def test_raw_samples_come_through_whatever_the_reads_return(encoding, make):
    samples = (FLOATS * 32768).round() / 32768
    data = (
        (samples * 32768).astype("<i2").tobytes() if encoding == "s16le" else samples.astype("<f4").tobytes()
    )
    parts = list(raw_blocks(make(data + b"\x01"), encoding=encoding, block_s=0.01))  # and an odd byte
    assert [len(part) for part in parts] == [160, 160, 80]
    np.testing.assert_array_equal(np.concatenate(parts), samples.astype(np.float32))


def test_raw_samples_are_resampled():
    data = (tone(8000, 8000) * 32768).astype("<i2")
    got = np.concatenate(list(raw_blocks(Dribble(data.tobytes()), sample_rate=8000)))
    np.testing.assert_array_equal(got, soxr.resample(data.astype(np.float32) / 32768, 8000, RATE))


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (wav(PCM), {}, "found a sound file with a header; give its path instead"),
        (encode(tone(9000), format="MP3", subtype="MPEG_LAYER_III"), {}, "found a sound file with a header"),
        (
            encode(tone(9000), rate=44100, format="MP3", subtype="MPEG_LAYER_III"),
            {},
            "found a sound file with a header",
        ),
        (b"ID3\x03" + bytes(99), {}, "found a sound file with a header"),
        (bytes(4) + b"ftypM4A " + bytes(99), {}, "found a sound file with a header"),
        (b"\x1a\x45\xdf\xa3" + bytes(99), {}, "found a sound file with a header"),
        (PCM, {"encoding": "u8"}, "encoding 'u8' is not one of s16le, f32le"),
        (PCM, {"sample_rate": 100}, "sample rate is 100 Hz"),
        (
            with_value(7, np.nan)[44:],
            {"encoding": "f32le"},
            "number 7 is NaN or infinite; is the encoding right",
        ),
    ],
)
def test_wrong_raw_samples_are_refused(data, options, message):
    with pytest.raises(AudioError, match=message):
        list(raw_blocks(io.BytesIO(data), **options))


def test_no_raw_samples_are_no_blocks():
    with pytest.warns(AudioWarning, match="raw samples: none arrived"):
        assert list(raw_blocks(io.BytesIO(b""))) == list(raw_blocks(io.BytesIO(b"\1"))) == []


def test_a_sample_that_looks_like_an_mp3_frame_is_a_sample():
    data = encode(tone(9000), format="MP3", subtype="MPEG_LAYER_III")[:4] + PCM
    assert sum(map(len, raw_blocks(io.BytesIO(data)))) == 402


# Writing


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "A.WAV"])
def test_what_is_written_is_read_again_bit_for_bit(name, tmp_path):
    write(tmp_path / name, FLOATS)
    first = read(tmp_path / name)
    np.testing.assert_allclose(first, FLOATS, atol=2**-16)
    write(tmp_path / name, first)
    np.testing.assert_array_equal(read(tmp_path / name), first)
    assert stat.S_ISREG((tmp_path / name).stat().st_mode)


def test_writing_clips_and_refuses_what_is_no_sound(tmp_path):
    write(tmp_path / "a.wav", np.float32([2, -2, 0.5]))
    np.testing.assert_allclose(soundfile.read(tmp_path / "a.wav")[0], [1, -1, 0.5], atol=1e-4)
    with pytest.raises(AudioError, match="hold NaN"):
        write(tmp_path / "b.wav", np.float32([np.nan]))
    with pytest.raises(AudioError, match=r"b\.mp3: audio can be written only as \.wav or \.flac"):
        write(tmp_path / "b.mp3", FLOATS)
    with pytest.raises(AudioError, match=r"b\.wav: not found"):
        write(tmp_path / "none" / "b.wav", FLOATS)
