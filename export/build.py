"""From a model to a bundle that has been verified against it."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from asr.model.hybrid import HybridModel
from asr.model.torch_scorer import TorchScorer
from asr.runtime.bundle import Bundle
from asr.runtime.info import ModelInfo
from export.bundle import Origin, describe, write_bundle
from export.evaluation import BundleEvaluator
from export.gate import Limit, Report, gate
from export.onnx import export_graphs
from export.targets import TARGETS
from export.verify import (
    Comparison,
    Utterance,
    answer,
    at_once,
    check_float32,
    compare,
    contexts,
    encoding,
    made_sound,
    possible_contexts,
)

SOUND_S = 20.0


@dataclass(frozen=True)
class Built:
    """A bundle and the results of its verification."""

    info: ModelInfo
    float32: Comparison
    """The model and its float32 graphs, on synthetic audio, at once and in chunks: the larger difference."""

    converted: Comparison | None
    """The float32 graphs and those of the bundle, on the given utterances."""

    report: Report | None
    """The outcome of the word error rate limit."""


def build(
    model: HybridModel,
    tokens: Path,
    target: str,
    origin: Origin,
    utterances: Sequence[Utterance],
    out: Path,
    limit: Limit | None = None,
) -> Built:
    """Write the bundle of a model. Raises BundleError without writing anything if the graphs differ from the
    model, or if those of the target exceed the limit."""
    graphs, report = export_graphs(model), None
    info = describe(model, tokens, target, origin)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float32"
        write_bundle(graphs, info, tokens, path)
        float32 = Bundle.load(path)
        proved = _prove(model, float32)
        convert = TARGETS[target].converter(float32, graphs, utterances)
        if convert and limit:
            evaluator = BundleEvaluator(float32, limit.utterances, limit.modes)
            graphs, report = gate(graphs, convert, evaluator, limit)
        elif convert:
            graphs = {name: convert(graph, ()) for name, graph in graphs.items()}
        info = write_bundle(graphs, info, tokens, out)
        lost = _lost(float32, Bundle.load(out, device="cpu"), utterances) if convert else None
    info = replace(info, figures=_figures(proved, lost, report))
    info.write(out)
    return Built(info, proved, lost, report)


def made_utterance(model: HybridModel) -> Utterance:
    """Synthetic audio of SOUND_S, or of the model's maximum length if that is shorter."""
    rate = model.fbank.config.sample_rate
    return Utterance("made", made_sound(SOUND_S, rate)[: model.fbank.max_samples or None], "")


def _prove(model: HybridModel, float32: Bundle) -> Comparison:
    """Raise BundleError unless the graphs match the model, at once and in chunks, also with look-ahead."""
    info = float32.info
    sound = [made_utterance(model)]
    found = []
    for context in possible_contexts(info):
        expected = answer(at_once(TorchScorer(model, "cpu"), context), sound, float32.tokenizer, info.has_ctc)
        given = answer(encoding(float32, context), sound, float32.tokenizer, info.has_ctc)
        found.append(compare(expected, given))
        check_float32(found[-1], f"{context}")
    return max(found, key=lambda comparison: comparison.max_difference)


def _lost(float32: Bundle, bundle: Bundle, utterances: Sequence[Utterance]) -> Comparison:
    """What quantization changes, in the chunks that the bundle streams with, or at once if it cannot."""
    context = contexts(bundle.info)[:2][-1]
    answers = [
        answer(encoding(b, context), utterances, b.tokenizer, b.info.has_ctc) for b in (float32, bundle)
    ]
    return compare(*answers)


def _figures(proved: Comparison, lost: Comparison | None, report: Report | None) -> dict[str, object]:
    figures: dict[str, object] = {"max_difference_to_checkpoint": float(f"{proved.max_difference:.2e}")}
    if lost:
        figures["same_units_as_float32"] = f"{lost.same} of {lost.total} utterances"
        figures["wer_float32"], figures["wer"] = (w and round(w, 2) for w in lost.wer)
    return figures | ({"gate": report.as_dict()} if report else {})
