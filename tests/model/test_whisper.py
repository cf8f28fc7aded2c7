"""Whisper's encoder: windows of a fixed length, without masking."""

import math

import pytest
import torch
from torch import tensor

from asr.config import load_config
from asr.errors import AudioError, ConfigError
from asr.model.build import build_model
from asr.model.whisper import WhisperConfig, WhisperEncoder, sinusoid_table

CONFIG = """
features: {type: whisper, num_bins: 16, low_freq_hz: 0, high_freq_hz: 0, window_s: 0.4}
encoder: {type: whisper, dim: 24, num_layers: 2, num_heads: 2, ff_dim: 32, window: 20}
decoder: {dim: 16, num_layers: 1, num_heads: 2, ff_dim: 32}
"""


def build(**changes: object) -> WhisperEncoder:
    sizes = {"dim": 24, "num_layers": 2, "num_heads": 2, "ff_dim": 32, "window": 20}
    return WhisperEncoder(WhisperConfig(**sizes | changes), 16).eval()


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    config = load_config([tmp_path / "config.yaml"])
    return build_model(config.features, config.encoder, config.decoder, config.loss, 9).eval()


@torch.no_grad()
def test_every_frame_hears_the_whole_window():
    encoder = build()
    x = torch.randn(1, 40, 16, requires_grad=False)
    y, y_lens, state = encoder(x, tensor([40]))
    assert y.shape == (1, 20, 24)
    assert y_lens.tolist() == [20]
    assert not state.tensors()
    for t in (0, 21, 39):
        other = x.clone()
        other[0, t] += 1
        changed = (encoder(other, tensor([40]))[0] - y).abs().amax(-1)
        assert (changed > 1e-5).all()


@torch.no_grad()
def test_company_and_lengths_change_nothing():
    encoder = build()
    x = torch.randn(3, 40, 16)
    y, y_lens, _ = encoder(x, tensor([40, 3, 0]))
    assert y_lens.tolist() == [20] * 3
    for i in range(3):
        torch.testing.assert_close(y[i], encoder(x[i : i + 1], tensor([40]))[0][0], rtol=0, atol=1e-5)


def test_a_bias_of_the_keys_changes_nothing():
    encoder = build().double()
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    y, _, _ = encoder(x, tensor([40, 40]))
    with torch.no_grad():
        for layer in encoder.layers:
            layer.attention.project.bias[24:48] += torch.randn(24)
    torch.testing.assert_close(encoder(x, tensor([40, 40]))[0], y, rtol=0, atol=1e-12)


def test_positions_are_sines_and_then_cosines():
    table = sinusoid_table(50, 8)
    for t in (0, 1, 49):
        for i in range(4):
            angle = t / 10000 ** (i / 3)
            assert table[t, i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[t, 4 + i].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_there_are_no_streams():
    encoder = build()
    with pytest.raises(ConfigError, match="chunk: 4 frames, and an encoder of type whisper takes whole"):
        encoder(torch.zeros(1, 40, 16), tensor([40]), None, 4)
    with pytest.raises(ConfigError, match="cannot stream"):
        encoder.init_state(1, 0)
    assert not encoder.can_stream


def test_what_does_not_fit_is_said():
    with pytest.raises(ConfigError, match=r"encoder.window: 20 frames need 40 feature frames, not 38"):
        build()(torch.zeros(1, 38, 16), tensor([38]))
    with pytest.raises(ConfigError, match=r"encoder.dim: 24 channels do not divide into 5 heads"):
        build(num_heads=5)
    config = WhisperConfig(dim=24)
    config.chunk.dynamic = True
    with pytest.raises(ConfigError, match=r"encoder.chunk.dynamic: true"):
        WhisperEncoder(config, 16)


def test_a_model_hears_what_its_window_holds_and_learns(model):
    samples, lens = torch.randn(2, 6400), tensor([6400, 900])
    x, x_lens = model.features(samples, lens)
    assert x.shape == (2, 40, 16)
    assert x_lens.tolist() == [40, 40]
    loss = model(x, x_lens, tensor([[3, 4, 5], [6, 0, 0]]), tensor([3, 1]))
    loss.total.backward()
    for name, p in model.encoder.named_parameters():
        assert p.grad.abs().max() > 0, name
    with pytest.raises(AudioError, match="cut it at pauses"):
        model.features(torch.zeros(1, 6401), tensor([6401]))
