"""Manifests: lhotse CutSets in `*.jsonl.gz`, one utterance per line, read lazily.

A cut is a stretch of a recording; its supervision holds the text and the speaker. Any CutSet that lhotse
writes as JSON lines or Shar is a manifest here, and lhotse reads ours. `importers` makes manifests, `check`
judges them.
"""

from __future__ import annotations

import gzip
import itertools
import math
import os
import random
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from lhotse import CutSet
from lhotse.audio.backend import LibsndfileBackend, set_current_audio_backend
from lhotse.cut import Cut, MixedCut, MixTrack
from lhotse.cut.set import mix
from lhotse.serialization import decode_json_line, deserialize_item
from lhotse.supervision import SupervisionSegment

from asr.errors import AudioError, ManifestError, naming_full_disk

# One reader for all formats. lhotse's own choice depends on the installed packages, and reading from memory
# fails entirely if the installed torchaudio cannot be loaded.
set_current_audio_backend(LibsndfileBackend())

# If a file is shorter than its manifest says, lhotse makes up as much as half a second of audio, which hides
# damage. In seconds; codecs round to their frames.
os.environ.setdefault("LHOTSE_AUDIO_DURATION_MISMATCH_TOLERANCE", "0.1")

MAX_LINE_BYTES = 16 << 20
"""A file with a longer line is refused: it is not a manifest."""

RUNS_COMMANDS = ("command", "url")
"""Types of lhotse's AudioSource that run what the manifest says, the second for URLs such as `pipe:rm a`."""


class Manifest:
    """The cuts of a `.jsonl` or `.jsonl.gz` file, read line by line in every iteration."""

    def __init__(self, path: Path, allow_pipes: bool = False) -> None:
        self.path, self.allow_pipes = path, allow_pipes

    def __iter__(self) -> Iterator[Cut]:
        for number, line in enumerate(self._lines(), 1):
            yield _parse(line, f"{self.path}:{number}", self.allow_pipes)

    def __len__(self) -> int:
        return sum(1 for _ in self._lines())

    def _lines(self) -> Iterator[bytes]:
        try:
            with self._open() as lines:
                yield from iter(lambda: lines.readline(MAX_LINE_BYTES), b"")
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ManifestError(
                f"{self.path}: not a complete gzip file ({error}); copy it again, or make it again"
            ) from None

    def _open(self) -> IO[bytes]:
        try:
            gzipped = self.path.suffix == ".gz"
            return gzip.open(self.path, "rb") if gzipped else self.path.open("rb")  # type: ignore[return-value]
        except OSError as error:
            raise ManifestError(f"{self.path}: {error.strerror}; make it with `asr prepare`") from None


def _parse(line: bytes, where: str, allow_pipes: bool) -> Cut:
    if len(line) >= MAX_LINE_BYTES and not line.endswith(b"\n"):
        raise ManifestError(f"{where}: longer than {MAX_LINE_BYTES >> 20} MiB; this is not a manifest")
    try:
        data = decode_json_line(line)
        if not allow_pipes:
            _refuse_commands(data, where)
        cut = deserialize_item(data)
    except ManifestError:
        raise
    except Exception as error:  # lhotse raises whatever the first surprising value leads to
        raise ManifestError(
            f"{where}: not a lhotse cut ({type(error).__name__}: {error}); make it with `asr prepare`"
        ) from None
    if not isinstance(cut, Cut):
        raise ManifestError(
            f"{where}: expected a cut, found a {type(cut).__name__}; make cuts from lhotse's recordings and "
            "supervisions with asr.data.importers.from_lhotse"
        )
    if problem := _nonsense(cut):
        raise ManifestError(f"{where}: {problem}; correct or drop the line")
    return cut


def _nonsense(cut: Cut) -> str:
    """What lhotse reads without complaint, and stumbles over later or reads from elsewhere; "" if nothing."""
    times = {"duration": cut.duration, "start": getattr(cut, "start", 0.0)}
    for name, value in times.items():
        if not isinstance(value, float | int) or not math.isfinite(value):
            return f"{name} is {value!r}, expected a number of seconds"
    if times["start"] < 0:
        return f"start is {times['start']} s, expected 0 or more"
    texts = (segment.text for segment in cut.supervisions)
    wrong = next((text for text in texts if not isinstance(text, str | None)), None)
    return "" if wrong is None else f"text is {wrong!r}, expected a string"


