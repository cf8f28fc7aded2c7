"""Convert as much to fewer bits as a limit on the word error rate allows.

The float32 graphs and those of a target decode the same set. If the error rate rises by more than the limit,
modules (`export/quantize.py`) return to float32 in the order of the harm that they do, until it is within the
limit. The order is found cheaply: each module is converted alone, and its harm is the change in the
log-probabilities of the float32 graphs' own output on a minute of the set: those of CTC if only CTC modes
exceed the limit, else the decoder's, too. The number of modules is found by doubling and bisection, because
each trial decodes the whole set; the resulting graphs are ones that were measured.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from asr.errors import BundleError
from asr.wer import ErrorCount, total, word_errors
from export.evaluation import Evaluator, Graphs
from export.quantize import modules
from export.verify import Utterance

MAX_SHARE = 0.5
"""Maximum share of the matrices, by size, that may stay in float32: more would defeat the purpose."""

Convert = Callable[[onnx.ModelProto, Collection[str]], onnx.ModelProto]
"""A float32 graph, and its modules to keep in float32 -> the graph of a target."""

Watch = Callable[[str, int], Callable[[int], None]]
"""A description and a number of steps -> a progress callback, called with the number of steps done."""

Rates = dict[str, float]
"""Mode of decoding -> word error rate, per cent."""


@dataclass(frozen=True)
class Limit:
    """What a target may cost."""

    max_increase: float
    """Maximum increase of the error rate, in per cent of words, in any mode."""

    utterances: Sequence[Utterance]
    """The set, with its texts."""

    modes: Sequence[str] = ()
    """Decoding modes; none: modes that together use every graph."""

    about: Mapping[str, object] = field(default_factory=dict)
    """The set and the command, for the report."""

    watch: Watch = lambda what, steps: lambda done: None
    say: Callable[[str], None] = lambda line: None


@dataclass(frozen=True)
class Report:
    """The measurements, for model.json."""

    limit: Limit
    words: int
    """Words of the reference."""
    wer_float32: Rates
    wer_all: Rates
    """With every module converted."""
    wer: Rates
    """Of the resulting graphs."""
    kept: dict[str, float]
    """Modules in float32 -> their harm, in nats, the greatest first."""
    share: float
    """Fraction of the matrix elements that is in float32."""
    size: int
    size_float32: int
    """Size of all graphs, in bytes."""

    def as_dict(self) -> dict[str, Any]:
        """The report with its numbers rounded as printed."""
        rates = {
            name: {mode: round(rate, 2) for mode, rate in getattr(self, name).items()}
            for name in ("wer_float32", "wer_all", "wer")
        }
        return {
            "max_wer_increase": self.limit.max_increase,
            **self.limit.about,
            "utterances": len(self.limit.utterances),
            "words": self.words,
            **rates,
            "kept_in_float32": {name: float(f"{harm:.3g}") for name, harm in self.kept.items()},
            "share_in_float32": round(self.share, 3),
            "size": self.size,
            "size_float32": self.size_float32,
        }


def gate(
    float32: Graphs, convert: Convert, evaluator: Evaluator, limit: Limit
) -> tuple[dict[str, onnx.ModelProto], Report]:
    """Graphs of a target that are within the limit, and their measurements.

    BundleError if none are, even with half of the matrices in float32, or if the set has no words.
    """
    measured = _Trials(float32, convert, evaluator, limit)
    order: dict[str, float] = {}
    count = 0
    if not measured.is_within([]):
        order = rank(float32, convert, evaluator, measured.beyond([]), limit.watch)
        most = _most(float32, list(order))
        count = _fewest(lambda n: measured.is_within(list(order)[:n]), most)
        if count < 0:
            raise measured.error(most)
    kept = dict(list(order.items())[:count])
    return measured.report(kept)


def rank(
    float32: Graphs, convert: Convert, evaluator: Evaluator, modes: Sequence[str], watch: Watch
) -> dict[str, float]:
    """Modules -> their harm in some modes, the greatest first: the mean change in the log-probabilities of
    the float32 graphs' output if the module alone is converted, summed over the kinds of output."""
    kinds = {kind for mode in modes for kind in evaluator.kinds(mode)}
    reference = evaluator.log_probs(float32)
    names = list(dict.fromkeys(name for graph in float32.values() for name in modules(graph)))
    show = watch("harm of modules", len(names))
    harms = {}
    for done, name in enumerate(names, 1):
        others = [x for x in names if x != name]
        alone = {
            key: convert(graph, others) if name in modules(graph) else graph for key, graph in float32.items()
        }
        found = evaluator.log_probs(alone)
        harms[name] = sum(
            float(np.abs(reference[kind] - found[kind]).mean()) for kind in sorted(kinds & found.keys())
        )
        show(done)
    return dict(sorted((x for x in harms.items() if x[1] > 0), key=lambda item: -item[1]))


