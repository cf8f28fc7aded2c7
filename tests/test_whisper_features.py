"""Whisper's log-mel: slaney triangles, mirrored ends, and a floor that depends on the loudest frame."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor, tensor

from asr.errors import AudioError, ConfigError
from asr.features import FbankConfig
from asr.whisper_features import WhisperFbank, slaney_mel


def build(window_s: float, **changes: object) -> WhisperFbank:
    options = {"low_freq_hz": 0, "high_freq_hz": 0, "window_s": window_s}
    return WhisperFbank(FbankConfig(type="whisper", **options | changes))


def frames(fbank: WhisperFbank, samples: Tensor) -> Tensor:
    x, x_lens = fbank(samples[None], tensor([len(samples)]))
    assert x_lens.tolist() == fbank.num_frames(tensor([len(samples)])).tolist() == [x.shape[1]]
    return x[0]


def reference(fbank: WhisperFbank, samples: Tensor) -> Tensor:
    """By definition, with torch's Fourier transform in double precision."""
    n = fbank.frame_samples
    window = torch.hann_window(n, dtype=torch.float64)
    power = torch.stft(samples.double(), n, fbank.shift_samples, window=window, return_complex=True)
    x = (fbank.mel.double().T @ power[..., :-1].abs().square()).clamp(min=1e-10).log10().T
    return (torch.maximum(x, x.max() - 8) + 4) / 4


def close(actual, expected, atol):
    torch.testing.assert_close(actual.double(), torch.as_tensor(expected).double(), rtol=0, atol=atol)


@pytest.fixture(scope="module")
def whisper(golden):
    folder = golden / "openai_whisper"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    with np.load(folder / "io.npz") as arrays:
        return json.loads((folder / "config.json").read_text()), {x: arrays[x] for x in arrays.files}


def test_triangles_equal_whispers(whisper):
    config, arrays = whisper
    mel = build(1, num_bins=config["dims"]["n_mels"]).mel
    close(mel.T, arrays["mel_filters"], 1e-7)


def test_frames_equal_whispers(whisper):
    config, arrays = whisper
    for i in range(len(config["wav_seconds"])):
        samples = torch.from_numpy(arrays[f"wav{i}"])
        alone = build(len(samples) / 16000, num_bins=config["dims"]["n_mels"])
        close(frames(alone, samples).T, arrays[f"mel{i}.no_padding"], 2e-4)
        first = arrays[f"mel{i}.padded_30s.first_frames"]
        x = frames(build(30, num_bins=config["dims"]["n_mels"]), samples).T
        assert x.shape[1] == arrays[f"mel{i}.padded_30s.frames"]
        close(x[:, : first.shape[1]], first, 2e-4)
        last = arrays[f"mel{i}.padded_30s.last_value"]
        close(x[:, first.shape[1] :], np.full((len(x), x.shape[1] - first.shape[1]), last), 2e-4)


def test_a_batch_equals_whispers(whisper):
    config, arrays = whisper
    size = 2 * config["dims"]["n_audio_ctx"] * 160
    rows = [torch.from_numpy(arrays[f"wav{i}"])[:size] for i in range(len(config["wav_seconds"]))]
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    x, _ = build(size / 16000, num_bins=config["dims"]["n_mels"])(batch, tensor([len(row) for row in rows]))
    close(x.transpose(1, 2), arrays["mel"], 2e-4)


@pytest.mark.parametrize(("sample_rate", "num_bins"), [(16000, 80), (16000, 128), (8000, 40)])
def test_frames_equal_the_definition(sample_rate, num_bins):
    samples = torch.randn(sample_rate) * torch.linspace(0, 0.3, sample_rate) ** 4
    fbank = build(1, sample_rate=sample_rate, num_bins=num_bins)
    close(frames(fbank, samples), reference(fbank, samples), 1e-4)


def test_triangles_have_equal_areas_and_meet_at_their_edges():
    assert build(1, num_bins=20, sample_rate=4000).mel.shape == (51, 20)
    mel = slaney_mel(FbankConfig(low_freq_hz=0, high_freq_hz=0), fft_size=32000)
    close(mel.sum(0) * 0.5, torch.ones(80), 1e-3)  # bins are 0.5 Hz apart


def test_company_and_what_is_behind_the_end_change_nothing():
    fbank = build(0.5)
    lens = [8000, 5000, 17, 0]
    samples = torch.randn(4, 8000)
    x, _ = fbank(samples, tensor(lens))
    for row, n, found in zip(samples, lens, x, strict=True):
        close(found, frames(fbank, row[:n]), 1e-5)


def test_the_floor_is_eight_powers_below_the_loudest_frame():
    samples = torch.cat([torch.zeros(4000), torch.randn(4000)])
    x = frames(build(1), samples)
    assert x.max() - x.min() == pytest.approx(2, abs=1e-6)
    close(x[-20:], x.min().expand(20, 80), 0)


def test_the_frames_of_a_window_are_those_of_the_utterance():
    fbank = build(0.5)
    samples = torch.randn(8000)
    mirrored = torch.nn.functional.pad(samples[None, None], (200, 200), mode="reflect")[:, 0]
    x = fbank.frames(mirrored)
    close(x[0, :-1], frames(fbank, samples), 1e-4)


def test_an_utterance_beyond_the_window_is_refused():
    with pytest.raises(AudioError, match=r"0\.6 s of audio, and the model takes 0\.5 s at most; cut it"):
        build(0.5)(torch.zeros(2, 9600), tensor([100, 9600]))
    x, _ = build(0.5)(torch.zeros(1, 9600), tensor([8000]))
    assert x.shape == (1, 50, 80)


def test_what_does_not_fit_is_said():
    with pytest.raises(ConfigError, match=r"features.window_s: 0; .* as in 30"):
        WhisperFbank(FbankConfig(type="whisper"))
    with pytest.raises(ConfigError, match="do not fit samples at 16000 Hz"):
        build(30, high_freq_hz=8001)
