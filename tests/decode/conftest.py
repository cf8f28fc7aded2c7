"""A toy model small enough to enumerate all of its outputs."""

import itertools
import re
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from asr.context import WHOLE, Context
from asr.decode.scorer import Floats, Ints, Step, Window

BLANK, SOS_EOS = 0, 1


class Toy:
    """A Scorer with random probability tables, keyed by the utterance and the tokens so far.

    A waveform is [seed, number of frames]. `decoder` replaces the decoder's log-probabilities.
    """

    sos_eos = SOS_EOS
    frame_s = 0.04
    decoder_type = "transformer"
    has_reverse = False
    has_fire = False
    has_ctc = True
    max_tokens = 0
    max_samples = 0
    prompt = ()
    symbols = ()

    def __init__(
        self, num_tokens: int = 4, decoder: Callable[[tuple[int, ...]], Floats] | None = None
    ) -> None:
        self.num_tokens = num_tokens
        self.word_starts = np.zeros(num_tokens, bool)
        self.decoder = decoder
        self.num_steps = 0
        self.largest = 0

    def log_probs(self, seed: int, num_frames: int) -> Floats:
        """CTC never emits sos/eos."""
        table = np.random.default_rng(seed).normal(0, 2, (num_frames, self.num_tokens))
        table[:, SOS_EOS] = -np.inf
        return normalised(table)

    def following(self, seed: int, tokens: Sequence[int]) -> Floats:
        """The decoder's log-probabilities (V,) after `tokens`; it never writes blank."""
        if self.decoder:
            return self.decoder(tuple(tokens))
        key = zlib.crc32(np.array([seed, *tokens]).tobytes())
        table = np.random.default_rng(key).normal(0, 2, self.num_tokens)
        table[BLANK] = -np.inf
        return normalised(table)

    def encode(self, samples: Sequence[Floats], context: Context = WHOLE) -> tuple[list[Floats], list[int]]:
        pairs = [(int(seed), int(num_frames)) for seed, num_frames in samples]
        return [self.log_probs(*pair) for pair in pairs], [seed for seed, _ in pairs]

    def view(self, memory: list[int], utterance: int, num_frames: int) -> list[int]:
        return [memory[utterance]]

    def start(self, memory: list[int], owner: Ints) -> list[tuple[int, tuple[int, ...]]]:
        return [(memory[n], ()) for n in owner]

    def join(
        self, states: Sequence[list[tuple[int, tuple[int, ...]]]], memory: list[int]
    ) -> list[tuple[int, tuple[int, ...]]]:
        return [x for state in states for x in state]

    def step(
        self, state: list[tuple[int, tuple[int, ...]]], tokens: Ints, k: int, window: Window | None = None
    ) -> Step:
        self.num_steps += 1
        self.largest = max(self.largest, len(state))
        rows = tokens.reshape(len(tokens), -1).tolist()
        grown = [(seed, (*past, *row)) for (seed, past), row in zip(state, rows, strict=True)]
        table = np.stack([self.following(seed, past[1:]) for seed, past in grown])
        ids = np.argsort(-table, 1)[:, :k]
        return Step(ids, np.take_along_axis(table, ids, 1), np.zeros((len(ids), 0), np.float32), grown)

    def steps(self, state: list[tuple[int, tuple[int, ...]]], tokens: Ints, k: int) -> Step:
        """Counts as one call, whatever the number of tokens."""
        parts, count = [], self.num_steps
        for column in tokens.T:
            parts.append(self.step(state, column, k))
            state = parts[-1].state
        self.num_steps = count + 1
        ids, log_probs = (np.stack([getattr(x, name) for x in parts], 1) for name in ("ids", "log_probs"))
        return Step(ids, log_probs, np.zeros((*ids.shape[:2], 0), np.float32), state)

    def rewind(
        self, state: list[tuple[int, tuple[int, ...]]], num_tokens: int
    ) -> list[tuple[int, tuple[int, ...]]]:
        return [(seed, past[:num_tokens], *rest) for seed, past, *rest in state]

    def select(
        self, state: list[tuple[int, tuple[int, ...]]], index: Ints
    ) -> list[tuple[int, tuple[int, ...]]]:
        return [state[b] for b in index]

    def score(
        self, memory: list[int], owner: Ints, tokens: Sequence[Sequence[int]], prompt: Sequence[int] = ()
    ) -> list[Floats]:
        return [
            np.array(
                [self.following(memory[n], (*prompt, *x[:u]))[v] for u, v in enumerate([*x, SOS_EOS])],
                np.float32,
            )
            for n, x in zip(owner, tokens, strict=True)
        ]


