"""Heads that attend to where the tokens are: found, saved, and used when the model is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from asr.errors import CheckpointError
from asr.features import FbankConfig
from asr.losses import LossConfig
from asr.model.build import build_model
from asr.model.conformer import ConformerConfig
from asr.model.decoder import SOS_EOS, DecoderConfig, Guide
from asr.model.hybrid import HybridModel
from asr.train.checkpoint import load_model
from asr.train.heads import Heard, hear, listening, load_guide, measure, save_guide, search
from recipes.cli import main


@pytest.fixture
def model() -> HybridModel:
    torch.manual_seed(3)
    encoder = ConformerConfig(dim=16, num_layers=1, num_heads=2, ff_dim=16, subsampling_channels=2)
    decoder = DecoderConfig(dim=24, num_layers=2, num_heads=3, ff_dim=16)
    return build_model(FbankConfig(), encoder, decoder, LossConfig(), 9).eval()


def heard(model: HybridModel, seed: int, guide: Guide | None = None, shift: int = 0) -> Heard:
    """An utterance whose tokens are where `guide` attends, or `shift` frames later."""
    generator = torch.Generator().manual_seed(seed)
    y, tokens = torch.randn(1, 30, 16, generator=generator), torch.randint(2, 9, (6,), generator=generator)
    start = torch.zeros(6, dtype=torch.int64)
    if guide:
        attention = listening(model.decoder, Heard(y, tokens, start, start + 1))
        start = attention[guide.layer, list(guide.heads)].mean(0)[:, :-1].argmax(-1) + shift
    return Heard(y, tokens, start, start + 1)


@torch.no_grad()
def test_what_is_overheard_is_what_the_decoder_says_of_a_guide(model: HybridModel) -> None:
    one = heard(model, 1)
    tokens = torch.cat([torch.tensor([SOS_EOS]), one.tokens[:-1]])[None]
    attention = listening(model.decoder, one)
    assert attention.shape == (2, 3, 6, 30)
    for layer in range(2):
        for heads in ((0,), (2,), (0, 1, 2)):
            guide = Guide(layer, heads)
            said = model.decoder(tokens, *model.decoder.memory(one.y), torch.tensor([30]), guide=guide)
            torch.testing.assert_close(said.attention[0], attention[layer, list(heads)].mean(0))
    assert not any(layer.cross._forward_pre_hooks for layer in model.decoder.layers)


@pytest.mark.parametrize("guide", [Guide(0, (1,)), Guide(1, (2,)), Guide(0, (0, 1, 2))])
def test_the_guide_that_finds_every_token_is_chosen(model: HybridModel, guide: Guide) -> None:
    utterances = [heard(model, seed, guide) for seed in range(4)]
    found = search(model, utterances)
    assert (found[0].guide, found[0].distance_frames, found[0].near) == (guide, 0.0, 1.0)
    assert [x.near for x in found] == sorted((x.near for x in found), reverse=True)
    assert {x.guide for x in found} >= {Guide(i, (h,)) for i in range(2) for h in range(3)}
    assert all(found[0].distance_frames < x.distance_frames for x in found[1:])


@pytest.mark.parametrize(("shift", "near"), [(2, 1.0), (-2, 1.0), (3, 0.0), (-3, 0.0)])
def test_distance_is_counted_to_the_frames_of_the_token(model: HybridModel, shift: int, near: float) -> None:
    guide = Guide(1, (0,))
    one = heard(model, 5, guide, shift)
    (found,) = measure(model, [one, one], [guide])
    assert (found.distance_frames, found.near) == (abs(shift), near)
    long = Heard(one.y, one.tokens, one.start - 5, one.end + 5)
    assert measure(model, [long], [guide])[0].distance_frames == 0


def test_an_utterance_is_aligned_or_passed_over(model: HybridModel) -> None:
    samples = torch.randn(16000) * 0.1
    one = hear(model, samples, [4, 4, 5])
    assert one is not None
    assert (one.start[1:] >= one.end[:-1]).all()
    assert (one.end > one.start).all()
    assert int(one.end[-1]) <= one.y.shape[1] == 25
    assert hear(model, samples, []) is None
    assert hear(model, samples, [4] * 20) is None
    assert hear(model, samples[:100], [4]) is None


def test_heads_are_remembered(model: HybridModel, tmp_path: Path) -> None:
    assert load_guide(tmp_path, model.decoder) is None
    found = search(model, [heard(model, 1, Guide(0, (1,)))])[0]
    save_guide(tmp_path, found, 6)
    assert load_guide(tmp_path, model.decoder) == Guide(0, (1,))
    about = json.loads((tmp_path / "heads.json").read_text())
    assert about["figures"] == {"distance_frames": 0.0, "near": 1.0, "tokens": 6}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not a layer and its heads"),
        ("[1]", "not a layer and its heads"),
        ('{"layer": 0}', "not a layer and its heads"),
        ('{"layer": 0, "heads": 1}', "not a layer and its heads"),
        ('{"layer": 2, "heads": [0]}', "layer is 2, the decoder has 2"),
        ('{"layer": -1, "heads": [0]}', "layer is -1, the decoder has 2"),
        ('{"layer": true, "heads": [0]}', "layer is True"),
        ('{"layer": 0, "heads": []}', "heads are [], expected some of the decoder's 3"),
        ('{"layer": 0, "heads": [1, 3]}', "heads are [1, 3], expected some of the decoder's 3"),
        ('{"layer": 0, "heads": "01"}', "heads are ['0', '1']"),
    ],
)
def test_heads_that_cannot_be_are_refused(model: HybridModel, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "heads.json").write_text(text)
    with pytest.raises(CheckpointError) as error:
        load_guide(tmp_path, model.decoder)
    assert said in str(error.value)
    assert str(error.value).startswith(f"{tmp_path}/heads.json: ")
    assert "asr heads" in str(error.value)


def test_the_verb_guides_the_model_that_is_loaded(lab: Any, capsys: pytest.CaptureFixture[str]) -> None:
    exp, _ = lab.train("a", "optim.max_steps=2", "decoder.num_layers=2")
    manifest = lab.folder / "train.jsonl.gz"
    assert load_model(exp, "latest")[0].decoder.guide == Guide(1, (0, 1))
    assert main(["heads", str(exp), str(manifest), "--checkpoint", "latest", "--device", "cpu"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["layer", "distance", "within", "2", "heads"]
    assert len(out) == 1 + 6 + 1
    about = json.loads((exp / "heads.json").read_text())
    assert about["figures"]["tokens"] == 19
    guide = load_model(exp, "latest")[0].decoder.guide
    assert guide == Guide(about["layer"], tuple(about["heads"]))
    assert f"layer {guide.layer}, " in out[-1]

    (exp / "heads.json").write_text('{"layer": 7, "heads": [0]}')
    assert main(["heads", str(exp), str(manifest), "--checkpoint", "latest"]) == 2
    assert "layer is 7, the decoder has 2; remove the file" in capsys.readouterr().err
