"""A bundle as decode's Scorer, and the streaming call of its encoder: state in, state out.

Utterances are encoded one at a time, so that the result for one never depends on the others, not even with
the int8 target, whose activations share one scale within a call.

N streams or utterances · T encoder frames · C channels · V units · B hypotheses · k best continuations
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from asr.context import WHOLE, Context
from asr.decode.scorer import Floats, Ints, Step, Window
from asr.decode.trie import Trie, read_order, text_order, tries
from asr.errors import AudioError
from asr.runtime.bundle import Bundle
from asr.runtime.framing import Framer
from asr.runtime.info import Field

State = Mapping[str, NDArray[Any]]
"""Name of an input of the encoder -> its tensor, streams first."""


Tensors = dict[str, NDArray[Any]]


class Encoded(NamedTuple):
    """The encoder's output for one call, padded to the longest stream."""

    y: Floats
    """(N, T, C)."""

    log_probs: Floats
    """CTC log-probabilities (N, T, V)."""

    y_lens: Ints
    """(N,)."""

    state: State


class Memory:
    """The encoder output of N utterances; keys and values for the decoder are computed once, on demand."""

    def __init__(
        self, bundle: Bundle, ys: Sequence[Floats], crosses: dict[int, Tensors] | None = None
    ) -> None:
        self.ys = ys
        self._bundle = bundle
        self._crosses = crosses or {}

    def gather(self, utterances: Ints, window: Window | None = None) -> Tensors:
        """The decoder's inputs for the audio of some utterances (N,): all of it, or the window of each. For
        one utterance nothing is copied."""
        lens = np.array([len(self.ys[n]) for n in utterances.tolist()], np.int64)
        window = window or Window(np.zeros_like(lens), lens)
        spans = list(zip(utterances.tolist(), window.start.tolist(), window.end.tolist(), strict=True))
        length = max(1, *(end - start for _, start, end in spans))
        inputs: Tensors = {"y_lens": window.end - window.start}
        for name in self._names:
            inputs[name] = _stack([self.cross(n)[name][:, :, start:end] for n, start, end in spans], length)
        return inputs

    def cross(self, n: int) -> Tensors:
        """Keys and values of an utterance, (1, H, T, D) for each layer; one without frames counts as a single
        frame of zeros."""
        if n not in self._crosses:
            found = self._bundle.memory.run(None, {"y": self.frames(n)[None]})
            self._crosses[n] = dict(zip(self._names, found, strict=True))
        return self._crosses[n]

    @cached_property
    def _names(self) -> list[str]:
        return [x.name for x in self._bundle.memory.get_outputs()]

    def frames(self, n: int) -> Floats:
        """Utterance n as graph input, (T, C): a frame of zeros if it has no frame."""
        return self.ys[n] if len(self.ys[n]) else np.zeros((1, self._bundle.info.dim), np.float32)

    def view(self, n: int, num_frames: int) -> "Memory":
        """Utterance n alone, up to frame num_frames."""
        cut = {name: x[:, :, : max(num_frames, 1)] for name, x in self.cross(n).items()}
        return Memory(self._bundle, [self.ys[n][:num_frames]], {0: cut})

    def append(self, y: Floats) -> "Memory":
        """The memory of one utterance with the next frames y (T, C) appended."""
        known = {}
        if 0 in self._crosses and len(self.ys[0]) and len(y):
            new = Memory(self._bundle, [y]).cross(0)
            known[0] = {name: np.concatenate((x, new[name]), 2) for name, x in self.cross(0).items()}
        return Memory(self._bundle, [np.concatenate((self.ys[0], y))], known)


def _stack(parts: Sequence[Floats], length: int) -> Floats:
    """N parts (1, H, T_n, D) -> (N, H, length, D), zero-padded."""
    if len(parts) == 1 and parts[0].shape[2] == length:
        return np.ascontiguousarray(parts[0])
    _, heads, _, head_dim = parts[0].shape
    stacked = np.zeros((len(parts), heads, length, head_dim), np.float32)
    for row, part in zip(stacked, parts, strict=True):
        row[:, : part.shape[2]] = part[0]
    return stacked