def _refuse_commands(cut: Any, where: object) -> None:
    """ManifestError if any audio in the fields of a cut, impulse responses included, is not just a file."""
    fields = [cut]
    while fields:
        value = fields.pop()
        if isinstance(value, list | tuple):
            fields += value
        elif isinstance(value, dict):
            fields += value.values()
            if "source" in value and value.get("type") in RUNS_COMMANDS:
                raise ManifestError(
                    f"{where}: audio of type {value['type']}, which may run commands on this machine; if you "
                    "trust it, store the audio with `asr prepare --allow-pipes --store-audio DIR`"
                )


def _checked(cut: Cut, folder: Path) -> Cut:
    _refuse_commands(cut.to_dict(), folder)
    return cut


def open_cuts(path: str | Path, allow_pipes: bool = False) -> CutSet:
    """The cuts of a manifest (`.jsonl`, `.jsonl.gz`) or of a lhotse Shar folder, lazily.

    allow_pipes: whether audio may come from commands and URLs.

    Raises ManifestError, here or during iteration, with the file, the line and what to do.
    """
    path = Path(path)
    if path.is_dir() and any(path.glob("cuts.*.jsonl*")):
        cuts = CutSet.from_shar(in_dir=path)
        return cuts if allow_pipes else cuts.map(partial(_checked, folder=path))
    if path.is_dir() or not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ManifestError(f"{path}: not a manifest (.jsonl.gz); make one from it with `asr prepare`")
    if not path.exists():
        raise ManifestError(f"{path}: no such manifest; make it with `asr prepare`")
    return CutSet(Manifest(path, allow_pipes))


def count_cuts(path: str | Path) -> int:
    """The number of utterances that `open_cuts` would read, by counting lines."""
    path = Path(path)
    files = sorted(path.glob("cuts.*.jsonl*")) if path.is_dir() else [path]
    return sum(len(Manifest(file)) for file in files)


def save_cuts(cuts: Iterable[Cut], path: str | Path) -> int:
    """Write a manifest, cut by cut; it gets its name once it is complete. Returns the number of cuts."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name("part-" + path.name)
    count = 0
    try:
        with naming_full_disk(path), CutSet.open_writer(part, overwrite=True) as writer:
            for cut in cuts:
                writer.write(cut)
                count += 1
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return count


def cut_text(cut: Cut) -> str:
    """The text of a cut; the texts of joined cuts follow in the order they are spoken."""
    return " ".join(segment.text for segment in spoken(cut.supervisions))


def spoken(segments: Iterable[SupervisionSegment]) -> list[SupervisionSegment]:
    """Supervisions with text, in the order they are spoken."""
    return sorted((segment for segment in segments if segment.text), key=lambda segment: segment.start)


def cut_speaker(cut: Cut) -> str:
    """The speaker of a cut, or "" if the manifest does not say."""
    return next((s.speaker for s in cut.supervisions if s.speaker), "")


def cut_path(cut: Cut) -> str:
    """The audio file of a cut, for messages; the first one of a mix."""
    tracks = [track.cut for track in cut.tracks] if isinstance(cut, MixedCut) else [cut]
    sources = [s for c in tracks if getattr(c, "has_recording", False) for s in c.recording.sources]
    return str(sources[0].source) if sources and sources[0].type != "memory" else ""


def read_cut(cut: Cut) -> np.ndarray:
    """The samples of a cut: (S,) float32 at its own rate, channels averaged, S as the manifest says.

    Raises AudioError for a file that cannot be read, is not as long as the manifest says, or has NaN or inf.
    """
    try:
        samples = cut.load_audio()
    except Exception as error:  # whatever a decoder raises on a broken file
        raise AudioError(f"{cut_path(cut)}: {_reason(cut, error)}") from None
    if samples is None:
        raise AudioError(f"{cut.id}: the manifest names no recording for it")
    samples = samples.mean(axis=0) if len(samples) > 1 else samples[0]
    if not np.isfinite(samples).all():
        raise AudioError(f"{cut_path(cut)}: {np.sum(~np.isfinite(samples))} samples are not finite numbers")
    return samples.astype(np.float32, copy=False)[: cut.num_samples]


def _reason(cut: Cut, error: Exception) -> str:
    """One line, however long lhotse's message; decoders are especially unclear about missing files."""
    path = cut_path(cut)
    if path and not Path(path).exists():
        return "no such file"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def balance_texts(cuts: Iterable[Cut], rng: random.Random, power: float) -> list[Cut]:
    """Repeat the cuts of rare texts, so that a text with n cuts occurs in proportion to n ** power.

    If the commonest text has m cuts, a cut of a text with n cuts occurs (m / n) ** (1 - power) times, with
    random rounding; repetitions get ids of their own.
    """
    cuts = list(cuts)
    count = Counter(map(cut_text, cuts))
    most = max(count.values(), default=0)
    balanced = []
    for cut in cuts:
        times = (most / count[cut_text(cut)]) ** (1 - power)
        again = int(times + rng.random()) - 1
        balanced += [cut, *(cut.with_id(f"{cut.id}#{number}") for number in range(2, again + 2))]
    return balanced


