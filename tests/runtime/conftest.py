"""Loaded bundles of the tiny model, and something to listen to."""

from pathlib import Path

import pytest

from asr.audio import read
from asr.decode.scorer import Floats
from asr.runtime import Bundle
from export.verify import made_sound


@pytest.fixture(scope="session")
def float32(tiny_bundles: Path) -> Bundle:
    return Bundle.load(tiny_bundles / "cpu-fp32")


@pytest.fixture(scope="session")
def int8(tiny_bundles: Path) -> Bundle:
    return Bundle.load(tiny_bundles / "cpu-int8")


@pytest.fixture(scope="session")
def sound() -> Floats:
    """Seven seconds, not a whole number of chunks or of frames."""
    return made_sound(7.0, 16000)[: 7 * 16000 - 333]


@pytest.fixture(scope="session")
def speech(speech_data: Path) -> list[Floats]:
    """Three short utterances of real speech."""
    folder = speech_data / "librispeech_mini"
    smallest = sorted(folder.rglob("*.opus"), key=lambda path: path.stat().st_size)[100:103]
    return [read(path) for path in smallest]
