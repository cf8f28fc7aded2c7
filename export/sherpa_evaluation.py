"""The output of sherpa-onnx with graphs of its contracts, each run here as that runtime runs it, for the
limit on error rates (`export/gate.py`).

T frames of 40 ms · V units · U tokens · X log-probabilities
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from asr.decode.ctc import CtcGreedy
from asr.decode.scorer import Floats, Ints
from asr.features import Fbank
from asr.model.decoder import SOS_EOS
from asr.model.hybrid import HybridModel
from asr.runtime.bundle import session_options
from asr.tokens import Tokenizer
from export.evaluation import PROBE_S, Graphs
from export.sherpa_graphs import LOUD, RATE
from export.verify import Utterance

CHUNK, LEFT = 16, 4
"""Context of the stream, in frames of 40 ms and in chunks."""

SILENCE_S = 0.04 * CHUNK + 0.1
"""Silence after an utterance of a stream, so that its last chunk is full."""


def zipformer_silence(shift: int, sample_rate: int) -> int:
    """The same for a Zipformer whose stream advances by `shift` feature frames, in samples."""
    return (shift + 20) * sample_rate // 100


MOONSHINE_END = 2
AED_TOKENS, FIRE_RED_TOKENS = 0.36, 0.24
"""Maximum tokens that a decoder writes per frame; one more is allowed in all."""

Sessions = Mapping[str, ort.InferenceSession]
Inputs = dict[str, NDArray[Any]]
Listen = Callable[[Sessions, Floats, Ints | None], tuple[Ints, Floats]]
"""Graphs, samples (S,), and a given output or None -> the output, found by the graphs if None, and its
log-probabilities (X,): for CTC the best unit of each frame, for a decoder the tokens and the end."""


class SherpaEvaluator:
    """The graphs of one contract."""

    def __init__(
        self, contract: str, model: HybridModel, tokenizer: Tokenizer, utterances: Sequence[Utterance]
    ) -> None:
        self.utterances = utterances
        self._contract, self._tokenizer = contract, tokenizer
        self._listen = LISTEN[contract](model)
        self._rate = model.fbank.config.sample_rate
        self._references: list[Ints] = []
        self._last: tuple[Graphs, Sessions] | None = None

    def texts(self, graphs: Graphs, number: int) -> dict[str, str]:
        reference, _ = self._listen(self._sessions(graphs), self.utterances[number].samples, None)
        tokens: Sequence[int] = reference[:-1].tolist()
        if self._contract in ("ctc", "streaming", "zipformer"):
            search = CtcGreedy()
            search.advance(np.eye(int(reference.max(initial=0)) + 1, dtype=np.float32)[reference])
            tokens = search.best().tokens
        return {self._contract: self._tokenizer.decode(tokens)}

    def kinds(self, mode: str) -> tuple[str, ...]:
        return (self._contract,)

    def log_probs(self, graphs: Graphs) -> dict[str, Floats]:
        """The graphs of the first call must be those in float32."""
        sessions, probe, audio_s = self._sessions(graphs), list[Floats](), 0.0
        for _, samples, _ in self.utterances:
            if audio_s < PROBE_S:
                audio_s += len(samples) / self._rate
                probe.append(samples)
        self._references = self._references or [self._listen(sessions, x, None)[0] for x in probe]
        found = [
            self._listen(sessions, x, reference)[1]
            for x, reference in zip(probe, self._references, strict=True)
        ]
        return {self._contract: np.concatenate(found)}

    def _sessions(self, graphs: Graphs) -> Sessions:
        if self._last is None or self._last[0] is not graphs:
            self._last = graphs, {name: _session(graph) for name, graph in graphs.items()}
        return self._last[1]


def _session(graph: onnx.ModelProto) -> ort.InferenceSession:
    return ort.InferenceSession(
        graph.SerializeToString(), session_options(1), providers=["CPUExecutionProvider"]
    )


def _features(model: HybridModel, scale: float) -> Callable[[Floats], Floats]:
    """The runtime's features, of samples times `scale`."""
    fbank = Fbank(replace(model.fbank.config, scale=scale))

    def features(samples: Floats) -> Floats:
        with torch.inference_mode():
            x, _ = fbank(torch.from_numpy(samples)[None], torch.tensor([len(samples)]))
        return x.numpy()

    return features


def _of_frames(log_probs: Floats, reference: Ints | None) -> tuple[Ints, Floats]:
    reference = log_probs.argmax(1) if reference is None else reference
    return reference, np.take_along_axis(log_probs, reference[:, None], 1)[:, 0]


def _ctc(model: HybridModel) -> Listen:
    features = _features(model, 1.0)

    def listen(sessions: Sessions, samples: Floats, reference: Ints | None) -> tuple[Ints, Floats]:
        x = features(samples)
        log_probs, lens = sessions["model"].run(None, {"x": x, "x_lens": np.array([x.shape[1]])})
        return _of_frames(log_probs[0, : lens[0]], reference)

    return listen


