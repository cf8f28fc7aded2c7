"""`asr transcribe --vad`: long recordings, cut where nobody speaks, with a progress bar and a journal."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from recipes.journal import Journal, hash_recording, open_journal
from recipes.sources import Source

if TYPE_CHECKING:
    from rich.progress import Progress

    from asr.runtime import Bundle, Event
    from asr.runtime.recording import Recording, RecordingConfig


@contextmanager
def job(
    recording: Recording, bundle: Bundle, config: RecordingConfig, source: Source, output: Path | None
) -> Iterator[Iterator[Event]]:
    """The final events of a source; if it has its own output, a journal records them until the end."""
    from asr.audio import info

    is_file = source.name != "-"
    total_s = info(source.name).duration_s if is_file else 0.0
    noted = open_journal(output, _about(bundle, config, source)) if output and is_file else nullcontext()
    with noted as journal:
        known_s = _known_s(journal, output)
        with Bar(source.name, total_s, known_s) as bar:
            blocks = source.blocks(bundle.info.features.sample_rate)
            yield _events(recording, blocks, journal, bar)


def _events(recording: Recording, blocks: Any, journal: Journal | None, bar: Bar) -> Iterator[Event]:
    known = journal.batches if journal else []
    for batch in known:
        yield from batch.events
    for batch in recording.batches(blocks, len(known)):
        if journal:
            journal.add(batch)
        bar.show(batch.end_s)
        yield from batch.events
    bar.show(recording.duration_s)


def _about(bundle: Bundle, config: RecordingConfig, source: Source) -> dict[str, Any]:
    """Everything that a transcript depends on."""
    from asr import __version__
    from asr.runtime.voice import SHA256

    return {
        "version": __version__,
        "recording": hash_recording(Path(source.name)),
        "channel": source.settings.channel,
        "bundle": hashlib.sha256((bundle.folder / "model.json").read_bytes()).hexdigest(),
        "voice activity detection": SHA256,
        "configuration": asdict(config),
    }


def _known_s(journal: Journal | None, output: Path | None) -> float:
    """How far an earlier run has come; also reports what became of its journal."""
    if journal is None:
        return 0.0
    if journal.changed:
        what = ", ".join(journal.changed)
        print(f"asr: {output}: an earlier run had a different {what}; starting over", file=sys.stderr)
    if not journal.batches:
        return 0.0
    known_s = journal.batches[-1].end_s
    print(f"asr: {output}: resuming at {_clock(known_s)}, where an earlier run stopped", file=sys.stderr)
    return known_s


class Bar:
    """Progress and speed on a recording: a bar on a terminal, a line for every 10 % elsewhere."""

    def __init__(self, name: str, total_s: float, known_s: float = 0.0) -> None:
        """total_s: 0 if unknown. known_s: done by an earlier run."""
        self._name, self._total_s, self._known_s = name, total_s, known_s
        self._end_s = known_s
        self._tenths = int(10 * known_s / total_s) if total_s else 0
        self._started = time.monotonic()
        self._progress: Progress | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(20),
                TextColumn("{task.fields[told]}", markup=False),
                TimeRemainingColumn(),
                console=Console(file=sys.stderr),
                transient=True,
            )
            self._progress.add_task(
                self._name, total=self._total_s or None, completed=round(self._known_s), told=""
            )
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        if self._progress:
            self._progress.stop()
        if kind is None:
            wall_s = time.monotonic() - self._started
            minutes = (self._end_s - self._known_s) / 60
            done = f"{minutes:.1f} min of audio in {wall_s:.1f} s (RTF {self._rtf():.3f})"
            print(f"{self._name}: {done}", file=sys.stderr)

    def show(self, end_s: float) -> None:
        """Show that the recording has been decoded up to end_s."""
        self._end_s = end_s
        told = f"{_clock(end_s)} of {_clock(self._total_s)}" if self._total_s else _clock(end_s)
        told += f"  RTF {self._rtf():.3f}"
        if self._progress:
            self._progress.update(self._progress.task_ids[0], completed=end_s, told=told)
        elif self._total_s and int(10 * end_s / self._total_s) > self._tenths:
            self._tenths = int(10 * end_s / self._total_s)
            print(f"{self._name}  {10 * self._tenths} %  {told}", file=sys.stderr, flush=True)

    def _rtf(self) -> float:
        """Wall time per second of audio, without what an earlier run has done."""
        return (time.monotonic() - self._started) / max(self._end_s - self._known_s, 1e-9)


def _clock(time_s: float) -> str:
    """3661.5 -> 1:01:01."""
    minutes, seconds = divmod(int(time_s), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
