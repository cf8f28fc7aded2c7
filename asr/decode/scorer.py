"""The interface between a search and a model, and the hypotheses that a search returns.

A search is a plain function from a Scorer to hypotheses. `asr/model/torch_scorer.py` (a checkpoint, on any
device) and `asr/runtime/onnx_scorer.py` (a bundle) implement the protocol, so every decoding mode runs on
both with the same code. Arrays are NumPy; whatever stays on a device is opaque to the search.

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
    """The encoder frames that each of B hypotheses attends to: start up to but excluding end; (B,) each."""

    start: Ints
    end: Ints


@dataclass(frozen=True)
class Chunking:
    """The chunks of encoder frames that a decoder attends to one by one, each until it writes end of chunk,
    which is `sos_eos`.

    Chunk k of K = ceil(T / step), from 0, covers frames k * step - left up to but excluding
    k * step + window, clipped to the utterance.
    """

    step: int
    window: int
    left: int
    hears_eoc: bool
    """Whether it sees end-of-chunk symbols in its history. If not, it starts the next chunk with its last
    label as input again, from the state before that label."""

    def span(self, k: int, num_frames: int) -> tuple[int, int]:
        """The first frame of chunk k, and the frame after its last, of num_frames."""
        return max(k * self.step - self.left, 0), min(k * self.step + self.window, num_frames)


class Step(NamedTuple):
    """The decoder's prediction after the last token of B hypotheses."""

    ids: Ints
    """The k most likely next tokens (B, k), best first."""

    log_probs: Floats
    """Their log-probabilities (B, k)."""

    attention: Floats
    """Attention of the guiding heads (B, T): frames of the window, counted from its start."""

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
    """The type of decoder, which determines the modes it supports (modes.py)."""

    chunking: Chunking | None
    """The chunks of a decoder of type "chunked"."""

    has_ctc: bool
    """Whether there is a CTC head. If not, CTC log-probabilities are (T, 0): frames, but no units."""

    max_tokens: int
    """The maximum length of the decoder's input, including sos/eos and a prompt; 0: no limit."""

    max_samples: int
    """The maximum number of samples that can be encoded at once; 0: no limit."""

    prompt: tuple[str, ...]
    """Units that precede every text but are no part of it, unless `SearchConfig.prompt` overrides them."""

    symbols: Sequence[str]
    """The names of the units; empty if unknown."""

    has_reverse: bool
    """Whether there is a second, right-to-left decoder for rescoring."""

    has_fire: bool
    """Whether there is a head that counts words."""

    word_starts: NDArray[np.bool_]
    """Units before which a word is complete (V,); all False if the units do not mark words."""

    def encode(self, samples: Sequence[Floats], context: Context = WHOLE) -> tuple[list[Floats], Any]:
        """N waveforms -> the CTC log-probabilities (T_n, V) of each, and the decoder's memory of all."""
        ...

    def grow(self, memory: Any, y: Any) -> Any:
        """The memory of one utterance extended by its next encoder frames y (T, C); None at its start."""
        ...

    def view(self, memory: Any, utterance: int, num_frames: int) -> Any:
        """The memory of one utterance alone, up to frame num_frames: as if no more had arrived."""
        ...

    def start(self, memory: Any, owner: Ints) -> Any:
        """The decoder state of B empty hypotheses; hypothesis b belongs to utterance owner[b] (B,)."""
        ...

    def step(self, state: Any, tokens: Ints, k: int, window: Window | None = None) -> Step:
        """Append tokens (B,), or several at once (B, U), beginning with `sos_eos`. window: the frames that
        they attend to, None for all. The cost grows with the window, not with the utterance."""
        ...

    def listen(self, memory: Any, utterance: int, tokens: Sequence[int]) -> Floats:
        """Attention of the guiding heads to one utterance when predicting what follows each of the tokens,
        `sos_eos` first: (H, U, T), of each head or, with H = 1, the mean of all."""
        ...

    def steps(self, state: Any, tokens: Ints, k: int) -> Step:
        """Like `step` without a window, with the predictions after each of tokens (B, U) in one call: ids and
        log_probs (B, U, k); attention is empty (B, U, 0)."""
        ...

    def rewind(self, state: Any, num_tokens: int) -> Any:
        """The state of the same hypotheses after their first num_tokens, including `sos_eos`."""
        ...

    def select(self, state: Any, index: Ints) -> Any:
        """The state of hypotheses index (B',), which may repeat, drop and reorder."""
        ...

    def join(self, states: Sequence[Any], memory: Any) -> Any:
        """The hypotheses of several states, all with the same number of tokens, in one; from now on they
        attend to `memory`, which may have more frames than before."""
        ...

    def emit(self, memory: Any, frames: Ints, labels: Ints, durations: Ints) -> Floats:
        """The log-odds (R,) that segments of one utterance end at frames (R,), by the length model of a
        segmental decoder; labels (R,): the preceding tokens; durations (R,): their frames so far."""
        ...

    def log_lengths(self) -> Floats:
        """log p(length | token) (V, M) for segments of 1 to M frames, as counted in training of a segmental
        decoder. It attends only to the last M frames of longer segments."""
        ...

    def fire(self, memory: Any) -> Floats:
        """Weights alpha (T,) of the frames of one utterance, T at least 1: they sum to the number of complete
        words in it."""
        ...

    def score(
        self,
        memory: Any,
        owner: Ints,
        tokens: Sequence[Sequence[int]],
        reverse: bool = False,
        prompt: Sequence[int] = (),
    ) -> list[Floats]:
        """Log-probabilities (U + 1,) of each token and of eos; hypothesis b belongs to utterance owner[b].

        reverse: by the right-to-left decoder, but returned in the order of the tokens.  prompt: units before
        the tokens; the right-to-left decoder takes none.
        """
        ...


@dataclass(frozen=True)
class Hypothesis:
    """One result of a search. Scores are natural logs, higher is better."""

    tokens: tuple[int, ...]
    score: float
    """What the search ranks by."""

    parts: dict[str, float] = field(default_factory=dict)
    """Its unweighted terms: "ctc", "attention"."""

    frames: tuple[int, ...] = ()
    """Encoder frame at which each token is emitted, by the CTC alignment; without CTC, the frame where the
    attention for the token peaks, but none earlier than that of the token before it."""

    confidence: tuple[float, ...] = ()
    """Probability of each token, in [0, 1]."""

    guard: str = ""
    """Which guard ended or replaced the attention decoder's output: "length", "repetition", or none."""

    ends: tuple[int, ...] = ()
    """The frame after each token, if known; otherwise a token lasts for one frame."""
