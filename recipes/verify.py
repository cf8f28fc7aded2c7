"""`asr verify`: the checkpoint, its float32 graphs and its bundle on the same utterances."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from asr.errors import BundleError, ManifestError

if TYPE_CHECKING:
    from asr.context import Context
    from asr.decode.scorer import Scorer
    from asr.runtime.bundle import Bundle
    from export.verify import Comparison, Encode, Utterance


class Model(NamedTuple):
    """One of the models to compare."""

    scorer: Scorer
    encode: Callable[[Context], Encode]


def verify(
    model: Annotated[Path, typer.Argument(help="bundle, or experiment with its bundle in EXPERIMENT/bundle")],
    manifest: Annotated[Path, typer.Argument(help="utterances to compare on")],
    utterances: Annotated[int, typer.Option(help="how many of them, from the start")] = 200,
    checkpoint: Annotated[str, typer.Option(help="average, latest, best, ema, or a path")] = "average",
    searches: Annotated[bool, typer.Option(help="also compare the results of every decoding mode")] = False,
) -> None:
    """Compare torch, ONNX and int8 on audio: log-probabilities, units, and word error rates.

    Each is compared on whole utterances and chunk by chunk. For a bundle alone, only the word error rates
    are meaningful. Exits with 2 if a limit of export/verify.py is exceeded.

    Example: asr verify exp/conformer-s data/manifests/corpus_test.jsonl.gz --utterances 200 --searches
    """
    from asr.runtime.bundle import Bundle
    from export.verify import answer, check_float32, check_int8, compare, contexts, read_utterances

    is_experiment = (model / "config.yaml").is_file()
    if searches and not is_experiment:
        raise BundleError(f"{model}: no checkpoint to compare searches with; give the experiment")
    bundle = Bundle.load(model)
    heard = read_utterances(manifest, utterances, bundle.info.features.sample_rate)
    if not heard:
        raise ManifestError(f"{manifest}: no utterances in it")
    with tempfile.TemporaryDirectory() as folder:
        models = _models(model, checkpoint, bundle, Path(folder)) if is_experiment else {}
        models[f"bundle {bundle.info.target}"] = _bundle_model(bundle)
        for context in contexts(bundle.info):
            print(f"{context}, {len(heard)} utterances")
            answers = {
                name: answer(one.encode(context), heard, bundle.tokenizer, bundle.info.has_ctc)
                for name, one in models.items()
            }
            reference = next(iter(answers.values()))
            for name, given in answers.items():
                found = compare(reference, given)
                _print(name, found)
                if name == "onnx float32" or bundle.info.target == "cpu-fp32":
                    check_float32(found, f"{name}, {context}")
                check_int8(found, f"{name}, {context}")
        if searches:
            _compare_searches(models["torch"].scorer, models["onnx float32"].scorer, heard)
            float32 = Bundle.load(Path(folder) / "float32")
            for context in contexts(bundle.info)[1:2]:  # none if the encoder cannot stream
                _compare_streams(models["torch"].scorer, float32, heard, context)
    _print_sizes(bundle)


def _models(experiment: Path, checkpoint: str, bundle: Bundle, folder: Path) -> dict[str, Model]:
    """The checkpoint, and a fresh float32 export of it; BundleError if the bundle has other units."""
    from asr.decode.words import word_starts
    from asr.model.torch_scorer import TorchScorer
    from asr.runtime.bundle import Bundle
    from asr.train.checkpoint import load_model
    from export.bundle import Origin, describe, write_bundle
    from export.onnx import export_graphs
    from export.verify import at_once

    model, tokenizer, _ = load_model(experiment, checkpoint)
    info = describe(model, experiment / "tokens", "cpu-fp32", Origin(experiment.name, ""))
    if info.tokens_sha256 != bundle.info.tokens_sha256:
        raise BundleError(f"{bundle.folder}: its units are not those of {experiment}; export again")
    write_bundle(export_graphs(model), info, experiment / "tokens", folder / "float32")
    starts = word_starts(tokenizer.words, info.num_tokens)
    scorer = TorchScorer(model, "cpu", starts, tokenizer.symbols)
    return {
        "torch": Model(scorer, lambda context: at_once(scorer, context)),
        "onnx float32": _bundle_model(Bundle.load(folder / "float32")),
    }


def _bundle_model(bundle: Bundle) -> Model:
    from asr.runtime.onnx_scorer import OnnxScorer
    from export.verify import encoding

    return Model(OnnxScorer(bundle), lambda context: encoding(bundle, context))


def _compare_searches(torch: Scorer, onnx: Scorer, heard: Sequence[Utterance]) -> None:
    """Raise BundleError if a search finds other units with the float32 graphs than with the checkpoint."""
    from asr.decode.modes import modes_for
    from export.verify import check_searches, count_same_searches

    print(f"searches at once, {len(heard)} utterances, torch and onnx float32")
    for mode in modes_for(torch.decoder_type, torch.has_ctc):
        same = count_same_searches(mode, torch, onnx, heard)
        print(f"  {mode:<18}same units {same}/{len(heard)}", flush=True)
        check_searches(mode, same, len(heard))


def _compare_streams(torch: Scorer, float32: Bundle, heard: Sequence[Utterance], context: Context) -> None:
    """Raise BundleError if a stream of the float32 graphs outputs another text than the checkpoint finds."""
    from asr.decode.modes import modes_for
    from export.verify import check_searches, count_same_streams

    print(f"streams of onnx float32 and searches of torch, {context}, {len(heard)} utterances")
    for mode in modes_for(torch.decoder_type, torch.has_ctc):
        same = count_same_streams(mode, torch, float32, heard, context)
        print(f"  {mode:<18}same text {same}/{len(heard)}", flush=True)
        check_searches(mode, same, len(heard))


def _print(name: str, found: Comparison) -> None:
    wer = "" if found.wer[1] is None else f"  WER {found.wer[1]:6.2f} % of {found.num_words:,} words"
    print(
        f"  {name:<18}max |Δ log p| {found.max_difference:8.1e}  "
        f"same units {found.same}/{found.total}, {found.units:.2f} % differ{wer}",
        flush=True,
    )


def _print_sizes(bundle: Bundle) -> None:
    sizes = ", ".join(f"{name} {file.size / 1e6:.1f} MB" for name, file in bundle.info.files.items())
    print(f"{bundle.folder}: {bundle.info.parameters / 1e6:.1f} M parameters; {sizes}")
