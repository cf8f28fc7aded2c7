"""Detects the type of an audio file by its first bytes, never by its name.

WAV (PCM, float, A-law, mu-law), RF64, FLAC, Ogg (Opus, Vorbis), MP3 and NIST SPHERE go to the decoder.
Anything else is refused with a command that converts it: decoders of rare formats are where hostile files do
harm. WAV headers are parsed here, because libsndfile believes a data size of 0 and does not report that a
file is truncated.
"""

import io
import os
import shlex
import struct
import warnings
from collections.abc import Iterator
from typing import Any, BinaryIO

from asr.errors import AudioError

MIN_RATE_HZ, MAX_RATE_HZ = 4000, 384000
MAX_CHANNELS = 8

_UNKNOWN_SIZE = 0x7FFF0000  # programs that write WAV to a pipe leave such a size in the header
MAGIC = (b"RIFF", b"RF64", b"fLaC", b"OggS", b"ID3", b"NIST_1A")
_LOOKS_LIKE = {
    b"<!doctype": "HTML: a failed download?",
    b"<html": "HTML: a failed download?",
    b"<?xml": "XML: a failed download?",
    b"{": "JSON: a failed download?",
    b"version https://git-lfs": "a Git LFS pointer: run git lfs pull",
    b"\xff\xd8\xff": "a JPEG picture",
    b"\x89png": "a PNG picture",
    b"%pdf": "a PDF document",
    b"pk\x03\x04": "a ZIP archive: unpack it",
    b"\x1f\x8b": "a gzip archive: unpack it",
    b"\x1aE\xdf\xa3": "WebM or Matroska",
}
TAG_BYTES = 1024
"""So much may follow the audio without being a chunk: tags that some programs append."""
MP3_FRAMES = 3
"""Successive headers of MP3 frames that are no coincidence."""
_MP3_KBPS = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0)
_MP3_LOW_KBPS = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0)
_WAV_CODECS = {1: "PCM", 3: "float", 6: "A-law", 7: "mu-law"}


class AudioWarning(UserWarning):
    """The audio is used, but something is wrong with it."""


class Patched(io.RawIOBase):
    """A binary stream with some bytes replaced, and without its name, which soundfile would trust."""

    def __init__(self, stream: BinaryIO, at: int = 0, data: bytes = b"") -> None:
        self._stream, self._at, self._data = stream, at, data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def readinto(self, buffer: Any) -> int:
        start = self._stream.tell()
        data = bytearray(self._stream.read(len(buffer)))
        for i, byte in enumerate(self._data, start=self._at - start):
            if 0 <= i < len(data):
                data[i] = byte
        buffer[: len(data)] = data
        return len(data)


def check_head(stream: BinaryIO, name: str) -> tuple[Patched, int | None]:
    """The stream to decode, and the frames that a WAV header promises; AudioError for other formats."""
    head = stream.read(64)
    if not head:
        raise AudioError(f"{name}: is empty (0 bytes)")
    if head[:4] == b"RIFF":
        return _check_wav(stream, name)
    is_mp3 = len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] & 0x06
    if not (head.startswith(MAGIC) or is_mp3):
        raise AudioError(f"{name}: {_looks_like(head)}; {how_to_convert(name)}")
    stream.seek(0)
    return Patched(stream), None


def has_header(data: bytes) -> bool:
    """Whether data is the beginning of a file with a header, rather than samples."""
    if data.startswith(MAGIC) or data.startswith(b"\x1a\x45\xdf\xa3") or data[4:8] == b"ftyp":
        return True
    at = 0
    for _ in range(MP3_FRAMES):  # a single one could be a sample
        if not (size := _mp3_frame_bytes(data[at : at + 4])):
            return False
        at += size
    return True


