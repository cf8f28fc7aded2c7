"""`asr transcribe`: a file, a folder, standard input, or the microphone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from asr.errors import AsrError, AudioError, ConfigError, naming_full_disk
from recipes.journal import hidden
from recipes.options import Mode, Search, stream_config
from recipes.sources import Settings, Source, find_sources, print_devices, terminal_width

if TYPE_CHECKING:
    from asr.runtime import Bundle, Event, StreamConfig
    from asr.runtime.recording import RecordingConfig

CHUNKS_PER_CALL = 4
"""For files, whose audio is all available: twice as fast as chunk by chunk, with the same context."""

FINISHED_WITH_FAILURES = 3


def _list_devices(wanted: bool) -> None:
    """Called before the arguments are checked: no bundle is needed."""
    if wanted:
        print_devices()
        raise typer.Exit


ListDevices = Annotated[
    bool, typer.Option("--list-devices", is_eager=True, callback=_list_devices, help="list the microphones")
]


def transcribe(
    bundle: Annotated[Path, typer.Argument(help="folder of the bundle, or of an experiment that has one")],
    sources: Annotated[
        list[str] | None, typer.Argument(help="sound files, folders, or - for raw samples on standard input")
    ] = None,
    mic: Annotated[bool, typer.Option("--mic", help="listen to the microphone")] = False,
    device: Annotated[str, typer.Option(help="microphone: number or part of its name")] = "",
    list_devices: ListDevices = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="file to write; for several sources a folder")
    ] = None,
    format_: Annotated[str, typer.Option("--format", help="txt, srt, vtt or json")] = "txt",
    recursive: Annotated[bool, typer.Option("--recursive", help="also search subfolders")] = False,
    mode: Mode = "",
    search: Search = None,
    chunk_ms: Annotated[int, typer.Option(help="chunk length, sets the latency; 0: the bundle's own")] = 0,
    left_chunks: Annotated[int, typer.Option(help="chunks of left context; -1: the bundle's own")] = -1,
    look_ahead: Annotated[int, typer.Option(help="chunks of look-ahead in every layer; delays add up")] = 0,
    channel: Annotated[str, typer.Option(help="of files: mix, left, right, or a number from 0")] = "mix",
    rate: Annotated[int, typer.Option(help="sample rate of raw samples, in Hz")] = 16000,
    encoding: Annotated[str, typer.Option(help="encoding of raw samples: s16le or f32le")] = "s16le",
    realtime: Annotated[bool, typer.Option("--realtime", help="read files in real time")] = False,
    vad: Annotated[
        bool, typer.Option("--vad", help="long files: cut where nobody speaks, and decode pieces in batches")
    ] = False,
    piece_s: Annotated[float, typer.Option(help="longest piece with --vad, in seconds")] = 20.0,
    threads: Annotated[int, typer.Option(help="threads of onnxruntime")] = 1,
) -> None:
    """Transcribe audio of any length; on a terminal, words appear as they are recognised.

    Files are WAV, FLAC, Ogg Vorbis or Opus, and MP3, at any sample rate. One that cannot be used does not
    stop the others; then the exit status is 3.

    With --vad, each piece is decoded as a whole, not as a stream, unless --chunk-ms is given. If the program
    ends early, the same command with the same -o resumes where it stopped.

    Example: asr transcribe bundle a.wav talks/ --format srt -o subtitles

    Example: arecord -t raw -f S16_LE -r 16000 | asr transcribe bundle -
    """
    from asr.runtime import Bundle

    _check_options(format_, mic, bool(sources), vad, realtime)
    config = stream_config(mode, chunk_ms, left_chunks, look_ahead, search)
    settings = Settings(channel=channel, rate=rate, encoding=encoding, realtime=realtime, device=device)
    found = find_sources(sources or [], recursive, settings)
    if mic:
        found = [Source("microphone", Path("microphone"), settings)]
    outputs = _outputs(found, out, format_)
    model = Bundle.load(bundle, threads)
    pieces = _recording_config(model, config, piece_s) if vad else None
    run = Run(model, config, format_, is_single=len(found) == 1, pieces=pieces)
    with _terminable():
        for source, output in zip(found, outputs, strict=True):
            run.transcribe(source, output)
    run.summarise()
    if run.num_failed:
        raise typer.Exit(FINISHED_WITH_FAILURES)


def _check_options(format_: str, mic: bool, has_sources: bool, vad: bool, realtime: bool) -> None:
    """Raise ConfigError if the options are incompatible."""
    from asr.runtime.transcript import FORMATS

    if format_ not in FORMATS:
        raise ConfigError(f"--format {format_}: no such format; expected one of {', '.join(FORMATS)}")
    if mic == has_sources:
        raise ConfigError("pass sound files, folders or -, or else --mic")
    if vad and (mic or realtime):
        raise ConfigError("--vad is for complete recordings; leave out --vad, or --mic and --realtime")


def _recording_config(bundle: Bundle, config: StreamConfig, piece_s: float) -> RecordingConfig:
    """The same options for pieces: at once, unless chunks are requested."""
    from asr.context import WHOLE
    from asr.runtime.cutter import CutConfig
    from asr.runtime.recording import Recording, RecordingConfig
    from asr.runtime.stream import stream_context

    in_chunks = config.chunk_ms or config.left_chunks is not None or config.look_ahead
    context = stream_context(bundle.info, config) if in_chunks else WHOLE
    cut = CutConfig(max_s=piece_s)
    pieces = RecordingConfig(mode=config.mode, search=config.search, cut=cut, context=context)
    Recording(bundle, pieces)  # report what is missing or impossible before any work
    return pieces


def _outputs(sources: list[Source], out: Path | None, format_: str) -> list[Path | None]:
    """The output file of each source, None for standard output. ConfigError if that is not possible."""
    if out is None:
        if len(sources) > 1 and format_ in ("srt", "vtt"):
            raise ConfigError(f"--format {format_}: several sources need a folder; pass -o FOLDER")
        return [None] * len(sources)
    is_folder = len(sources) > 1 or out.is_dir()
    outputs = [out / f"{source.output}.{format_}" if is_folder else out for source in sources]
    for output, source in zip(outputs, sources, strict=True):
        if outputs.count(output) > 1:
            raise ConfigError(
                f"{output}: would be the transcript of several sources, one of them {source.name}"
            )
        if any(_is_same(output, Path(x.name)) for x in sources):
            raise ConfigError(f"{output}: is a source; choose another file with -o")
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.exists()  # an error if its name is too long
        except OSError as error:
            raise ConfigError(
                f"{error.filename or output}: {(error.strerror or str(error)).lower()}"
            ) from None
        if not os.access(output.parent, os.W_OK):
            raise ConfigError(f"{output.parent}: not writable; choose another folder with -o")
    return list(outputs)


def _is_same(output: Path, source: Path) -> bool:
    try:
        return output.samefile(source)
    except OSError:
        return False


@dataclass
class Run:
    """One run of the program: many sources, one bundle."""

    bundle: Bundle
    config: StreamConfig
    format: str
    is_single: bool
    """Only one source: its failure is that of the program, and standard output needs no names."""

    pieces: RecordingConfig | None = None
    """How recordings are cut, if they are."""

    broken: AudioError | KeyboardInterrupt | None = None
    """What ended a source that cannot be read again; its transcript is complete up to there."""

    num_done: int = 0
    num_failed: int = 0
    audio_s: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def transcribe(self, source: Source, output: Path | None) -> None:
        """Write the transcript of one source; if that fails, report why and go on."""
        try:
            with _told_warnings(), self._events(source, output) as events, _opened(output) as file:
                for line in self._lines(source, events, named=output is None and not self.is_single):
                    file.write(line + "\n")
                    file.flush()
            if self.broken:
                raise self.broken  # a source that cannot be read again is the only one
            self.num_done += 1
        except AsrError as error:
            if self.is_single:
                raise
            print(f"asr: {error}", file=sys.stderr)
            self.num_failed += 1

    @contextlib.contextmanager
    def _events(self, source: Source, output: Path | None) -> Iterator[Iterator[Event]]:
        """The final events of a source, in pieces or as a stream."""
        from asr.runtime.recording import Recording
        from recipes.recordings import job

        if self.pieces is None:
            yield self._finals(source)
            return
        recording = Recording(self.bundle, self.pieces)
        with job(recording, self.bundle, self.pieces, source, output) as events:
            yield events
        self.audio_s += recording.duration_s

    def _lines(self, source: Source, events: Iterator[Event], named: bool) -> Iterator[str]:
        """The lines of a transcript, each as soon as its utterance has ended."""
        from asr.runtime.transcript import FORMATS

        for line in FORMATS[self.format](events):
            if named and self.format == "json":
                yield json.dumps({"source": source.name, **json.loads(line)}, ensure_ascii=False)
            else:
                yield f"{source.name}: {line}" if named else line

    def _finals(self, source: Source) -> Iterator[Event]:
        """The final events of a source; partial ones appear on a terminal."""
        from asr.runtime import open_stream

        config = self.config if source.is_live else replace(self.config, chunks_per_call=CHUNKS_PER_CALL)
        stream = open_stream(self.bundle, config)
        try:
            for block in source.blocks(self.bundle.info.features.sample_rate):
                yield from _shown(stream.accept(block), source.settings.realtime)
        except KeyboardInterrupt as interrupt:
            if not source.is_gone:
                raise
            self.broken = interrupt if source.name == "-" else None  # the usual end of a microphone
        except AudioError as error:
            if not source.is_gone or not stream.duration_s:
                raise
            self.broken = error  # the text so far is worth keeping
        yield from _shown(stream.finish(), source.settings.realtime)
        self.audio_s += stream.duration_s

    def summarise(self) -> None:
        """Print one line about many sources."""
        if not self.is_single:
            wall_s = time.monotonic() - self.started
            failed = f"; {self.num_failed} could not be used" if self.num_failed else ""
            print(
                f"{self.num_done} transcribed, {self.audio_s / 60:.1f} min of audio in {wall_s:.1f} s "
                f"(RTF {wall_s / max(self.audio_s, 1e-9):.3f}){failed}",
                file=sys.stderr,
            )


def _shown(events: list[Event], realtime: bool) -> Iterator[Event]:
    """The final ones of some events. On a terminal the last partial one is shown in place; elsewhere each
    gets its own line if the words are to be seen as they are spoken."""
    is_terminal = sys.stderr.isatty()
    for event in events:
        if event.final:
            if is_terminal:
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            yield event
        elif realtime and not is_terminal and event.text:
            print(f"{event.end_s:7.1f} s  {event.text}", file=sys.stderr, flush=True)
    if is_terminal and events and not events[-1].final:
        text = events[-1].text[-(terminal_width() - 15) :]
        print(f"\r\x1b[K\x1b[12C{text}", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _opened(output: Path | None) -> Iterator[IO[str]]:
    """Standard output, or a file that gets its name when it is complete."""
    if output is None:
        yield sys.stdout
        return
    unfinished = hidden(output, ".part")
    try:
        with naming_full_disk(output), unfinished.open("w", encoding="utf-8") as file:
            yield file
        unfinished.replace(output)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM does the same as Ctrl-C: no half transcript stays, and none of a live source is lost."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _told_warnings() -> Iterator[None]:
    """Print warnings about audio on standard error, in one line each."""

    def tell(message: Any, *_: Any, **__: Any) -> None:
        print(f"asr: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = tell
        yield