class _Trials:
    """The error rates for trials with different modules in float32."""

    def __init__(self, float32: Graphs, convert: Convert, evaluator: Evaluator, limit: Limit) -> None:
        self._float32, self._convert, self._evaluator, self._limit = float32, convert, evaluator, limit
        self._before, self._words = self._rates(float32, "float32")
        self._tried: dict[tuple[str, ...], Rates] = {}
        self._graphs: dict[tuple[str, ...], dict[str, onnx.ModelProto]] = {}

    def is_within(self, kept: Sequence[str]) -> bool:
        key = tuple(kept)
        graphs = {name: self._convert(graph, kept) for name, graph in self._float32.items()}
        self._tried[key], _ = self._rates(graphs, f"{len(kept)} in float32" if kept else "all converted")
        if self.beyond(kept):
            return False
        self._graphs = {key: graphs}  # the last one within the limit has the fewest modules in float32
        return True

    def beyond(self, kept: Sequence[str]) -> list[str]:
        """The modes in which a trial exceeds the limit."""
        most = self._limit.max_increase + 1e-9
        return [mode for mode, rate in self._tried[tuple(kept)].items() if rate - self._before[mode] > most]

    def _rates(self, graphs: Graphs, what: str) -> tuple[Rates, int]:
        utterances = [n for n, x in enumerate(self._evaluator.utterances) if x.text]
        show = self._limit.watch(what, len(utterances))
        counts: dict[str, list[ErrorCount]] = {}
        for done, number in enumerate(utterances, 1):
            for mode, text in self._evaluator.texts(graphs, number).items():
                counts.setdefault(mode, []).append(word_errors(self._evaluator.utterances[number].text, text))
            show(done)
        errors = {mode: total(x) for mode, x in counts.items()}
        words = max((x.ref for x in errors.values()), default=0)
        if not words:
            raise BundleError("the set has no words, so error rates cannot be compared; give one with text")
        rates = {mode: 100 * x.rate for mode, x in errors.items()}
        self._limit.say(f"{what}: WER {describe(rates)}")
        return rates, words

    def report(self, kept: dict[str, float]) -> tuple[dict[str, onnx.ModelProto], Report]:
        graphs = self._graphs[tuple(kept)]
        sizes = _sizes(self._float32)
        report = Report(
            limit=self._limit,
            words=self._words,
            wer_float32=self._before,
            wer_all=self._tried[()],
            wer=self._tried[tuple(kept)],
            kept=kept,
            share=sum(sizes[name] for name in kept) / sum(sizes.values()),
            size=sum(x.ByteSize() for x in graphs.values()),
            size_float32=sum(x.ByteSize() for x in self._float32.values()),
        )
        return graphs, report

    def error(self, most: int) -> BundleError:
        last = list(self._tried.values())[-1]
        return BundleError(
            f"WER {describe(last)} instead of {describe(self._before)}, with the {most} most harmful modules "
            f"in float32, expected at most {self._limit.max_increase:g} more on {self._words:,} words; "
            "allow more with --max-wer-increase, or use --target cpu-fp32"
        )


def describe(rates: Rates) -> str:
    return ", ".join(f"{rate:.2f} % ({mode})" for mode, rate in rates.items())


def _sizes(graphs: Graphs) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for graph in graphs.values():
        for name, size in modules(graph).items():
            sizes[name] = sizes.get(name, 0) + size
    return sizes


def _most(graphs: Graphs, order: Sequence[str]) -> int:
    """How many of the first modules together have at most MAX_SHARE of the matrices."""
    sizes = _sizes(graphs)
    shares = np.cumsum([sizes[name] for name in order]) / max(sum(sizes.values()), 1)
    return int((shares <= MAX_SHARE).sum())


def _fewest(is_within: Callable[[int], bool], most: int) -> int:
    """The fewest that suffice, by doubling and bisection, if more is never worse; -1 if `most` does not."""
    low, high = 0, min(1, most)
    while high and not is_within(high):
        if high == most:
            return -1
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_within(middle) else (middle, high)
    return high or -1
