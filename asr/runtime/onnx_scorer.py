"""A bundle as decode's Scorer, and the streaming call of its encoder: state in, state out.

Utterances are encoded one at a time, so that what one gives never depends on the others, not even with the
int8 target, whose activations share one scale within a call.

N streams or utterances · T encoder frames · C channels · V units · B hypotheses · k best continuations
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from asr.context import WHOLE, Context
from asr.decode.scorer import BLANK, Floats, Ints
from asr.runtime.bundle import Bundle, Field
from asr.runtime.framing import Framer

State = Mapping[str, NDArray[Any]]
"""Name of an input of the encoder -> its tensor, streams first."""


ROWS = 5
"""Hypotheses scored in one call: bounds the memory of what they attend to, at little cost."""


class Encoded(NamedTuple):
    """What the encoder makes of one call, padded to the longest stream."""

    y: Floats
    """(N, T, C)."""

    log_probs: Floats
    """(N, T, V) of CTC."""

    y_lens: Ints
    """(N,)."""

    state: State


class Memory:
    """The encoder output of N utterances. What the decoder attends to is computed once for each, if asked."""

    def __init__(self, bundle: Bundle, ys: Sequence[Floats]) -> None:
        self._bundle = bundle
        self._ys = ys
        self._cross: dict[int, list[Floats]] = {}

    def gather(self, owner: Ints) -> dict[str, NDArray[Any]]:
        """The decoder's inputs about the audio, for hypotheses of utterances owner (B,)."""
        crosses = [self._of(n) for n in owner.tolist()]
        length = max((keys.shape[3] for keys, _ in crosses), default=1)
        inputs: dict[str, NDArray[Any]] = {"y_lens": np.array([len(self._ys[n]) for n in owner.tolist()])}
        for i, name in enumerate(("cross_keys", "cross_values")):
            shape = (len(crosses), *crosses[0][i].shape[1:3], length, crosses[0][i].shape[4])
            inputs[name] = np.zeros(shape, np.float32)
            for b, cross in enumerate(crosses):
                inputs[name][b, :, :, : cross[i].shape[3]] = cross[i][0]
        return inputs

    def _of(self, n: int) -> list[Floats]:
        if n not in self._cross:
            y = self._ys[n] if len(self._ys[n]) else np.zeros((1, self._bundle.info.dim), np.float32)
            self._cross[n] = self._bundle.memory.run(None, {"y": y[None]})
        return self._cross[n]


@dataclass(frozen=True)
class DecoderState:
    """B hypotheses: whose they are, what they attend to, and keys and values of their tokens."""

    memory: Memory
    owner: Ints
    cross: dict[str, NDArray[Any]]
    past: dict[str, NDArray[Any]]


