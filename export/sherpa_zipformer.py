"""The module that is traced for the contract `zipformer2_ctc` of sherpa-onnx: a chunk of a causal Zipformer.

The states of the contract are, for every layer, keys and values of the left context and the left context of
both convolutions; then the left context of the front, and the number of its frames so far. Its C++ reads
their sizes from metadata, and begins with zeros. Chunk and left context are constants in the graph.

N streams · T feature frames of a call · T' encoder frames · F mel bins · C channels · K kernel · V units
· W left context, in frames of the layer's stack
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim

from asr.context import Context
from asr.model.hybrid import HybridModel
from asr.model.zipformer import Zipformer, layer_sizes
from asr.model.zipformer_front import RATE
from asr.model.zipformer_layer import Past
from asr.model.zipformer_state import ZipformerState
from export.bundle import streaming
from export.onnx import Trace
from export.sherpa_graphs import rescaled

LAYER = {
    "cached_key": 1,
    "cached_nonlin_attn": 1,
    "cached_val1": 1,
    "cached_val2": 1,
    "cached_conv1": 0,
    "cached_conv2": 0,
}
"""The states of a layer, by their names in the contract, and which of their axes is N."""


def fixed_context(model: HybridModel) -> Context:
    """The context in the graph: the one with which a bundle of the model streams by default."""
    info, encoder = streaming(model), cast(Zipformer, model.encoder)
    unit_ms = round(1000 * encoder.chunk_unit * model.frame_s)
    return Context(info.chunk_ms // unit_ms * encoder.chunk_unit, info.left_chunks)


class OnlineZipformer(nn.Module):
    """A chunk of frames and all states -> log-probabilities and the states after it."""

    def __init__(self, model: HybridModel, context: Context) -> None:
        super().__init__()
        self.model = model
        self.encoder = cast(Zipformer, model.encoder)
        self.context = context
        config = self.encoder.config
        stacks = zip(layer_sizes(config), config.depths, strict=True)
        self.memory_dims = [size.memory_dims for size, depth in stacks for _ in range(depth)]

    @property
    def shift(self) -> int:
        """Feature frames by which a stream advances per call."""
        return self.context.chunk * self.encoder.subsampling

    def init_states(self, n: int) -> tuple[Tensor, ...]:
        """The states of n new streams: zeros, in the order of the contract."""
        return self._unpacked(self.encoder.init_state(n, self.context.width))

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """x (N, shift + overlap_frames, F) -> log-probabilities (N, T', V), and the next states."""
        x = self.model.cmvn(rescaled(x, 1.0, self.model.fbank.config.scale))
        x_lens = torch.full_like(states[-1], x.shape[1])
        chunk, left, _ = self.context
        y, _, state = self.encoder(x, x_lens, self._packed(states), chunk, left)
        return self.model.ctc_log_probs(y), *self._unpacked(state)

    def _packed(self, states: Sequence[Tensor]) -> ZipformerState:
        """keys, values (W, N, C), of the non-linear attention (1, N, W, C), convolutions (N, C, K // 2)."""
        *layers, frames, processed = states
        pasts = []
        for i in range(0, len(layers), len(LAYER)):
            keys, hidden, values_1, values_2, *convolutions = layers[i : i + len(LAYER)]
            kept = keys.transpose(0, 1), hidden[0], values_1.transpose(0, 1), values_2.transpose(0, 1)
            pasts.append(Past(torch.cat(kept, dim=-1), torch.stack(convolutions, dim=1)))
        return ZipformerState(frames, *self.encoder.layout.join(pasts), processed // RATE)

    def _unpacked(self, state: ZipformerState) -> tuple[Tensor, ...]:
        stacks = self.encoder.layout.unpack(state.memory, state.convolutions)
        states: list[Tensor] = []
        for past, dims in zip((past for stack in stacks for past in stack), self.memory_dims, strict=True):
            keys, hidden, *values = past.memory.split(dims, dim=-1)
            states += [keys.transpose(0, 1), hidden[None], *(x.transpose(0, 1) for x in values)]
            states += past.convolutions.unbind(1)
        return *states, state.frames, RATE * state.offset


def zipformer_trace(module: OnlineZipformer) -> Trace:
    """A trace with streams that began long ago, and new ones."""
    encoder, n = module.encoder, Dim("N")
    *zeros, _ = module.init_states(2)
    length = RATE * module.context.chunk
    states = [*(0.1 * torch.randn_like(x) for x in zeros), torch.tensor([9 * length, length])]
    axes = {f"{name}_{i}": axis for i in range(encoder.config.num_layers) for name, axis in LAYER.items()}
    axes |= {"embed_states": 0, "processed_lens": 0}
    inputs = {"x": torch.randn(2, module.shift + encoder.overlap_frames, encoder.num_bins)}
    inputs |= zip(axes, states, strict=True)
    dynamic: dict[str, dict[int, Any]] = {"x": {0: n}} | {name: {axis: n} for name, axis in axes.items()}
    return Trace(module, inputs, dynamic, ["log_probs", *(f"new_{name}" for name in axes)], len(axes))


def zipformer_metadata(module: OnlineZipformer) -> dict[str, Any]:
    """What the C++ derives the sizes of its states from, with a number for each stack."""
    encoder, config = module.encoder, module.encoder.config
    width = RATE * module.context.width
    lists = {
        "encoder_dims": config.dims,
        "query_head_dims": config.query_dims,
        "value_head_dims": config.value_dims,
        "num_heads": config.num_heads,
        "num_encoder_layers": config.depths,
        "cnn_module_kernels": config.kernel_sizes,
        "left_context_len": [width // rate for rate in config.rates],
    }
    sizes = {"T": module.shift + encoder.overlap_frames, "decode_chunk_len": module.shift}
    return {"model_type": "zipformer2"} | sizes | {k: ",".join(map(str, x)) for k, x in lists.items()}
