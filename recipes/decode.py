"""`asr decode`: what a checkpoint or a bundle hears in the utterances of manifests."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from asr.context import WHOLE, Context
from asr.errors import AudioError, CheckpointError, ConfigError

if TYPE_CHECKING:
    from lhotse.cut import Cut

    from asr.decode.config import SearchConfig
    from asr.decode.scorer import Floats, Hypothesis, Scorer
    from asr.tokens import Tokenizer
    from asr.wer import ErrorCount

WINDOW = 512
"""Utterances that are sorted by length at a time, so that those of a batch are about as long."""

FINISHED_WITH_FAILURES = 3


def decode(
    model: Annotated[Path, typer.Argument(help="experiment or bundle")],
    manifests: Annotated[list[Path], typer.Argument(help="what to decode")],
    mode: Annotated[
        str, typer.Option(help="ctc-greedy, ctc-prefix, attention, joint or rescore")
    ] = "ctc-prefix",
    beam: Annotated[int, typer.Option(help="hypotheses kept of an utterance")] = 10,
    nbest: Annotated[int, typer.Option(help="hypotheses written of an utterance, at most")] = 1,
    ctc_weight: Annotated[float, typer.Option(help="share of CTC in the score: joint, rescore")] = 0.3,
    chunk_ms: Annotated[int, typer.Option(help="attention in chunks, as a stream; 0: all at once")] = 0,
    left_chunks: Annotated[int, typer.Option(help="chunks of left context; -1: all")] = -1,
    look_ahead: Annotated[int, typer.Option(help="chunks that every layer looks ahead, with --chunk-ms")] = 0,
    checkpoint: Annotated[str, typer.Option(help="average, latest, best, ema, or a path")] = "average",
    batch_s: Annotated[float, typer.Option(help="seconds of audio decoded at once")] = 120.0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda, of an experiment")] = "auto",
) -> None:
    """Write what a model hears in the utterances of manifests, with word times, confidences and scores.

    Writes MODEL/decode/SET_MODE/hyp.jsonl, one object an utterance, in the order of the manifest, and
    failures.jsonl beside it where audio could not be used; then the exit status is 3. Prints the word error
    rate.

    Example: asr decode exp/conformer-s data/manifests/corpus_test.jsonl.gz --mode rescore
    """
    from asr.decode.config import SearchConfig
    from asr.decode.modes import MODES

    if mode not in MODES:
        raise ConfigError(f"--mode {mode}: no such mode; expected one of {', '.join(MODES)}")
    if batch_s <= 0:
        raise ConfigError(f"--batch-s {batch_s}: expected more than 0")
    search = SearchConfig(beam=beam, nbest=nbest, ctc_weight=ctc_weight)
    if look_ahead < 0 or (look_ahead and not chunk_ms):
        raise ConfigError(
            f"--look-ahead {look_ahead}: expected 0 or more chunks, whose length --chunk-ms has to say"
        )
    context = (f"_c{chunk_ms}" if chunk_ms else "") + (f"_l{left_chunks}" if left_chunks >= 0 else "")
    context += f"_r{look_ahead}" if look_ahead else ""
    folders = _folders(model, manifests, f"{mode}{context}")
    recogniser = _load(model, checkpoint, device, mode, search)
    recogniser.set_context(chunk_ms, left_chunks, look_ahead)
    failed = sum(
        _decode_set(recogniser, manifest, folder, batch_s)
        for manifest, folder in zip(manifests, folders, strict=True)
    )
    if failed:
        raise typer.Exit(FINISHED_WITH_FAILURES)


@dataclass
class Recogniser:
    """A loaded model and how it is to be searched."""

    scorer: Scorer
    tokenizer: Tokenizer
    sample_rate: int
    mode: str
    search: SearchConfig
    context: Context = WHOLE

    def set_context(self, chunk_ms: int, left_chunks: int, look_ahead: int) -> None:
        """Chunks in milliseconds -> encoder frames. ConfigError unless it is a whole number of them."""
        frame_ms = round(self.scorer.frame_s * 1000)
        if chunk_ms < 0 or chunk_ms % frame_ms:
            raise ConfigError(f"--chunk-ms {chunk_ms}: not a multiple of {frame_ms} ms, the encoder frame")
        self.context = Context(chunk_ms // frame_ms, left_chunks, look_ahead)

    def run(self, samples: Sequence[Floats]) -> list[list[Hypothesis]]:
        from asr.decode.modes import decode

        return decode(self.scorer, self.mode, samples, self.search, self.context)

    def row(self, cut: Cut, nbest: Sequence[Hypothesis]) -> dict[str, Any]:
        """What hyp.jsonl says of an utterance."""
        from asr.data.cuts import cut_speaker, cut_text
        from asr.decode.modes import words

        best = nbest[0]
        found = words(best, self.tokenizer.words, self.scorer.frame_s)
        return {
            "id": cut.id,
            "speaker": cut_speaker(cut),
            "duration_s": round(cut.duration, 3),
            "ref": cut_text(cut),
            "hyp": self.tokenizer.decode(best.tokens),
            "score": best.score,
            "words": [
                {
                    "word": x.word,
                    "start_s": round(x.start_s, 3),
                    "end_s": round(x.end_s, 3),
                    "confidence": round(x.confidence, 4),
                }
                for x in found
            ],
            "nbest": [{"hyp": self.tokenizer.decode(x.tokens), "score": x.score, **x.parts} for x in nbest],
            "guard": best.guard,
        }


@dataclass
class Report:
    """What one set came to."""

    num_done: int = 0
    audio_s: float = 0.0
    errors: ErrorCount | None = None
    guards: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, str]] = field(default_factory=list)

    def add(self, row: dict[str, Any]) -> None:
        from asr.wer import total, word_errors

        self.num_done += 1
        self.audio_s += row["duration_s"]
        self.guards[row["guard"]] += 1
        found = word_errors(row["ref"], row["hyp"])
        self.errors = total([self.errors, found]) if self.errors else found

    def line(self, name: str, mode: str, wall_s: float) -> str:
        rate = "no references"
        if count := self.errors if self.errors and self.errors.ref else None:
            parts = f"{count.ins:,} ins, {count.dels:,} del, {count.subs:,} sub"
            rate = f"WER {100 * count.rate:.2f} % [{count.ref:,} words: {parts}]"
        rtf = f"RTF {wall_s / self.audio_s:.3f}" if self.audio_s else "no audio"
        guards = "".join(f"  {n:,} stopped by {guard}" for guard, n in sorted(self.guards.items()) if guard)
        return f"{name}  {mode}  {rate}  {rtf}{guards}"


def _folders(model: Path, manifests: Sequence[Path], what: str) -> list[Path]:
    """Where the hypotheses go, made at once, so that a full disk is met before a model is loaded."""
    names = Counter(_set_name(path) for path in manifests)
    for name, count in names.items():
        if count > 1:
            raise ConfigError(f"{count} manifests are named {name}: their hypotheses would share a folder")
    if not model.is_dir():
        raise CheckpointError(f"{model}: no such experiment or bundle")
    folders = [model / "decode" / f"{name}_{what}" for name in names]
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{folder}: {(error.strerror or str(error)).lower()}") from None
    return folders


def _set_name(manifest: Path) -> str:
    return manifest.name.removesuffix(".gz").removesuffix(".jsonl")


def _load(model: Path, checkpoint: str, device: str, mode: str, search: SearchConfig) -> Recogniser:
    if (model / "model.json").is_file():
        from asr.runtime.bundle import Bundle
        from asr.runtime.onnx_scorer import OnnxScorer

        bundle = Bundle.load(model, threads=os.cpu_count() or 1)
        return Recogniser(
            OnnxScorer(bundle), bundle.tokenizer, bundle.info.features.sample_rate, mode, search
        )
    from asr.model.torch_scorer import TorchScorer
    from asr.train.checkpoint import load_model
    from asr.train.distributed import device_of

    trained, tokenizer, config = load_model(model, checkpoint)
    return Recogniser(
        TorchScorer(trained, device_of(device)), tokenizer, config.features.sample_rate, mode, search
    )


def _decode_set(recogniser: Recogniser, manifest: Path, folder: Path, batch_s: float) -> int:
    """Decode one manifest; returns how many utterances could not be."""
    from asr.data.cuts import count_cuts, open_cuts

    name, total, report = _set_name(manifest), count_cuts(manifest), Report()
    progress = _Progress(name, total)
    cuts = iter(open_cuts(manifest))
    with _replacing(folder / "hyp.jsonl") as file:
        while window := list(islice(cuts, WINDOW)):
            rows = {}
            for batch in _batches(window, batch_s):
                for number, row in _decode_batch(recogniser, batch, report):
                    rows[number] = row
                    report.add(row)
                progress.show(report.num_done + len(report.failures))
            for _, row in sorted(rows.items()):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    _list_failures(folder / "failures.jsonl", report, total)
    print(report.line(name, folder.name.removeprefix(f"{name}_"), progress.wall_s()), flush=True)
    return len(report.failures)


def _batches(window: Sequence[Cut], batch_s: float) -> Iterator[list[tuple[int, Cut]]]:
    """Cuts of about one length with their places in the window; padded, batch_s seconds, or one cut if
    longer."""
    batch: list[tuple[int, Cut]] = []
    for item in sorted(enumerate(window), key=lambda item: -item[1].duration):
        if batch and batch[0][1].duration * (len(batch) + 1) > batch_s:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _decode_batch(
    recogniser: Recogniser, batch: Iterable[tuple[int, Cut]], report: Report
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a batch; audio that cannot be read is noted in the report, and the rest goes on."""
    from asr.data.cuts import cut_path, cut_speaker, cut_text, read_cut

    heard: list[tuple[int, Cut]] = []
    samples: list[Floats] = []
    for number, cut in batch:
        try:
            samples.append(read_cut(cut.resample(recogniser.sample_rate)))
            heard.append((number, cut))
        except AudioError as error:
            about = {"id": cut.id, "path": cut_path(cut), "error": str(error)}
            report.failures.append({**about, "ref": cut_text(cut), "speaker": cut_speaker(cut)})
    for (number, cut), nbest in zip(heard, recogniser.run(samples), strict=True):
        yield number, recogniser.row(cut, nbest)


