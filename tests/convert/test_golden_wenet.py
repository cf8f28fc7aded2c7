"""WeNet's outputs, from features to searches: encoder, caches, CTC, both decoders, losses, n-best lists.

Sizes and options are those of the config.json beside the arrays. Our units are in another order than theirs:
sos/eos is 1 here. The searches get the reference's encoder output of each utterance alone. Where padding
changes the reference's batches (symmetric convolutions), ours are compared with its output for one utterance.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn, tensor

from asr.convert.names import Units, load
from asr.convert.wenet import empty_decoder, wenet_names
from asr.decode.align import align
from asr.decode.config import SearchConfig
from asr.decode.ctc import CtcGreedy, CtcPrefixBeam
from asr.decode.rescore import rescore
from asr.decode.scorer import Hypothesis
from asr.decode.unbounded import unbounded
from asr.features import Cmvn, FbankConfig
from asr.losses import LossConfig, ctc_loss, label_smoothed_cross_entropy
from asr.model.attention import sinusoids
from asr.model.build import build_model
from asr.model.decoder import DecoderConfig, TransformerDecoder
from asr.model.hybrid import HybridModel
from asr.model.masks import valid_mask
from asr.model.torch_scorer import Memory, TorchScorer
from asr.model.wenet import WenetConformer, WenetConformerConfig

SETS = ["wenet_u2pp_conformer", "wenet_conformer_noncausal"]
LAYER = {  # theirs: ours
    "norm_ff_macaron": "feed_forward_1.0",
    "feed_forward_macaron": "feed_forward_1",
    "norm_mha": "attention_norm",
    "self_attn": "attention",
    "norm_conv": "convolution.norm",
    "conv_module": "convolution",
    "norm_ff": "feed_forward_2.0",
    "feed_forward": "feed_forward_2",
    "norm_final": "norm",
}


@dataclass
class Golden:
    config: dict
    arrays: dict[str, Tensor]
    order: list[int]
    """Our unit i is theirs order[i]."""
    model: HybridModel

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]

    def ours(self, tokens: Tensor) -> Tensor:
        """Our ids of their units; arbitrary where they are negative."""
        return torch.argsort(tensor(self.order))[tokens.clamp(min=0)]

    def theirs(self, hypothesis: Hypothesis) -> list[int]:
        return [self.order[x] for x in hypothesis.tokens]

    @property
    def utterances(self) -> range:
        return range(len(self["x_lens"]))

    def x(self, index: int) -> tuple[Tensor, Tensor]:
        """One utterance, normalised, without padding."""
        n = int(self["x_lens"][index])
        return self.model.cmvn(self["x"][index : index + 1, :n]), tensor([n])

    def heard(self, index: int) -> tuple[np.ndarray, Memory]:
        """CTC log-probabilities (T, V) and what the decoders attend to."""
        y = self[f"full.alone{index}.encoder_out"]
        return self.model.ctc_log_probs(y)[0].numpy(), memory(self.model.decoder, y)


def memory(decoder: TransformerDecoder, y: Tensor) -> Memory:
    return Memory(*decoder.memory(y), y, tensor([y.shape[1]]))


def build(options: dict) -> HybridModel:
    """The model of a configuration, with a right-to-left decoder if it has one."""
    features, num_tokens = FbankConfig(num_bins=options["input_dim"]), options["vocab_size"]
    encoder, decoder = encoder_config(options), decoder_config(options, "num_blocks")
    model = build_model(features, encoder, decoder, LossConfig(), num_tokens)
    if has_reverse(options):
        config = decoder_config(options, "r_num_blocks")
        model.reverse_decoder = TransformerDecoder(config, num_tokens, encoder.dim)
    return model.eval()


def has_reverse(options: dict) -> bool:
    """Whether there is a right-to-left decoder; one without layers does not count."""
    return options["decoder"] == "bitransformer" and options["decoder_conf"]["r_num_blocks"] > 0


def encoder_config(options: dict) -> WenetConformerConfig:
    encoder = options["encoder_conf"]
    return WenetConformerConfig(
        dim=encoder["output_size"],
        num_layers=encoder["num_blocks"],
        num_heads=encoder["attention_heads"],
        ff_dim=encoder["linear_units"],
        kernel_size=encoder["cnn_module_kernel"],
        causal=encoder["causal"],
        norm=encoder["cnn_module_norm"],
        input_layer=encoder["input_layer"],
    )


def decoder_config(options: dict, num_layers: str) -> DecoderConfig:
    return DecoderConfig(
        dim=options["encoder_conf"]["output_size"],
        num_layers=options["decoder_conf"][num_layers],
        num_heads=options["decoder_conf"]["attention_heads"],
        ff_dim=options["decoder_conf"]["linear_units"],
        activation="relu",
        positions="sinusoid",
    )


@pytest.fixture(scope="module", params=SETS)
def wenet(golden: Path, request: pytest.FixtureRequest) -> Iterator[Golden]:
    folder = golden / request.param
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    config = json.loads((folder / "config.json").read_text())
    rest = [i for i in range(config["vocab_size"]) if i not in (0, config["eos"])]
    order = [0, config["eos"], *rest]
    model = build(config)
    weights = load_file(folder / "weights.safetensors")
    weights = {name: x for name, x in weights.items() if name not in empty_decoder(weights)}
    units = Units([0, config["sos"], *rest], order)
    load(model, weights, wenet_names(weights), request.param, units)
    with np.load(folder / "io.npz") as arrays:
        found = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    with torch.no_grad():
        yield Golden(config, found, order, model)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)


def contexts(wenet: Golden, kind: str) -> list[tuple[int, int, str]]:
    """Chunk, left context and prefix of the array names."""
    found = [(c, left, f"{kind}.chunk{c}_left{left}") for c, left in wenet.config["chunks"]]
    if not found:
        pytest.skip("the config of this set has no chunks")
    return found


def test_the_position_table(wenet):
    rows = wenet["pos_enc.first_rows"]
    close(sinusoids(torch.arange(len(rows))[None], rows.shape[1])[0], rows)
    table = wenet["embed.pos_emb"]
    close(sinusoids(torch.arange(table.shape[1])[None], table.shape[2]), table)


def test_subsampling(wenet):
    inputs = []
    layer = wenet.model.encoder.layers[0]
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    _, y_lens, _ = wenet.model.encoder(wenet.model.cmvn(wenet["x"]), wenet["x_lens"])
    hook.remove()
    valid = wenet["embed.mask"][:, 0]
    assert torch.equal(valid_mask(y_lens, valid.shape[1]), valid)
    close(inputs[0][valid], wenet["embed.out"][valid])


def test_the_modules_of_the_first_layer(wenet):
    seen: dict[str, Tensor] = {}

    def keep(name):
        def hook(_, args, output):
            seen[name] = output[0] if isinstance(output, tuple) else output
            if name == "self":
                seen["in"] = args[0]

        return hook

    layer = wenet.model.encoder.layers[0]
    hooks = [layer.get_submodule(ours).register_forward_hook(keep(name)) for name, ours in LAYER.items()]
    hooks.append(layer.register_forward_hook(keep("self")))
    wenet.model.encoder(*wenet.x(int(wenet["layer0.utterance_index"])))
    for hook in hooks:
        hook.remove()
    for name in ["in", *LAYER]:
        close(seen[name], wenet[f"layer0.{name}"])


def test_whole_utterances_alone_and_in_a_batch(wenet):
    y, y_lens, _ = wenet.model.encoder(wenet.model.cmvn(wenet["x"]), wenet["x_lens"])
    assert torch.equal(y_lens, wenet["full.encoder_out_lens"])
    log_probs = wenet.model.ctc_log_probs(y)
    for i, n in enumerate(y_lens.tolist()):
        expected = wenet[f"full.alone{i}.encoder_out"]
        close(wenet.model.encoder(*wenet.x(i))[0], expected)
        close(y[i : i + 1, :n], expected)
        if wenet.config["encoder_conf"]["causal"]:
            close(y[i, :n], wenet["full.encoder_out"][i, :n])
            close(log_probs[i, :n], wenet["full.ctc_log_probs"][i, :n, wenet.order])


def test_ctc_log_probabilities(wenet):
    found = wenet.model.ctc_log_probs(wenet["full.encoder_out"])
    close(found, wenet["full.ctc_log_probs"][..., wenet.order])


def test_masked_chunks(wenet):
    for chunk, left, name in contexts(wenet, "mask"):
        x = wenet.model.cmvn(wenet["x"])
        y, y_lens, _ = wenet.model.encoder(x, wenet["x_lens"], None, chunk, left)
        assert torch.equal(y_lens, wenet[f"{name}.encoder_out_lens"])
        log_probs = wenet.model.ctc_log_probs(y)
        for i, n in enumerate(y_lens.tolist()):
            if wenet.config["encoder_conf"]["causal"]:
                close(y[i, :n], wenet[f"{name}.encoder_out"][i, :n])
                close(log_probs[i, :n], wenet[f"{name}.ctc_log_probs"][i, :n, wenet.order])
            close(y[i : i + 1, :n], wenet[f"{name}.alone{i}.encoder_out"])
            alone, _, _ = wenet.model.encoder(*wenet.x(i), None, chunk, left)
            close(alone, wenet[f"{name}.alone{i}.encoder_out"])


def test_chunk_by_chunk_with_caches(wenet):
    encoder = wenet.model.encoder
    if not wenet.config["encoder_conf"]["causal"]:
        pytest.skip("a symmetric convolution does not stream")
    for chunk, left, name in contexts(wenet, "stream"):
        for i in wenet.utterances:
            x, _ = wenet.x(i)
            step = chunk * encoder.subsampling
            state, parts = encoder.init_state(1, max(left, 0) * chunk), []
            for start in range(0, x.shape[1] - encoder.front.window + 1, step):
                part = x[:, start : start + step + encoder.overlap_frames]
                state = state.widen(chunk) if left < 0 else state
                y, _, state = encoder(part, tensor([part.shape[1]]), state, chunk, left)
                after = f"{name}.alone{i}.after{len(parts)}"
                parts.append(y)
                if f"{after}.out" in wenet.arrays:
                    close(y, wenet[f"{after}.out"])
                    cache = wenet[f"{after}.att_cache"]  # (L, H, frames so far, 2 D)
                    ours = torch.cat([state.keys, state.values], dim=-1)[0]
                    close(ours[:, :, ours.shape[2] - cache.shape[2] :], cache)
                    close(state.conv[0, :, None], wenet[f"{after}.cnn_cache"])
            assert len(parts) == int(wenet[f"{name}.alone{i}.num_chunks"])
            close(torch.cat(parts, dim=1), wenet[f"{name}.alone{i}.encoder_out"])


def directions(wenet: Golden) -> list[tuple[str, str, TransformerDecoder]]:
    """Name of the direction, prefix of its array names, and its decoder."""
    found = [("l2r", "att.", wenet.model.decoder)]
    if has_reverse(wenet.config):
        found.append(("r2l", "att.r_", wenet.model.reverse_decoder))
    return found


def test_decoders_with_forced_tokens(wenet):
    for name, prefix, decoder in directions(wenet):
        tokens = wenet.ours(wenet[f"{prefix}ys_in"])
        y_lens = wenet["full.encoder_out_lens"]
        logits = decoder(tokens, *decoder.memory(wenet["full.encoder_out"]), y_lens).logits
        counts = valid_mask(wenet["target_lens"] + 1, tokens.shape[1])
        expected = wenet[f"att.log_probs_{name}"][..., wenet.order]
        close(logits.log_softmax(-1)[counts], expected[counts])


def test_losses(wenet):
    options, y = wenet.config["model_conf"], wenet["full.encoder_out"]
    y_lens, token_lens = wenet["full.encoder_out_lens"], wenet["target_lens"]
    ctc = ctc_loss(wenet.model.ctc_log_probs(y), y_lens, wenet.ours(wenet["targets"]), token_lens)
    found = {"ctc": ctc.mean()}
    for name, prefix, decoder in directions(wenet):
        logits = decoder(wenet.ours(wenet[f"{prefix}ys_in"]), *decoder.memory(y), y_lens).logits
        targets = wenet.ours(wenet[f"{prefix}ys_out"])
        loss = divergence(logits.log_softmax(-1), targets, token_lens + 1, options["lsm_weight"])
        per = (token_lens + 1).sum() if options.get("length_normalized_loss") else len(loss)
        found[f"att_{name}"] = loss.sum() / per
        if name == "l2r":
            hits = (logits.argmax(-1) == targets)[valid_mask(token_lens + 1, targets.shape[1])]
            found["att_accuracy"] = hits.float().mean()
    reverse = options.get("reverse_weight", 0.0)
    found["att"] = (1 - reverse) * found["att_l2r"] + reverse * found.get("att_r2l", tensor(0.0))
    found["total"] = options["ctc_weight"] * found["ctc"] + (1 - options["ctc_weight"]) * found["att"]
    for name, loss in found.items():
        torch.testing.assert_close(loss, wenet[f"loss.{name}"], atol=1e-6, rtol=1e-4)


def divergence(log_probs: Tensor, targets: Tensor, lens: Tensor, smoothing: float) -> Tensor:
    """The cross-entropy with smoothing over all but the target, minus the entropy of the smoothed target.

    Ours smooths over all V units including the target, so V / (V - 1) times the smoothing is the same.
    """
    others = log_probs.shape[-1] - 1
    loss = label_smoothed_cross_entropy(log_probs, targets, lens, smoothing * (others + 1) / others)
    if not smoothing:
        return loss
    entropy = -(1 - smoothing) * math.log(1 - smoothing) - smoothing * math.log(smoothing / others)
    return loss - lens * entropy


def test_ctc_greedy_search(wenet):
    for i in wenet.utterances:
        search = CtcGreedy()
        search.advance(wenet.heard(i)[0])
        assert wenet.theirs(search.best()) == wenet[f"search.utt{i}.ctc_greedy"].tolist()


def first_pass(log_probs: np.ndarray, beam: int) -> tuple[np.ndarray, list[Hypothesis]]:
    """The reference considers the `beam` likeliest symbols of a frame, blank only if it is one of them."""
    least = np.sort(log_probs, axis=1)[:, -beam, None]
    considered = np.where(log_probs >= least, log_probs, -np.inf).astype(np.float32)
    search = CtcPrefixBeam(beam, beam)
    search.advance(considered)
    return considered, search.nbest(beam)


def beams(wenet: Golden) -> Iterator[tuple[int, int, str]]:
    for beam in wenet.config["beams"]:
        yield from ((beam, i, f"search.beam{beam}.utt{i}") for i in wenet.utterances)


def test_prefix_beam_search(wenet):
    for beam, i, name in beams(wenet):
        frames, nbest = first_pass(wenet.heard(i)[0], beam)
        lens = wenet[f"{name}.prefix.lens"].tolist()
        rows = (wenet[f"{name}.prefix.{part}"] for part in ("nbest", "times"))
        expected, times = ([x[:n].tolist() for x, n in zip(row, lens, strict=True)] for row in rows)
        assert [wenet.theirs(x) for x in nbest] == expected
        scores = wenet[f"{name}.prefix.scores"].numpy()
        np.testing.assert_allclose([x.score for x in nbest], scores, rtol=0, atol=1e-3)
        for x, when in zip(nbest, times, strict=True):
            check_times(frames, x, when)


def check_times(frames: np.ndarray, found: Hypothesis, when: list[int]) -> None:
    """The reference's time of a token is the last frame of its run, ours the first.

    Where two paths of a prefix meet in a frame, the reference may keep the times of the worse one: a path
    with its times is then less probable than the best.
    """
    ends = (*found.frames, len(frames))[1:]
    if all(a <= t < b for a, t, b in zip(found.frames, when, ends, strict=True)):
        return
    through = np.full_like(frames, -np.inf)
    through[when, found.tokens] = frames[when, found.tokens]
    free = np.setdiff1d(np.arange(len(frames)), when)
    through[free] = frames[free]
    assert align(through, found.tokens).score < align(frames, found.tokens).score


def test_rescoring(wenet):
    """If sos and eos differ, ours cannot have eos within a text, where no text should have it."""
    scorer, compared = TorchScorer(wenet.model, "cpu"), 0
    for ctc_weight, reverse_weight in wenet.config["rescoring"]:
        # they add w times the CTC score; our weights sum to 1: w / (1 + w)
        config = SearchConfig(ctc_weight=ctc_weight / (1 + ctc_weight), reverse_weight=reverse_weight)
        for beam, i, name in beams(wenet):
            expected = f"{name}.rescoring.ctc{ctc_weight}_rev{reverse_weight}"
            frames, heard = wenet.heard(i)
            nbest = first_pass(frames, beam)[1]
            if wenet.config["sos"] != wenet.config["eos"] and any(1 in x.tokens for x in nbest):
                continue
            compared += 1
            best = rescore(scorer, heard, [nbest], config)[0][0]
            assert wenet.theirs(best) == wenet[f"{expected}.tokens"].tolist()
            score = best.score * (1 + ctc_weight)
            assert score == pytest.approx(wenet[f"{expected}.score"].item(), abs=1e-3)
            confidence = math.exp(best.parts["attention"] / (len(best.tokens) + 1))
            assert confidence == pytest.approx(wenet[f"{expected}.confidence"].item(), rel=1e-3)
            (left,) = scorer.score(heard, np.array([0]), [best.tokens])
            each = np.exp(left)
            if reverse_weight:
                (right,) = scorer.score(heard, np.array([0]), [best.tokens], reverse=True)
                each = (each + np.exp(right)) / 2
            of_tokens = wenet[f"{expected}.tokens_confidence"].numpy()
            np.testing.assert_allclose(each[:-1], of_tokens, rtol=1e-3)
    if not compared:
        pytest.skip("eos is within a text of every list")


def test_attention_search(wenet):
    scorer, config = TorchScorer(wenet.model, "cpu"), wenet.config
    offset = float(config["sos"] != config["eos"])  # then it counts sos as a token
    for length_penalty in config["length_penalty"]:
        for beam, i, name in beams(wenet):
            log_probs, heard = wenet.heard(i)
            options = SearchConfig(beam=beam, length_penalty=length_penalty, length_offset=offset)
            (found,) = unbounded(scorer, [log_probs], heard, options)[0]
            assert wenet.theirs(found) == wenet[f"{name}.attention.lp{length_penalty}.tokens"].tolist()


def test_a_published_model_has_our_tensors(golden):
    """Names and shapes of a full-size checkpoint; nothing is computed."""
    folder = golden / "checkpoint_tables"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    models = json.loads((folder / "config.json").read_text())
    for model in (x for x in models if x["name"].startswith("wenet")):
        rows = [x.split("\t") for x in (folder / f"{model['name']}.tsv").read_text().splitlines()[1:]]
        with torch.device("meta"):
            sizes = {name: [int(n) for n in shape.split("x") if n != "scalar"] for name, shape, _ in rows}
            weights = {name: torch.empty(size) for name, size in sizes.items()}
            parts = parts_of(model["options"])
            load(parts, weights, wenet_names(weights), model["name"])
        assert sum(p.numel() for p in parts.parameters()) == model["params"]


def parts_of(options: dict) -> nn.ModuleDict:
    """The modules of a HybridModel, without building one."""
    encoder, num_tokens = encoder_config(options), options["vocab_size"]
    parts = {
        "cmvn": Cmvn(options["input_dim"]),
        "encoder": WenetConformer(encoder, options["input_dim"]),
        "ctc": nn.Linear(encoder.dim, num_tokens),
        "decoder": TransformerDecoder(decoder_config(options, "num_blocks"), num_tokens, encoder.dim),
    }
    if has_reverse(options):
        config = decoder_config(options, "r_num_blocks")
        parts["reverse_decoder"] = TransformerDecoder(config, num_tokens, encoder.dim)
    return nn.ModuleDict(parts)
