"""Manifests: lhotse CutSets in `*.jsonl.gz`, one utterance a line, read lazily.

A cut is a stretch of a recording; its supervision holds the text and the speaker. Anything lhotse can
prepare or write is a manifest here, and what we write lhotse can read. `importers` makes manifests,
`check` judges them.
"""

from __future__ import annotations

import gzip
import itertools
import math
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from lhotse import CutSet
from lhotse.audio.backend import LibsndfileBackend, set_current_audio_backend
from lhotse.cut import Cut, MixedCut, MixTrack
from lhotse.cut.set import mix
from lhotse.serialization import decode_json_line, deserialize_item
from lhotse.supervision import SupervisionSegment

from asr.errors import AudioError, ManifestError

# One reader for every format. lhotse's own choice depends on which packages are installed beside it, and
# reading from memory fails altogether where a torchaudio is installed that cannot be loaded.
set_current_audio_backend(LibsndfileBackend())

# lhotse makes up to half a second of audio up where a file is shorter than its manifest says; that hides
# damage. Seconds; codecs round to their frames.
os.environ.setdefault("LHOTSE_AUDIO_DURATION_MISMATCH_TOLERANCE", "0.1")

MAX_LINE_BYTES = 16 << 20
"""A longer line of a manifest is refused: it is not a manifest."""


class Manifest:
    """The cuts of a `.jsonl` or `.jsonl.gz` file, read line by line each time they are iterated over."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[Cut]:
        with self._open() as lines:
            for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE_BYTES), b""), 1):
                yield _parse(line, f"{self.path}:{number}")

    def __len__(self) -> int:
        with self._open() as lines:
            return sum(1 for _ in lines)

    def _open(self) -> IO[bytes]:
        try:
            gzipped = self.path.suffix == ".gz"
            return gzip.open(self.path, "rb") if gzipped else self.path.open("rb")  # type: ignore[return-value]
        except OSError as error:
            raise ManifestError(f"{self.path}: {error.strerror}; make it with `asr prepare`") from None


def _parse(line: bytes, where: str) -> Cut:
    if len(line) >= MAX_LINE_BYTES and not line.endswith(b"\n"):
        raise ManifestError(f"{where}: longer than {MAX_LINE_BYTES >> 20} MiB; this is not a manifest")
    try:
        cut = deserialize_item(decode_json_line(line))
    except Exception as error:  # lhotse raises whatever the first surprising value leads to
        raise ManifestError(
            f"{where}: not a lhotse cut ({type(error).__name__}: {error}); make it with `asr prepare`"
        ) from None
    if not isinstance(cut, Cut):
        raise ManifestError(
            f"{where}: expected a cut, found a {type(cut).__name__}; make cuts of lhotse's recordings and "
            "supervisions with asr.data.importers.from_lhotse"
        )
    return cut


def open_cuts(path: str | Path) -> CutSet:
    """The cuts of a manifest (`.jsonl`, `.jsonl.gz`) or of a lhotse Shar folder, lazily.

    Raises ManifestError, here or while they are read, with the file, the line and what to do.
    """
    path = Path(path)
    if path.is_dir() and any(path.glob("cuts.*.jsonl*")):
        return CutSet.from_shar(in_dir=path)
    if path.is_dir() or not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ManifestError(f"{path}: not a manifest (.jsonl.gz); make one of it with `asr prepare`")
    if not path.exists():
        raise ManifestError(f"{path}: no such manifest; make it with `asr prepare`")
    return CutSet(Manifest(path))


def count_cuts(path: str | Path) -> int:
    """The number of utterances of what `open_cuts` opens, by its lines."""
    path = Path(path)
    files = sorted(path.glob("cuts.*.jsonl*")) if path.is_dir() else [path]
    return sum(len(Manifest(file)) for file in files)


def save_cuts(cuts: Iterable[Cut], path: str | Path) -> int:
    """Write a manifest, cut by cut; it appears under its name when it is complete. Returns how many."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name("part-" + path.name)
    count = 0
    with CutSet.open_writer(part, overwrite=True) as writer:
        for cut in cuts:
            writer.write(cut)
            count += 1
    part.replace(path)
    return count


def cut_text(cut: Cut) -> str:
    """The words of a cut, those of joined cuts in the order they are spoken."""
    return " ".join(segment.text for segment in spoken(cut.supervisions))


def spoken(segments: Iterable[SupervisionSegment]) -> list[SupervisionSegment]:
    """Supervisions with text, in the order they are spoken."""
    return sorted((segment for segment in segments if segment.text), key=lambda segment: segment.start)


def cut_speaker(cut: Cut) -> str:
    """The speaker of a cut, or "" where the manifest does not say."""
    return next((s.speaker for s in cut.supervisions if s.speaker), "")


def cut_path(cut: Cut) -> str:
    """The sound file of a cut, for messages; the first one of a mix."""
    tracks = [track.cut for track in cut.tracks] if isinstance(cut, MixedCut) else [cut]
    sources = [s for c in tracks if getattr(c, "has_recording", False) for s in c.recording.sources]
    return str(sources[0].source) if sources and sources[0].type != "memory" else ""


def read_cut(cut: Cut) -> np.ndarray:
    """The samples of a cut: (S,) float32 at its own rate, channels averaged, S as the manifest says.

    Raises AudioError for a file that cannot be read, is not as long as the manifest says, or holds NaN.
    """
    try:
        samples = cut.load_audio()
    except Exception as error:  # whatever a broken file leads a decoder to
        raise AudioError(f"{cut_path(cut)}: {_reason(cut, error)}") from None
    if samples is None:
        raise AudioError(f"{cut.id}: the manifest names no recording for it")
    samples = samples.mean(axis=0) if len(samples) > 1 else samples[0]
    if not np.isfinite(samples).all():
        raise AudioError(f"{cut_path(cut)}: {np.sum(~np.isfinite(samples))} samples are not finite numbers")
    return samples.astype(np.float32, copy=False)[: cut.num_samples]


def _reason(cut: Cut, error: Exception) -> str:
    """One line, however long lhotse's message is; decoders are least clear about absent files."""
    path = cut_path(cut)
    if path and not Path(path).exists():
        return "no such file"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def balance_texts(cuts: Iterable[Cut], rng: random.Random, power: float) -> list[Cut]:
    """Repeat the cuts of rare texts, so that a text of n cuts is there in proportion to n ** power.

    Those of the commonest text stay as they are; a cut of a text with n cuts where that one has m is there
    (m / n) ** (1 - power) times, fractions by chance, and its repetitions get ids of their own.
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
    """Long utterances out of short ones: each cut is used once, beside others of the same speaker.

    Every joined cut takes a number of cuts drawn evenly from `words`, in random order, with a pause drawn
    evenly from `pause_s` (seconds) between them, and fewer where it would pass `max_s`. See `cut_text`.
    The cuts, and which go together, depend on `rng` and on the order of `cuts` alone.
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
    """Every `count` cuts in their order as one, whoever speaks: the same speech as ever longer recordings.

    The last one has what is left.
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
    """Remove the cuts of one joined utterance from `own`; they come back with the time each starts at."""
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
    """Encoder frames of an utterance: 10 ms frames, edges mirrored, then one in `subsampling` (4 or 8)."""
    return math.ceil(int(duration_s * 100 + 0.5) / subsampling)


def ctc_frames_needed(tokens: list[int]) -> int:
    """The fewest frames a CTC path of these tokens has: one each, and a blank between equal neighbours."""
    return len(tokens) + sum(a == b for a, b in itertools.pairwise(tokens))
