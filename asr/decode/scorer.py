"""What a search asks of a model, and what it answers.

A search is a plain function from a Scorer to hypotheses. `asr/model/torch_scorer.py` (a checkpoint, on any
device) and `asr/runtime/onnx_scorer.py` (a bundle) implement the protocol, so every decoding mode runs on
both with the same code. Arrays are NumPy; what stays on a device is opaque to the search.

N utterances · T encoder frames · V units, blank is 0 · B hypotheses · k best continuations
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from asr.context import WHOLE, Context

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

BLANK = 0


class Scorer(Protocol):
    """A model: CTC log-probabilities of waveforms, and a decoder that scores token sequences given them."""

    num_tokens: int
    """V, blank (0) and sos/eos included."""

    sos_eos: int
    """The one id that starts and ends a token sequence."""

    frame_s: float
    """Seconds of audio per encoder frame."""

    def encode(self, samples: Sequence[Floats], context: Context = WHOLE) -> tuple[list[Floats], Any]:
        """N waveforms -> CTC log-probabilities (T_n, V) of each, and the decoder's memory of all of them."""
        ...

    def start(self, memory: Any, owner: Ints) -> Any:
        """The decoder state of B empty hypotheses; hypothesis b is of utterance owner[b] (B,)."""
        ...

    def step(self, state: Any, tokens: Ints, k: int) -> tuple[Ints, Floats, Any]:
        """Append tokens (B,), `sos_eos` the first time. Returns the k likeliest next ids (B, k), best first,
        their log-probabilities (B, k), and the state after `tokens`."""
        ...

    def select(self, state: Any, index: Ints) -> Any:
        """The state of hypotheses index (B',), which may repeat, drop and reorder."""
        ...

    def score(self, memory: Any, owner: Ints, tokens: Sequence[Sequence[int]]) -> list[Floats]: ...


@dataclass(frozen=True)
class Hypothesis:
    """One answer of a search. Scores are natural logs, higher is better."""

    tokens: tuple[int, ...]
    score: float
    """What the search ranked by."""

    parts: dict[str, float] = field(default_factory=dict)
    """Its unweighted terms: "ctc", "attention"."""

    frames: tuple[int, ...] = ()
    """Encoder frame at which each token is emitted, by the CTC alignment."""

    confidence: tuple[float, ...] = ()
    """Probability of each token, in [0, 1]."""

    guard: str = ""
    """Which guard ended or replaced the attention decoder's output: "length", "repetition", or none."""
