"""Tiny experiments: eight words of tones, a model of a few thousand parameters, processes to be killed.

Children come from a server that has imported torch and done nothing else: importing it anew takes longer than
most tests, and a fork of this process would inherit locks held by the threads of autograd.
"""

import faulthandler
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, Recording, SupervisionSegment

from asr.config import ExperimentConfig, load_config
from asr.tokens import train_tokenizer
from asr.train.learner import Progress
from asr.train.loop import train

FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["asr.train.loop", "lhotse", "pytest"])
LIMIT_S = 60
SIZES = (
    "encoder.dim=16 encoder.num_layers=1 encoder.num_heads=2 encoder.ff_dim=32 encoder.kernel_size=3 "
    "encoder.subsampling_channels=4 decoder.dim=16 decoder.num_layers=1 decoder.num_heads=2 decoder.ff_dim=32"
)
RUN = (
    "optim.warmup_steps=5 data.max_batch_s=2 data.max_utterance_s=2 data.num_workers=0 train.log_every=2 "
    "train.cmvn_utterances=4 train.precision=fp32 train.save_every=3 train.timeout_s=45"
)


def write_manifest(folder: Path, texts: Sequence[str]) -> Path:
    """One utterance per text: a tone of 80 ms per letter, and a little silence."""
    rng = np.random.default_rng(0)
    cuts = []
    for number, text in enumerate(texts):
        tones = [np.sin(np.arange(1280) * 0.05 * (ord(letter) - ord("a") + 2)) for letter in text]
        samples = (
            np.concatenate([*tones, np.zeros(2400)]) * 0.3 + rng.normal(size=1280 * len(text) + 2400) * 0.01
        )
        path = folder / f"u{number}.wav"
        soundfile.write(path, samples.astype(np.float32), 16000)
        cut = Recording.from_file(path, recording_id=f"u{number}").to_cut()
        cut.supervisions = [
            SupervisionSegment(f"u{number}", f"u{number}", 0, cut.duration, text=text, speaker="s")
        ]
        cuts.append(cut)
    CutSet.from_cuts(cuts).to_file(folder / "train.jsonl.gz")
    return folder / "train.jsonl.gz"


@dataclass
class Lab:
    """A corpus, and experiments on it."""

    folder: Path
    log: list[str] = field(default_factory=list)

    def config(self, *overrides: str) -> ExperimentConfig:
        manifest = self.folder / "train.jsonl.gz"
        data = [f"data.train=[{manifest}]", f"data.tokens={self.folder / 'tokens'}"]
        return load_config([], [*SIZES.split(), *RUN.split(), *data, *overrides])

    def train(
        self, name: str, *overrides: str, echo: Callable[[str], None] | None = None
    ) -> tuple[Path, Progress]:
        """Train in this process; lines go to `log` unless `echo` takes them."""
        exp_dir = self.folder / name
        self.log.clear()
        progress = train(self.config(*overrides), exp_dir, torch.device("cpu"), echo or self.log.append)
        return exp_dir, progress


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    texts = ["ab", "abc", "bca", "cab", "c", "ba", "acb", "bb"]
    write_manifest(tmp_path, texts)
    train_tokenizer(iter(texts), "char", 0, tmp_path / "tokens")
    return Lab(tmp_path)


@dataclass
class Children:
    """Child processes that end with the test."""

    alive: list[Any] = field(default_factory=list)

    def start(self, target: Callable[..., None], *args: Any, **environment: str) -> Any:
        """Run target(*args), a function of a module, in a process of its own."""
        process = FRESH.Process(target=_with_environment, args=(target, args, environment))
        process.start()
        self.alive.append(process)
        return process

    def ranks(self, count: int, target: Callable[..., None], *args: Any) -> None:
        """Run target(*args) as each of `count` ranks, and wait."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        where = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        started = [self.start(target, *args, **where, RANK=str(rank)) for rank in range(count)]
        for process in started:
            process.join(LIMIT_S)
        assert [process.exitcode for process in started] == [0] * count


def _with_environment(target: Callable[..., None], args: Sequence[Any], environment: dict[str, str]) -> None:
    multiprocessing.set_start_method("fork", force=True)  # as in training, for the data workers
    os.environ.update(environment)
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(LIMIT_S - 5)  # shows where a child hangs
    try:
        target(*args)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


@pytest.fixture
def children() -> Any:
    processes = Children()
    yield processes
    for process in processes.alive:
        process.kill()
        process.join()
