"""Loaded bundles of the tiny model, and something to listen to."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from asr.audio import read
from asr.context import Context
from asr.decode.config import SearchConfig
from asr.decode.modes import decode
from asr.decode.scorer import Floats
from asr.model.torch_scorer import TorchScorer
from asr.runtime import Bundle, EndpointConfig, Stream, StreamConfig
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


@pytest.fixture(scope="session")
def writes_as_torch(speech_data: Path) -> Callable[[TorchScorer, Bundle, str, SearchConfig], None]:
    """Asserts that streams of a bundle give the same tokens as torch in the same chunks, for 1.25 seconds of
    100 real utterances."""
    paths = sorted((speech_data / "librispeech_mini").rglob("*.opus"))[::13][:100]
    assert len(paths) == 100
    never = EndpointConfig(trailing_s=1e6, silence_s=1e6, max_s=1e6)

    def check(scorer: TorchScorer, bundle: Bundle, mode: str, search: SearchConfig) -> None:
        config = StreamConfig(mode=mode, chunk_ms=320, left_chunks=4, search=search, endpoint=never)
        texts = []
        for path in paths:
            samples = read(path)[:20000]
            (nbest,) = decode(scorer, mode, [samples], search, Context(8, 4))
            stream = Stream(bundle, config)
            events = [x for part in np.array_split(samples, 7) for x in stream.accept(part)]
            finals = [x for x in events + stream.finish() if x.final]
            assert "".join(x.text for x in finals) == bundle.tokenizer.decode(nbest[0].tokens), path
            texts.append(nbest[0].tokens)
        assert len(set(texts)) > 50

    return check
