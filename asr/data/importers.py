"""Importers of manifests: from a TSV, a folder of audio files, a Kaldi data directory, or a lhotse recipe.

Each importer is a generator of cuts with one supervision. An invalid line raises ManifestError with the file,
the line and what to do. An audio file without a readable header goes to `left_out`, so that one bad file does
not cost a corpus.
"""

from __future__ import annotations

import io
import itertools
import math
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import soundfile
from lhotse import CutSet, Recording, RecordingSet, SupervisionSegment, SupervisionSet
from lhotse.audio import AudioSource
from lhotse.cut import Cut, MonoCut, MultiCut

from asr.data.augment import AUDIO_SUFFIXES
from asr.errors import ManifestError

TOLERANCE_S = 0.05
"""A segment may end this much after its audio, due to rounding; it is then cut to fit."""

COLUMNS = ("utt_id", "audio", "text", "speaker", "split", "language")
NEEDED = ("utt_id", "audio", "text")


@dataclass(frozen=True)
class LeftOut:
    """An utterance left out of the manifest, and why: `reason` is one of a few, `detail` says more."""

    id: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Line:
    """One utterance of a source, before its audio is inspected. `where` is file:line."""

    id: str
    audio: str
    text: str
    speaker: str
    language: str
    where: str
    start_s: float = 0.0
    end_s: float | None = None


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered non-empty lines of a UTF-8 file, without byte order mark and line ends."""
    try:
        data = path.open("rb")
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}; give a file that can be read") from None
    with data:
        for number, raw in enumerate(data, 1):
            raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            line = _decode(raw, f"{path}:{number}").rstrip("\r\n")
            if line.strip():
                yield number, line


def _decode(raw: bytes, where: str) -> str:
    if b"\0" in raw:
        raise ManifestError(f"{where}: NUL byte at column {raw.index(0) + 1}; is this a text file?")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ManifestError(
            f"{where}: byte 0x{raw[error.start]:02X} at column {error.start + 1} is not UTF-8; "
            "convert the file, e.g. iconv -f LATIN1 -t UTF-8"
        ) from None


def from_tsv(path: Path, left_out: list[LeftOut], split: str = "") -> Iterator[Cut]:
    """A tab-separated table with a header: utt_id, audio, text; optionally speaker, split, language.

    `audio` is relative to the folder of the table. `split` "" takes every line.
    """
    return _cuts(list(_tsv_lines(path, split)), left_out)


def _tsv_lines(path: Path, split: str) -> Iterator[Line]:
    lines = read_lines(path)
    header = next(lines, (1, ""))[1].split("\t")
    missing = [name for name in NEEDED if name not in header]
    if missing:
        raise ManifestError(
            f"{path}:1: no column {', '.join(missing)}; expected a tab-separated header, {' '.join(COLUMNS)}"
        )
    if split and "split" not in header:
        raise ManifestError(f"{path}:1: no column split, so no --split {split}; leave it out")
    splits = set()
    for number, text in lines:
        cells = text.split("\t")
        if len(cells) != len(header):
            raise ManifestError(f"{path}:{number}: {len(cells)} columns, the header has {len(header)}")
        row = dict(zip(header, cells, strict=True))
        splits.add(row.get("split", ""))
        if split in ("", row.get("split")):
            audio = str(path.parent / row["audio"])
            speaker, language = row.get("speaker", ""), row.get("language", "")
            yield Line(row["utt_id"], audio, row["text"], speaker, language, f"{path}:{number}")
    if split and split not in splits:
        raise ManifestError(
            f"{path}: no line has split {split}; its splits are {', '.join(sorted(splits)) or 'none'}"
        )


def from_folder(path: Path, left_out: list[LeftOut]) -> Iterator[Cut]:
    """Audio files, each with a `<name>.txt` beside it, or with LibriSpeech's `*.trans.txt` ("id text" lines).

    The id is the path below the folder, or LibriSpeech's; the speaker is the name of the file's folder, or
    the first part of LibriSpeech's id. An audio file without text is left out.
    """
    if not path.is_dir():
        raise ManifestError(f"{path}: not a folder")
    sounds = sorted(file for file in path.rglob("*") if file.suffix.lower() in AUDIO_SUFFIXES)
    texts: dict[Path, dict[str, Line]] = {}
    found = []
    for sound in sounds:
        if sound.parent not in texts:
            texts[sound.parent] = _librispeech_lines(sound.parent)
        line = texts[sound.parent].get(sound.stem) or _folder_line(path, sound)
        if line is None:
            left_out.append(LeftOut(str(sound), "no transcript"))
        else:
            found.append(Line(line.id, str(sound), line.text, line.speaker, "", line.where))
    if not found:
        raise ManifestError(f"{path}: {len(sounds)} sound files, none with a transcript (.txt or .trans.txt)")
    return _cuts(found, left_out)


def _librispeech_lines(folder: Path) -> dict[str, Line]:
    lines = {}
    for file in sorted(folder.glob("*.trans.txt")):
        for number, line in read_lines(file):
            name, _, text = line.strip().partition(" ")
            lines[name] = Line(name, "", text.strip(), name.split("-")[0], "", f"{file}:{number}")
    return lines


def _folder_line(root: Path, sound: Path) -> Line | None:
    file = sound.with_suffix(".txt")
    if not file.exists():
        return None
    name = "-".join(sound.relative_to(root).with_suffix("").parts)
    speaker = sound.parent.name if sound.parent != root else ""
    return Line(name, "", " ".join(text.strip() for _, text in read_lines(file)), speaker, "", str(file))


def from_kaldi(path: Path, left_out: list[LeftOut], allow_pipes: bool = False) -> Iterator[Cut]:
    """A Kaldi data directory: wav.scp, text, and optionally segments and utt2spk.

    Paths in wav.scp are relative to the working directory, as in Kaldi, or to the data directory.
    A pipe lets a data file run a program: it is refused unless `allow_pipes`.
    """
    scp = _table(path / "wav.scp")
    audio = {name: _kaldi_audio(value, path, where, allow_pipes) for name, (value, where) in scp.items()}
    text = _table(path / "text")
    speakers = _table(path / "utt2spk") if (path / "utt2spk").exists() else {}
    segments = _segments(path / "segments") if (path / "segments").exists() else {}
    if segments:
        known = {recording for recording, *_ in segments.values()}
        _same_names(known, set(audio), path / "segments", path / "wav.scp", both=False)
    _same_names(
        set(text), set(segments or audio), path / "text", path / ("segments" if segments else "wav.scp")
    )
    lines = []
    for name, (words, where) in text.items():
        recording, start_s, end_s, at = segments.get(name, (name, 0.0, None, where))
        speaker = speakers.get(name, (name, ""))[0]
        lines.append(Line(name, audio[recording], words, speaker, "", at, start_s, end_s))
    return _cuts(lines, left_out)


def _table(path: Path) -> dict[str, tuple[str, str]]:
    """Kaldi's "key value" lines: key -> (value, file:line)."""
    table: dict[str, tuple[str, str]] = {}
    for number, line in read_lines(path):
        key, _, value = line.strip().partition(" ")
        if key in table:
            raise ManifestError(
                f"{path}:{number}: {key} already appears at {table[key][1]}; keep one of them"
            )
        table[key] = (value.strip(), f"{path}:{number}")
    return table


