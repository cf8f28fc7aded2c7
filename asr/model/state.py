"""What every streaming state has in common.

Every field is a tensor whose first dimension is N, the number of streams, so streams join and leave a batch
with the two functions below, whatever the module.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class State:
    """What a module must remember between two calls. Returned by `forward`, never stored on a module."""

    def tensors(self) -> tuple[Tensor, ...]:
        """The fields in order: the inputs and outputs of the ONNX graph."""
        return tuple(getattr(self, f.name) for f in fields(self))


S = TypeVar("S", bound=State)


def join(states: Sequence[S]) -> S:
    """Batch the states of several streams into one."""
    return type(states[0])(*map(torch.cat, zip(*(s.tensors() for s in states), strict=True)))


def split(state: S) -> list[S]:
    """The inverse of `join`: one state of N = 1 for each stream."""
    return [type(state)(*t) for t in zip(*(x.split(1) for x in state.tensors()), strict=True)]


def select(state: S, index: Tensor) -> S:
    """The streams (or hypotheses) index (N',), which may repeat, drop and reorder."""
    return type(state)(*(x.index_select(0, index) for x in state.tensors()))
