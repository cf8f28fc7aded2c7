"""The audio sources of `asr transcribe`: files, standard input, the microphone; all as blocks of samples."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from asr.errors import AudioError, ConfigError

if TYPE_CHECKING:
    from asr.decode.scorer import Floats
    from asr.microphone import Block

SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
BLOCK_S = 0.1
LAG_S = 1.0
"""A longer delay between a word and its text is worth a warning."""
COMPLAINT_S = 10.0
"""Minimum interval between warnings about the microphone."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to read sources."""

    channel: str = "mix"
    rate: int = 16000
    encoding: str = "s16le"
    realtime: bool = False
    device: str = ""


@dataclass(frozen=True)
class Source:
    """One source of audio."""

    name: str
    """A path, "-" for standard input, or "microphone"."""

    output: Path
    """Path of the transcript below the folder of -o, without its suffix."""

    settings: Settings

    @property
    def is_live(self) -> bool:
        """Whether its audio arrives no faster than it is spoken."""
        return self.is_gone or self.settings.realtime

    @property
    def is_gone(self) -> bool:
        """Whether its audio cannot be read again."""
        return self.name in ("-", "microphone")

    def blocks(self, sample_rate: int) -> Iterator[Floats]:
        """Its samples at sample_rate. AudioError if it cannot be used."""
        from asr.audio import blocks, raw_blocks

        settings = self.settings
        if self.name == "microphone":
            yield from _microphone(settings.device, sample_rate)
        elif self.name == "-":
            stream = sys.stdin.buffer
            yield from raw_blocks(stream, settings.rate, settings.encoding, BLOCK_S, sample_rate)
        else:
            found = blocks(self.name, BLOCK_S, sample_rate, settings.channel)
            yield from paced(found, sample_rate) if settings.realtime else found


def paced(blocks: Iterator[Floats], sample_rate: int) -> Iterator[Floats]:
    """The same blocks, each when it would have been spoken."""
    started, num_samples = time.monotonic(), 0
    for block in blocks:
        num_samples += len(block)
        time.sleep(max(0.0, started + num_samples / sample_rate - time.monotonic()))
        yield block


def find_sources(names: list[str], recursive: bool, settings: Settings) -> list[Source]:
    """The sources of the command line, with folders replaced by the audio files in them."""
    if "-" in names and len(names) > 1:
        raise ConfigError("- is standard input, and cannot be combined with files")
    sources: list[Source] = []
    for name in names:
        path = Path(name)
        if name != "-" and path.is_dir():
            found = _sound_files(path, recursive)
            sources += [Source(str(x), x.relative_to(path).with_suffix(""), settings) for x in found]
        else:
            sources.append(Source(name, Path("stdin" if name == "-" else path.stem), settings))
    return sources


def _sound_files(folder: Path, recursive: bool) -> list[Path]:
    every = folder.rglob("*") if recursive else folder.glob("*")
    found = sorted(path for path in every if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        advice = "" if recursive else "; --recursive also searches its subfolders"
        raise AudioError(f"{folder}: no sound files ({' '.join(SUFFIXES)}) in it{advice}")
    return found


def _microphone(device: str, sample_rate: int) -> Iterator[Floats]:
    """Blocks of the microphone, with a level meter on a terminal. Lost or late audio is always reported."""
    from asr.microphone import level_db, microphone_blocks

    complaints = Complaints()
    try:
        for block in microphone_blocks(device, sample_rate, round(1000 * BLOCK_S)):
            complaints.hear(block)
            if sys.stderr.isatty():
                print(f"\r{meter(level_db(block.samples))}", end="", file=sys.stderr, flush=True)
            yield block.samples
    finally:
        complaints.end()


class Complaints:
    """Reports problems with a microphone: the first at once, later ones together, every COMPLAINT_S."""

    def __init__(self) -> None:
        self._told_at = -COMPLAINT_S
        self._num_gaps, self._lost_s, self._lag_s = 0, 0.0, 0.0

    def hear(self, block: Block) -> None:
        self._num_gaps += block.overflowed
        self._lost_s += block.lost_s
        self._lag_s = max(self._lag_s, block.lag_s)
        if time.monotonic() >= self._told_at + COMPLAINT_S:
            self.tell()

    def end(self) -> None:
        """Report the losses that have not been reported."""
        if self._num_gaps:
            self.tell()

    def tell(self) -> None:
        """Report what has not been reported."""
        found = [f"{self._lag_s:.1f} s behind"] if self._lag_s > LAG_S else []
        if self._num_gaps:
            times = "once" if self._num_gaps == 1 else f"{self._num_gaps} times"
            amount = f", {self._lost_s:.1f} s of it here" if self._lost_s else " by the device"
            found.append(f"audio was lost {times}{amount}")
        if found:
            why = ": this machine is too slow for this model" if self._lag_s > LAG_S else ""
            print(f"\rasr: {'; '.join(found)}{why}\x1b[K", file=sys.stderr)
            self._told_at = time.monotonic()
        self._num_gaps, self._lost_s, self._lag_s = 0, 0.0, 0.0


def meter(level_db: float) -> str:
    """-60 dB and below is empty, 0 dB is full."""
    full = round(max(0.0, min(1.0, 1 + level_db / 60)) * 10)
    return f"[{'#' * full}{'-' * (10 - full)}]"


def print_devices() -> None:
    """Print the microphones, one per line."""
    from asr.microphone import devices

    for device in devices():
        print(f"{device.index:3}  {device.name}{'  (default)' if device.is_default else ''}")


def terminal_width() -> int:
    """Columns of the terminal; 80 if unknown."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
