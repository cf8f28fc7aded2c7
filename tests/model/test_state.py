from dataclasses import dataclass

import torch
from torch import Tensor, tensor

from asr.model.state import State, join, select, split


@dataclass(frozen=True)
class _State(State):
    a: Tensor
    b: Tensor


def test_split_is_the_inverse_of_join():
    state = _State(torch.randn(3, 2), tensor([5, 6, 7]))
    parts = split(state)
    assert [part.b.tolist() for part in parts] == [[5], [6], [7]]
    for whole, field in zip(join(parts).tensors(), state.tensors(), strict=True):
        assert torch.equal(whole, field)


def test_select_repeats_drops_and_reorders():
    state = select(_State(torch.randn(3, 2), tensor([5, 6, 7])), tensor([2, 2, 0]))
    assert state.b.tolist() == [7, 7, 5]
