"""Iterating over the utterances of a manifest: batches of similar length, order, progress, failures."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar

from asr.errors import AudioError, ConfigError, naming_full_disk

if TYPE_CHECKING:
    import numpy as np
    from lhotse.cut import Cut
    from numpy.typing import NDArray

T = TypeVar("T")

WINDOW = 512
"""Utterances that are sorted by length at a time, so that those of a batch have about the same length."""

FINISHED_WITH_FAILURES = 3
"""The exit status if some utterances were left out."""


def set_name(manifest: Path) -> str:
    return manifest.name.removesuffix(".gz").removesuffix(".jsonl")


def chunk_frames(chunk_ms: int, frame_s: float) -> int:
    """--chunk-ms in encoder frames. ConfigError unless it is a whole number of them."""
    frame_ms = round(frame_s * 1000)
    if chunk_ms < 0 or chunk_ms % frame_ms:
        raise ConfigError(f"--chunk-ms {chunk_ms}: not a multiple of {frame_ms} ms, the encoder frame")
    return chunk_ms // frame_ms


def check_batch_s(batch_s: float) -> None:
    if batch_s <= 0:
        raise ConfigError(f"--batch-s {batch_s}: expected more than 0")


def in_order(
    manifest: Path,
    batch_s: float,
    work: Callable[[list[tuple[int, Cut]]], Iterable[tuple[int, T]]],
    progress: Progress,
) -> Iterator[T]:
    """The results of `work` on batches of numbered cuts, with their numbers, in the order of the manifest."""
    from asr.data.cuts import open_cuts

    cuts, num_done = iter(open_cuts(manifest)), 0
    while window := list(islice(cuts, WINDOW)):
        made: dict[int, T] = {}
        for batch in batches(window, batch_s):
            made.update(work(batch))
            num_done += len(batch)
            progress.show(num_done)
        yield from (made[number] for number in sorted(made))


def batches(window: Sequence[Cut], batch_s: float) -> Iterator[list[tuple[int, Cut]]]:
    """Batches of cuts of similar length with their indices in the window: batch_s seconds including padding,
    or a single longer cut."""
    batch: list[tuple[int, Cut]] = []
    for item in sorted(enumerate(window), key=lambda item: -item[1].duration):
        if batch and batch[0][1].duration * (len(batch) + 1) > batch_s:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def read_batch(
    batch: Iterable[tuple[int, Cut]], sample_rate: int, failures: list[dict[str, str]]
) -> tuple[list[tuple[int, Cut]], list[NDArray[np.float32]]]:
    """The cuts of a batch that can be read, and their samples; the others are added to `failures`."""
    from asr.data.cuts import read_cut

    heard: list[tuple[int, Cut]] = []
    samples: list[NDArray[np.float32]] = []
    for number, cut in batch:
        try:
            samples.append(read_cut(cut.resample(sample_rate) if cut.has_recording else cut))
            heard.append((number, cut))
        except AudioError as error:
            failures.append(failure(cut, str(error)))
    return heard, samples


def failure(cut: Cut, error: str) -> dict[str, str]:
    """The row of failures.jsonl for an utterance."""
    from asr.data.cuts import cut_path, cut_speaker, cut_text

    about = {"id": cut.id, "path": cut_path(cut), "error": error}
    return {**about, "ref": cut_text(cut), "speaker": cut_speaker(cut)}


def list_failures(path: Path, failures: Sequence[dict[str, str]], total: int, done: str) -> None:
    """Write the failures, and report the first; those of an earlier run are removed either way."""
    path.unlink(missing_ok=True)
    if failures:
        with replacing(path) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in failures)
        first = failures[0]
        print(
            f"{len(failures):,} of {total:,} utterances could not be {done}, listed in {path}; "
            f"first {first['id']}: {first['error']}",
            file=sys.stderr,
        )


@contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """A text file that gets its name when it is complete; until then an earlier file keeps it."""
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with naming_full_disk(path), unfinished.open("w", encoding="utf-8") as file:
            yield file
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


class Progress:
    """Progress on a set: a changing line on a terminal, a line for every 10 % elsewhere."""

    def __init__(self, verb: str, name: str, total: int) -> None:
        self.what, self.total = f"{verb} {name}", total
        self.started = time.monotonic()
        self.tenths = 0

    def wall_s(self) -> float:
        return time.monotonic() - self.started

    def show(self, done: int) -> None:
        if not self.total:
            return
        left_s = self.wall_s() / done * (self.total - done)
        text = f"{self.what}  {done:,}/{self.total:,}  {100 * done // self.total} %"
        text += f"  {left_s // 60:.0f}:{left_s % 60:02.0f} left"
        if sys.stderr.isatty():
            print(f"\r{text}\x1b[K", end="\n" if done == self.total else "", file=sys.stderr, flush=True)
        elif 10 * done // self.total > self.tenths:
            self.tenths = 10 * done // self.total
            print(text, file=sys.stderr, flush=True)