class OnnxScorer:
    """The Scorer of a bundle."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.num_tokens = bundle.info.num_tokens
        self.sos_eos = bundle.info.sos_eos
        self.frame_s = bundle.info.frame_s

    # streams

    def init_state(self, context: Context) -> State:
        """The state of one new stream; that of WHOLE for an utterance at once, in any context."""
        sizes = {"W": context.width, "R": context.delay}
        return {field.name: _zeros(field, sizes) for field in self.bundle.info.encoder_state}

    def advance(
        self, windows: Floats, num_frames: Ints, context: Context, state: State, is_last: bool = False
    ) -> Encoded:
        """Encode the next num_frames (N,) feature frames of N streams, cut by `Framer`: windows (N, S).

        Streams that look ahead give frames later than they take them: while they go on they take equally many
        in a call, and where is_last, the frames that are still due come out, too.
        """
        if is_last:
            info = self.bundle.info
            flush = info.late_frames(context) * info.subsampling * info.features.shift_samples
            windows = np.pad(windows, ((0, 0), (0, flush)))
        inputs = {"window": windows, "num_frames": num_frames}
        inputs |= {name: np.array(value) for name, value in context._asdict().items()}
        y, log_probs, y_lens, *states = self.bundle.encoder.run(None, inputs | dict(state))
        return Encoded(y, log_probs, y_lens, dict(zip(state, states, strict=True)))

    def framer(self) -> Framer:
        """What cuts the samples of one stream."""
        features = self.bundle.info.features
        return Framer(features.shift_samples, features.frame_samples, features.snip_edges)

    def memory(self, ys: Sequence[Floats]) -> Memory:
        """The decoder's memory of utterances that were encoded as streams, y (T, C) each."""
        return Memory(self.bundle, ys)

    # the protocol

    def encode(self, samples: Sequence[Floats], context: Context = WHOLE) -> tuple[list[Floats], Memory]:
        encoded = [self._encode_one(x, context) for x in samples]
        return [log_probs for _, log_probs in encoded], self.memory([y for y, _ in encoded])

    def _encode_one(self, samples: Floats, context: Context) -> tuple[Floats, Floats]:
        framer = self.framer()
        framer.accept(samples)
        framer.finish()
        num_frames = framer.ready()
        if num_frames == 0:
            info = self.bundle.info
            return np.zeros((0, info.dim), np.float32), np.zeros((0, info.num_tokens), np.float32)
        window = framer.take(num_frames)[None]
        out = self.advance(window, np.array([num_frames]), context, self.init_state(WHOLE))
        return out.y[0], out.log_probs[0]

    def start(self, memory: Memory, owner: Ints) -> DecoderState:
        past = {field.name: _zeros(field, {"U": 0}, len(owner)) for field in self.bundle.info.decoder_state}
        return DecoderState(memory, owner, memory.gather(owner), past)

    def step(self, state: DecoderState, tokens: Ints, k: int) -> tuple[Ints, Floats, DecoderState]:
        log_probs, past = self._decode(tokens[:, None], state)
        ids, values = _best(log_probs[:, -1], k)
        return ids, values, DecoderState(state.memory, state.owner, state.cross, past)

    def select(self, state: DecoderState, index: Ints) -> DecoderState:
        owner = state.owner[index]
        is_same = np.array_equal(owner, state.owner)
        cross = state.cross if is_same else {name: x[index] for name, x in state.cross.items()}
        return DecoderState(state.memory, owner, cross, {name: x[index] for name, x in state.past.items()})

    def score(self, memory: Memory, owner: Ints, tokens: Sequence[Sequence[int]]) -> list[Floats]:
        scores: list[Floats] = []
        for start in range(0, len(tokens), ROWS):
            part = slice(start, start + ROWS)
            scores += self._score(memory, owner[part], tokens[part])
        return scores

    def _score(self, memory: Memory, owner: Ints, tokens: Sequence[Sequence[int]]) -> list[Floats]:
        padded = np.full((len(tokens), 1 + max(map(len, tokens))), BLANK, np.int64)
        padded[:, 0] = self.sos_eos
        for row, sequence in zip(padded, tokens, strict=True):
            row[1 : 1 + len(sequence)] = sequence
        log_probs, _ = self._decode(padded, self.start(memory, owner))
        return [
            log_probs[b, np.arange(len(sequence) + 1), [*sequence, self.sos_eos]]
            for b, sequence in enumerate(tokens)
        ]

    def _decode(self, tokens: Ints, state: DecoderState) -> tuple[Floats, dict[str, NDArray[Any]]]:
        log_probs, *past = self.bundle.decoder.run(None, {"tokens": tokens, **state.cross, **state.past})
        return log_probs, dict(zip(state.past, past, strict=True))


def _zeros(field: Field, sizes: Mapping[str, int], n: int = 1) -> NDArray[Any]:
    """A state of n streams or hypotheses, whose variable sizes are given."""
    shape = [sizes[size] if isinstance(size, str) else size for size in field.shape]
    return np.zeros((n, *shape), field.dtype)


def _best(log_probs: Floats, k: int) -> tuple[Ints, Floats]:
    """log_probs (B, V) -> the k likeliest ids and their values (B, k), best first."""
    k = min(k, log_probs.shape[1])
    ids = np.argpartition(-log_probs, k - 1, axis=1)[:, :k]
    values = np.take_along_axis(log_probs, ids, 1)
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(ids, order, 1), np.take_along_axis(values, order, 1)
