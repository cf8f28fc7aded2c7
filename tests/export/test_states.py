"""Which sizes of a state vary is found by creating it."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from asr.model.masks import ChunkConfig
from asr.model.state import State
from export.states import dynamic_shapes, encoder_fields


@dataclass(frozen=True)
class _Stack(State):
    keys: Tensor
    conv: Tensor


@dataclass(frozen=True)
class _Stacks(State):
    stacks: tuple[_Stack, ...]
    waiting: Tensor
    offset: Tensor


def stacks(rates, delays=True):
    """An encoder whose stacks run at several frame rates."""

    def init_state(n, width, delay=0):
        parts = tuple(_Stack(torch.zeros(n, 2, int(width * r), 3), torch.zeros(n, 5)) for r in rates)
        return _Stacks(parts, torch.zeros(n, delay, 3), torch.zeros(n, dtype=torch.int64))

    layers = 2 if delays else 0
    return SimpleNamespace(
        config=SimpleNamespace(chunk=ChunkConfig(max_right=1)),
        can_stream=True,
        chunk_unit=4,
        subsampling=4,
        init_state=init_state,
        flush_frames=lambda delay: 6 + 4 * layers * delay,
    )


def test_sizes_are_in_proportion_to_the_width_or_the_delay():
    shapes = {f.name: (f.shape, f.dtype) for f in encoder_fields(stacks([2, 1, 0.25]))}
    assert shapes == {
        "stacks_0_keys": ((2, "2*W", 3), "float32"),
        "stacks_0_conv": ((5,), "float32"),
        "stacks_1_keys": ((2, "W", 3), "float32"),
        "stacks_1_conv": ((5,), "float32"),
        "stacks_2_keys": ((2, "W/4", 3), "float32"),
        "stacks_2_conv": ((5,), "float32"),
        "waiting": (("R", 3), "float32"),
        "offset": ((), "int64"),
    }


def test_what_does_not_vary_is_a_number():
    encoder = stacks([1], delays=False)
    encoder.init_state = lambda n, width, delay=0: _Stack(torch.zeros(n, 7), torch.zeros(n, 5))
    assert [f.shape for f in encoder_fields(encoder)] == [(7,), (5,)]


def test_a_size_of_another_kind_is_a_mistake():
    encoder = stacks([1])
    encoder.init_state = lambda n, width, delay=0: _Stack(torch.zeros(n, 7 + width), torch.zeros(n, 5))
    with pytest.raises(AssertionError, match="in proportion"):
        encoder_fields(encoder)


def test_an_encoder_that_cannot_stream_has_no_state():
    encoder = stacks([1])
    encoder.can_stream = False
    assert encoder_fields(encoder) == ()


class _Sum(nn.Module):
    def forward(self, *tensors: Tensor) -> Tensor:
        return sum(x.sum() for x in tensors)


def test_a_graph_takes_every_size_that_fits():
    """With stacks at several rates, the sizes are multiples of one of them."""
    encoder = stacks([2, 1, 0.25])
    fields = encoder_fields(encoder)
    shapes = dynamic_shapes(fields, Dim("N"))
    example = encoder.init_state(2, 24, 4).tensors()
    program = export(_Sum(), example, dynamic_shapes=(tuple(shapes[f.name] for f in fields),)).module()
    for n, width, delay in ((1, 8, 1), (3, 40, 2)):
        given = [x + 1 for x in encoder.init_state(n, width, delay).tensors()]
        assert program(*given) == sum(x.numel() for x in given)
    wrong = list(encoder.init_state(2, 24, 4).tensors())
    wrong[0] = wrong[0][:, :, 1:]
    with pytest.raises((AssertionError, RuntimeError)):
        program(*wrong)
