"""The folder of an experiment during training: opened once, written by the first rank only."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from asr.config import ExperimentConfig, differences, save_config
from asr.data.loader import Batch
from asr.errors import TokensError, TrainingError
from asr.tokens import Tokenizer, load_tokenizer, tokens_hash
from asr.train import checkpoint, distributed, lock
from asr.train.learner import Learner, Progress
from asr.train.report import Report, Window
from asr.train.storage import remove_litter


@dataclass
class Run:
    exp_dir: Path
    config: ExperimentConfig
    tokenizer: Tokenizer
    device: torch.device
    echo: Callable[[str], None]
    report: Report | None = None
    """None on every rank but the first."""

    def resume(self, learner: Learner) -> bool:
        """Resume from the last valid checkpoint; False if there is none. Raises CheckpointError."""
        path = checkpoint.newest_valid(self.exp_dir, self.echo)
        if path is not None:
            meta = checkpoint.verify(path)
            checkpoint.check_tokens_hash(path, meta, self.exp_dir / "tokens")
            learner.restore(path, self.config, distributed.rank())
        self._start_report(learner.progress.step)
        if path is not None:
            self.say(f"resuming from {path}")
            for field, (old, new) in differences(meta["config"], asdict(self.config)).items():
                self.say(f"changed since {path.name}: {field} was {old}, is {new}")
        return path is not None

    def _start_report(self, step: int) -> None:
        if distributed.is_main():
            self.report = Report(self.exp_dir, self.echo, step)
            save_config(self.config, self.exp_dir / "config.yaml")

    def say(self, line: str) -> None:
        if self.report:
            self.report.say(line)

    def log(self, progress: Progress, window: Window, lr: float, grad_norm: float) -> None:
        """Log a line about the steps of the window, with losses summed over all ranks."""
        window.losses = distributed.gather(window.losses.cpu()).sum(0)
        if self.report:
            about = {"step": progress.step, "epoch": progress.epoch, "lr": lr, "grad": grad_norm}
            seen = {"audio_hours": progress.audio_s / 3600, "cpu_minutes": progress.cpu_s / 60}
            self.report.step({**about, **window.values(self.device), **seen})

    def log_valid(self, progress: Progress, values: dict[str, float]) -> bool:
        """Log a line about a validation. Returns whether it is the best so far."""
        best = progress.best or values
        is_best = not progress.best or (values["wer"], values["loss"]) < (best["wer"], best["loss"])
        if is_best:
            progress.best = {"step": progress.step, **values}
        if self.report:
            sets = ", ".join(Path(path).name.split(".")[0] for path in self.config.data.valid)
            seen = {"cpu_minutes": progress.cpu_s / 60}
            self.report.valid({"step": progress.step, **values, **seen}, sets, is_best)
        return is_best

    def save(self, learner: Learner, is_best: bool = False) -> None:
        """Write a checkpoint and prune old ones. Raises CheckpointError if it cannot be written."""
        distributed.barrier(self.config.train.timeout_s)
        state = learner.state(distributed.gather_objects(learner.random_state()))
        if not distributed.is_main():
            return
        progress = learner.progress
        meta = checkpoint.describe(self.config, self.exp_dir / "tokens", progress.best)
        path = checkpoint.save_checkpoint(self.exp_dir, progress.step, learner.weights(), state, meta)
        if is_best:
            checkpoint.point(self.exp_dir, "best", path)
        checkpoint.prune(self.exp_dir, self.config.train.keep)
        self.say(f"step {progress.step:,} saved in {path}")

    def skip_step(self, progress: Progress, batches: Sequence[Batch], grad_norm: float) -> None:
        """List the utterances of a step with a non-finite gradient. Raises TrainingError after too many."""
        progress.bad_steps += 1
        ids = distributed.gather_objects([name for batch in batches for name in batch.ids])
        where = self.exp_dir / "nonfinite.jsonl"
        if distributed.is_main():
            row = {"step": progress.step, "grad": str(grad_norm), "ids": ids}
            with where.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.say(f"step {progress.step:,}: gradient is {grad_norm}, step skipped; utterances in {where}")
        if progress.bad_steps >= self.config.train.max_bad_steps:
            last = checkpoint.pointed(self.exp_dir, "latest") or "no checkpoint yet"
            raise TrainingError(
                f"step {progress.step}: {progress.bad_steps} steps in a row without a finite gradient; "
                f"utterances in {where}; lower optim.lr, and resume from {last}"
            )


@contextlib.contextmanager
def open_run(
    config: ExperimentConfig, exp_dir: Path, device: torch.device, echo: Callable[[str], None]
) -> Iterator[Run]:
    """Lock the folder of an experiment, creating it and copying the tokenizer into it if needed."""
    with contextlib.ExitStack() as stack:
        if distributed.is_main():
            try:
                exp_dir.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock.hold(exp_dir))
            except OSError as error:
                raise TrainingError(
                    f"{exp_dir}: cannot be written: {(error.strerror or '').lower()}"
                ) from None
            remove_litter(exp_dir)
            remove_litter(checkpoint.folder_of(exp_dir))
            _copy_tokens(Path(config.data.tokens), exp_dir / "tokens")
        distributed.barrier(config.train.timeout_s)
        tokenizer = load_tokenizer(exp_dir / "tokens")
        run = Run(exp_dir, config, tokenizer, device, echo if distributed.is_main() else _silent)
        yield run
        if run.report:
            run.report.close()


def _silent(line: str) -> None:
    pass


def _copy_tokens(source: Path, target: Path) -> None:
    """Copy the tokenizer into the experiment. Raises TokensError if it already has another one."""
    if target.exists():
        if source.exists() and tokens_hash(source) != tokens_hash(target):
            raise TokensError(f"{source}: other units than {target}, with which this experiment began")
        return
    load_tokenizer(source)
    unfinished = target.with_name(target.name + ".tmp")
    shutil.copytree(source, unfinished)
    unfinished.rename(target)
