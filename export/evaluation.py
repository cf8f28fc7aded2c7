"""The output of graphs on a set: texts in the modes that a bundle is used in, and the log-probabilities that
they give to the output of the float32 graphs. Graphs are run from memory; nothing is exported again.

X log-probabilities · T encoder frames · C channels · V units
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import onnx

from asr.context import WHOLE
from asr.decode.config import SearchConfig
from asr.decode.ctc import CtcGreedy
from asr.decode.modes import FIRST_PASS, check_mode, modes_for, search_encoded
from asr.decode.prompt import prompt_ids, with_prompt
from asr.decode.scorer import Floats, Ints
from asr.runtime.bundle import Bundle
from asr.runtime.onnx_scorer import OnnxScorer
from export.verify import Utterance, contexts, encode_in_chunks, follows

Graphs = Mapping[str, onnx.ModelProto]

PROBE_S = 60.0
"""Seconds of audio for the comparison of modules."""


class Evaluator(Protocol):
    """A set of utterances, and the output of graphs of one model on it."""

    utterances: Sequence[Utterance]

    def texts(self, graphs: Graphs, number: int) -> dict[str, str]:
        """The text of an utterance in each decoding mode."""

    def log_probs(self, graphs: Graphs) -> dict[str, Floats]:
        """Log-probabilities of the float32 graphs' output on some utterances: an array (X,) for each kind of
        output, for the same units in the same places whatever the graphs."""

    def kinds(self, mode: str) -> tuple[str, ...]:
        """The kinds of output that the texts of a mode depend on."""


@dataclass(frozen=True)
class Reference:
    """The output of the float32 graphs for an utterance."""

    samples: Floats
    best: Ints
    """The most likely unit of each frame (T,)."""
    tokens: tuple[int, ...]
    frames: tuple[int, ...]
    """The frame of each token."""

    def segments(self, first: int) -> tuple[Ints, Ints, Ints]:
        """Frames, the token before each, and the frames since its end, (T,) each; first: initial token."""
        frames = np.arange(len(self.best))
        before = np.searchsorted(self.frames, frames)
        starts = np.array([0, *(frame + 1 for frame in self.frames)])
        return frames, np.array([first, *self.tokens])[before], frames + 1 - starts[before]


class BundleEvaluator:
    """The graphs of a bundle, in the chunks that it streams with, or at once if it cannot stream."""

    def __init__(self, float32: Bundle, utterances: Sequence[Utterance], modes: Sequence[str] = ()) -> None:
        """ConfigError if the model does not support one of the modes; none stands for `usual_modes`."""
        self.utterances = utterances
        self.modes = tuple(modes) or usual_modes(float32)
        for mode in self.modes:
            check_mode(mode, float32.info.decoder_type, float32.info.has_ctc)
        self._float32 = float32
        self._context = contexts(float32.info)[:2][-1]
        self._last: tuple[Graphs, OnnxScorer] | None = None
        self._references: list[Reference] = []

    def texts(self, graphs: Graphs, number: int, sessions: Mapping[str, Any] | None = None) -> dict[str, str]:
        """sessions: replacements for the onnxruntime sessions of the graphs."""
        scorer = self._scorer(graphs)
        vars(scorer.bundle).update(sessions or {})  # where a bundle caches its sessions
        y, log_probs = self._encode(scorer, self.utterances[number].samples)
        config = with_prompt(scorer, SearchConfig())
        memory = scorer.memory([y])
        found = {
            mode: search_encoded(scorer, mode, [log_probs], memory, config, self._context)[0][0]
            for mode in self.modes
        }
        return {mode: scorer.bundle.tokenizer.decode(x.tokens) for mode, x in found.items()}

    def kinds(self, mode: str) -> tuple[str, ...]:
        return ("ctc",) if mode in FIRST_PASS else ("ctc", "decoder", "reverse", "length")

    def log_probs(self, graphs: Graphs) -> dict[str, Floats]:
        scorer = self._scorer(graphs)
        self._references = self._references or self._transcribe_probe()
        kinds: dict[str, list[Floats]] = {}
        for reference in self._references:
            for kind, found in self._of_one(scorer, reference).items():
                kinds.setdefault(kind, []).append(found)
        return {kind: np.concatenate(parts) for kind, parts in kinds.items()}

    def _of_one(self, scorer: OnnxScorer, reference: Reference) -> dict[str, Floats]:
        if not scorer.has_ctc:
            return {"decoder": _of_units(follows(scorer, reference.samples), reference.best)}
        y, log_probs = self._encode(scorer, reference.samples)
        found = {"ctc": _of_units(log_probs, reference.best)}
        memory, owner = scorer.memory([y]), np.zeros(1, np.int64)
        prompt = prompt_ids(with_prompt(scorer, SearchConfig()))
        found["decoder"] = scorer.score(memory, owner, [reference.tokens], prompt=prompt)[0]
        if scorer.has_reverse:
            found["reverse"] = scorer.score(memory, owner, [reference.tokens], reverse=True)[0]
        if scorer.bundle.info.decoder_type == "segmental":
            found["length"] = scorer.emit(memory, *reference.segments(scorer.sos_eos))
        return found

    def _transcribe_probe(self) -> list[Reference]:
        scorer, references, audio_s = OnnxScorer(self._float32), [], 0.0
        for _, samples, _ in self.utterances:
            if audio_s < PROBE_S:
                audio_s += len(samples) / self._float32.info.features.sample_rate
                references.append(self._reference(scorer, samples))
        return references

    def _reference(self, scorer: OnnxScorer, samples: Floats) -> Reference:
        if not scorer.has_ctc:
            return Reference(samples, follows(scorer, samples).argmax(1), (), ())
        _, log_probs = self._encode(scorer, samples)
        search = CtcGreedy()
        search.advance(log_probs)
        best = search.best()
        return Reference(samples, log_probs.argmax(1), best.tokens, best.frames)

    def _encode(self, scorer: OnnxScorer, samples: Floats) -> tuple[Floats, Floats]:
        if self._context != WHOLE:
            return encode_in_chunks(scorer, samples, self._context)
        (log_probs,), memory = scorer.encode([samples])
        return memory.ys[0], log_probs

    def _scorer(self, graphs: Graphs) -> OnnxScorer:
        """A scorer with other graphs than the bundle's; that of the last graphs is kept."""
        if self._last is None or self._last[0] is not graphs:
            self._last = graphs, OnnxScorer(in_memory(self._float32, graphs))
        return self._last[1]


def _of_units(log_probs: Floats, units: Ints) -> Floats:
    """log_probs (T, V), units (T,) -> (T,)."""
    return np.take_along_axis(log_probs, units[:, None], 1)[:, 0]


def in_memory(bundle: Bundle, graphs: Graphs) -> Bundle:
    """The bundle with other graphs, which are only in memory."""
    data = {}
    for name, graph in graphs.items():
        onnx.helper.set_model_props(graph, {"tokens_sha256": bundle.info.tokens_sha256})
        data[name] = graph.SerializeToString()
    return replace(bundle, _graphs=data)


def usual_modes(bundle: Bundle) -> tuple[str, ...]:
    """Modes that together use every graph: CTC alone, and with the decoder."""
    possible = modes_for(bundle.info.decoder_type, bundle.info.has_ctc)
    if not bundle.info.has_ctc:
        return (possible[0],)
    return ("ctc-greedy", "rescore" if "rescore" in possible else possible[-1])
