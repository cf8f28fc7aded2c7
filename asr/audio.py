"""Audio files and raw samples in, float32 mono in [-1, 1] out.

All entry points share one loader: `read` for a whole file, `blocks` for a file of any length in bounded
memory, `raw_blocks` for samples without a header, such as from a pipe. All three give the same samples.
`asr/containers.py` determines which files are decoded.

A file that is only partly usable is used as far as possible, with an AudioWarning (asr/containers.py). An
unusable one raises an AudioError that names the file.

C channels, S samples. The resampler is soxr at its high-quality setting.
"""

import errno
import math
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from asr.containers import (
    MAX_CHANNELS,
    Patched,
    check_format,
    check_head,
    has_header,
    how_to_convert,
    warn,
)
from asr.errors import AudioError, AudioTooLong

Floats = NDArray[np.float32]
Source = str | os.PathLike[str] | BinaryIO

SAMPLE_RATE = 16000
MAX_READ_S = 4 * 3600.0
"""`read` refuses more seconds than this ..."""
MAX_READ_BYTES = 2**30
"""... and more decoded bytes (frames x channels x 4), whatever sample rate the file claims."""

_PIECE_FRAMES = 4096
_CHANNELS = {"mix": None, "left": 0, "right": 1, **{str(i): i for i in range(MAX_CHANNELS)}}

_ERRNO = {
    errno.ENOENT: "not found",
    errno.EACCES: "permission denied",
    errno.ELOOP: "too many links: they form a loop",
    errno.ENOTDIR: "not found: a part of the path is a file",
}


@dataclass(frozen=True)
class AudioInfo:
    duration_s: float
    sample_rate: int
    channels: int


def info(source: Source) -> AudioInfo:
    """Length, sample rate in Hz and channels. If the header has no or a wrong length, decodes to get it."""
    with _opened(source) as sound:
        frames = sound.declared
        if frames is None or sound.is_cut:
            frames = sum(map(len, _pieces(sound)))
        return AudioInfo(frames / sound.rate, sound.rate, sound.channels)


def read(
    source: Source,
    sample_rate: int = SAMPLE_RATE,
    channel: str | int = "mix",
    max_s: float = MAX_READ_S,
    max_bytes: int = MAX_READ_BYTES,
) -> Floats:
    """A whole audio file -> (S,) at sample_rate.

    channel: "mix" (the mean), "left", "right", or a channel number from 0. Raises AudioError beyond max_s
    seconds or max_bytes decoded bytes; `blocks` has no limits unless they are given.
    """
    with _opened(source) as sound:
        limit = _limit(sound, max_s, max_bytes)
        pieces = list(_samples(sound, sample_rate, channel, limit))
    return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)


def blocks(
    source: Source,
    block_s: float = 1.0,
    sample_rate: int = SAMPLE_RATE,
    channel: str | int = "mix",
    max_s: float = math.inf,
    max_bytes: float = math.inf,
) -> Iterator[Floats]:
    """The samples of `read` in blocks of block_s seconds (the last may be shorter), in bounded memory."""
    with _opened(source) as sound:
        limit = _limit(sound, max_s, max_bytes)
        yield from _cut(_samples(sound, sample_rate, channel, limit), block_s, sample_rate)


def raw_blocks(
    stream: BinaryIO,
    sample_rate: int = SAMPLE_RATE,
    encoding: str = "s16le",
    block_s: float = 0.1,
    to_rate: int = SAMPLE_RATE,
) -> Iterator[Floats]:
    """Mono samples without a header -> blocks of block_s seconds at to_rate, each once it is complete.

    encoding: "s16le" or "f32le"; sample_rate: of the stream, in Hz. Reads may return any number of bytes; an
    incomplete sample at the end is dropped. Raises AudioError if the stream is an audio file with a header.
    """
    if encoding not in ("s16le", "f32le"):
        raise AudioError(f"raw samples: encoding {encoding!r} is not one of s16le, f32le")
    check_format("raw samples", sample_rate, 1)
    samples = _raw_samples(stream, np.dtype("<i2" if encoding == "s16le" else "<f4"), block_s, sample_rate)
    yield from _cut(_resampled(samples, sample_rate, to_rate), block_s, to_rate)