def _streaming(model: HybridModel) -> Listen:
    features = _features(model, LOUD)
    silence = np.zeros(int(SILENCE_S * model.fbank.config.sample_rate), np.float32)

    def listen(sessions: Sessions, samples: Floats, reference: Ints | None) -> tuple[Ints, Floats]:
        session = sessions["model"]
        shapes = {x.name: x.shape for x in session.get_inputs()}
        layers, heads, _, double = shapes["attn_cache"]
        caches = {
            "attn_cache": np.zeros((layers, heads, CHUNK * LEFT, double), np.float32),
            "conv_cache": np.zeros(shapes["conv_cache"], np.float32),
        }
        required = np.array([CHUNK * LEFT])
        mask = np.ones((1, 1, CHUNK * (LEFT + 1)), bool)
        x = features(np.concatenate([samples, silence]))
        parts = []
        for number in range(x.shape[1] // (CHUNK * RATE)):
            inputs = {"x": x[:, number * CHUNK * RATE : (number + 1) * CHUNK * RATE], "attn_mask": mask}
            inputs |= {"offset": required + number * CHUNK, "required_cache_size": required} | caches
            log_probs, *after = session.run(None, {name: inputs[name] for name in shapes})
            caches = dict(zip(caches, after, strict=True))
            parts.append(log_probs[0])
        return _of_frames(np.concatenate(parts), reference)

    return listen


def _zipformer(model: HybridModel) -> Listen:
    features, overlap = _features(model, 1.0), model.encoder.overlap_frames

    def listen(sessions: Sessions, samples: Floats, reference: Ints | None) -> tuple[Ints, Floats]:
        session = sessions["model"]
        (_, (_, length, _)), *shapes = [(x.name, x.shape) for x in session.get_inputs()]
        sizes = {name: [1 if isinstance(size, str) else size for size in shape] for name, shape in shapes}
        states = {name: np.zeros(shape, np.float32) for name, shape in sizes.items()}
        states["processed_lens"] = np.zeros(1, np.int64)
        shift = length - overlap
        silence = np.zeros(zipformer_silence(shift, model.fbank.config.sample_rate), np.float32)
        x = features(np.concatenate([samples, silence]))
        parts = []
        for first in range(0, x.shape[1] - length, shift):
            log_probs, *after = session.run(None, {"x": x[:, first : first + length], **states})
            states = dict(zip(states, after, strict=True))
            parts.append(log_probs[0])
        return _of_frames(np.concatenate(parts), reference)

    return listen


def _written(
    first: Inputs,
    step: Callable[[Inputs, int], tuple[Floats, Inputs]],
    most: int,
    end: int,
    reference: Ints | None,
) -> tuple[Ints, Floats]:
    """Decode token by token up to `end`, or as `reference`.  step: state, token -> logits (V,), state."""
    tokens: list[int] = []
    found: list[float] = []
    state, token = first, SOS_EOS
    while token != end or not tokens:
        logits, state = step(state, token)
        token = int(logits.argmax()) if reference is None else int(reference[len(tokens)])
        found.append(float(logits[token] - np.logaddexp.reduce(logits)))
        tokens.append(token)
        if reference is None and len(tokens) >= most:
            break
    return np.array(tokens, np.int64), np.array(found, np.float32)


def _aed(model: HybridModel) -> Listen:
    def listen(sessions: Sessions, samples: Floats, reference: Ints | None) -> tuple[Ints, Floats]:
        (hidden,) = sessions["encoder"].run(None, {"audio": samples[None]})
        decoder = sessions["decoder"]
        shapes = {x.name: x.shape for x in decoder.get_inputs() if x.name.startswith("past_key_values.")}
        first = {name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in shapes.items()}

        def step(state: Inputs, token: int) -> tuple[Floats, Inputs]:
            inputs = {"input_ids": np.array([[token]]), "encoder_hidden_states": hidden, **state}
            inputs["use_cache_branch"] = np.array([state is not first])
            names = [x.name for x in decoder.get_inputs()]
            logits, *present = decoder.run(None, {name: inputs[name] for name in names})
            return logits[0, -1], dict(zip(state, present, strict=True))

        return _written(first, step, 1 + int(AED_TOKENS * hidden.shape[1]), MOONSHINE_END, reference)

    return listen


def _fire_red(model: HybridModel) -> Listen:
    features = _features(model, LOUD)
    config, head_dim = model.decoder.config, model.decoder.head_dim

    def listen(sessions: Sessions, samples: Floats, reference: Ints | None) -> tuple[Ints, Floats]:
        x = features(samples)
        cross = sessions["encoder"].run(None, {"x": x, "x_len": np.array([x.shape[1]])})
        most = 1 + int(FIRE_RED_TOKENS * x.shape[1] / RATE)
        cache = np.zeros((config.num_layers, 1, most + 1, config.num_heads, head_dim), np.float32)
        memory = {"n_layer_cross_k": cross[0], "n_layer_cross_v": cross[1]}
        caches = ("in_n_layer_self_k_cache", "in_n_layer_self_v_cache")

        def step(state: Inputs, token: int) -> tuple[Floats, Inputs]:
            logits, keys, values = sessions["decoder"].run(
                None, {"tokens": np.array([[token]]), **memory, **state}
            )
            after = dict(zip(caches, (keys, values), strict=True))
            return logits[0, -1], {**after, "offset": state["offset"] + 1}

        first: Inputs = {**dict.fromkeys(caches, cache), "offset": np.zeros(1, np.int64)}
        return _written(first, step, most, SOS_EOS, reference)

    return listen


LISTEN: dict[str, Callable[[HybridModel], Listen]] = {
    "ctc": _ctc,
    "streaming": _streaming,
    "zipformer": _zipformer,
    "aed": _aed,
    "fire_red": _fire_red,
}
"""Contract -> how to run its graphs."""
