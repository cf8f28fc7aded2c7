"""What a streaming Zipformer remembers: the past of all layers of all stacks in two tensors.

Stacks run at several rates. A row of the memory is a step, the time in which every stack has a whole number
of frames, so one index holds for all of them.

N streams · W cached steps · C channels · K kernel
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from asr.model.layers import keep
from asr.model.state import State
from asr.model.zipformer_layer import LayerSizes, Past


@dataclass(frozen=True)
class ZipformerState(State):
    """What a stream remembers, besides the frames that it passes again, for all layers of all stacks."""

    frames: Tensor
    """(N, channels, 3, F'): left context of the ConvNeXt layer of the front."""

    memory: Tensor
    """(N, W, sum over layers): keys and values of `chunk_unit` encoder frames in each of W rows."""

    convolutions: Tensor
    """(N, sum over layers): left context of both convolutions of each layer."""

    offset: Tensor
    """(N,) int64: encoder frames so far."""

    def widen(self, num_frames: int, chunk_unit: int) -> Self:
        """Make room for num_frames more cached encoder frames."""
        return replace(self, memory=F.pad(self.memory, (0, 0, -(-num_frames // chunk_unit), 0)))


class Layout:
    """Where the layers are in the tensors of a state."""

    def __init__(
        self, sizes: Sequence[LayerSizes], rates: Sequence[int], depths: Sequence[int], step: int
    ) -> None:
        """sizes, rates, depths: of each stack; step: frames at rate 1."""
        self.depths = depths
        stacks = [(size, step // rate) for size, rate in zip(sizes, rates, strict=True)]
        layers = [stack for stack, depth in zip(stacks, depths, strict=True) for _ in range(depth)]
        self._frames = [frames for _, frames in layers]
        """Frames of each layer in a step."""
        self._memory_dims = [frames * sum(size.memory_dims) for size, frames in layers]
        self._shapes = [(2, size.dim, size.past_frames) for size, _ in layers]

    @property
    def memory_dim(self) -> int:
        return sum(self._memory_dims)

    @property
    def convolutions_dim(self) -> int:
        return sum(map(math.prod, self._shapes))

    def unpack(self, memory: Tensor, convolutions: Tensor) -> list[list[Past]]:
        """(N, W, memory_dim), (N, convolutions_dim) -> the past of each layer of each stack."""
        parts = memory.split(self._memory_dims, dim=2)
        memories = (
            part.unflatten(2, (frames, -1)).flatten(1, 2)
            for part, frames in zip(parts, self._frames, strict=True)
        )
        parts = convolutions.split([math.prod(shape) for shape in self._shapes], dim=1)
        sides = (part.unflatten(1, shape) for part, shape in zip(parts, self._shapes, strict=True))
        pasts = map(Past, memories, sides)
        return [list(islice(pasts, depth)) for depth in self.depths]

    def pack(self, memory: Tensor, pasts: Sequence[Sequence[Past]], steps: Tensor) -> tuple[Tensor, Tensor]:
        """memory (N, W, memory_dim) so far; pasts with new frames only, of which steps (N,) are valid.

        Returns the last W rows of the memory, and (N, convolutions_dim).
        """
        rows, convolutions = self.join([past for stack in pasts for past in stack])
        seen = torch.cat([memory, rows.to(memory.dtype)], dim=1)
        return keep(seen, steps, memory.shape[1], dim=1), convolutions

    def join(self, layers: Sequence[Past]) -> tuple[Tensor, Tensor]:
        """The inverse of `unpack`, for all layers one after the other."""
        rows = [
            past.memory.unflatten(1, (-1, frames)).flatten(2)
            for past, frames in zip(layers, self._frames, strict=True)
        ]
        convolutions = torch.cat([past.convolutions.flatten(1) for past in layers], dim=1)
        return torch.cat(rows, dim=2), convolutions