def write(path: str | os.PathLike[str], samples: Floats, sample_rate: int = SAMPLE_RATE) -> None:
    """Write samples (S,) as 16-bit .wav or .flac, clipped to [-1, 1]. Raises AudioError for NaN."""
    format_ = Path(path).suffix.lower().removeprefix(".").upper()
    if format_ not in ("WAV", "FLAC"):
        raise AudioError(f"{path}: audio can be written only as .wav or .flac")
    if not np.isfinite(samples).all():
        raise AudioError(f"{path}: the samples to write hold NaN or infinity")
    # not libsndfile's conversion, which scales by 32767: reading and writing again is lossless
    pcm = (np.asarray(samples, np.float64) * 32768).round().clip(-32768, 32767).astype(np.int16)
    try:
        with open(path, "wb") as stream:
            soundfile.write(stream, pcm, sample_rate, format=format_, subtype="PCM_16")
    except OSError as error:
        raise AudioError(f"{path}: {_reason(error)}") from None


# Opening


class _Decoder(soundfile.SoundFile):
    """Reads sequentially: SoundFile seeks after every read, which breaks MP3 and truncated or piped FLAC."""

    def seekable(self) -> bool:
        return False


@dataclass(frozen=True)
class _Sound:
    name: str
    file: _Decoder
    rate: int
    channels: int
    declared: int | None
    """Frames that the header promises; None if it does not say."""
    is_cut: bool
    """Whether there are fewer."""


@contextmanager
def _opened(source: Source) -> Iterator[_Sound]:
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        context: AbstractContextManager[BinaryIO] = _open_file(name)
    else:
        given = getattr(source, "name", None)
        name, context = given if isinstance(given, str) else "audio", nullcontext(source)
    with context as stream:
        patched, declared = check_head(stream, name)
        with _decoder(patched, name) as file:
            check_format(name, file.samplerate, file.channels)
            known = file.frames if file.frames < 2**60 else None  # unknown in FLAC written to a pipe
            is_cut = declared is not None and file.frames < declared
            yield _Sound(name, file, file.samplerate, file.channels, declared or known, is_cut)


def _decoder(stream: Patched, name: str) -> _Decoder:
    try:
        return _Decoder(stream)
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{name}: {_complaint(error)}; {how_to_convert(name)}") from None


def _complaint(error: soundfile.LibsndfileError) -> str:
    return f"damaged, or in an unsupported format ({error.error_string.rstrip('. ')})"


def _open_file(path: str) -> BinaryIO:
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise AudioError(f"{path}: is a directory, expected a sound file")
        if not stat.S_ISREG(mode):
            raise AudioError(
                f"{path}: is a pipe or a device, expected a file; send raw samples to standard input"
            )
        return open(path, "rb")
    except OSError as error:
        raise AudioError(f"{path}: {_reason(error)}") from None


def _reason(error: OSError) -> str:
    return _ERRNO.get(error.errno or 0, (error.strerror or str(error)).lower())


# Decoding


