"""Two ranks: unequal data, one checkpoint, an exact resume in the middle of an epoch, and a clear end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from asr.config import save_config
from asr.errors import TrainingError
from asr.train import distributed
from asr.train.checkpoint import load_state, path_of, read_weights
from asr.train.report import read_metrics

OPTIONS = ("data.max_batch_s=2.0", "data.num_workers=1")


def test_two_ranks_resume_exactly_in_the_middle_of_an_epoch(lab: Any, children: Any) -> None:
    children.ranks(2, lab.train, "whole", *OPTIONS, "optim.max_steps=5")
    children.ranks(2, lab.train, "parts", *OPTIONS, "optim.max_steps=2")
    children.ranks(2, lab.train, "parts", *OPTIONS, "optim.max_steps=5")
    whole, parts = (path_of(lab.folder / name, 5) for name in ("whole", "parts"))
    a, b = (read_weights(path / "model.safetensors") for path in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)
    middle = load_state(path_of(lab.folder / "parts", 2))
    assert middle["progress"]["position"]["world_size"] == 2
    assert len(middle["random"]) == 2
    assert read_metrics(lab.folder / "whole" / "metrics.jsonl")[-1]["cpu_minutes"] > 0


def ask(line: str) -> None:
    if line.startswith("step       2"):
        os.kill(os.getpid(), signal.SIGTERM)


def train_until_asked(lab: Any) -> None:
    lab.train("a", "optim.max_steps=1000", echo=ask)


def test_one_rank_is_asked_and_all_stop(lab: Any, children: Any) -> None:
    children.ranks(2, train_until_asked, lab)
    assert path_of(lab.folder / "a", 3).is_dir()


def come_or_stay_away(done: Path) -> None:
    with distributed.group(torch.device("cpu"), 60):
        if distributed.rank() == 0:
            with pytest.raises(TrainingError, match=r"lost the connection to other ranks: .*1"):
                distributed.barrier(0.5)
            done.touch()
        while not done.exists():
            time.sleep(0.05)


def test_a_rank_that_is_missing_is_named(children: Any, tmp_path: Path) -> None:
    children.ranks(2, come_or_stay_away, tmp_path / "done")


def come_alone(done: Path) -> None:
    alone = distributed.group(torch.device("cpu"), 0.5)
    with pytest.raises(TrainingError, match=r"rank 1: cannot reach the other ranks at 127.0.0.1:9: "), alone:
        pass
    done.touch()


def test_ranks_that_do_not_meet_say_where(children: Any, tmp_path: Path) -> None:
    where = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    children.start(come_alone, tmp_path / "done", **where).join(30)
    assert (tmp_path / "done").exists()


@pytest.mark.slow
def test_torchrun(lab: Any) -> None:
    save_config(lab.config("optim.max_steps=4"), lab.folder / "config.yaml")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--config", str(lab.folder / "config.yaml"), "--exp", str(lab.folder / "a")]
    subprocess.run([*torchrun, "-m", "recipes.cli", "train", *options], check=True, timeout=300)
    assert path_of(lab.folder / "a", 4).is_dir()
