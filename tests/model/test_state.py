from dataclasses import dataclass

import torch
from torch import Tensor, tensor

from asr.model.state import State, join, select, split


@dataclass(frozen=True)
class _State(State):
    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class _Groups(State):
    stacks: tuple[_State, ...]
    offset: Tensor


def test_tensors_of_groups_have_names_and_places():
    stacks = tuple(_State(torch.randn(3, size), torch.arange(3)) for size in (2, 5))
    state = _Groups(stacks, tensor([5, 6, 7]))
    assert list(state.named()) == ["stacks_0_a", "stacks_0_b", "stacks_1_a", "stacks_1_b", "offset"]
    assert torch.equal(state.of(state.tensors()).stacks[1].a, stacks[1].a)
    again = join(split(state))
    assert all(torch.equal(x, y) for x, y in zip(state.tensors(), again.tensors(), strict=True))
    assert select(state, tensor([2, 0])).stacks[1].b.tolist() == [2, 0]


def test_split_is_the_inverse_of_join():
    state = _State(torch.randn(3, 2), tensor([5, 6, 7]))
    parts = split(state)
    assert [part.b.tolist() for part in parts] == [[5], [6], [7]]
    for whole, field in zip(join(parts).tensors(), state.tensors(), strict=True):
        assert torch.equal(whole, field)


def test_select_repeats_drops_and_reorders():
    state = select(_State(torch.randn(3, 2), tensor([5, 6, 7])), tensor([2, 2, 0]))
    assert state.b.tolist() == [7, 7, 5]