def _mp3_frame_bytes(head: bytes) -> int:
    """The length of the frame of MPEG audio, layer III, that these four bytes begin; 0 if they do not."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2:
        return 0
    version, rate_hz = head[1] >> 3 & 3, (44100, 48000, 32000, 0)[head[2] >> 2 & 3]
    kbps = (_MP3_KBPS if version == 3 else _MP3_LOW_KBPS)[head[2] >> 4]
    if version == 1 or not rate_hz or not kbps:
        return 0
    samples, divisor = (1152, 1) if version == 3 else (576, 2 if version == 2 else 4)
    return samples // 8 * 1000 * kbps * divisor // rate_hz + (head[2] >> 1 & 1)


def _looks_like(head: bytes) -> str:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if head[4:8] == b"ftyp":
        return "looks like MP4 or M4A"
    for magic, what in _LOOKS_LIKE.items():
        if text.startswith(magic) or head.startswith(magic):
            return f"looks like {what}"
    if text.isascii() and text.decode().isprintable():
        return f"looks like text: {text[:20].decode()!r}"
    return f"not a known audio format (it starts with {head[:8].hex(' ')})"


def how_to_convert(name: str) -> str:
    return f"convert it: ffmpeg -i {shlex.quote(name)} -ac 1 -ar 16000 out.wav"


def check_format(name: str, rate: int, channels: int) -> None:
    if not MIN_RATE_HZ <= rate <= MAX_RATE_HZ:
        raise AudioError(f"{name}: sample rate is {rate} Hz, expected {MIN_RATE_HZ} to {MAX_RATE_HZ} Hz")
    if not 1 <= channels <= MAX_CHANNELS:
        raise AudioError(f"{name}: has {channels} channels, expected 1 to {MAX_CHANNELS}")


# WAV headers: libsndfile believes a size of 0, and does not report a truncated file


def _check_wav(stream: BinaryIO, name: str) -> tuple[Patched, int | None]:
    total = stream.seek(0, os.SEEK_END)
    frame_bytes = 0
    for chunk, start, size in _chunks(stream, 12):
        if chunk == b"fmt ":
            frame_bytes = _check_wav_format(stream.read(min(size, 40)), name)
        elif chunk == b"data" and frame_bytes:
            stream.seek(0)
            return _wav_data(stream, name, start, size, total - start, frame_bytes)
    raise AudioError(f"{name}: truncated WAV header; copy or record the file again")


def _chunks(stream: BinaryIO, at: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, first byte, size) of each RIFF chunk from a position on; the stream is at its first byte."""
    stream.seek(at)
    while len(header := stream.read(8)) == 8:
        chunk, size = struct.unpack("<4sI", header)
        at += 8
        yield chunk, at, size
        at += size + size % 2
        stream.seek(at)


def _check_wav_format(data: bytes, name: str) -> int:
    """Bytes per frame; AudioError if codec, rate or channels are not supported."""
    if len(data) < 16:
        raise AudioError(f"{name}: truncated WAV header; copy or record the file again")
    codec, channels, rate, _, frame_bytes, _ = struct.unpack("<HHIIHH", data[:16])
    if codec == 0xFFFE and len(data) >= 26:
        codec = struct.unpack("<H", data[24:26])[0]
    check_format(name, rate, channels)
    if codec not in _WAV_CODECS:
        ours = ", ".join(_WAV_CODECS.values())
        raise AudioError(f"{name}: WAV codec 0x{codec:04X}, expected {ours}; {how_to_convert(name)}")
    if not frame_bytes:
        raise AudioError(f"{name}: damaged WAV header (a frame of 0 bytes); {how_to_convert(name)}")
    return int(frame_bytes)


def _wav_data(
    stream: BinaryIO, name: str, start: int, size: int, present: int, frame_bytes: int
) -> tuple[Patched, int | None]:
    if size >= _UNKNOWN_SIZE:
        return Patched(stream), None
    if size or not present or _is_chunk_list(stream, start, start + present):
        is_more = size and present > size + TAG_BYTES
        if is_more and not _is_chunk_list(stream, start + size + size % 2, start + present):
            warn(
                f"{name}: the header says {size:,} bytes of audio, {present:,} are there; the rest is unused"
            )
        stream.seek(0)
        return Patched(stream), size // frame_bytes
    warn(f"{name}: the header says 0 bytes of audio, {present} are there and are used")
    stream.seek(0)
    return Patched(stream, start - 4, struct.pack("<I", min(present, 2**32 - 1))), None


def _is_chunk_list(stream: BinaryIO, start: int, end: int) -> bool:
    """Whether complete chunks, and thus not samples, fill the file from start to end."""
    last = start
    for _, begin, size in _chunks(stream, start):
        last = begin + size
    return end in (last, last + 1)


def warn(message: str) -> None:
    warnings.warn(AudioWarning(message), stacklevel=2)
