"""The parts of a model with the inputs and outputs of their graphs: what `export/onnx.py` traces.

N streams or utterances · S samples · T frames · U tokens · G hypotheses of an utterance · H heads ·
D channels per head · W tokens before · V units
"""

import torch
from torch import Tensor, nn

from asr.model.attention import split_heads
from asr.model.decoder import TransformerDecoder, in_tree
from asr.model.hybrid import HybridModel
from asr.model.segmental import LengthModel
from asr.model.state import State


class EncoderGraph(nn.Module):
    """One call of a stream, which takes the state that the previous call returned."""

    def __init__(self, model: HybridModel, state: State, num_context: int) -> None:
        """state: an example.  num_context: how many of chunk, left, right are inputs."""
        super().__init__()
        self.model = model
        self.state = state
        self.num_context = num_context

    def forward(self, window: Tensor, num_frames: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        x = self.model.cmvn(self.model.fbank.frames(window))
        context, state = rest[: self.num_context], self.state.of(rest[self.num_context :])
        y, y_lens, present = self.model.encoder(x, num_frames, state, *context)
        return *_heard(self.model, y), y_lens, *present.tensors()


class WholeGraph(nn.Module):
    """A whole utterance, for encoders that cannot stream."""

    def __init__(self, model: HybridModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, window: Tensor, num_frames: Tensor) -> tuple[Tensor, ...]:
        x = self.model.cmvn(self.model.fbank.frames(window))
        y, y_lens, _ = self.model.encoder(x, num_frames)
        return *_heard(self.model, y), y_lens


class SamplesGraph(nn.Module):
    """One utterance, for models whose features depend on all samples."""

    def __init__(self, model: HybridModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, samples: Tensor) -> tuple[Tensor, ...]:
        lens = torch.full((1,), samples.shape[1], dtype=torch.int64)
        x, x_lens = self.model.fbank(samples, lens)
        y, _, _ = self.model.encoder(self.model.cmvn(x), x_lens)
        return _heard(self.model, y)


def _heard(model: HybridModel, y: Tensor) -> tuple[Tensor, ...]:
    return (y,) if model.ctc is None else (y, model.ctc_log_probs(y))


class MemoryGraph(nn.Module):
    def __init__(self, model: HybridModel) -> None:
        super().__init__()
        self.num_heads = model.decoder.config.num_heads
        # in one product of all, each part would have to be copied out
        self.cross = nn.ModuleList(_parts(model.decoder.cross, 2 * len(model.decoder.layers)))

    def forward(self, y: Tensor) -> tuple[Tensor, ...]:
        """Keys of every layer, values of every layer, (N, H, T, D) each."""
        return tuple(split_heads(part(y), self.num_heads) for part in self.cross)


def _parts(linear: nn.Linear, count: int) -> list[nn.Linear]:
    """A linear layer cut into `count` that give equal parts of its output."""
    parts = []
    for weight, bias in zip(linear.weight.chunk(count), linear.bias.chunk(count), strict=True):
        part = nn.Linear(*weight.T.shape)
        part.weight, part.bias = nn.Parameter(weight), nn.Parameter(bias)
        parts.append(part)
    return parts


class DecoderGraph(nn.Module):
    """G hypotheses of each of N utterances, side by side, share one copy of its memory. Keys and values are
    separate inputs and outputs per layer: stacked in one tensor, each would be copied in every call."""

    def __init__(self, model: HybridModel) -> None:
        super().__init__()
        self.decoder = model.decoder

    def forward(self, tokens: Tensor, ends: Tensor, y_lens: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """tokens, ends (N, G, U): a text or a tree (`in_tree`) each; y_lens (N,); rest: keys and values of
        the memory (N, H, T, D) and of the tokens before (N, G, H, W, D). Returns log-probabilities
        (N G, U, V), attention (N G, U, T), and keys and values of all tokens (N G, H, W + U, D)."""
        depth = len(self.decoder.layers)
        memory, past = rest[: 2 * depth], [x.flatten(0, 1) for x in rest[2 * depth :]]
        logits, attention, present = self.decoder.extend(
            tokens.flatten(0, 1),
            list(zip(memory[:depth], memory[depth:], strict=True)),
            y_lens,
            list(zip(past[:depth], past[depth:], strict=True)),
            guide=self.decoder.guide,
            order=in_tree(ends.flatten(0, 1), past[0].shape[2], self.decoder.config.left_tokens),
        )
        keys, values = zip(*present, strict=True)
        return self.decoder.log_probs(logits), attention, *keys, *values


class ReverseGraph(nn.Module):
    """The tree of the texts of one utterance, from right to left."""

    def __init__(self, decoder: TransformerDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, tokens: Tensor, ends: Tensor, y: Tensor, y_lens: Tensor) -> Tensor:
        order = in_tree(ends, left=self.decoder.config.left_tokens)
        return self.decoder(tokens, *self.decoder.memory(y), y_lens, order=order).logits.log_softmax(-1)


class LengthGraph(nn.Module):
    def __init__(self, length: LengthModel) -> None:
        super().__init__()
        self.length = length

    def forward(self, y: Tensor, labels: Tensor, durations: Tensor) -> tuple[Tensor, Tensor]:
        return self.length(y, labels, durations), self.length.log_lengths()