def _segments(path: Path) -> dict[str, tuple[str, float, float, str]]:
    segments = {}
    for name, (value, where) in _table(path).items():
        try:
            recording, start, end = value.split()
            start_s, end_s = float(start), float(end)
        except ValueError:
            raise ManifestError(f"{where}: {value!r}; expected RECORDING START END, in seconds") from None
        if not (math.isfinite(start_s) and math.isfinite(end_s) and 0 <= start_s < end_s):
            raise ManifestError(f"{where}: {start} to {end} s is not a valid segment; correct or drop it")
        segments[name] = (recording, start_s, end_s, where)
    return segments


def _same_names(left: set[str], right: set[str], first: Path, second: Path, both: bool = True) -> None:
    for missing, here, there in (
        (left - right, first, second),
        (right - left if both else set(), second, first),
    ):
        if missing:
            names = ", ".join(sorted(missing)[:5])
            raise ManifestError(
                f"{here}: {len(missing)} ids are not in {there}, first {names}; filter both alike"
            )


def _kaldi_audio(value: str, folder: Path, where: str, allow_pipes: bool) -> str:
    if not value.endswith("|"):
        return value if Path(value).exists() else str(folder / value)
    if not allow_pipes:
        raise ManifestError(
            f"{where}: a pipe, which would run {value.split()[0]} on this machine; if you trust this "
            "directory, store the audio with `asr prepare --allow-pipes --store-audio DIR`"
        )
    return value