def normalised(table: np.ndarray) -> Floats:
    return (table - np.logaddexp.reduce(table, -1, keepdims=True)).astype(np.float32)


def by_enumeration(log_probs: Floats) -> dict[tuple[int, ...], float]:
    """log p of every token sequence that has an alignment: a sum over all V ** T paths."""
    num_frames, num_tokens = log_probs.shape
    sums: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(num_tokens), repeat=num_frames):
        tokens = tuple(symbol for symbol, _ in itertools.groupby(path) if symbol != BLANK)
        score = log_probs[range(num_frames), path].sum(dtype=np.float64)
        sums[tokens] = np.logaddexp(sums.get(tokens, -np.inf), score)
    return {tokens: float(score) for tokens, score in sums.items() if score > -np.inf}


def with_dictionaries(
    log_probs: Floats, beam: int, tokens_per_frame: int
) -> list[tuple[tuple[int, ...], float]]:
    """The prefix beam search as it is usually written: a dictionary of prefixes, frame by frame."""
    prefixes = {(): (0.0, -np.inf)}
    for frame in log_probs.astype(np.float64):
        tops = 1 + np.argsort(-frame[1:])[:tokens_per_frame]
        grown: dict[tuple[int, ...], tuple[float, float]] = {}

        def add(prefix: tuple[int, ...], blank: float, token: float, grown: dict = grown) -> None:
            old = grown.get(prefix, (-np.inf, -np.inf))
            grown[prefix] = (np.logaddexp(old[0], blank), np.logaddexp(old[1], token))

        for prefix, (blank, token) in prefixes.items():
            total = np.logaddexp(blank, token)
            add(prefix, total + frame[0], -np.inf)
            for c in tops.tolist():
                again = prefix[-1:] == (c,)
                add((*prefix, c), -np.inf, (blank if again else total) + frame[c])
                if again:
                    add(prefix, -np.inf, token + frame[c])
        best = sorted(grown.items(), key=lambda item: -np.logaddexp(*item[1]))
        prefixes = dict(best[:beam])
    return [(prefix, float(np.logaddexp(*sums))) for prefix, sums in prefixes.items()]


@pytest.fixture
def toy() -> type[Toy]:
    return Toy


@pytest.fixture
def enumerate_ctc() -> Callable[[Floats], dict[tuple[int, ...], float]]:
    return by_enumeration


@pytest.fixture
def plain_prefix_beam() -> Callable[[Floats, int, int], list[tuple[tuple[int, ...], float]]]:
    return with_dictionaries


@pytest.fixture(scope="session")
def vectors(golden_folder) -> dict[str, np.ndarray]:
    """Reference vectors: enumeration in float64, and torchaudio's alignments."""
    with np.load(golden_folder("ctc_rnnt") / "io.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def cases(vectors: dict[str, np.ndarray]) -> Callable[[str], list[str]]:
    """The names of the cases of a kind, such as nbest0, nbest1, ..."""

    def find(kind: str) -> list[str]:
        found = {name.partition(".")[0] for name in vectors if re.match(rf"{kind}\d+\.", name)}
        assert found
        return sorted(found)

    return find


@pytest.fixture
def random_log_probs() -> Callable[..., Floats]:
    def make(seed: int, num_frames: int, num_tokens: int, scale: float = 2.0) -> Floats:
        return normalised(np.random.default_rng(seed).normal(0, scale, (num_frames, num_tokens)))

    return make
