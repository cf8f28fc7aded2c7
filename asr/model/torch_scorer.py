"""A HybridModel as the searches see a model (asr/decode/scorer.py): arrays in, arrays out, the rest on its
device.

N utterances · T encoder frames · B hypotheses · U tokens · V units · k best continuations
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from asr.context import WHOLE, Context
from asr.model.decoder import DecoderState
from asr.model.hybrid import SOS_EOS, HybridModel
from asr.model.state import select

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

# hypotheses scored in one call of the decoder: bounds the memory of their logits and of what they attend to
ROWS = 64


@dataclass(frozen=True)
class Memory:
    """What the decoder attends to in N utterances, on the device."""

    cross_keys: Tensor
    cross_values: Tensor
    """(N, L, H, T, D)"""
    y_lens: Tensor
    """(N,)"""

    def rows(self, owner: Ints) -> "Memory":
        """One row for each hypothesis, which is of utterance owner[b] (B,)."""
        index = torch.from_numpy(owner).to(self.y_lens.device)
        parts = (self.cross_keys, self.cross_values, self.y_lens)
        return Memory(*(x.index_select(0, index) for x in parts))


@dataclass(frozen=True)
class Hypotheses:
    """The decoder state of B hypotheses."""

    memory: Memory
    """Of all N utterances."""
    owner: Ints
    """(B,)"""
    heard: Memory
    """memory.rows(owner)"""
    past: DecoderState


class TorchScorer:
    """A model on `device`, in evaluation mode whenever it is asked, and in its own mode again afterwards."""

    def __init__(self, model: HybridModel, device: torch.device | str) -> None:
        self.model = model.to(device)
        self.device = torch.device(device)
        self.num_tokens = model.ctc.out_features
        self.sos_eos = SOS_EOS
        self.frame_s = model.encoder.subsampling * model.fbank.config.shift_ms / 1000

    def encode(self, samples: Sequence[Floats], context: Context = WHOLE) -> tuple[list[Floats], Memory]:
        """As Scorer.encode; the waveforms may have different lengths, and none of them changes another."""
        lens = torch.tensor([len(x) for x in samples], device=self.device)
        # zeros behind the end change nothing, and spare the encoder a batch without a frame
        shortest = torch.zeros(self.model.fbank.frame_samples)
        batch = pad_sequence([*map(torch.as_tensor, samples), shortest], batch_first=True)[:-1]
        with self._evaluating():
            x, x_lens = self.model.features(batch.to(self.device, torch.float32), lens)
            y, y_lens = self.model.encode(x, x_lens, context)
            log_probs = self.model.ctc_log_probs(y).cpu().numpy()
            memory = Memory(*self.model.decoder.memory(y), y_lens)
        return [a[:n] for a, n in zip(log_probs, y_lens.tolist(), strict=True)], memory

    def start(self, memory: Memory, owner: Ints) -> Hypotheses:
        """As Scorer.start."""
        return Hypotheses(memory, owner, memory.rows(owner), self.model.decoder.init_state(len(owner)))

    def step(self, state: Hypotheses, tokens: Ints, k: int) -> tuple[Ints, Floats, Hypotheses]:
        """As Scorer.step; only the k best of the V leave the device."""
        last = torch.from_numpy(tokens).to(self.device)[:, None]
        heard = state.heard
        with self._evaluating():
            logits, past = self.model.decoder(
                last, heard.cross_keys, heard.cross_values, heard.y_lens, state.past
            )
            values, ids = logits[:, -1].float().log_softmax(-1).topk(k)
        return ids.cpu().numpy(), values.cpu().numpy(), replace(state, past=past)

    def select(self, state: Hypotheses, index: Ints) -> Hypotheses:
        """As Scorer.select."""
        owner = state.owner[index]
        # most steps reorder hypotheses within their utterance, and what they hear stays where it is
        same = np.array_equal(owner, state.owner)
        heard = state.heard if same else state.memory.rows(owner)
        past = select(state.past, torch.from_numpy(index).to(self.device))
        return Hypotheses(state.memory, owner, heard, past)

    def score(self, memory: Memory, owner: Ints, tokens: Sequence[Sequence[int]]) -> list[Floats]:
        """As Scorer.score."""
        scores: list[Floats] = []
        for start in range(0, len(tokens), ROWS):
            part = slice(start, start + ROWS)
            scores += self._score(memory.rows(owner[part]), tokens[part])
        return scores

    def _score(self, heard: Memory, tokens: Sequence[Sequence[int]]) -> list[Floats]:
        rows = [torch.tensor([SOS_EOS, *x, SOS_EOS], device=self.device) for x in tokens]
        batch = pad_sequence(rows, batch_first=True)
        with self._evaluating():
            logits, _ = self.model.decoder(batch[:, :-1], heard.cross_keys, heard.cross_values, heard.y_lens)
            log_probs = logits.float().log_softmax(-1).gather(2, batch[:, 1:, None])[:, :, 0].cpu().numpy()
        return [a[: len(x) + 1] for a, x in zip(log_probs, tokens, strict=True)]

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            self.model.train(training)