class Rows(NamedTuple):
    """How B hypotheses are laid out for the graph: grouped by utterance, equally many for each."""

    utterances: Ints
    """(N,)."""

    order: Ints | None
    """The hypotheses of each utterance (N, G), repeated where others have more; None if already in order."""

    places: Ints | slice
    """Where each of the B hypotheses is in the output."""

    @classmethod
    def of(cls, owner: Ints) -> "Rows":
        utterances, counts = np.unique(owner, return_counts=True)
        most = int(counts.max())
        sides = np.argsort(owner, kind="stable")
        starts = np.cumsum(counts) - counts
        order = sides[starts[:, None] + np.minimum(np.arange(most), counts[:, None] - 1)]
        if np.array_equal(order.ravel(), np.arange(len(owner))):
            return cls(utterances, None, slice(None))
        places = np.empty(len(owner), np.int64)
        places[sides] = np.concatenate([n * most + np.arange(count) for n, count in enumerate(counts)])
        return cls(utterances, order, places)

    def shape(self, x: NDArray[Any]) -> NDArray[Any]:
        """(B, ...) -> (N, G, ...)."""
        n = len(self.utterances)
        return x.reshape(n, len(x) // n, *x.shape[1:]) if self.order is None else x[self.order]


@dataclass(frozen=True)
class DecoderState:
    """B hypotheses: their utterances, what they attend to, and the keys and values of their tokens."""

    memory: Memory
    owner: Ints
    cross: Tensors | None
    """Keys and values of the whole utterances of Rows.of(owner), once requested."""
    past: Tensors


class OnnxScorer:
    """The Scorer of a bundle."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.num_tokens = bundle.info.num_tokens
        self.sos_eos = bundle.info.sos_eos
        self.frame_s = bundle.info.frame_s
        self.decoder_type = bundle.info.decoder_type
        self.chunking = bundle.info.chunking
        self.has_ctc = bundle.info.has_ctc
        self.max_tokens = bundle.info.max_tokens
        self.prompt = bundle.info.prompt
        self.max_samples = bundle.info.features.max_samples
        self.symbols: Sequence[str] = bundle.tokenizer.symbols
        self.has_reverse = bundle.info.has_reverse
        self.has_fire = bundle.info.has_fire
        self.word_starts = bundle.word_starts

    # streams

    def init_state(self, context: Context) -> State:
        """The state of one new stream; to encode a whole utterance in any context, use that of WHOLE."""
        sizes = {"W": context.width, "R": context.delay}
        return {field.name: _zeros(field, sizes) for field in self.bundle.encoder_state}

    def advance(
        self, windows: Floats, num_frames: Ints, context: Context, state: State, flush_frames: int = 0
    ) -> Encoded:
        """Encode the next num_frames (N,) feature frames of N streams, cut by `Framer`: windows (N, S).

        While streams go on, num_frames is the same for all, and the last `overlap_frames` of them, which come
        after a chunk, are given again in the next call. In the last call of streams, `flush_frames` padding
        frames bring out all pending output (ModelInfo.flush_frames).
        """
        info = self.bundle.info
        missing = info.min_frames - int(num_frames.max(initial=0))
        silence = max(flush_frames, missing) * info.features.shift_samples
        windows = np.pad(windows, ((0, 0), (0, silence))) if silence > 0 else windows
        inputs = {"window": windows, "num_frames": num_frames}
        inputs |= {name: np.array(getattr(context, name)) for name in info.context_inputs}
        found = dict(zip(self._outputs, self.bundle.encoder.run(None, inputs | dict(state)), strict=True))
        y = found["y"]
        log_probs = found["log_probs"] if info.has_ctc else y[..., :0]
        return Encoded(y, log_probs, found["y_lens"], {name: found[f"next_{name}"] for name in state})

    @cached_property
    def _outputs(self) -> list[str]:
        return [x.name for x in self.bundle.encoder.get_outputs()]

    def framer(self) -> Framer:
        """A framer for the samples of one stream."""
        features = self.bundle.info.features
        return Framer(features.shift_samples, features.frame_samples, features.snip_edges, features.fading)

    def memory(self, ys: Sequence[Floats]) -> Memory:
        """The decoder's memory of utterances that were encoded as streams, y (T, C) each."""
        return Memory(self.bundle, ys)

    # the protocol

    def encode(self, samples: Sequence[Floats], context: Context = WHOLE) -> tuple[list[Floats], Memory]:
        encoded = [self._encode_one(x, context) for x in samples]
        return [log_probs for _, log_probs in encoded], self.memory([y for y, _ in encoded])

    def _encode_one(self, samples: Floats, context: Context) -> tuple[Floats, Floats]:
        info = self.bundle.info
        info.check_context(context)
        if not info.features.framed:
            return self._encode_samples(samples)
        framer = self.framer()
        framer.accept(samples)
        framer.finish()
        num_frames = framer.ready()
        if num_frames == 0:
            columns = info.num_tokens if info.has_ctc else 0
            return np.zeros((0, info.dim), np.float32), np.zeros((0, columns), np.float32)
        window = framer.take(num_frames)[None]
        state, flush_frames = self.init_state(WHOLE), info.flush_frames(WHOLE)
        out = self.advance(window, np.array([num_frames]), context, state, flush_frames)
        num = out.y_lens[0]
        return out.y[0, :num], out.log_probs[0, :num]

    def _encode_samples(self, samples: Floats) -> tuple[Floats, Floats]:
        """Encode a whole utterance whose features, all in the graph, depend on all samples."""
        features = self.bundle.info.features
        if features.max_samples and len(samples) > features.max_samples:
            raise AudioError(
                f"{len(samples) / features.sample_rate:.1f} s of audio, and the model takes "
                f"{features.max_samples / features.sample_rate:g} s at most; cut it at pauses, as asr "
                "transcribe does"
            )
        found = dict(
            zip(self._outputs, self.bundle.encoder.run(None, {"samples": samples[None]}), strict=True)
        )
        y = found["y"][0]
        return y, found["log_probs"][0] if self.has_ctc else y[:, :0]

    def start(self, memory: Memory, owner: Ints) -> DecoderState:
        past = {field.name: _zeros(field, {"U": 0}, len(owner)) for field in self.bundle.info.decoder_state}
        return DecoderState(memory, owner, None, past)

    def grow(self, memory: Memory | None, y: Floats) -> Memory:
        return self.memory([y]) if memory is None else memory.append(y)

    def view(self, memory: Memory, utterance: int, num_frames: int) -> Memory:
        return memory.view(utterance, num_frames)

    def step(self, state: DecoderState, tokens: Ints, k: int, window: Window | None = None) -> Step:
        given = tokens.reshape(len(tokens), -1)
        ids, log_probs, attention, state = self._follow(state, given, k, BEST, window)
        return Step(ids[:, -1], log_probs[:, -1], attention[:, -1], state)

    def listen(self, memory: Memory, utterance: int, tokens: Sequence[int]) -> Floats:
        """As Scorer.listen; the graph outputs the mean of all heads."""
        state = self.start(memory, np.array([utterance]))
        attention: Floats = self._follow(state, np.array([tokens], np.int64), 0, ("attention",))[0]
        return attention

    def steps(self, state: DecoderState, tokens: Ints, k: int) -> Step:
        ids, log_probs, attention, state = self._follow(state, tokens, k, BEST)
        return Step(ids, log_probs, attention[:, :, :0], state)

    def rewind(self, state: DecoderState, num_tokens: int) -> DecoderState:
        past = {}
        for field in self.bundle.info.decoder_state:
            axis = 1 + field.shape.index("U")
            past[field.name] = state.past[field.name][(slice(None),) * axis + (slice(num_tokens),)]
        return replace(state, past=past)

    def select(self, state: DecoderState, index: Ints) -> DecoderState:
        owner = state.owner[index]
        is_same = np.array_equal(np.unique(owner), np.unique(state.owner))
        past = {name: x[index] for name, x in state.past.items()}
        return DecoderState(state.memory, owner, state.cross if is_same else None, past)

    def join(self, states: Sequence[DecoderState], memory: Memory) -> DecoderState:
        past = {name: np.concatenate([x.past[name] for x in states]) for name in states[0].past}
        return DecoderState(memory, np.concatenate([x.owner for x in states]), None, past)

    def emit(self, memory: Memory, frames: Ints, labels: Ints, durations: Ints) -> Floats:
        inputs = {"y": memory.ys[0][frames], "labels": labels, "durations": durations}
        return self.bundle.length.run(["log_odds"], inputs)[0]

    def log_lengths(self) -> Floats:
        none = np.zeros(0, np.int64)
        inputs = {"y": np.zeros((0, self.bundle.info.dim), np.float32), "labels": none, "durations": none}
        return self.bundle.length.run(["log_lengths"], inputs)[0]

    def fire(self, memory: Memory) -> Floats:
        return self.bundle.fire.run(None, {"y": memory.ys[0][None]})[0][0]

    def score(
        self,
        memory: Memory,
        owner: Ints,
        tokens: Sequence[Sequence[int]],
        reverse: bool = False,
        prompt: Sequence[int] = (),
    ) -> list[Floats]:
        texts = read_order(tokens, reverse, prompt)
        scores: dict[int, Floats] = {}
        for n in np.unique(owner).tolist():
            for trie in tries(texts, np.flatnonzero(owner == n).tolist(), self.sos_eos):
                read = self._read_reverse if reverse else self._read
                scores.update(trie.split(read(memory, n, trie)[trie.nodes, trie.targets]))
        return text_order([scores[b] for b in range(len(tokens))], reverse, len(prompt))

    def _read(self, memory: Memory, n: int, trie: Trie) -> Floats:
        """Log-probabilities after each token of a tree (U, V)."""
        tokens, ends = np.array([trie.tokens]), np.array([trie.ends])
        state = self.start(memory, np.array([n]))
        log_probs: Floats = self._follow(state, tokens, 0, ("log_probs",), ends=ends)[0]
        return log_probs[0]

    def _read_reverse(self, memory: Memory, n: int, trie: Trie) -> Floats:
        inputs = {"tokens": np.array([trie.tokens]), "ends": np.array([trie.ends])}
        inputs |= {"y": memory.frames(n)[None], "y_lens": np.array([len(memory.ys[n])])}
        return self.bundle.reverse.run(None, inputs)[0][0]

    def _follow(
        self,
        state: DecoderState,
        tokens: Ints,
        k: int,
        outputs: Sequence[str],
        window: Window | None = None,
        ends: Ints | None = None,
    ) -> tuple[Any, ...]:
        """Feed tokens (B, U) to the decoder, with ends (B, U) trees of them: the requested outputs, a row per
        hypothesis, and the state."""
        ends = np.full_like(tokens, tokens.shape[1]) if ends is None else ends
        rows = Rows.of(state.owner) if window is None else _alone(state.owner)
        if window is None and state.cross is None:
            state = replace(state, cross=state.memory.gather(rows.utterances))
        heard = state.memory.gather(state.owner, window) if window else state.cross or {}
        names = [*outputs, *(f"next_{name}" for name in state.past)]
        given = {name: rows.shape(x) for name, x in {"tokens": tokens, "ends": ends, **state.past}.items()}
        k = min(k, self.num_tokens)
        found = self.bundle.decoder.run(names, {"k": np.array([k]), **given, **heard})
        found = found if rows.order is None else [x[rows.places] for x in found]
        past = dict(zip(state.past, found[len(outputs) :], strict=True))
        return *found[: len(outputs)], replace(state, past=past)


BEST = ("ids", "log_probs_of_ids", "attention")


def _alone(owner: Ints) -> Rows:
    """Every hypothesis with its own copy of what it attends to."""
    return Rows(owner, None, slice(None))


def _zeros(field: Field, sizes: Mapping[str, int], n: int = 1) -> NDArray[Any]:
    """A zero state of n streams or hypotheses, for given variable sizes."""
    return np.zeros((n, *field.sizes(sizes)), field.dtype)
