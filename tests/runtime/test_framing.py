import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from asr.decode.scorer import Floats
from asr.features import Fbank, FbankConfig
from asr.nemo_features import NemoFbank
from asr.runtime.framing import Framer


def frames_of(framer: Framer, fbank: Fbank | NemoFbank, most: int = 1000) -> torch.Tensor:
    """The features of all frames that are ready, at most `most` at a time."""
    parts = [torch.zeros(0, fbank.config.num_bins)]
    while num_frames := min(framer.ready(), most):
        parts.append(fbank.frames(torch.from_numpy(framer.take(num_frames))[None])[0])
    return torch.cat(parts)


@pytest.mark.parametrize("snip_edges", [False, True])
def test_as_many_frames_are_ready_after_each_block_as_in_kaldi(
    golden_folder: Callable[[str], Path], snip_edges: bool
):
    folder = golden_folder("kaldi_fbank")
    options, arrays = json.loads((folder / "config.json").read_text()), np.load(folder / "io.npz")
    shift, length = (
        int(options["sample_rate"] * options[f"frame_{x}_ms"] / 1000) for x in ("shift", "length")
    )
    waves = [name.removeprefix("wav.") for name in arrays.files if name.startswith("wav.")]
    assert waves
    for wave, (pattern, sizes) in itertools.product(waves, enumerate(options["blocks"])):
        samples = arrays[f"wav.{wave}"]
        framer, ready, start = Framer(shift, length, snip_edges), [], 0
        while start < len(samples):
            size = sizes[len(ready) % len(sizes)]
            framer.accept(samples[start : start + size])
            ready.append(framer.ready())
            start += size
        framer.finish()
        ready.append(framer.ready())
        expected = arrays[f"online.{wave}.snip{snip_edges:d}.blocks{pattern}.frames_ready"]
        np.testing.assert_array_equal(ready, expected)


@pytest.mark.parametrize("snip_edges", [False, True])
@pytest.mark.parametrize(("sample_rate", "block"), [(16000, 1), (16000, 777), (8000, 100)])
@pytest.mark.parametrize("num_samples", [0, 1, 79, 80, 119, 320, 399, 400, 401, 999, 4001])
def test_framed_features_are_those_of_the_whole_utterance(
    snip_edges: bool, sample_rate: int, block: int, num_samples: int
):
    config = FbankConfig(sample_rate=sample_rate, snip_edges=snip_edges)
    fbank = Fbank(config)
    samples = np.random.default_rng(0).normal(0, 0.1, num_samples).astype(np.float32)
    framer = Framer(fbank.shift_samples, fbank.frame_samples, snip_edges)
    parts = []
    for start in range(0, num_samples, block):
        framer.accept(samples[start : start + block])
        parts.append(frames_of(framer, fbank, most=3))
    framer.finish()
    parts.append(frames_of(framer, fbank))
    whole, _ = fbank(torch.from_numpy(samples)[None], torch.tensor([num_samples]))
    torch.testing.assert_close(torch.cat(parts), whole[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("block", [1, 160, 777])
@pytest.mark.parametrize("num_samples", [0, 1, 159, 160, 361, 362, 1000, 4001])
def test_framed_features_of_nemo_are_those_of_the_whole_utterance(block: int, num_samples: int):
    fbank = NemoFbank(FbankConfig(type="nemo", low_freq_hz=0, high_freq_hz=0))
    samples = np.random.default_rng(0).normal(0, 0.1, num_samples).astype(np.float32)
    framer, parts = Framer(fbank.shift_samples, fbank.frame_samples, fading=fbank.fading), []
    for start in range(0, num_samples, block):
        framer.accept(samples[start : start + block])
        parts.append(frames_of(framer, fbank, most=3))
    framer.finish()
    parts.append(frames_of(framer, fbank))
    whole, _ = fbank(torch.from_numpy(samples)[None], torch.tensor([num_samples]))
    torch.testing.assert_close(torch.cat(parts), whole[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("fading", [0.0, 0.97])
def test_only_what_is_still_needed_is_kept(fading: float):
    framer = Framer(160, 400, fading=fading)
    for _ in range(1000):
        framer.accept(np.zeros(1000, np.float32))
        if framer.ready():
            framer.take(framer.ready())
        assert len(framer._buffer) <= 1400


def test_samples_are_counted_exactly_beyond_what_32_bits_hold():
    framer = Framer(160, 400)
    framer.num_samples = framer._first = 2**33 * 160
    framer.num_taken = 2**33
    framer._buffer = np.zeros(0, np.float32)
    block: Floats = np.arange(1000, dtype=np.float32)
    framer._first -= 400
    framer._buffer = np.zeros(400, np.float32)
    framer.accept(block)
    assert framer.ready() == (1000 - 280) // 160 + 1
    np.testing.assert_array_equal(framer.take(1)[120:], block[:280])


@pytest.mark.parametrize("snip_edges", [False, True])
@pytest.mark.parametrize("num_samples", [400, 1000, 1600])
def test_no_frames_are_a_window_that_frames_can_be_appended_to(snip_edges: bool, num_samples: int):
    framer = Framer(160, 400, snip_edges)
    framer.accept(np.ones(num_samples, np.float32))
    framer.finish()
    framer.take(framer.ready())
    assert len(framer.take(0)) == 400 - 160
