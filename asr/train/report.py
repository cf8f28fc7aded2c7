"""Reports on a running training: train.log, metrics.jsonl, TensorBoard, curves.png."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asr.data.loader import Batch
from asr.train.clock import peak_memory_bytes
from asr.train.curves import draw_curves
from asr.train.storage import write_file


@dataclass
class Window:
    """Totals since the last line of the log."""

    losses: Tensor = field(default_factory=lambda: torch.zeros(3))
    """Sums of total, ctc and attention loss of this rank."""

    tokens: int = 0
    audio_s: float = 0.0
    padding: list[float] = field(default_factory=list)
    wait_s: float = 0.0
    start_s: float = field(default_factory=time.monotonic)

    def take(self, batches: Iterator[Batch], count: int) -> list[Batch]:
        """The next batches; adds the time spent waiting for them."""
        asked_s = time.monotonic()
        taken = list(islice(batches, count))
        self.wait_s += time.monotonic() - asked_s
        self.padding += [batch.padding for batch in taken]
        return taken

    def add(self, losses: Tensor, tokens: int, audio_s: float) -> None:
        self.losses = self.losses.to(losses.device) + losses
        self.tokens += tokens
        self.audio_s += audio_s

    def values(self, device: torch.device) -> dict[str, float]:
        """The numbers of a log line; `losses` must already be summed over all ranks."""
        total, ctc, attention = (self.losses.cpu() / max(1, self.tokens)).tolist()
        elapsed_s = max(1e-9, time.monotonic() - self.start_s)
        memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory_bytes()
        return {
            "loss": total,
            "ctc": ctc,
            "attention": attention,
            "h/h": self.audio_s / elapsed_s,
            "padding": sum(self.padding) / max(1, len(self.padding)),
            "wait": self.wait_s / elapsed_s,
            "memory_gb": memory / 1e9,
        }


class Report:
    """Writes lines to `echo` and train.log, and numbers also to metrics.jsonl and TensorBoard."""

    def __init__(self, exp_dir: Path, echo: Callable[[str], None], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.exp_dir = exp_dir
        self.echo = echo
        self.metrics = exp_dir / "metrics.jsonl"
        _forget_after(self.metrics, step)
        self.tensorboard = SummaryWriter(str(exp_dir / "tensorboard"), purge_step=step + 1)

    def say(self, line: str) -> None:
        """Write a line with a timestamp."""
        self._write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}")

    def step(self, values: dict[str, Any]) -> None:
        """Write a line about the last steps; see Window.values."""
        v = values
        self._write(
            f"step {v['step']:>7,}  loss {v['loss']:.3f} (ctc {v['ctc']:.3f}, attention {v['attention']:.3f})"
            f"  lr {v['lr']:.1e}  grad {v['grad']:.3g}  {v['h/h']:,.0f} h/h  pad {v['padding']:.0%}"
            f"  wait {v['wait']:.0%}  {v['memory_gb']:.1f} GB  cpu {v['cpu_minutes']:,.1f} min"
        )
        self._record("train", values)

    def valid(self, values: dict[str, Any], sets: str, is_best: bool) -> None:
        v = values
        self._write(
            f"step {v['step']:>7,}  valid {v['loss']:.3f} (ctc {v['ctc']:.3f}, "
            f"attention {v['attention']:.3f})  wer {v['wer']:.2f} "
            f"({'ctc-greedy' if v['ctc'] else 'attention'}, {sets}, {v['words']:,.0f} words)"
            f"{'  best so far' if is_best else ''}"
        )
        self._record("valid", values)
        draw_curves(read_metrics(self.metrics), self.exp_dir / "curves.png")

    def close(self) -> None:
        self.tensorboard.close()

    def _write(self, line: str) -> None:
        self.echo(line)
        with (self.exp_dir / "train.log").open("a", encoding="utf-8") as log:
            log.write(line + "\n")

    def _record(self, kind: str, values: dict[str, Any]) -> None:
        with self.metrics.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"kind": kind, **values}) + "\n")
        for name, value in values.items():
            if name != "step":
                self.tensorboard.add_scalar(f"{kind}/{name}", value, values["step"])


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; skips lines that are not JSON, such as a truncated last one."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _forget_after(file: Path, step: int) -> None:
    """Drop rows logged after the checkpoint that training resumes from: they will be logged again."""
    kept = [row for row in read_metrics(file) if row["step"] <= step]
    write_file(file, "".join(json.dumps(row) + "\n" for row in kept).encode())
