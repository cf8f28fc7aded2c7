"""NeMo's log-mel frames: pre-emphasis, silence at the ends, and normalisation over the utterance."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor, tensor

from asr import nemo_features
from asr.convert.nemo import features_config
from asr.errors import CheckpointError, ConfigError
from asr.features import FbankConfig
from asr.nemo_features import NemoFbank


def build(**changes: object) -> NemoFbank:
    return NemoFbank(FbankConfig(**{"type": "nemo", "low_freq_hz": 0, "high_freq_hz": 0} | changes))  # type: ignore[arg-type]


def frames(fbank: NemoFbank, samples: Tensor) -> Tensor:
    x, x_lens = fbank(samples[None], tensor([len(samples)]))
    assert x_lens.tolist() == [x.shape[1]] == [len(samples) // fbank.shift_samples]
    return x[0]


def close(actual, expected, atol):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def nemo(golden):
    folder = golden / "nemo_fastconformer"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    with np.load(folder / "io.npz") as arrays:
        found = {x: torch.from_numpy(arrays[x]) for x in arrays.files}
    return json.loads((folder / "config.json").read_text())["preprocessor"], found


def of_nemo(options: dict, normalize: str) -> NemoFbank:
    return NemoFbank(features_config(options | {"normalize": normalize}, "model_config.yaml"))


def test_triangles_and_window_equal_nemos(nemo):
    options, arrays = nemo
    fbank = of_nemo(options, "NA")
    close(fbank.mel.T, arrays["mel.filterbank"], 1e-7)
    close(fbank.fourier[:, 0], arrays["mel.window"], 1e-6)


@pytest.mark.parametrize(
    ("name", "normalize", "atol"),
    [("NA", "NA", 1e-3), ("per_feature", "per_feature", 2e-3), ("all_features", "all_features", 2e-3)],
)
def test_frames_equal_nemos(nemo, name, normalize, atol):
    options, arrays = nemo
    fbank = of_nemo(options, normalize)
    x, x_lens = fbank(arrays["wav"], arrays["wav_lens"])
    assert torch.equal(x_lens, arrays["mel.lens"])
    expected = arrays[f"mel.{name}.pad0"].transpose(1, 2)
    for i, n in enumerate(x_lens.tolist()):
        close(x[i, :n], expected[i, :n], atol)
        if (alone := f"mel.{name}.alone{i}") in arrays:
            close(frames(fbank, arrays["wav"][i, : arrays["wav_lens"][i]]), arrays[alone][0, :, :n].T, atol)


@pytest.mark.parametrize("normalize", ["none", "per_feature", "all_features"])
def test_padding_does_not_change_an_utterance(normalize):
    fbank = build(normalize=normalize)
    samples, lens = torch.randn(5, 4000), tensor([4000, 3217, 320, 161, 90])
    samples[1, 3217:] = torch.nan
    x, x_lens = fbank(samples, lens)
    for i, n in enumerate(lens.tolist()):
        close(x[i, : x_lens[i]], frames(fbank, samples[i, :n]), 1e-4)
        assert not x[i, x_lens[i] :].any()


def test_long_recordings_are_computed_in_pieces(monkeypatch):
    samples = torch.randn(2, 4000)
    x, _ = build()(samples, tensor([4000, 2500]))
    monkeypatch.setattr(nemo_features, "PIECE_FRAMES", 7)
    close(build()(samples, tensor([4000, 2500]))[0], x, 1e-5)


def test_the_frames_of_a_window_are_those_of_the_utterance():
    """After the end, samples decay so that pre-emphasis turns them into silence."""
    fbank, samples = build(), torch.randn(1, 4000)
    whole = frames(fbank, samples[0])
    first = fbank.frame_samples // 2 + 1
    fading = samples[:, -1:] * 0.97 ** torch.arange(1, 400)
    padded = torch.cat([torch.zeros(1, first), samples, fading], dim=1)
    for start, count in ((0, 25), (3, 8), (24, 1)):
        begin = start * fbank.shift_samples
        window = padded[:, begin : begin + (count - 1) * fbank.shift_samples + fbank.frame_samples]
        close(fbank.frames(window)[0], whole[start : start + count], 1e-4)


def test_normalised_frames_have_mean_0_and_variance_1():
    samples = torch.randn(16000) * torch.linspace(0, 1, 16000)
    x = frames(build(normalize="per_feature"), samples)
    close(x.mean(0), torch.zeros(80), 1e-5)
    close(x.var(0), torch.ones(80), 1e-3)
    x = frames(build(normalize="all_features"), samples)
    close(torch.stack([x.mean(), x.var()]), tensor([0.0, 1.0]), 1e-3)


def test_a_stream_cannot_be_normalised_over_the_utterance():
    with pytest.raises(ConfigError, match=r"features\.normalize: per_feature needs whole utterances"):
        build(normalize="per_feature").frames(torch.zeros(1, 401))
    with pytest.raises(
        ConfigError, match="normalize is per_feature; expected none with features of type kaldi"
    ):
        FbankConfig(normalize="per_feature")


@pytest.mark.parametrize(
    "options", [{"window": "hamming"}, {"n_fft": 1024}, {"normalize": "fixed"}, {"mag_power": 1.0}]
)
def test_features_that_cannot_be_converted_are_refused(options):
    name = next(iter(options))
    with pytest.raises(CheckpointError, match=f"model_config.yaml: preprocessor.{name}: .*, expected "):
        features_config({"window_size": 0.025} | options, "model_config.yaml")
