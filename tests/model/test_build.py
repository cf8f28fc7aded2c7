import re
from pathlib import Path

import pytest
import torch

from asr.config import load_config
from asr.errors import ConfigError
from asr.features import FbankConfig
from asr.losses import LossConfig
from asr.model.build import DECODERS, ENCODERS, build_model
from asr.model.conformer import ConformerConfig
from asr.model.decoder import DecoderConfig

CONF = Path(__file__).parents[2] / "recipes" / "conf"


@pytest.mark.parametrize("registry", [ENCODERS, DECODERS])
def test_the_key_is_the_type_of_the_configuration(registry):
    for name, (config_class, _) in registry.items():
        assert config_class().type == name


def test_encoder_and_decoder_may_have_different_sizes():
    encoder = ConformerConfig(dim=16, num_layers=1, ff_dim=8)
    decoder = DecoderConfig(dim=24, num_layers=1, ff_dim=8)
    model = build_model(FbankConfig(num_bins=20), encoder, decoder, LossConfig(), 7)
    assert model.ctc.out_features == model.decoder.out.out_features == 7
    assert model.encoder.dim == 16
    assert model.cmvn.mean.shape == (20,)


@pytest.mark.parametrize(
    ("encoder", "decoder", "message"),
    [
        ({"dim": 0}, {}, "encoder.dim is 0; expected at least 1"),
        ({"dropout": 2.0}, {}, "encoder.dropout is 2.0; expected at least 0 and below 1"),
        ({}, {"num_layers": 0}, "decoder.num_layers is 0; expected at least 1"),
    ],
)
def test_sizes_that_no_model_has_are_named(encoder, decoder, message):
    with pytest.raises(ConfigError, match=message):
        build_model(FbankConfig(), ConformerConfig(**encoder), DecoderConfig(**decoder), LossConfig(), 7)


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_head_of_a_configuration_says_how_large_the_model_is(path):
    config = load_config([path])
    with torch.device("meta"):
        model = build_model(config.features, config.encoder, config.decoder, config.loss, 500)
    stated = re.search(r"([\d.]+) M parameters with 500 units", path.read_text())
    assert stated
    digits = len(stated[1].partition(".")[2])
    assert f"{sum(x.numel() for x in model.parameters()) / 1e6:.{digits}f}" == stated[1]
