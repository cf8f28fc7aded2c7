"""`asr decode`: transcribe the utterances of manifests with a checkpoint or a bundle."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asr.context import WHOLE, Context
from asr.errors import CheckpointError, ConfigError, ManifestError
from recipes.options import Mode, Search, search_config
from recipes.sets import (
    FINISHED_WITH_FAILURES,
    Progress,
    check_batch_s,
    chunk_frames,
    in_order,
    list_failures,
    read_batch,
    replacing,
    set_name,
)

if TYPE_CHECKING:
    from lhotse.cut import Cut

    from asr.decode.config import SearchConfig
    from asr.decode.scorer import Floats, Hypothesis, Scorer
    from asr.tokens import Tokenizer
    from asr.wer import ErrorCount


def decode(
    model: Annotated[Path, typer.Argument(help="experiment or bundle")],
    manifests: Annotated[list[Path], typer.Argument(help="what to decode")],
    mode: Mode = "",
    beam: Annotated[int, typer.Option(help="hypotheses kept per utterance")] = 10,
    nbest: Annotated[int, typer.Option(help="hypotheses written per utterance, at most")] = 1,
    ctc_weight: Annotated[
        float, typer.Option(help="weight of CTC in the score: joint, rescore, alignatt, edatt, triggered")
    ] = 0.3,
    search: Search = None,
    chunk_ms: Annotated[int, typer.Option(help="attend in chunks, as in a stream; 0: whole utterances")] = 0,
    left_chunks: Annotated[int, typer.Option(help="chunks of left context; -1: all")] = -1,
    look_ahead: Annotated[int, typer.Option(help="chunks of look-ahead in every layer, with --chunk-ms")] = 0,
    checkpoint: Annotated[str, typer.Option(help="average, latest, best, ema, or a path")] = "average",
    batch_s: Annotated[float, typer.Option(help="seconds of audio decoded at once")] = 120.0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda; for experiments only")] = "auto",
) -> None:
    """Decode the utterances of manifests; write hypotheses with word times, confidences and scores.

    Writes MODEL/decode/SET_MODE/hyp.jsonl, one object per utterance, in the order of the manifest. Utterances
    whose audio cannot be used are listed in failures.jsonl beside it; then the exit status is 3. Prints the
    word error rate.

    Example: asr decode exp/conformer-s data/manifests/corpus_test.jsonl.gz --mode rescore
    """
    from asr.decode.modes import check_name

    check_name(mode)
    check_batch_s(batch_s)
    config = search_config(search, beam=beam, nbest=nbest, ctc_weight=ctc_weight)
    if look_ahead < 0 or (look_ahead and not chunk_ms):
        raise ConfigError(
            f"--look-ahead {look_ahead}: expected 0 or more chunks, with their length in --chunk-ms"
        )
    context = (f"_c{chunk_ms}" if chunk_ms else "") + (f"_l{left_chunks}" if left_chunks >= 0 else "")
    context += f"_r{look_ahead}" if look_ahead else ""
    context += "".join(f"_{setting.replace('=', '')}" for setting in search or ())
    check_manifests(model, manifests)
    recogniser = _load(model, checkpoint, device, mode, config)
    folders = _folders(model, manifests, f"{recogniser.mode}{context}")
    recogniser.set_context(chunk_ms, left_chunks, look_ahead)
    failed = sum(
        _decode_set(recogniser, manifest, folder, batch_s)
        for manifest, folder in zip(manifests, folders, strict=True)
    )
    if failed:
        raise typer.Exit(FINISHED_WITH_FAILURES)


@dataclass
class Recogniser:
    """A loaded model and its search options."""

    scorer: Scorer
    tokenizer: Tokenizer
    sample_rate: int
    mode: str
    search: SearchConfig
    context: Context = WHOLE

    def set_context(self, chunk_ms: int, left_chunks: int, look_ahead: int) -> None:
        """Attend in chunks of milliseconds; ConfigError unless they are whole encoder frames."""
        self.context = Context(chunk_frames(chunk_ms, self.scorer.frame_s), left_chunks, look_ahead)

    def run(self, samples: Sequence[Floats]) -> list[list[Hypothesis]]:
        from asr.decode.modes import decode

        return decode(self.scorer, self.mode, samples, self.search, self.context)

    def row(self, cut: Cut, nbest: Sequence[Hypothesis]) -> dict[str, Any]:
        """The row of hyp.jsonl for an utterance."""
        from asr.data.cuts import cut_speaker, cut_text
        from asr.decode.words import words

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
    """The results for one set."""

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


def check_manifests(model: Path, manifests: Sequence[Path]) -> None:
    """Raise ConfigError or CheckpointError if hypotheses cannot be written, before a model is loaded."""
    for name, count in Counter(set_name(path) for path in manifests).items():
        if count > 1:
            raise ConfigError(f"{count} manifests are named {name}: their hypotheses would share a folder")
    if not model.is_dir():
        raise CheckpointError(f"{model}: no such experiment or bundle")


def _folders(model: Path, manifests: Sequence[Path], what: str) -> list[Path]:
    """Create the output folders at once, so that a full disk is noticed before anything is decoded."""
    folders = [model / "decode" / f"{set_name(path)}_{what}" for path in manifests]
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{folder}: {(error.strerror or str(error)).lower()}") from None
    return folders


def _load(model: Path, checkpoint: str, device: str, mode: str, search: SearchConfig) -> Recogniser:
    from asr.decode.modes import mode_of

    if (model / "model.json").is_file():
        from asr.runtime.bundle import Bundle
        from asr.runtime.onnx_scorer import OnnxScorer

        bundle = Bundle.load(model, threads=os.cpu_count() or 1)
        onnx = OnnxScorer(bundle)
        rate = bundle.info.features.sample_rate
        return Recogniser(onnx, bundle.tokenizer, rate, mode_of(onnx, mode), search)
    from asr.decode.words import word_starts
    from asr.model.torch_scorer import TorchScorer
    from asr.train.checkpoint import load_model
    from asr.train.distributed import device_of

    trained, tokenizer, config = load_model(model, checkpoint)
    starts = word_starts(tokenizer.words, len(tokenizer.symbols))
    scorer = TorchScorer(trained, device_of(device), starts, tokenizer.symbols)
    return Recogniser(scorer, tokenizer, config.features.sample_rate, mode_of(scorer, mode), search)


def _decode_set(recogniser: Recogniser, manifest: Path, folder: Path, batch_s: float) -> int:
    """Decode one manifest; returns the number of utterances that failed."""
    from asr.data.cuts import count_cuts

    name, total, report = set_name(manifest), count_cuts(manifest), Report()
    if not total:
        raise ManifestError(f"{manifest}: no utterances in it")
    progress = Progress("decode", name, total)
    work = partial(_decode_batch, recogniser, failures=report.failures)
    with replacing(folder / "hyp.jsonl") as file:
        for row in in_order(manifest, batch_s, work, progress):
            report.add(row)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    list_failures(folder / "failures.jsonl", report.failures, total, "decoded")
    print(report.line(name, folder.name.removeprefix(f"{name}_"), progress.wall_s()), flush=True)
    return len(report.failures)


def _decode_batch(
    recogniser: Recogniser, batch: Iterable[tuple[int, Cut]], failures: list[dict[str, str]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a batch; audio that cannot be read is recorded and skipped."""
    heard, samples = read_batch(batch, recogniser.sample_rate, failures)
    for (number, cut), nbest in zip(heard, recogniser.run(samples), strict=True):
        yield number, recogniser.row(cut, nbest)
