"""`asr export`: a checkpoint becomes a bundle, and says what was proved of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from asr.errors import ConfigError

if TYPE_CHECKING:
    from asr.runtime.info import ModelInfo
    from export.bundle import Origin
    from export.sherpa_bundle import Written
    from export.verify import Comparison

SHERPA = "sherpa-onnx"

UTTERANCES = 20
"""Of the first validation set, to compare on."""


def export(
    experiment: Annotated[Path, typer.Argument(help="folder of the experiment")],
    target: Annotated[
        str, typer.Option(help="cpu-int8, cpu-fp32 as the reference, or sherpa-onnx")
    ] = "cpu-int8",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="folder to write; EXPERIMENT/bundle, or sherpa, if not given"),
    ] = None,
    checkpoint: Annotated[str, typer.Option(help="average, latest, best, ema, or a path")] = "average",
    licence: Annotated[
        str, typer.Option(help="of the weights, noted in model.json; a converted model states its own")
    ] = "",
) -> None:
    """Write an ONNX bundle that runs without torch, and compare it with the checkpoint.

    The float32 graphs must be the checkpoint up to rounding. What 8-bit matrices change is printed: on some
    utterances of the validation set, or on made sound where there is none. The target sherpa-onnx is a folder
    of graphs for that runtime instead, in float32 and 8 bits, with a README that says how it loads each.

    Example: asr export exp/conformer-s --target cpu-int8 -o bundle
    """
    from asr.train.checkpoint import load_model
    from export.build import build, made_utterance
    from export.bundle import check_out
    from export.sherpa_bundle import MARKER, write_sherpa
    from export.targets import TARGETS
    from export.verify import read_utterances

    if target not in (*TARGETS, SHERPA):
        raise ConfigError(f"--target {target}: no such target; there are {', '.join([*TARGETS, SHERPA])}")
    out = out or experiment / ("sherpa" if target == SHERPA else "bundle")
    check_out(out, MARKER if target == SHERPA else "model.json")
    model, _, config = load_model(experiment, checkpoint)
    origin = _origin(experiment, checkpoint, licence)
    if target == SHERPA:
        _print_sherpa(write_sherpa(model, experiment / "tokens", origin, out), out)
        return
    rate = config.features.sample_rate
    found = [Path(path) for path in config.data.valid if Path(path).exists()]
    where = "made sound"
    made = made_utterance(model)
    utterances = [made]
    if found:
        utterances, where = read_utterances(found[0], UTTERANCES, rate), found[0].name
    built = build(model, experiment / "tokens", target, origin, utterances, out)
    _print_files(built.info)
    print(
        f"{'torch and onnx':<20}max |Δ log p| {built.float32.max_difference:.1e} "
        f"on {len(made.samples) / rate:g} s of made sound, at once and in chunks"
    )
    if built.quantized:
        _print_quantized(built.quantized, where)
    print(f"{out}/ written, model.json format {built.info.format}, from {origin.source}")


def _origin(experiment: Path, checkpoint: str, licence: str) -> Origin:
    """With that of a converted checkpoint, where the experiment is one."""
    from asr.convert.origin import NOT_STATED, read_origin
    from export.bundle import Origin

    source, converted = f"{experiment.name}, {checkpoint} checkpoint", read_origin(experiment)
    if converted:
        source += f", from {converted.family} {converted.source}"
    return Origin(source, licence or (converted.licence if converted else NOT_STATED))


def _print_files(info: ModelInfo) -> None:
    kind = info.target.rpartition("-")[2]
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
        print(f"{name:<20}{info.files[name].size / 1e6:6.1f} MB {kind:<6}{role}")


def _print_sherpa(written: Written, out: Path) -> None:
    for name, size in written.sizes.items():
        if name.endswith(".onnx"):
            print(f"{name:<30}{size / 1e6:6.1f} MB")
    for name, why in written.left_out.items():
        print(f"{name:<30}left out: {why}")
    print(f"{out}/ written; its README.md says how sherpa-onnx loads each")


def _print_quantized(found: Comparison, where: str) -> None:
    from export.quantize import KEPT

    print(f"{'kept in float32':<20}{', '.join(KEPT.values())}  (export/quantize.py says why)")
    before, after = found.wer
    wer = "" if before is None or after is None else f"; WER {before:.2f} -> {after:.2f}"
    print(
        f"{'onnx and int8':<20}same units in {found.same} of {found.total} utterances of {where}, "
        f"{found.units:.2f} % of units differ{wer}"
    )
