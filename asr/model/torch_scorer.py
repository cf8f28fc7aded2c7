"""A HybridModel as a Scorer for the searches (asr/decode/scorer.py): NumPy arrays in and out, everything else
stays on the device.

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
from asr.decode.scorer import Step, Window
from asr.decode.trie import Trie, read_order, text_order, tries
from asr.model.decoder import SOS_EOS, DecoderState, TransformerDecoder, in_tree
from asr.model.hybrid import HybridModel
from asr.model.segmental import SegmentalDecoder
from asr.model.state import join, select

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

# trees scored in one call of the decoder: bounds the memory of logits and cross-attention
ROWS = 8


@dataclass(frozen=True)
class Memory:
    """What the decoder attends to in N utterances, on the device."""

    cross_keys: Tensor
    cross_values: Tensor
    """(N, L, H, T, D)"""
    y: Tensor
    """(N, T, C)"""
    y_lens: Tensor
    """(N,)"""

    def rows(self, owner: Ints) -> "Memory":
        """One row for each hypothesis; hypothesis b belongs to utterance owner[b], owner (B,)."""
        index = torch.from_numpy(owner).to(self.y_lens.device)
        parts = (self.cross_keys, self.cross_values, self.y, self.y_lens)
        return Memory(*(x.index_select(0, index) for x in parts))

    def windows(self, owner: Ints, window: Window) -> "Memory":
        """As `rows`, with only the frames in the window of each hypothesis."""
        device = self.y_lens.device
        lens = torch.from_numpy(window.end - window.start).to(device)
        frames = torch.from_numpy(window.start).to(device)[:, None] + torch.arange(
            int(lens.max()), device=device
        )
        frames = frames.clamp(max=self.y.shape[1] - 1)
        rows = torch.from_numpy(owner).to(device)[:, None]
        keys, values = (
            x[rows, :, :, frames].permute(0, 2, 3, 1, 4) for x in (self.cross_keys, self.cross_values)
        )
        return Memory(keys, values, self.y[rows, frames], lens)


@dataclass(frozen=True)
class Hypotheses:
    """The decoder state of B hypotheses."""

    memory: Memory
    """The memory of all N utterances."""
    owner: Ints
    """(B,)"""
    heard: Memory | None
    """memory.rows(owner), once computed"""
    past: DecoderState


class TorchScorer:
    """A model on `device`; every call runs in evaluation mode and then restores the previous mode."""

    def __init__(
        self,
        model: HybridModel,
        device: torch.device | str,
        word_starts: NDArray[np.bool_] | None = None,
        symbols: Sequence[str] = (),
    ) -> None:
        """word_starts, symbols: as in Scorer; by default no unit starts a word, and symbols are unknown."""
        self.model = model.to(device)
        self.device = torch.device(device)
        self.num_tokens = model.num_tokens
        self.has_ctc = model.ctc is not None
        self.symbols = symbols
        self.prompt = tuple(model.decoder.config.prompt)
        self.max_tokens = model.decoder.max_tokens
        self.max_samples: int = model.fbank.max_samples
        self.sos_eos = SOS_EOS
        self.decoder_type: str = model.decoder.config.type
        self.chunking = model.decoder.chunking
        self.has_reverse = model.reverse_decoder is not None
        self.has_fire = model.fire is not None
        self.word_starts = np.zeros(self.num_tokens, bool) if word_starts is None else word_starts
        self.frame_s = model.frame_s

    def encode(self, samples: Sequence[Floats], context: Context = WHOLE) -> tuple[list[Floats], Memory]:
        """As Scorer.encode; waveforms may differ in length and do not affect one another."""
        lens = torch.tensor([len(x) for x in samples], device=self.device)
        # padding changes nothing, and ensures that the batch has at least one frame
        shortest = torch.zeros(self.model.fbank.frame_samples)
        batch = pad_sequence([*map(torch.as_tensor, samples), shortest], batch_first=True)[:-1]
        with self._evaluating():
            x, x_lens = self.model.features(batch.to(self.device, torch.float32), lens)
            y, y_lens = self.model.encode(x, x_lens, context)
            log_probs = self.model.ctc_log_probs(y).cpu().numpy()
            memory = Memory(*self.model.decoder.memory(y), y, y_lens)
        return [a[:n] for a, n in zip(log_probs, y_lens.tolist(), strict=True)], memory

    def grow(self, memory: Memory | None, y: Floats | Tensor) -> Memory:
        """As Scorer.grow."""
        with self._evaluating():
            new = torch.as_tensor(y, device=self.device)[None]
            more = Memory(*self.model.decoder.memory(new), new, torch.tensor([len(y)], device=self.device))
        if memory is None:
            return more
        keys, values = (
            torch.cat(pair, dim=3)
            for pair in ((memory.cross_keys, more.cross_keys), (memory.cross_values, more.cross_values))
        )
        return Memory(keys, values, torch.cat([memory.y, new], dim=1), memory.y_lens + more.y_lens)

    def view(self, memory: Memory, utterance: int, num_frames: int) -> Memory:
        """As Scorer.view."""
        row = slice(utterance, utterance + 1)
        keys, values = (x[row, :, :, :num_frames] for x in (memory.cross_keys, memory.cross_values))
        return Memory(keys, values, memory.y[row, :num_frames], memory.y_lens[row].clamp(max=num_frames))

    def start(self, memory: Memory, owner: Ints) -> Hypotheses:
        """As Scorer.start."""
        return Hypotheses(memory, owner, None, self.model.decoder.init_state(len(owner)))

    def step(self, state: Hypotheses, tokens: Ints, k: int, window: Window | None = None) -> Step:
        """As Scorer.step; only the k best of V units leave the device."""
        last = torch.from_numpy(tokens.reshape(len(tokens), -1)).to(self.device)
        if window is None:
            state = replace(state, heard=state.heard or state.memory.rows(state.owner))
        heard = state.memory.windows(state.owner, window) if window else state.heard
        assert heard is not None
        decoder = self.model.decoder
        with self._evaluating():
            logits, attention, past = decoder(
                last, heard.cross_keys, heard.cross_values, heard.y_lens, state.past, guide=decoder.guide
            )
            values, ids = decoder.log_probs(logits[:, -1].float()).topk(k)
        state = replace(state, past=past)
        return Step(ids.cpu().numpy(), values.cpu().numpy(), attention[:, -1].cpu().numpy(), state)

    def listen(self, memory: Memory, utterance: int, tokens: Sequence[int]) -> Floats:
        """As Scorer.listen, for each head separately."""
        heard = memory.rows(np.array([utterance]))
        shown = torch.tensor([tokens], device=self.device)
        with self._evaluating():
            found = self.model.decoder.listen(shown, heard.cross_keys, heard.cross_values, heard.y_lens)
        return found[0].cpu().numpy()

    def steps(self, state: Hypotheses, tokens: Ints, k: int) -> Step:
        """As Scorer.steps; only the k best of V units leave the device."""
        heard = state.heard or state.memory.rows(state.owner)
        given = torch.from_numpy(tokens).to(self.device)
        decoder = self.model.decoder
        with self._evaluating():
            logits, attention, past = decoder(
                given, heard.cross_keys, heard.cross_values, heard.y_lens, state.past
            )
            values, ids = decoder.log_probs(logits.float()).topk(k)
        state = replace(state, heard=heard, past=past)
        return Step(ids.cpu().numpy(), values.cpu().numpy(), attention.cpu().numpy(), state)

    def rewind(self, state: Hypotheses, num_tokens: int) -> Hypotheses:
        """As Scorer.rewind."""
        past = DecoderState(*(x[:, :, :, :num_tokens] for x in state.past.tensors()))
        return replace(state, past=past)

    def select(self, state: Hypotheses, index: Ints) -> Hypotheses:
        """As Scorer.select."""
        owner = state.owner[index]
        # most steps reorder hypotheses within their utterance, so the memory rows stay in place
        same = np.array_equal(owner, state.owner)
        heard = state.heard if same else None
        past = select(state.past, torch.from_numpy(index).to(self.device))
        return Hypotheses(state.memory, owner, heard, past)

    def join(self, states: Sequence[Hypotheses], memory: Memory) -> Hypotheses:
        """As Scorer.join."""
        owner = np.concatenate([x.owner for x in states])
        return Hypotheses(memory, owner, None, join([x.past for x in states]))

    def emit(self, memory: Memory, frames: Ints, labels: Ints, durations: Ints) -> Floats:
        """As Scorer.emit."""
        assert isinstance(self.model.decoder, SegmentalDecoder)
        at, after, lasting = (torch.from_numpy(x).to(self.device) for x in (frames, labels, durations))
        with self._evaluating():
            return self.model.decoder.length(memory.y[0, at], after, lasting).cpu().numpy()

    def log_lengths(self) -> Floats:
        """As Scorer.log_lengths."""
        assert isinstance(self.model.decoder, SegmentalDecoder)
        return self.model.decoder.length.log_lengths().cpu().numpy()

    def fire(self, memory: Memory) -> Floats:
        """As Scorer.fire."""
        assert self.model.fire is not None
        with self._evaluating():
            return self.model.fire(memory.y)[0].cpu().numpy()

    def score(
        self,
        memory: Memory,
        owner: Ints,
        tokens: Sequence[Sequence[int]],
        reverse: bool = False,
        prompt: Sequence[int] = (),
    ) -> list[Floats]:
        """As Scorer.score."""
        texts = read_order(tokens, reverse, prompt)
        decoder = self.model.decoder
        if reverse:
            assert self.model.reverse_decoder is not None
            decoder = self.model.reverse_decoder
            with self._evaluating():
                memory = Memory(*decoder.memory(memory.y), memory.y, memory.y_lens)
        numbers = {n: np.flatnonzero(owner == n).tolist() for n in np.unique(owner).tolist()}
        found = [(n, trie) for n, same in numbers.items() for trie in tries(texts, same, SOS_EOS)]
        scores: dict[int, Floats] = {}
        for start in range(0, len(found), ROWS):
            rows, batch = zip(*found[start : start + ROWS], strict=True)
            values = self._read(decoder, memory.rows(np.array(rows)), batch)
            for trie, own in zip(batch, values, strict=True):
                scores.update(trie.split(own))
        return text_order([scores[b] for b in range(len(tokens))], reverse, len(prompt))

    def _read(self, decoder: TransformerDecoder, heard: Memory, batch: Sequence[Trie]) -> list[Floats]:
        """The log-probabilities of the targets of each tree."""
        sizes = [len(trie.tokens) for trie in batch]
        tokens = torch.zeros(len(batch), max(sizes), dtype=torch.int64)
        ends = torch.arange(1, max(sizes) + 1).repeat(len(batch), 1)  # padding sees itself
        for n, trie in enumerate(batch):
            tokens[n, : sizes[n]] = torch.tensor(trie.tokens)
            ends[n, : sizes[n]] = torch.tensor(trie.ends)
        order = in_tree(ends.to(self.device), left=decoder.config.left_tokens)
        with self._evaluating():
            logits = decoder(
                tokens.to(self.device), heard.cross_keys, heard.cross_values, heard.y_lens, order=order
            ).logits
            log_probs = decoder.log_probs(logits.float())
            return [x[t.nodes, t.targets].cpu().numpy() for x, t in zip(log_probs, batch, strict=True)]

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.model.training
        if training:  # eval() visits every module, which costs as much as a small step
            self.model.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            if training:
                self.model.train()