@contextmanager
def _replacing(path: Path) -> Iterator[IO[str]]:
    """A text file that has its name when it is complete; until then an earlier one keeps it."""
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            yield file
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _list_failures(path: Path, report: Report, total: int) -> None:
    """Write the failures, and say the first; those of an earlier run are gone either way."""
    path.unlink(missing_ok=True)
    if report.failures:
        with _replacing(path) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in report.failures)
        first = report.failures[0]
        print(
            f"{len(report.failures):,} of {total:,} utterances could not be decoded, listed in {path}; "
            f"first {first['id']}: {first['error']}",
            file=sys.stderr,
        )


class _Progress:
    """How far a set is: a line that changes on a terminal, one for every 10 % elsewhere."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total = name, total
        self.started = time.monotonic()
        self.tenths = 0

    def wall_s(self) -> float:
        return time.monotonic() - self.started

    def show(self, done: int) -> None:
        if not self.total:
            return
        left_s = self.wall_s() / done * (self.total - done)
        text = f"decode {self.name}  {done:,}/{self.total:,}  {100 * done // self.total} %"
        text += f"  {left_s // 60:.0f}:{left_s % 60:02.0f} left"
        if sys.stderr.isatty():
            print(f"\r{text}\x1b[K", end="\n" if done == self.total else "", file=sys.stderr, flush=True)
        elif 10 * done // self.total > self.tenths:
            self.tenths = 10 * done // self.total
            print(text, file=sys.stderr, flush=True)
