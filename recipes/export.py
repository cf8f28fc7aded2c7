"""`asr export`: turn a checkpoint into a bundle, and report how it was verified."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from asr.errors import ConfigError
from recipes.sets import Progress

if TYPE_CHECKING:
    from asr.config import ExperimentConfig
    from asr.model.hybrid import HybridModel
    from asr.runtime.info import ModelInfo
    from export.bundle import Origin
    from export.gate import Limit, Report
    from export.sherpa_bundle import Written
    from export.verify import Comparison, Utterance

SHERPA = "sherpa-onnx"

UTTERANCES, UTTERANCES_OF_WORDS = 20, 500
"""Utterances of a set for comparing outputs, and for measuring error rates."""


def export(
    experiment: Annotated[Path, typer.Argument(help="folder of the experiment")],
    target: Annotated[
        str, typer.Option(help="cpu-int8, cpu-int8-static, cpu-int4, cpu-fp32, cuda-fp16, or sherpa-onnx")
    ] = "cpu-int8",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="folder to write; EXPERIMENT/bundle, or sherpa, if not given"),
    ] = None,
    checkpoint: Annotated[str, typer.Option(help="average, latest, best, ema, or a path")] = "average",
    licence: Annotated[
        str, typer.Option(help="licence of the weights, noted in model.json; a converted model has its own")
    ] = "",
    max_wer_increase: Annotated[
        float | None, typer.Option(help="highest increase in WER accepted, in percentage points")
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(help="set to measure on; the experiment's first validation set if not given"),
    ] = None,
    utterances: Annotated[
        int, typer.Option(help="how many of that set, from the start; 0: 20, or 500 with --max-wer-increase")
    ] = 0,
    mode: Annotated[
        list[str] | None,
        typer.Option(help="mode to measure, may be repeated  [default: enough to use every graph]"),
    ] = None,
) -> None:
    """Write an ONNX bundle that runs without torch, and compare it with the checkpoint.

    The float32 graphs must match the checkpoint up to rounding. Prints what the target changes on some
    utterances of the validation set, or on synthetic sound if there is none. The target sherpa-onnx is a
    folder of graphs for that runtime instead, in float32 and 8 bits, with a README on how to load each.

    With --max-wer-increase, word error rates are measured in streaming chunks. If the target exceeds the
    limit, the most harmful modules stay in float32, as many as it takes; if half of the matrices are not
    enough, nothing is written, and the exit status is 2.

    Example: asr export exp/conformer-s --max-wer-increase 0.1 --manifest data/manifests/corpus_dev.jsonl.gz
    """
    from asr.train.checkpoint import load_model
    from export.bundle import check_out
    from export.sherpa_bundle import MARKER

    _check_target(target, max_wer_increase, utterances)
    out = out or experiment / ("sherpa" if target == SHERPA else "bundle")
    check_out(out, MARKER if target == SHERPA else "model.json")
    model, _, config = load_model(experiment, checkpoint)
    origin = _origin(experiment, checkpoint, licence)
    needs_set = max_wer_increase is not None or _is_calibrated(target)
    count = utterances or (UTTERANCES if max_wer_increase is None else UTTERANCES_OF_WORDS)
    heard, where = _read(experiment, manifest, config, count, needs_set)
    limit = None
    if max_wer_increase is not None:
        command = f"asr export {experiment.name} --target {target} --checkpoint {checkpoint}"
        limit = _limit(max_wer_increase, heard, where, mode or [], command)
    if target == SHERPA:
        _export_sherpa(model, experiment / "tokens", origin, out, limit)
    else:
        _export_bundle(model, experiment / "tokens", target, origin, heard[:UTTERANCES], where, out, limit)


def _export_bundle(
    model: HybridModel,
    tokens: Path,
    target: str,
    origin: Origin,
    heard: Sequence[Utterance],
    where: str,
    out: Path,
    limit: Limit | None,
) -> None:
    from export.build import build, made_utterance

    made = made_utterance(model)
    built = build(model, tokens, target, origin, heard or [made], out, limit)
    _print_files(built.info)
    print(
        f"{'torch and onnx':<20}max |Δ log p| {built.float32.max_difference:.1e} "
        f"on {len(made.samples) / model.fbank.config.sample_rate:g} s of synthetic sound, whole and in chunks"
    )
    if built.converted:
        _print_converted(built.converted, target, where)
    if built.report:
        _print_report(built.report, target, where)
    print(f"{out}/ written, model.json format {built.info.format}, from {origin.source}")


def _export_sherpa(model: HybridModel, tokens: Path, origin: Origin, out: Path, limit: Limit | None) -> None:
    from export.sherpa_bundle import write_sherpa

    written = write_sherpa(model, tokens, origin, out, limit)
    for name, report in written.reports.items():
        _print_report(report, f"{name} int8", str(report.limit.about["set"]))
    _print_sherpa(written, out)


def _check_target(target: str, max_wer_increase: float | None, utterances: int) -> None:
    """Raise ConfigError if there is no such target, or if it cannot be combined with the limit."""
    from export.targets import TARGETS

    if target not in (*TARGETS, SHERPA):
        raise ConfigError(
            f"--target {target}: no such target; expected one of {', '.join([*TARGETS, SHERPA])}"
        )
    if utterances < 0:
        raise ConfigError(f"--utterances {utterances}: expected at least 1")
    if max_wer_increase is None:
        return
    if not max_wer_increase >= 0:
        raise ConfigError(f"--max-wer-increase {max_wer_increase:g}: expected 0 or more")
    if target in TARGETS and not TARGETS[target].kept:
        raise ConfigError(f"--max-wer-increase: {target} loses nothing; give a target with fewer bits")


def _is_calibrated(target: str) -> bool:
    from export.targets import TARGETS

    return target in TARGETS and TARGETS[target].calibrate is not None


def _read(
    experiment: Path, manifest: Path | None, config: ExperimentConfig, count: int, is_needed: bool
) -> tuple[Sequence[Utterance], str]:
    """The first utterances of a manifest, or of the first validation set that exists; and its name.

    If there is none, no utterances, under the name of made sound; ConfigError if they are needed.
    """
    from export.verify import read_utterances

    path = manifest or next((Path(x) for x in config.data.valid if Path(x).exists()), None)
    if path:
        return read_utterances(path, count, config.features.sample_rate), path.name
    if is_needed:
        raise ConfigError(f"{experiment}: has no utterances to measure on; give them with --manifest")
    return [], "synthetic sound"


def _limit(
    max_increase: float, heard: Sequence[Utterance], where: str, modes: Sequence[str], command: str
) -> Limit:
    from export.gate import Limit

    given = "".join(f" --mode {mode}" for mode in modes)
    command += f" --max-wer-increase {max_increase:g} --manifest {where} --utterances {len(heard)}{given}"
    return Limit(
        max_increase,
        heard,
        modes,
        {"set": where, "command": command},
        lambda what, total: Progress("export", what, total).show,
        lambda line: print(line, file=sys.stderr, flush=True),
    )


def _origin(experiment: Path, checkpoint: str, licence: str) -> Origin:
    """The origin of an experiment, including that of a converted checkpoint."""
    from asr.convert.origin import NOT_STATED, read_origin
    from export.bundle import Origin

    source, converted = f"{experiment.name}, {checkpoint} checkpoint", read_origin(experiment)
    if converted:
        source += f", from {converted.family} {converted.source}"
    return Origin(source, licence or (converted.licence if converted else NOT_STATED))


def _print_files(info: ModelInfo) -> None:
    kind = info.target.partition("-")[2]
    step = f"{info.streaming.chunk_ms} ms a step" if info.streaming else "whole utterances"
    roles = {
        "encoder.onnx": f"samples, {len(info.encoder_state)} states -> log_probs (N, T, {info.num_tokens}), "
        + step,
        "memory.onnx": "encoder output -> what the decoder attends to",
        "decoder.onnx": "tokens -> log_probs of the next",
        "reverse.onnx": "tokens from right to left -> log_probs of the next",
        "length.onnx": "encoder output, last token, duration -> where its segment ends",
    }
    for name, role in ((name, role) for name, role in roles.items() if name in info.files):
        print(f"{name:<20}{info.files[name].size / 1e6:6.1f} MB {kind:<13}{role}")


def _print_sherpa(written: Written, out: Path) -> None:
    for name, size in written.sizes.items():
        if name.endswith(".onnx"):
            print(f"{name:<30}{size / 1e6:6.1f} MB")
    for name, why in written.left_out.items():
        print(f"{name:<30}left out: {why}")
    print(f"{out}/ written; its README.md says how to load each in sherpa-onnx")


def _print_converted(found: Comparison, target: str, where: str) -> None:
    from export.targets import TARGETS

    print(f"{'kept in float32':<20}{TARGETS[target].kept}")
    before, after = found.wer
    wer = "" if before is None or after is None else f"; WER {before:.2f} -> {after:.2f}"
    kind = target.partition("-")[2]
    print(
        f"{'onnx and ' + kind:<20}same units in {found.same} of {found.total} utterances of {where}, "
        f"{found.units:.2f} % of units differ{wer}"
    )


def _print_report(report: Report, target: str, where: str) -> None:
    from export.gate import describe

    print(f"{'WER, float32':<20}{describe(report.wer_float32)}  ({report.words:,} words of {where})")
    print(f"{'WER, ' + target:<20}{describe(report.wer)}")
    if report.kept:
        print(f"{'':<20}{describe(report.wer_all)} before these modules went back to float32:")
        for name, harm in report.kept.items():
            print(f"{'':<20}{name}  (harm {harm:.3g})")
        print(f"{'':<20}{100 * report.share:.0f} % of the matrices")
