"""Shaped gradients are those of the reference and of the stated penalties; nothing else changes."""

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from asr.model.schedule import Schedule, at, scheduled, set_batch_count
from asr.model.shaping import (
    Balancer,
    Whitener,
    alarms,
    happens,
    imbalance,
    limit_param_value,
    mean_over_std,
    penalize_abs_values_gt,
    restore_alarms,
    rms_of_abs,
    whiteness,
)


@pytest.fixture(scope="module")
def reference(golden_folder):
    folder = golden_folder("icefall_zipformer2_training")
    config = json.loads((folder / "config.json").read_text())
    with np.load(folder / "io.npz") as arrays:
        return config, {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-4)


def gradient_through(module: Any, x: Tensor, grad: Tensor) -> Tensor:
    """The gradient at x; the forward pass leaves x unchanged."""
    x = x.clone().requires_grad_()
    y = module(x)
    assert torch.equal(y, x)
    y.backward(grad)
    return x.grad


def balancers(config: dict) -> list[Balancer]:
    options = [dict(one) for one in config["balancer"]]
    for one in options:
        one.pop("num_channels")
    return [Balancer(**one, prob=1.0) for one in options]


def whiteners(config: dict) -> list[Whitener]:
    return [
        Whitener(one["num_groups"], one["whitening_limit"], (1.0, 1.0), one["grad_scale"])
        for one in config["whiten"]
    ]


def test_balancers_are_those_of_the_reference(reference):
    config, arrays = reference
    for i, module in enumerate(balancers(config)):
        x, grad, expected = (arrays[f"balancer{i}.{name}"] for name in ("x", "grad_out", "grad_in"))
        close(gradient_through(module, x, grad), expected)
        assert not torch.equal(grad, expected)


def test_whiteners_are_those_of_the_reference(reference):
    config, arrays = reference
    for i, module in enumerate(whiteners(config)):
        x, grad, expected = (arrays[f"whiten{i}.{name}"] for name in ("x", "grad_out", "grad_in"))
        close(whiteness(x, module.num_groups), arrays[f"whiten{i}.metric"])
        close(gradient_through(module, x, grad), expected)
        assert module.alarm == bool(arrays[f"whiten{i}.metric"] >= module.limit)


def test_limited_parameters_and_penalised_values_are_those_of_the_reference(reference):
    config, arrays = reference
    limits, penalty = config["limit_param"], config["penalize"]
    for name, limited in (
        ("limit_param", lambda x: limit_param_value(x, limits["min"], limits["max"])),
        ("penalize", lambda x: penalize_abs_values_gt(x, penalty["limit"], penalty["penalty"])),
    ):
        x, grad, expected = (arrays[f"{name}.{part}"] for part in ("x", "grad_out", "grad_in"))
        close(gradient_through(limited, x, grad), expected)


def test_schedules_are_those_of_the_reference(reference):
    """Corners are where the slope of the table changes; all other values must follow from them."""
    rows = reference[1]["scheduled_float.table"].tolist()
    slopes = [(d - b) / (c - a) for (a, b), (c, d) in itertools.pairwise(rows)]
    bends = [abs(b - a) > 1e-9 * max(abs(a), abs(b)) for a, b in itertools.pairwise(slopes)]
    corners = [row for row, bent in zip(rows, [True, *bends, True], strict=True) if bent]
    assert len(corners) < len(rows)
    found = [Schedule(*corners)(x) for x, _ in rows]
    assert found == pytest.approx([y for _, y in rows], rel=1e-12, abs=1e-15)


def test_a_schedule_is_constant_in_front_of_its_points_and_behind_them():
    schedule = Schedule((10, 1.0), (20, 3.0))
    assert [schedule(n) for n in (-5, 10, 15, 20, 1e9)] == [1, 1, 2, 3, 3]
    assert at(schedule, 15) == at(2.0, 15) == 2
    assert Schedule((10, 1.0))(99) == 1


def difference(penalty: Any, x: Tensor) -> Tensor:
    """The gradient of a penalty by finite differences."""
    gradient = torch.zeros_like(x)
    for index in np.ndindex(*x.shape):
        ends = [x.clone(), x.clone()]
        ends[0][index] += 1e-6
        ends[1][index] -= 1e-6
        gradient[index] = (penalty(ends[0]) - penalty(ends[1])) / 2e-6
    return gradient


@pytest.mark.parametrize("channel_dim", [-1, 1])
def test_a_balancer_adds_the_gradient_of_its_penalty(channel_dim):
    """The first channel is too small, the second rarely positive, the third within limits."""
    x = torch.randn(7, 3).double() * torch.tensor([0.01, 1, 1]) - torch.tensor([0, 2, 0])
    x = x[:, :, None].repeat(1, 1, 2) * torch.tensor([1.0, 1.1]) if channel_dim == 1 else x
    limits = (mean_over_std(0.2), mean_over_std(0.8), rms_of_abs(0.1), rms_of_abs(10.0))
    slope = difference(lambda x: imbalance(x, limits, channel_dim).sum(), x)
    assert not slope[:, 2].any()
    others = [d for d in range(x.dim()) if d != 1]
    rms = slope.square().mean(others, keepdim=True).sqrt().clamp(min=1e-9)
    grad = torch.randn_like(x)
    module = Balancer(channel_dim, min_positive=0.2, max_positive=0.8, min_abs=0.1, max_abs=10, prob=1)
    expected = grad + grad.abs() * 0.04 * slope / rms
    found = gradient_through(module, x.float(), grad.float())
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(found[:, 2], grad[:, 2].float())


