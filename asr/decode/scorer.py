"""What a search asks of a model, and what it answers.

A search is a plain function from a Scorer to hypotheses. `asr/model/torch_scorer.py` (a checkpoint, on any
device) and `asr/runtime/onnx_scorer.py` (a bundle) implement the protocol, so every decoding mode runs on
both with the same code. Arrays are NumPy; what stays on a device is opaque to the search.

N utterances · T encoder frames · V units, blank is 0 · B hypotheses · k best continuations
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from asr.context import WHOLE, Context

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

BLANK, UNK = 0, 2


class Window(NamedTuple):
    """Which encoder frames each of B hypotheses hears: from start up to, not including, end; (B,) each."""

    start: Ints
    end: Ints


@dataclass(frozen=True)
class Chunking:
    """The chunks of encoder frames that a decoder hears one by one, each until it has written end of chunk,
    which is `sos_eos`.

    Chunk k of K = ceil(T / step), from 0, is frames k * step - left up to, not including, k * step + window,
    as far as there are such frames.
    """

    step: int
    window: int
    left: int
    hears_eoc: bool
    """Whether it sees the ends of chunks among what it has written. If not, it is asked again about the next
    chunk with its last label for input, from the state before that label."""

    def span(self, k: int, num_frames: int) -> tuple[int, int]:
        """The first frame of chunk k, and the one behind its last, of num_frames."""
        return max(k * self.step - self.left, 0), min(k * self.step + self.window, num_frames)


class Step(NamedTuple):
    """What the decoder says behind the last token of B hypotheses."""

    ids: Ints
    """The k likeliest next tokens (B, k), best first."""

    log_probs: Floats
    """Theirs (B, k)."""

    attention: Floats
    """Where the guiding heads listened (B, T): frames of the window, counted from its start."""

    state: Any


class Scorer(Protocol):
    """A model: CTC log-probabilities of waveforms, and a decoder that scores token sequences given them."""

    num_tokens: int
    """V, blank (0) and sos/eos included."""

    sos_eos: int
    """The one id that starts and ends a token sequence."""

    frame_s: float
    """Seconds of audio per encoder frame."""

    decoder_type: str
    """Its kind: which modes it was trained for (modes.py)."""

    chunking: Chunking | None
    """What a decoder of type "chunked" hears."""

    has_ctc: bool
    """Whether there is a CTC head. If not, log-probabilities of CTC are (T, 0): frames, but no units."""

    max_tokens: int
    """Tokens that the decoder can be given, sos/eos and a prompt among them; 0: any number."""

    max_samples: int
    """Samples of an utterance that are heard at once, at most; 0: any number."""

    prompt: tuple[str, ...]
    """Units that every text begins with, and that are no part of it, unless `SearchConfig.prompt` says so."""

    symbols: Sequence[str]
    """The names of units; empty where they are not known."""

    has_reverse: bool
    """Whether there is a second decoder, from right to left, to score with."""

    has_fire: bool
    """Whether there is a head that counts words."""

    word_starts: NDArray[np.bool_]
    """Units before which a word is complete (V,); where units do not say, none is."""

    def encode(self, samples: Sequence[Floats], context: Context = WHOLE) -> tuple[list[Floats], Any]:
        """N waveforms -> CTC log-probabilities (T_n, V) of each, and the decoder's memory of all of them."""
        ...

    def grow(self, memory: Any, y: Any) -> Any:
        """The memory of one utterance whose next encoder frames y (T, C) have arrived; None at its start."""
        ...

    def view(self, memory: Any, utterance: int, num_frames: int) -> Any:
        """The memory of one utterance alone, up to frame num_frames: as if no more had arrived."""
        ...

    def start(self, memory: Any, owner: Ints) -> Any:
        """The decoder state of B empty hypotheses; hypothesis b is of utterance owner[b] (B,)."""
        ...

    def step(self, state: Any, tokens: Ints, k: int, window: Window | None = None) -> Step:
        """Append tokens (B,), or several at once (B, U), `sos_eos` first of all; `window`: what they hear,
        None for everything. The cost grows with the window, not with the utterance."""
        ...

    def listen(self, memory: Any, utterance: int, tokens: Sequence[int]) -> Floats:
        """Where guiding heads listened in one utterance before they wrote what follows each of the tokens,
        `sos_eos` first: (H, U, T), of each head or, with H = 1, the mean of all."""
        ...

    def steps(self, state: Any, tokens: Ints, k: int) -> Step:
        """As `step` with everything heard, and what the decoder says behind each of tokens (B, U), in one
        call: ids and log_probs (B, U, k); attention (B, U, 0) is not asked for."""
        ...

    def rewind(self, state: Any, num_tokens: int) -> Any:
        """The state of the same hypotheses behind their first num_tokens, `sos_eos` counted."""
        ...

    def select(self, state: Any, index: Ints) -> Any:
        """The state of hypotheses index (B',), which may repeat, drop and reorder."""
        ...

    def join(self, states: Sequence[Any], memory: Any) -> Any:
        """The hypotheses of several states, all of equally many tokens, in one; from now on they hear
        `memory`, in which more frames may have arrived."""
        ...

    def emit(self, memory: Any, frames: Ints, labels: Ints, durations: Ints) -> Floats:
        """The log-odds (R,) that segments of one utterance end at frames (R,), by the length model of a
        segmental decoder; labels (R,): the tokens before them; durations (R,): their frames so far."""
        ...

    def log_lengths(self) -> Floats:
        """log p(length | token) (V, M) of segments of 1 to M frames, as counted in the training of a
        segmental decoder. Of longer ones it hears the last M."""
        ...

    def fire(self, memory: Any) -> Floats:
        """Weights alpha (T,) of the frames of one utterance, of which there is one at least: they add up to
        the number of words that are complete in it."""
        ...

    def score(
        self,
        memory: Any,
        owner: Ints,
        tokens: Sequence[Sequence[int]],
        reverse: bool = False,
        prompt: Sequence[int] = (),
    ) -> list[Floats]:
        """Log-probabilities (U + 1,) of each token and of eos; hypothesis b is of utterance owner[b].

        reverse: by the decoder from right to left, in the order of the tokens all the same.  prompt: what
        stands before the tokens, in the other decoder nothing.
        """
        ...


@dataclass(frozen=True)
class Hypothesis:
    """One answer of a search. Scores are natural logs, higher is better."""

    tokens: tuple[int, ...]
    score: float
    """What the search ranked by."""

    parts: dict[str, float] = field(default_factory=dict)
    """Its unweighted terms: "ctc", "attention"."""

    frames: tuple[int, ...] = ()
    """Encoder frame at which each token is emitted, by the CTC alignment; without CTC, the one that the
    decoder listened to most when it wrote the token, or a later one of a token before it."""

    confidence: tuple[float, ...] = ()
    """Probability of each token, in [0, 1]."""

    guard: str = ""
    """Which guard ended or replaced the attention decoder's output: "length", "repetition", or none."""

    ends: tuple[int, ...] = ()
    """The frame behind each token, where it is known; else a token lasts for one frame."""
