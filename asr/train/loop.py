"""The training loop.

    asr train --config recipes/conf/conformer-s.yaml --config egs/NAME/conf/train.yaml --exp exp/NAME
    torchrun --nproc-per-node 8 -m recipes.cli train ...            the same on 8 GPUs

Restarted on the same folder, it resumes from the last checkpoint as if it had never stopped, on a CPU
bit-exactly. SIGTERM, SIGINT and SIGUSR1 end it after the current step with a checkpoint; a second signal ends
it at once.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from asr.config import ExperimentConfig
from asr.optim import clip_gradients, learning_rate, set_learning_rate
from asr.train import distributed
from asr.train.clock import cpu_s
from asr.train.learner import Progress
from asr.train.random_state import seed_all
from asr.train.report import Window
from asr.train.run import open_run
from asr.train.signals import listen
from asr.train.start import build_backward, open_loader, start, use_threads
from asr.train.step import agree, context_of_step
from asr.train.validate import validate


def train(
    config: ExperimentConfig, exp_dir: Path, device: torch.device, echo: Callable[[str], None]
) -> Progress:
    """Train until optim.max_steps or train.max_cpu_minutes is reached, or until asked to stop.

    echo: receives the lines of the log. Raises AsrError if training cannot go on; saved checkpoints stay.
    """
    every, timeout_s = config.train, config.train.timeout_s
    with (
        distributed.group(device, timeout_s),
        listen() as stop,
        open_run(config, exp_dir, device, echo) as run,
    ):
        seed_all(config.train.seed + distributed.rank())
        use_threads(config.train.threads)
        loader = open_loader(run)
        learner = start(run, loader)
        model, optimizer, progress = learner.model, learner.optimizer, learner.progress
        backward = build_backward(model, config, device)
        batches = loader.forever(progress.position)
        begin_cpu_s, earlier_cpu_s = cpu_s(), progress.cpu_s
        window = Window()

        reason = why_done(progress, config)
        while not reason:
            taken = window.take(batches, config.optim.accumulate)
            lr = learning_rate(progress.step + 1, config.optim, taken[-1].position["epoch"])
            set_learning_rate(optimizer, lr)
            shared = agree(model, taken, cpu_s() - begin_cpu_s, bool(stop))
            context = context_of_step(config, progress.step, shared.num_frames)
            learner.follow_schedules()
            losses = backward(taken, shared, context)
            grad_norm = clip_gradients(optimizer, config.optim)
            progress.advance(taken[-1].position, shared.audio_s, earlier_cpu_s + shared.cpu_s)
            if torch.isfinite(grad_norm):
                optimizer.step()
                learner.move_average(config.train.ema)
                progress.bad_steps = 0
                window.add(losses, shared.num_tokens, shared.audio_s)
            else:
                run.skip_step(progress, taken, float(grad_norm))
            optimizer.zero_grad()

            request = stop.name or "a signal to another rank" if shared.stop else ""
            reason = why_done(progress, config, request)
            is_best = False
            if progress.step % every.log_every == 0:
                run.log(progress, window, lr, float(grad_norm))
                window = Window()
            if config.data.valid and (progress.step % every.valid_every == 0 or (reason and not shared.stop)):
                with learner.averaged() as averaged:
                    values = validate(averaged, loader, run.tokenizer, config)
                is_best = run.log_valid(progress, values)
            if progress.step % every.save_every == 0 or reason or is_best:
                run.save(learner, is_best)
        run.say(f"step {progress.step:,}: ended, {reason}")
        return progress


def why_done(progress: Progress, config: ExperimentConfig, request: str = "") -> str:
    """The reason to end, or ""."""
    limit = config.train.max_cpu_minutes
    if progress.step >= config.optim.max_steps:
        return "optim.max_steps reached"
    if limit and progress.cpu_s >= 60 * limit:
        return "train.max_cpu_minutes reached"
    return f"stopped by {request}; run again to resume" if request else ""
