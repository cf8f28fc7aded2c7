"""The base of all streaming states.

The first dimension of every tensor is N, the number of streams, so the functions below let streams join and
leave a batch, whatever the module. A field is a tensor or a group of them: a state, or a tuple of either.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class State:
    """What a module must remember between calls. Returned by `forward`, never stored on a module."""

    def named(self) -> dict[str, Tensor]:
        """All tensors in order, those of groups as "group_0_field": the names in the ONNX graph."""
        return dict(_named(self))

    def tensors(self) -> tuple[Tensor, ...]:
        """The same without names."""
        return tuple(self.named().values())

    def of(self, tensors: Sequence[Tensor]) -> Self:
        """The inverse of `tensors`: a state like this one with other tensors."""
        rest = iter(tensors)
        return _map(lambda _: next(rest), self)


S = TypeVar("S", bound=State)


def join(states: Sequence[S]) -> S:
    """Batch the states of several streams into one."""
    return states[0].of([torch.cat(x) for x in zip(*(s.tensors() for s in states), strict=True)])


def split(state: S) -> list[S]:
    """The inverse of `join`: a state with N = 1 for each stream."""
    return [state.of(x) for x in zip(*(x.split(1) for x in state.tensors()), strict=True)]


def select(state: S, index: Tensor) -> S:
    """The streams (or hypotheses) at index (N',), which may repeat, drop and reorder them."""
    return _map(lambda x: x.index_select(0, index), state)


def _named(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
        return
    parts = enumerate(value) if isinstance(value, tuple) else _items(value)
    for key, part in parts:
        yield from _named(part, f"{name}_{key}" if name else str(key))


def _map(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same structure with changed tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_map(change, part) for part in value)
    return type(value)(**{name: _map(change, part) for name, part in _items(value)})


def _items(state: State) -> Iterator[tuple[str, Any]]:
    return ((f.name, getattr(state, f.name)) for f in fields(state))
