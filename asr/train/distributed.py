"""Training on several devices, one process each, started by torchrun. With one process, these are no-ops.

NCCL transfers tensors on a GPU, Gloo everything else. Every exchange has a time limit, and `barrier` names
the ranks that are missing.
"""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from asr.errors import TrainingError


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the process that writes files."""
    return rank() == 0


def device_of(name: str) -> torch.device:
    """`auto` | `cpu` | `cuda` -> this rank's device. Raises TrainingError if there is no such device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainingError("--device cuda: torch sees no GPU; use --device cpu, or see `nvidia-smi`")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextlib.contextmanager
def group(device: torch.device, timeout_s: float) -> Iterator[None]:
    """Join the process group that torchrun started, if any. Raises TrainingError if that fails."""
    if world_size() == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    except dist.DistError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise TrainingError(
            f"rank {rank()}: cannot reach the other ranks at {where}: {str(error).splitlines()[0]}"
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def gather(values: Tensor) -> Tensor:
    """values (K,) of this rank -> (R, K) of all R ranks, on every rank."""
    if world_size() == 1:
        return values[None]
    rows = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(rows, values)
    return torch.stack(rows)


def broadcast(tensor: Tensor) -> None:
    """Overwrite a tensor with that of the first rank."""
    if world_size() > 1:
        dist.broadcast(tensor, src=0)


def gather_objects(value: Any) -> list[Any]:
    """The plain values of all ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier(timeout_s: float) -> None:
    """Wait for all ranks. Raises TrainingError that names those missing after `timeout_s`."""
    if world_size() == 1:
        return
    try:
        dist.monitored_barrier(timeout=timedelta(seconds=timeout_s), wait_all_ranks=True)
    except RuntimeError as error:
        raise TrainingError(f"lost the connection to other ranks: {error}") from error
