"""Values that change during training: piecewise linear functions of the number of batches seen."""

from bisect import bisect_right
from itertools import pairwise
from typing import Protocol, runtime_checkable

from torch import nn


class Schedule:
    """Linear interpolation of (batch count, value) points, constant before the first and after the last.

    `Schedule((0, 0.3), (20_000, 0.1))` falls from 0.3 to 0.1 over the first 20,000 batches.
    """

    def __init__(self, *points: tuple[float, float]) -> None:
        assert points
        assert all(a[0] < b[0] for a, b in pairwise(points))
        self.points = points

    def __call__(self, batch_count: float) -> float:
        behind = bisect_right(self.points, batch_count, key=lambda point: point[0])
        (x0, y0), (x1, y1) = self.points[max(0, behind - 1)], self.points[min(behind, len(self.points) - 1)]
        return y0 if x0 == x1 else y0 + (y1 - y0) * (batch_count - x0) / (x1 - x0)


def at(value: float | Schedule, batch_count: float) -> float:
    """The value at batch_count."""
    return value(batch_count) if isinstance(value, Schedule) else value


@runtime_checkable
class Scheduled(Protocol):
    """A module that follows schedules.

    It keeps the count as a plain number, 0 until set: not part of a checkpoint or of an exported graph, and
    read without a device synchronisation.
    """

    batch_count: float


def set_batch_count(modules: list[Scheduled], batch_count: float) -> None:
    for module in modules:
        module.batch_count = batch_count


def scheduled(model: nn.Module) -> list[Scheduled]:
    """The modules that follow schedules; find them once, as a model has thousands of others."""
    return [module for module in model.modules() if isinstance(module, Scheduled)]
