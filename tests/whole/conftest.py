"""One small experiment, made by the programs themselves: from a table of recordings to a bundle."""

import fcntl
import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile

from recipes.cli import main

RATE = 16000
SETTINGS = """
encoder: {dim: 32, num_layers: 1, num_heads: 2, ff_dim: 64, kernel_size: 5, subsampling_channels: 8}
decoder: {dim: 32, num_layers: 1, num_heads: 2, ff_dim: 64}
optim: {lr: 3.0e-3, warmup_steps: 5, max_steps: 8}
data: {max_batch_s: 8, max_utterance_s: 8, num_workers: 0}
train: {cmvn_utterances: 8, save_every: 4, valid_every: 8, log_every: 4}
"""


@dataclass(frozen=True)
class Answer:
    """What `asr ...` printed, and its exit status."""

    status: int
    out: str
    err: str


def run(*args: str | Path) -> Answer:
    """`asr args`, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main([str(arg) for arg in args])
    return Answer(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session", name="run")
def _run() -> Callable[..., Answer]:
    return run


@dataclass(frozen=True)
class Project:
    """A corpus of tones, its units, a trained experiment and its bundles."""

    folder: Path

    @property
    def manifest(self) -> Path:
        return self.folder / "manifests" / "train.jsonl.gz"

    @property
    def tokens(self) -> Path:
        return self.folder / "tokens"

    @property
    def experiment(self) -> Path:
        return self.folder / "exp"

    @property
    def bundle(self) -> Path:
        return self.experiment / "bundle"

    @property
    def float32(self) -> Path:
        return self.folder / "float32"

    @property
    def settings(self) -> list[str]:
        """The options of `asr train` but --exp."""
        values = [f"data.train=[{self.manifest}]", f"data.valid=[{self.manifest}]"]
        values.append(f"data.tokens={self.tokens}")
        return ["--config", str(self.folder / "settings.yaml"), *(x for v in values for x in ("--set", v))]


def tones(text: str, seed: int) -> np.ndarray:
    """A tone of 80 ms for each letter, in noise."""
    rng = np.random.default_rng(seed)
    parts = [np.sin(np.arange(1280) * 0.05 * (ord(letter) - ord("a") + 2)) for letter in text]
    samples = np.concatenate([np.zeros(1600), *parts, np.zeros(1600)]) * 0.3
    return (samples + rng.normal(size=len(samples)) * 0.01).astype(np.float32)


def write_corpus(folder: Path, texts: Sequence[str]) -> Path:
    """A TSV and its audio files."""
    rows = ["utt_id\taudio\tspeaker\tsplit\ttext"]
    for number, text in enumerate(texts):
        soundfile.write(folder / f"u{number}.wav", tones(text, number), RATE)
        rows.append(f"u{number}\tu{number}.wav\ts{number % 3}\ttrain\t{text}")
    table = folder / "transcripts.tsv"
    table.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return table


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Made once for all workers; a test that changes something works on a copy."""
    base = tmp_path_factory.getbasetemp()
    made = Project((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "with space")
    made.folder.mkdir(exist_ok=True)
    with (made.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.float32.exists():
            make(made)
    return made


def make(project: Project) -> None:
    table = write_corpus(project.folder, ["abc", "cab", "bacab", "ca", "abba", "cacab"] * 4)
    (project.folder / "settings.yaml").write_text(SETTINGS, encoding="utf-8")
    for args in (
        ["prepare", table, "-o", project.folder / "manifests" / "train"],
        ["tokenizer", project.manifest, "--kind", "char", "-o", project.tokens],
        ["train", *project.settings, "--exp", project.experiment],
        ["average", project.experiment, "--last", "2"],
        ["export", project.experiment, "--target", "cpu-int8"],
        ["export", project.experiment, "--target", "cpu-fp32", "-o", project.float32],
    ):
        answer = run(*args)
        if answer.status:
            sys.stderr.write(answer.err)
            pytest.fail(f"asr {args[0]} ended with {answer.status}")