@pytest.mark.parametrize("num_groups", [1, 2])
def test_a_whitener_adds_the_gradient_of_its_metric(num_groups):
    x = torch.randn(9, 4).double() @ torch.randn(4, 4).double()
    slope = difference(lambda x: whiteness(x, num_groups), x)
    grad = torch.randn_like(x)
    module = Whitener(num_groups, limit=1.0, probs=(1, 1), grad_scale=0.1)
    expected = grad + 0.1 * slope * grad.norm() / slope.norm()
    torch.testing.assert_close(
        gradient_through(module, x.float(), grad.float()), expected.float(), rtol=1e-4, atol=1e-4
    )


def test_penalised_values_have_the_gradient_of_their_excess():
    x = torch.tensor([-3.0, -1.0, 0.5, 4.0]).double()
    slope = difference(lambda x: 0.3 * (x.abs() - 2).clamp(min=0).sum(), x)
    found = gradient_through(lambda x: penalize_abs_values_gt(x, 2.0, 0.3), x, torch.ones_like(x))
    torch.testing.assert_close(found, 1 + slope)


def test_the_metric_of_white_channels_is_one_and_of_one_direction_their_number():
    x = torch.randn(50, 8)
    white = torch.linalg.qr(x - x.mean(0))[0]
    assert whiteness(white, 1).item() == pytest.approx(1, rel=1e-4)
    assert whiteness(torch.randn(50, 1) * torch.randn(8), 1).item() == pytest.approx(8, rel=1e-4)


def test_limits_mean_about_what_they_say_of_normal_values():
    shares = [0.05, 0.3, 0.5, 0.6, 0.95]
    exact = [math.sqrt(2) * torch.tensor(2 * share - 1).erfinv().item() for share in shares]
    ours = [mean_over_std(share) for share in shares]
    assert ours == sorted(ours)
    assert all(0.6 * abs(e) <= abs(o) <= 0.85 * abs(e) for o, e in zip(ours, exact, strict=True))
    assert (mean_over_std(0.0), mean_over_std(1.0)) == (-math.inf, math.inf)
    normal = 3 * torch.randn(100_000)
    assert rms_of_abs(normal.abs().mean().item()) == pytest.approx(3, rel=0.01)


MODULES = [
    Balancer(min_abs=5.0, prob=1.0),
    Whitener(1, limit=1.0, probs=(1.0, 1.0)),
]


@pytest.mark.parametrize("module", MODULES)
def test_in_evaluation_and_without_gradients_nothing_is_left(module):
    x = torch.randn(5, 4, requires_grad=True)
    assert module.train()(x) is not x
    assert module.eval()(x) is x
    assert module.train()(x.detach()) is not x
    assert module(x.detach()).grad_fn is None
    assert not module.state_dict()


@pytest.mark.parametrize("module", MODULES)
def test_an_exported_graph_has_nothing_of_it(module):
    exported = torch.export.export(module.eval(), (torch.randn(5, 4),))
    assert not [node for node in exported.graph.nodes if node.op == "call_function"]
    module.train()


@pytest.mark.parametrize("module", MODULES)
def test_gradients_of_low_precision_are_shaped_in_float32(module):
    x, grad = torch.randn(5, 4), torch.randn(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradient_through(module, x.bfloat16(), grad.bfloat16())
    assert found.dtype == torch.bfloat16
    expected = gradient_through(module, x, grad)
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


def test_a_balancer_acts_as_often_as_its_schedule_says():
    module = Balancer(min_abs=5.0, prob=Schedule((0, 0.0), (100, 1.0)))
    x = torch.randn(5, 4, requires_grad=True)
    for count, share in ((0, 0.0), (30, 0.3), (100, 1.0)):
        set_batch_count(scheduled(nn.Sequential(nn.Linear(1, 1), module)), count)
        acts = sum(module(x) is not x for _ in range(400)) / 400
        assert acts == pytest.approx(share, abs=0.08)


def test_limits_follow_their_schedules():
    module = Balancer(min_abs=Schedule((0, 0.0), (100, 100.0)), min_positive=0, max_positive=1, prob=1)
    x, grad = torch.randn(5, 4), torch.randn(5, 4)
    assert torch.equal(gradient_through(module, x, grad), grad)
    module.batch_count = 100
    assert not torch.equal(gradient_through(module, x, grad), grad)


def test_a_whitener_looks_seldom_until_its_limit_is_passed():
    module = Whitener(1, limit=2.0, probs=(0.0, 1.0))
    white, one_direction = torch.randn(99, 4), torch.randn(99, 1) * torch.randn(4)
    for x, alarm in ((one_direction, True), (white, False), (one_direction, False)):
        gradient_through(module, x, torch.randn(99, 4))
        assert module.alarm == alarm


def test_what_whiteners_know_can_be_restored():
    model, other = (nn.ModuleList([Whitener(1, 2.0), nn.Linear(1, 1), Whitener(1, 2.0)]) for _ in range(2))
    model[2].alarm = False
    restore_alarms(other, alarms(model))
    assert alarms(other) == [True, False]


def test_what_happens_is_drawn_again_when_activations_are():
    drawn: list[bool] = []

    def layer(x: Tensor) -> Tensor:
        drawn.append(happens(0.5))
        return x.square()

    for _ in range(20):
        x = torch.randn(3, requires_grad=True)
        torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert drawn[::2] == drawn[1::2]
    assert set(drawn) == {True, False}