def _pieces(sound: _Sound) -> Iterator[Floats]:
    """Decoded frames (n, C). If the decoder fails after the first piece, the audio ends there."""
    got = False
    while True:
        try:
            piece = sound.file.read(_PIECE_FRAMES, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            if got:
                return
            raise AudioError(f"{sound.name}: {_complaint(error)}; {how_to_convert(sound.name)}") from None
        if not len(piece):
            return
        got = True
        yield piece


def _limit(sound: _Sound, max_s: float, max_bytes: float) -> float:
    """The number of frames of a file that may be read."""
    return min(max_s * sound.rate, max_bytes / (4 * sound.channels))


def _samples(sound: _Sound, sample_rate: int, channel: str | int, limit: float) -> Iterator[Floats]:
    """Mono pieces at sample_rate; AudioError beyond `limit` frames of the file."""
    index = _channel_index(sound, channel)
    scale = np.float32(_check_floats(sound))
    mono = (
        (piece.mean(1) if index is None else piece[:, index]) * scale
        for piece in _watched(sound, scale, limit)
    )
    yield from _resampled(mono, sound.rate, sample_rate)


def _channel_index(sound: _Sound, channel: str | int) -> int | None:
    """Which column to take; None for the mean of all."""
    index = _CHANNELS.get(channel, -1) if isinstance(channel, str) else channel
    if index == -1:
        raise AudioError(f"channel {channel!r} is not one of mix, left, right, or a number from 0")
    if index is not None and not 0 <= index < sound.channels:
        raise AudioError(f"{sound.name}: has {sound.channels} channels, no channel {channel}; use mix")
    return index


def _check_floats(sound: _Sound) -> float:
    """The scale of the samples. Only float files can have NaN or values beyond 1, so they are read twice."""
    if sound.file.subtype not in ("FLOAT", "DOUBLE"):
        return 1.0
    bad, first, at, peak = 0, 0, 0, 0.0
    for piece in _pieces(sound):
        is_bad = ~np.isfinite(piece).all(1)
        if is_bad.any():
            first = first if bad else at + int(is_bad.argmax())
            bad += int(is_bad.sum())
        peak = max(peak, float(np.abs(piece).max()))
        at += len(piece)
    if bad:
        raise AudioError(
            f"{sound.name}: {bad:,} of {at:,} frames are NaN or infinite, the first is number {first} "
            f"({first / sound.rate:.3f} s); repair the file"
        )
    sound.file.seek(0)
    if peak > 1:
        warn(f"{sound.name}: float samples up to {peak:g}, beyond [-1, 1]; scaled down to fit")
    return 1 / max(peak, 1.0)


def _watched(sound: _Sound, scale: np.float32, limit: float) -> Iterator[Floats]:
    """The pieces, with a warning at the end if there are fewer than promised or none, or if they clip."""
    frames = clipped = 0
    for piece in _pieces(sound):
        frames += len(piece)
        if frames > limit:
            raise AudioTooLong(
                f"{sound.name}: longer than {limit / sound.rate:.0f} s ({limit * 4 * sound.channels:,.0f} "
                "bytes decoded), the limit here; split it"
            )
        clipped += int((np.abs(piece).max(1) >= 0.999).sum())
        yield piece
    if not frames:
        warn(f"{sound.name}: holds no samples")
    elif sound.declared and (sound.declared - frames) / sound.rate > 0.02:
        percent = 100 * frames / sound.declared
        warn(f"{sound.name}: {percent:.0f} % of the declared audio is there; the file was cut off")
    if scale == 1 and clipped > 0.01 * frames:
        warn(f"{sound.name}: {100 * clipped / frames:.0f} % of the samples are at full scale: clipped")


class Resampler:
    """Mono samples (S,) that come piece by piece, from one sample rate in Hz to another."""

    def __init__(self, from_rate: int, to_rate: int) -> None:
        is_needed = from_rate != to_rate
        self._soxr = soxr.ResampleStream(from_rate, to_rate, 1, dtype="float32") if is_needed else None

    def accept(self, piece: Floats) -> Floats:
        """What is known so far of the next samples."""
        return self._soxr.resample_chunk(piece) if self._soxr else piece

    def finish(self) -> Floats:
        """The rest."""
        nothing = np.zeros(0, np.float32)
        return self._soxr.resample_chunk(nothing, last=True) if self._soxr else nothing


def _resampled(pieces: Iterable[Floats], from_rate: int, to_rate: int) -> Iterator[Floats]:
    resampler = Resampler(from_rate, to_rate)
    for piece in pieces:
        yield resampler.accept(piece)
    yield resampler.finish()


def _cut(pieces: Iterable[Floats], block_s: float, sample_rate: int) -> Iterator[Floats]:
    """Pieces of any length -> blocks of block_s seconds, the last one shorter."""
    size = max(1, round(block_s * sample_rate))
    held: list[Floats] = []
    length = 0
    for piece in pieces:
        held.append(piece)
        length += len(piece)
        if length >= size:
            whole = np.concatenate(held)
            end = length - length % size
            yield from (whole[i : i + size] for i in range(0, end, size))
            held, length = [whole[end:]], length - end
    if length:
        yield np.concatenate(held)


def _raw_samples(stream: BinaryIO, dtype: np.dtype[Any], block_s: float, rate: int) -> Iterator[Floats]:
    read_some = getattr(stream, "read1", stream.read)  # what has arrived, not the whole block
    size = max(1, round(block_s * rate)) * dtype.itemsize
    rest, at = b"", 0
    while data := read_some(size):
        if not at and has_header(rest + data):
            raise AudioError("raw samples: found a sound file with a header; give its path instead")
        rest += data
        end = len(rest) - len(rest) % dtype.itemsize
        samples = np.frombuffer(rest[:end], dtype).astype(np.float32)
        if not np.isfinite(samples).all():
            first = at + int((~np.isfinite(samples)).argmax())
            raise AudioError(f"raw samples: number {first} is NaN or infinite; is the encoding right?")
        rest, at = rest[end:], at + len(samples)
        yield samples / np.float32(32768) if dtype.kind == "i" else samples
    if not at:
        warn("raw samples: none arrived")