def from_lhotse(recordings: RecordingSet, supervisions: SupervisionSet) -> Iterator[Cut]:
    """The output of `lhotse.recipes.prepare_*` for a split -> a cut for each supervision."""
    cuts = CutSet.from_manifests(recordings=recordings, supervisions=supervisions)
    for cut in cuts.trim_to_supervisions(keep_overlapping=False):
        yield cut.with_id(cut.supervisions[0].id)


def _cuts(lines: list[Line], left_out: list[LeftOut]) -> Iterator[Cut]:
    """Lines -> cuts, reading several headers at a time, as that is mostly waiting for the disk."""
    _unique(lines)
    files = dict.fromkeys(line.audio for line in lines if not line.audio.endswith("|"))
    missing = [file for file in files if not Path(file).is_file()]
    if missing:
        where = next(line.where for line in lines if line.audio == missing[0])
        raise ManifestError(
            f"{where}: {len(missing)} of {len(files)} sound files are missing, first "
            f"{', '.join(missing[:5])}; correct the paths or drop the lines"
        )
    recordings: dict[str, Recording | str] = {}
    with ThreadPoolExecutor(4) as pool:
        for some in _chunks(lines, 1000):
            new = [audio for audio in dict.fromkeys(line.audio for line in some) if audio not in recordings]
            recordings = {line.audio: recordings[line.audio] for line in some if line.audio in recordings}
            recordings.update(zip(new, pool.map(_recording, new), strict=True))
            for line in some:
                recording = recordings[line.audio]
                if isinstance(recording, str):
                    left_out.append(LeftOut(line.id, "unreadable", recording))
                else:
                    yield _cut(line, recording)


def _unique(lines: list[Line]) -> None:
    seen: dict[str, str] = {}
    for line in lines:
        if not line.id:
            raise ManifestError(f"{line.where}: the id is empty; give every utterance its own id")
        if line.id in seen:
            raise ManifestError(f"{line.where}: id {line.id} already appears at {seen[line.id]}; rename one")
        seen[line.id] = line.where


def _chunks(lines: Iterable[Line], size: int) -> Iterator[list[Line]]:
    lines = iter(lines)
    return iter(lambda: list(itertools.islice(lines, size)), [])


def _recording(audio: str) -> Recording | str:
    """The recording of a file or a pipe, or why it cannot be read."""
    try:
        if audio.endswith("|"):
            run = subprocess.run(audio[:-1], shell=True, capture_output=True, check=True)
            samples, rate = soundfile.read(io.BytesIO(run.stdout), always_2d=True)
            num_samples, num_channels = samples.shape
            kind, source = "command", audio[:-1].strip()
        else:
            header = soundfile.info(audio)
            num_samples, num_channels, rate = header.frames, header.channels, header.samplerate
            kind, source = "file", str(Path(audio).absolute())
    except subprocess.CalledProcessError as error:
        return f"{audio}: exit status {error.returncode}"
    except soundfile.LibsndfileError as error:
        return f"{audio}: {error.error_string}"
    if not 0 < num_samples < sys.maxsize:
        return f"{audio}: no samples"
    channels = list(range(num_channels))
    sources = [AudioSource(kind, channels, source)]
    return Recording(Path(audio).stem, sources, rate, num_samples, num_samples / rate, channels)


def _cut(line: Line, recording: Recording) -> Cut:
    end_s = recording.duration if line.end_s is None else line.end_s
    if end_s > recording.duration + TOLERANCE_S or line.start_s >= recording.duration:
        raise ManifestError(
            f"{line.where}: {line.id} ends at {end_s:.3f} s, its audio at {recording.duration:.3f} s; "
            "correct or drop it"
        )
    duration_s = min(end_s, recording.duration) - line.start_s
    channels = recording.channel_ids
    language = line.language or None
    supervision = SupervisionSegment(
        line.id, recording.id, 0, duration_s, channels, line.text.strip(), language, line.speaker or None
    )
    if len(channels) == 1:
        supervision.channel = channels[0]
        return MonoCut(line.id, line.start_s, duration_s, channels[0], [supervision], recording=recording)
    return MultiCut(line.id, line.start_s, duration_s, channels, [supervision], recording=recording)
