"""Our model with the weights of FireRedASR-AED gives its outputs, from features to n-best lists.

Sizes and options are those of the config.json beside the arrays. Our units are in another order than theirs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn, tensor

from asr.convert import firered
from asr.convert.names import load
from asr.decode.config import SearchConfig
from asr.decode.scorer import Hypothesis
from asr.decode.unbounded import unbounded
from asr.features import FbankConfig
from asr.losses import LossConfig
from asr.model.attention import sinusoids
from asr.model.build import build_model
from asr.model.decoder import TransformerDecoder
from asr.model.firered import FireRedEncoder
from asr.model.hybrid import HybridModel
from asr.model.masks import valid_mask
from asr.model.torch_scorer import Memory, TorchScorer

LAYER = {"ffn1": "feed_forward_1", "mhsa": "attention", "conv": "convolution", "ffn2": "feed_forward_2"}
"""Their modules, whose output includes the residual: ours."""


@dataclass
class FireRed:
    config: dict
    arrays: dict[str, Tensor]
    model: HybridModel

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]

    @property
    def utterances(self) -> range:
        return range(len(self["x_lens"]))

    def x(self, index: int) -> tuple[Tensor, Tensor]:
        """One utterance, normalised, without padding."""
        n = int(self["x_lens"][index])
        return self["x"][index : index + 1, :n], tensor([n])

    def theirs(self, hypothesis: Hypothesis) -> list[int]:
        units = firered.units(self.config["args"])
        return [units.outputs[x] for x in hypothesis.tokens]


@pytest.fixture(scope="module")
def fire(golden_set: Callable) -> Iterator[FireRed]:
    golden = golden_set("fireredasr_aed")
    args = golden.config["args"]
    num_units = len(firered.units(args).inputs)
    encoder, decoder = firered.encoder_config(args), firered.decoder_config(args)
    model = build_model(FbankConfig(num_bins=args["idim"]), encoder, decoder, LossConfig(), num_units).eval()
    parts = nn.ModuleDict({"encoder": model.encoder, "decoder": model.decoder})
    load(parts, firered.tensors(golden.weights), firered.NAMES, "golden", firered.units(args))
    with torch.no_grad():
        yield FireRed(golden.config, golden.arrays, model)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)


def test_the_position_tables(fire):
    rows = fire["decoder_pe.first_rows"]
    close(sinusoids(torch.arange(len(rows))[None], rows.shape[1])[0], rows)
    table = fire["embed.pos_emb"]
    end = table.shape[1] // 2
    close(sinusoids(torch.arange(end, -end - 1, -1)[None], table.shape[2]), table)


def test_the_modules_of_the_first_layer(fire):
    seen: dict[str, Tensor] = {}
    layer = fire.model.encoder.layers[0]

    def keep(name):
        def hook(_, args, output):
            seen[f"{name}.in"], seen[name] = args[0], output

        return hook

    hooks = [layer.get_submodule(ours).register_forward_hook(keep(name)) for name, ours in LAYER.items()]
    hooks.append(layer.register_forward_hook(keep("layer_norm")))
    _, y_lens, _ = fire.model.encoder(*fire.x(int(fire["layer0.utterance_index"])))
    for hook in hooks:
        hook.remove()
    n = int(y_lens)  # after it theirs has frames that nothing attends to
    close(seen["layer_norm.in"], fire["embed.out"][:, :n])
    close(seen["layer_norm"], fire["layer0.layer_norm"][:, :n])
    for name in LAYER:
        close(seen[f"{name}.in"] + seen[name], fire[f"layer0.{name}"][:, :n])


def test_utterances_alone_and_in_a_batch(fire):
    y, y_lens, _ = fire.model.encoder(fire["x"], fire["x_lens"])
    assert torch.equal(y_lens, fire["encoder_out_lens"])
    mask = fire["encoder_mask"][:, 0]
    assert torch.equal(valid_mask(y_lens, mask.shape[1]), mask)
    for i, n in enumerate(y_lens.tolist()):
        close(y[i, :n], fire["encoder_out"][i, :n])
        alone, _, _ = fire.model.encoder(*fire.x(i))
        close(alone, fire[f"alone{i}.encoder_out"][:, :n])


NAMED = {
    "beam_size": "beam",
    "nbest": "nbest",
    "softmax_smoothing": "temperature",
    "length_penalty": "length_penalty",
    "eos_penalty": "eos_scale",
}
"""Their search options: ours."""


class Recording(TorchScorer):
    """Remembers all tokens that were in the beam."""

    def __init__(self, model: HybridModel) -> None:
        super().__init__(model, "cpu")
        self.seen: set[int] = set()

    def step(self, state, tokens, k, window=None):
        self.seen.update(tokens.flatten().tolist())
        return super().step(state, tokens, k, window)


def search(fire: FireRed, options: dict, index: int, num_frames: int) -> tuple[list[Hypothesis], set[int]]:
    """The n-best list of an utterance in a batch whose longest has `num_frames` encoder frames, and all units
    that were in the beam."""
    assert not options.keys() - NAMED.keys() - {"decode_max_len"}
    y_lens = fire["encoder_out_lens"][index : index + 1]
    y = fire["encoder_out"][index : index + 1, : int(y_lens)]
    most = options.get("decode_max_len", 0) or num_frames  # may exceed the frames
    config = SearchConfig(
        **{NAMED[name]: value for name, value in options.items() if name in NAMED},
        length_offset=6.0,  # it counts sos as a token
        extra_tokens=max(most - int(y_lens), 0),
        max_tokens=most,
    )
    frames = np.zeros((int(y_lens), fire.model.ctc.out_features), np.float32)  # there is no CTC
    memory = Memory(*fire.model.decoder.memory(y), y, y_lens)
    scorer = Recording(fire.model)
    return unbounded(scorer, [frames], memory, config)[0], scorer.seen


def test_searches(fire):
    """Theirs masks a pad within a text, which no text should have; ours attends to any unit."""
    pad = firered.units(fire.config["args"]).outputs.index(fire.config["args"]["pad_id"])
    compared = 0
    for name, options in fire.config["search"].items():
        for i in fire.utterances:
            for of, frames in ((f"batch.utt{i}", "encoder_out"), (f"alone{i}.utt0", f"alone{i}.encoder_out")):
                found, seen = search(fire, options, i, fire[frames].shape[1])
                if pad in seen:
                    continue
                expected = fire[f"search.{name}.{of}.nbest"].tolist()
                lens = fire[f"search.{name}.{of}.lens"].tolist()
                assert [fire.theirs(x) for x in found] == [x[:n] for x, n in zip(expected, lens, strict=True)]
                compared += 1
    assert compared


def test_scores_are_those_of_forced_tokens(fire):
    scorer = TorchScorer(fire.model, "cpu")
    units = firered.units(fire.config["args"])
    for name in fire.config["search"]:
        for i in fire.utterances:
            of = f"search.{name}.alone{i}.utt0"
            n = int(fire["encoder_out_lens"][i])
            y = fire[f"alone{i}.encoder_out"][:, :n]
            memory = Memory(*fire.model.decoder.memory(y), y, tensor([n]))
            rows = zip(
                *(fire[f"{of}.{x}"].tolist() for x in ("nbest", "lens", "logprob_with_eos")), strict=True
            )
            for text, length, expected in rows:
                tokens = [units.outputs.index(v) for v in text[:length]]
                if fire.config["args"]["pad_id"] not in text[:length]:
                    (found,) = scorer.score(memory, np.array([0]), [tokens])
                    assert found.sum() == pytest.approx(expected, abs=1e-3)


def test_a_published_model_has_our_tensors(full_size):
    for model, weights in full_size("firered"):
        args = model["options"]
        encoder, num_units = firered.encoder_config(args), len(firered.units(args).inputs)
        with torch.device("meta"):
            decoder = TransformerDecoder(firered.decoder_config(args), num_units, encoder.dim)
            parts = nn.ModuleDict({"encoder": FireRedEncoder(encoder, args["idim"]), "decoder": decoder})
            load(parts, firered.tensors(weights), firered.NAMES, model["name"], firered.units(args))
        key_biases = 2 * args["n_layers_dec"] * encoder.dim
        untied = args["odim"] * (encoder.dim + 1)
        assert sum(p.numel() for p in parts.parameters()) == model["params"] + key_biases + untied