def join_cuts(
    cuts: Iterable[Cut],
    rng: random.Random,
    words: Sequence[int] = (1, 8),
    pause_s: Sequence[float] = (0.1, 0.4),
    max_s: float = 30.0,
) -> CutSet:
    """Join short utterances of the same speaker to long ones; each cut is used once.

    Every joined cut has a random number of cuts within `words`, or fewer if it would exceed `max_s`, in
    random order, with random pauses within `pause_s` (seconds); both are uniform. For the text, see
    `cut_text`. The result depends only on `rng` and on the order of `cuts`.
    """
    speakers: dict[str, list[Cut]] = {}
    for cut in cuts:
        speakers.setdefault(cut_speaker(cut), []).append(cut)
    joined = []
    for own in speakers.values():
        rng.shuffle(own)
        while own:
            joined.append(_join(_take(own, rng, words, pause_s, max_s)))
    rng.shuffle(joined)
    return CutSet.from_cuts(joined)


def join_neighbours(
    cuts: Iterable[Cut], rng: random.Random, count: int, pause_s: Sequence[float] = (0.1, 0.4)
) -> Iterator[Cut]:
    """Join every `count` successive cuts, whoever speaks: the same speech in longer recordings.

    The last one has the rest.
    """
    own = iter(cuts)
    for first in own:
        whole, others = first, list(itertools.islice(own, count - 1))
        for cut in others:
            start = whole.duration + rng.uniform(*pause_s)
            whole = mix(whole, cut, offset=start, allow_padding=True)
        yield whole.with_id(f"{first.id}+{len(others)}") if others else whole


def _take(
    own: list[Cut], rng: random.Random, words: Sequence[int], pause_s: Sequence[float], max_s: float
) -> list[MixTrack]:
    """Take the cuts of one joined utterance out of `own`; returns them with their start times."""
    tracks, end = [MixTrack(own[-1])], own.pop().duration
    for _ in range(rng.randint(words[0], words[1]) - 1):
        start = end + rng.uniform(pause_s[0], pause_s[1])
        if not own or start + own[-1].duration > max_s:
            break
        tracks.append(MixTrack(own[-1], offset=start))
        end = start + own.pop().duration
    return tracks


def _join(tracks: list[MixTrack]) -> Cut:
    first = tracks[0].cut
    return MixedCut(f"{first.id}+{len(tracks) - 1}", tracks) if len(tracks) > 1 else first


def ctc_frames(duration_s: float, subsampling: int) -> int:
    """Encoder frames of an utterance: 10 ms frames, mirrored at the edges, over `subsampling` (4 or 8)."""
    return math.ceil(int(duration_s * 100 + 0.5) / subsampling)


def ctc_frames_needed(tokens: list[int]) -> int:
    """The length of the shortest CTC path of these tokens: one each, and a blank between equal neighbours."""
    return len(tokens) + sum(a == b for a, b in itertools.pairwise(tokens))
