"""Tiny corpora: short tones whose pitch tells them apart, written in milliseconds."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr.data.cuts import save_cuts
from asr.data.importers import from_tsv
from asr.tokens import Tokenizer, train_tokenizer

HEADER = ("utt_id", "audio", "speaker", "split", "text", "duration_s", "language")
Corpus = Callable[..., Path]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz 0123456789"
    return train_tokenizer([letters], "char", 0, tmp_path_factory.mktemp("tokens"))


def write_tone(path: Path, seconds: float, number: int = 0, sample_rate: int = 16000) -> None:
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.sin(2 * np.pi * (200 + 10 * number) * time), sample_rate)


def write_tsv(folder: Path, rows: Sequence[Sequence[str]]) -> Path:
    path = folder / "transcripts.tsv"
    path.write_text("".join("\t".join(row) + "\n" for row in [HEADER, *rows]), encoding="utf-8")
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """corpus(durations, name) -> a manifest of tones of these durations, from three speakers."""

    def make(durations: Sequence[float], name: str = "train", sample_rate: int = 16000) -> Path:
        rows = []
        for number, seconds in enumerate(durations):
            write_tone(tmp_path / name / f"{number}.wav", seconds, number, sample_rate)
            speaker = f"s{number % 3}"
            rows.append((f"{name}{number}", f"{number}.wav", speaker, "train", f"word {number}", "", "en"))
        manifest = tmp_path / f"{name}.jsonl.gz"
        save_cuts(from_tsv(write_tsv(tmp_path / name, rows), []), manifest)
        return manifest

    return make
