"""The state of training: the model, its running average, the optimizer, and the progress."""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asr.config import ExperimentConfig
from asr.errors import CheckpointError
from asr.model.build import build_model
from asr.model.hybrid import HybridModel
from asr.model.schedule import Scheduled, scheduled, set_batch_count
from asr.model.shaping import alarms, restore_alarms
from asr.optim import build_optimizer
from asr.train.checkpoint import EMA, WEIGHTS, load_state, load_weights, read_weights, verify
from asr.train.random_state import random_state, restore_random_state

SCHEDULED_BATCH_S = 600.0
"""A model's schedules count batches of this much audio, so they do not depend on the actual batch size."""


@dataclass
class Progress:
    """The progress of training, in plain types, saved with every checkpoint."""

    step: int = 0
    epoch: int = 0
    position: dict[str, int] | None = None
    """The position in the data, see asr/data/sampler.py."""

    audio_s: float = 0.0
    """Seconds of audio seen so far, by all ranks."""

    cpu_s: float = 0.0
    """CPU time so far of all ranks and their data workers, across resumes."""

    bad_steps: int = 0
    """Consecutive steps without a finite gradient."""

    best: dict[str, float] = field(default_factory=dict)
    """The validation with the lowest WER, and among equals the lowest loss: step, wer, loss, ..."""

    def advance(self, position: dict[str, int], audio_s: float, cpu_s: float) -> None:
        """Count a step. position: in the data after it; audio_s: of this step; cpu_s: in total."""
        self.step += 1
        self.position, self.epoch = position, position["epoch"]
        self.audio_s += audio_s
        self.cpu_s = cpu_s


@dataclass
class Learner:
    model: HybridModel
    optimizer: torch.optim.Optimizer
    ema: dict[str, Tensor] | None
    progress: Progress
    scheduled: list[Scheduled] = field(init=False)

    def __post_init__(self) -> None:
        self.scheduled = scheduled(self.model)

    @classmethod
    def fresh(cls, config: ExperimentConfig, num_tokens: int, device: torch.device) -> "Learner":
        model = build_model(config.features, config.encoder, config.decoder, config.loss, num_tokens)
        model.to(device)
        return cls(model, build_optimizer(model, config.optim), None, Progress())

    def follow_schedules(self) -> None:
        """Set the batch count of the model's schedules from the audio seen so far."""
        set_batch_count(self.scheduled, self.progress.audio_s / SCHEDULED_BATCH_S)

    def start_average(self) -> None:
        """Start the running average from the current parameters."""
        self.ema = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def move_average(self, decay: float) -> None:
        """ema = decay * ema + (1 - decay) * model, with a lower decay in the first steps."""
        if self.ema is not None:
            weight = 1 - min(decay, (1 + self.progress.step) / (10 + self.progress.step))
            torch._foreach_lerp_(list(self.ema.values()), list(self.model.state_dict().values()), weight)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[HybridModel]:
        """The model with its running average as parameters, if there is one."""
        if self.ema is None:
            yield self.model
            return
        own = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model.load_state_dict(self.ema)
        try:
            yield self.model
        finally:
            self.model.load_state_dict(own)

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """File name -> tensors, for a checkpoint."""
        averaged = {} if self.ema is None else {EMA: self.ema}
        return {WEIGHTS: self.model.state_dict(), **averaged}

    def random_state(self) -> dict[str, Any]:
        """What differs between ranks: random number generators, and the states of the whiteners."""
        return {**random_state(), "alarms": alarms(self.model)}

    def state(self, random_states: list[Any]) -> dict[str, Any]:
        """Everything else that a checkpoint needs; random_states: of every rank."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
            "random": random_states,
        }

    def restore(self, path: Path, config: ExperimentConfig, rank: int) -> dict[str, Any]:
        """Restore a checkpoint. Returns its meta.json; raises CheckpointError if it does not fit."""
        meta = verify(path)
        load_weights(self.model, path / WEIGHTS, meta["config"], config)
        saved_type = meta["config"]["optim"]["type"]
        if saved_type != config.optim.type:
            raise CheckpointError(
                f"{path}: optim.type is {saved_type} in the checkpoint, {config.optim.type} in the "
                "configuration; start a new experiment with train.init"
            )
        state = load_state(path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        if (path / EMA).exists() and config.train.ema:
            self.start_average()
            averaged = read_weights(path / EMA)
            self.ema = {name: averaged[name].to(tensor.device) for name, tensor in (self.ema or {}).items()}
        if rank < len(state["random"]):  # a new rank starts from its seed
            restore_random_state(state["random"][rank])
            restore_alarms(self.model, state["random"][rank].get("alarms", alarms(self.model)))
        return meta
