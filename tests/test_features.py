import json
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, tensor

from asr.errors import ConfigError
from asr.features import FLOOR, Cmvn, Fbank, FbankConfig


@dataclass
class Kaldi:
    """Kaldi's options and its results."""

    options: dict
    arrays: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]

    def config(self, **changes: object) -> FbankConfig:
        return FbankConfig(
            sample_rate=self.options["sample_rate"],
            num_bins=self.options["num_bins"],
            frame_ms=self.options["frame_length_ms"],
            shift_ms=self.options["frame_shift_ms"],
            low_freq_hz=self.options["low_freq"],
            **changes,
        )


@pytest.fixture(scope="module")
def kaldi(golden_folder) -> Kaldi:
    folder = golden_folder("kaldi_fbank")
    options = json.loads((folder / "config.json").read_text())
    if options["window"] != "povey":
        pytest.skip(f"{folder} has windows of another form than ours")
    with np.load(folder / "io.npz") as arrays:
        return Kaldi(options, {name: torch.from_numpy(arrays[name]) for name in arrays.files})


def frames(config: FbankConfig, samples: Tensor) -> Tensor:
    x, x_lens = Fbank(config)(samples[None], tensor([len(samples)]))
    assert x_lens.tolist() == [x.shape[1]]
    return x[0]


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def assert_equals_kaldi(x: Tensor, expected: Tensor) -> None:
    """Far below the strongest bin of a frame, float32 results are rounding noise in the reference too."""
    below = expected.amax(1, keepdim=True) - expected
    for nats, atol in ((18, 6e-4), (22, 1e-2)):
        close(x[below < nats], expected[below < nats], atol)


@pytest.mark.parametrize("snip_edges", [False, True])
def test_frames_equal_kaldis(kaldi, snip_edges):
    names = [re.fullmatch(rf"fbank\.(\w+)\.snip{snip_edges:d}\.hf(.+)\.scale(\d+)", x) for x in kaldi.arrays]
    assert any(names)
    for name in filter(None, names):
        wave, high_freq, scale = name[1], float(name[2]), float(name[3])
        config = kaldi.config(snip_edges=snip_edges, high_freq_hz=high_freq, scale=scale)
        x, expected = frames(config, kaldi[f"wav.{wave}"]), kaldi[name[0]]
        assert x.shape == expected.shape
        assert_equals_kaldi(x, expected)


@pytest.mark.parametrize("snip_edges", [False, True])
def test_frames_of_very_short_utterances_equal_kaldis(kaldi, snip_edges):
    high_freqs = kaldi.options["high_freqs"]
    high_freq = 0.0 if 0.0 in high_freqs else high_freqs[0]  # their names do not say
    for num_samples in kaldi.options["short"]:
        config = kaldi.config(snip_edges=snip_edges, high_freq_hz=high_freq)
        x = frames(config, kaldi["wav.noise"][:num_samples])
        expected = kaldi[f"short.len{num_samples}.snip{snip_edges:d}"]
        assert x.shape == expected.shape
        close(x, expected, 6e-4)


@pytest.mark.parametrize("sample_rate", [8000, 11025, 16000, 44100])
@pytest.mark.parametrize("snip_edges", [False, True])
def test_frames_equal_torchaudios_at_every_sample_rate(sample_rate, snip_edges):
    from torchaudio.compliance import kaldi

    config = FbankConfig(sample_rate=sample_rate, num_bins=40, snip_edges=snip_edges)
    samples = torch.randn(sample_rate // 2) * torch.linspace(0, 0.3, sample_rate // 2)
    expected = kaldi.fbank(
        samples[None],
        sample_frequency=sample_rate,
        num_mel_bins=40,
        snip_edges=snip_edges,
        high_freq=-400,
        dither=0,
    )
    # torchaudio computes the triangles in float32, and its FFT loses the weakest bins of the first frames
    close(frames(config, samples), expected, 2e-3)


@pytest.mark.parametrize("snip_edges", [False, True])
def test_padding_does_not_change_an_utterance(snip_edges):
    config = FbankConfig(snip_edges=snip_edges)
    samples, lens = torch.randn(5, 4000), tensor([4000, 3217, 400, 90, 0])
    x, x_lens = Fbank(config)(samples, lens)
    for i, n in enumerate(lens.tolist()):
        close(x[i, : x_lens[i]], frames(config, samples[i, :n]), 1e-4)
        assert not x[i, x_lens[i] :].any()


def test_the_frames_of_a_window_are_those_of_the_utterance():
    fbank = Fbank(FbankConfig())
    samples = torch.randn(2, 4000)
    whole, _ = fbank(samples, tensor([4000, 4000]))
    # frame 3 starts at 3 * 160 + 160 / 2 - 400 / 2
    close(fbank.frames(samples[:, 360 : 360 + 4 * 160 + 400]), whole[:, 3:8])


def test_silence_is_the_floor():
    x = frames(FbankConfig(), torch.zeros(1600))
    close(x, torch.full((10, 80), FLOOR).log())


def test_the_gradient_is_that_of_differences():
    fbank = Fbank(FbankConfig(sample_rate=800, num_bins=4, low_freq_hz=50, high_freq_hz=0)).double()
    samples = torch.randn(2, 60, dtype=torch.float64, requires_grad=True)
    lens = tensor([60, 33])
    assert torch.autograd.gradcheck(lambda s: fbank(s, lens)[0], samples)


@pytest.mark.parametrize("high_freq_hz", [8001.0, -7990.0])
def test_bins_beyond_half_the_sample_rate_are_refused(high_freq_hz):
    with pytest.raises(ConfigError, match="do not fit samples at 16000 Hz"):
        Fbank(FbankConfig(high_freq_hz=high_freq_hz))


def test_cmvn_normalises_what_it_was_estimated_on():
    parts = [torch.randn(n, 5) * tensor([1.0, 2, 3, 4, 5]) + 7 for n in (10, 200, 31)]
    x = Cmvn.from_frames(iter(parts))(torch.cat(parts))
    close(x.mean(0), torch.zeros(5))
    close(x.var(0, correction=0), torch.ones(5))


def test_cmvn_is_the_identity_until_it_is_estimated():
    x = torch.randn(3, 5)
    close(Cmvn(5)(x), x, atol=0)
    with pytest.raises(ValueError, match="no frames"):
        Cmvn.from_frames([])
