"""Attention decoders of other families: ours with their weights gives their outputs for given tokens.

Sizes and options are those of the config.json beside the arrays. Our units are in another order than theirs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn, tensor

from asr.convert import firered, icefall_decoder, nemo_decoder, whisper_decoder
from asr.convert.names import Names, Units, arrange_units, load
from asr.losses import label_smoothed_cross_entropy
from asr.model.attention import sinusoids
from asr.model.decoder import DecoderConfig, TransformerDecoder
from asr.model.masks import valid_mask


@dataclass
class Forced:
    """A decoder, and given tokens with the expected output."""

    decoder: TransformerDecoder
    units: Units
    y: Tensor
    y_lens: Tensor
    tokens: Tensor
    """Theirs (N, U)."""
    token_lens: Tensor
    expected: Tensor
    """Logits or log-probabilities (N, U, V)."""
    alone: list[tuple[Tensor, Tensor]]
    """Encoder output and expected decoder output of each utterance alone."""

    def log_probs(self, y: Tensor, y_lens: Tensor, tokens: Tensor) -> Tensor:
        """In the order of their units."""
        logits = self.decoder(self.ours(tokens), *self.decoder.memory(y), y_lens).logits
        theirs = logits.new_full((*tokens.shape, max(self.units.outputs) + 1), torch.nan)
        real = [i for i, x in enumerate(self.units.outputs) if x >= 0]
        theirs[..., [self.units.outputs[i] for i in real]] = logits.log_softmax(-1)[..., real]
        return theirs

    def ours(self, tokens: Tensor) -> Tensor:
        """Our ids of the input tokens."""
        sos, *rest = ([*column] for column in zip(*tokens.tolist(), strict=True))
        assert {*sos} == {self.units.inputs[1]}
        columns = [[1] * len(sos)] + [[self.units.outputs.index(x) for x in column] for column in rest]
        return tensor(columns).T


def build(
    config: DecoderConfig, names: Names, weights: dict[str, Tensor], units: Units, memory_dim: int
) -> TransformerDecoder:
    decoder = TransformerDecoder(config, len(units.inputs), memory_dim).eval()
    load(nn.ModuleDict({"decoder": decoder}), weights, names, "golden", units)
    return decoder


def only(weights: dict[str, Tensor], *parts: str) -> dict[str, Tensor]:
    return {name: x for name, x in weights.items() if name.startswith(parts)}


def of_firered(golden_set) -> Forced:
    golden = golden_set("fireredasr_aed")
    args = golden.config["args"]
    weights = only(firered.tensors(golden.weights), "decoder.")
    decoder = build(
        firered.decoder_config(args), firered.NAMES, weights, firered.units(args), args["d_model"]
    )
    lens = golden["encoder_out_lens"]
    alone = [
        (golden[f"alone{i}.encoder_out"][:, :n], golden[f"alone{i}.dec_logits"])
        for i, n in enumerate(lens.tolist())
    ]
    return Forced(
        decoder,
        firered.units(args),
        golden["encoder_out"],
        lens,
        golden["dec.input_ids"],
        golden["dec.input_lens"],
        golden["dec.logits"],
        alone,
    )


def of_nemo(golden_set) -> Forced:
    golden = golden_set("nemo_canary_aed")
    options = golden.config
    parts = ("transf_decoder.", "log_softmax.", "encoder_decoder_proj.")
    weights = only(nemo_decoder.decoder_tensors(only(golden.weights, *parts)), *parts)
    units = arrange_units(options["vocab_size"], options["bos"], options["eos"], blank=options["pad"])
    config = nemo_decoder.decoder_config(options["transf_decoder"], "config.json")
    decoder = build(config, nemo_decoder.DECODER, weights, units, options["encoder"]["d_model"])
    alone = [
        (golden[f"alone{i}.encoder_out"].transpose(1, 2), golden[f"alone{i}.log_probs"])
        for i in range(len(golden["x_lens"]))
    ]
    return Forced(
        decoder,
        units,
        golden["encoder_out"].transpose(1, 2),
        golden["encoder_out_lens"],
        golden["dec.input_ids"],
        golden["dec.input_lens"],
        golden["dec.log_probs"],
        alone,
    )


def of_whisper(golden_set) -> Forced:
    golden = golden_set("openai_whisper")
    dims, special = golden.config["dims"], golden.config["special"]
    weights = only(whisper_decoder.decoder_tensors(golden.weights), "decoder.")
    units = arrange_units(dims["n_vocab"], special["sot"], special["eot"])
    config = whisper_decoder.decoder_config(dims)
    decoder = build(config, whisper_decoder.DECODER, weights, units, dims["n_audio_state"])
    y, tokens = golden["encoder_out"], golden["dec.tokens"]
    whole = [torch.full((len(y),), x.shape[1]) for x in (y, tokens)]
    alone = [(y[i : i + 1], golden["dec.logits"][i : i + 1]) for i in range(len(y))]
    return Forced(decoder, units, y, whole[0], tokens, whole[1], golden["dec.logits"], alone)


def of_icefall(golden_set, name: str = "icefall_zipformer2") -> Forced:
    golden = golden_set(name)
    options, sizes = golden.config, golden.config["attention_decoder"]
    sos, eos = sizes["sos_id"], sizes["eos_id"]
    units = arrange_units(options["vocab_size"], sos, eos, blank=options["blank_id"])
    weights = only(golden.weights, "attention_decoder.")
    y, lens = golden["full.encoder_out"], golden["full.encoder_out_lens"]
    config = icefall_decoder.decoder_config(sizes)
    decoder = build(config, icefall_decoder.DECODER, weights, units, y.shape[2])
    alone = [(y[i : i + 1, :n], golden["att.logits"][i : i + 1]) for i, n in enumerate(lens.tolist())]
    return Forced(
        decoder, units, y, lens, golden["att.ys_in"], golden["att.ys_in_lens"], golden["att.logits"], alone
    )


def of_causal_icefall(golden_set) -> Forced:
    return of_icefall(golden_set, "icefall_zipformer2_causal")


FAMILIES = [of_firered, of_nemo, of_whisper, of_icefall, of_causal_icefall]


@pytest.fixture(scope="module", params=FAMILIES)
def forced(request: pytest.FixtureRequest, golden_set: Callable) -> Iterator[Forced]:
    with torch.no_grad():
        yield request.param(golden_set)


def close(actual: Tensor, expected: Tensor) -> None:
    """Log-probabilities of units that never occur are large, so a relative tolerance is needed."""
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_forced_tokens_in_a_batch(forced):
    found = forced.log_probs(forced.y, forced.y_lens, forced.tokens)
    valid = valid_mask(forced.token_lens, forced.tokens.shape[1])
    close(found[valid], forced.expected.log_softmax(-1)[valid])


def test_forced_tokens_of_an_utterance_alone(forced):
    for i, (y, expected) in enumerate(forced.alone):
        n = int(forced.token_lens[i])
        found = forced.log_probs(y, tensor([y.shape[1]]), forced.tokens[i : i + 1, :n])
        close(found, expected.log_softmax(-1)[:, :n])


def test_token_by_token(forced):
    y, _ = forced.alone[0]
    memory, y_lens = forced.decoder.memory(y), tensor([y.shape[1]])
    tokens = forced.ours(forced.tokens[:1])
    whole = forced.decoder(tokens, *memory, y_lens).logits
    state, parts = None, []
    for token in tokens.split(1, dim=1):
        logits, _, state = forced.decoder(token, *memory, y_lens, state)
        parts.append(logits)
    close(torch.cat(parts, dim=1), whole)


def test_where_whisper_listens(golden_set):
    whisper = of_whisper(golden_set)
    expected = golden_set("openai_whisper")["dec.cross_attention_weights"]
    seen: list[Tensor] = []

    def keep(cross, args, _):
        seen.append(cross.weights(args[0], args[1], args[3]))

    hooks = [layer.cross.register_forward_hook(keep) for layer in whisper.decoder.layers]
    with torch.no_grad():
        whisper.log_probs(whisper.y, whisper.y_lens, whisper.tokens)
    for hook in hooks:
        hook.remove()
    close(torch.stack(seen, dim=1), expected)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_published_whisper_models_have_our_tensors(full_size):
    """Every tensor; ours adds untied output weights, key biases and rows of added units."""
    for model, weights in full_size("whisper"):
        dims = model["options"]
        count, dim, layers = dims["n_vocab"], dims["n_text_state"], dims["n_text_layer"]
        with torch.device("meta"):
            decoder = build(
                whisper_decoder.decoder_config(dims),
                whisper_decoder.DECODER,
                whisper_decoder.decoder_tensors(only(weights, "decoder.")),
                arrange_units(count, sos=count - 1, eos=count - 2),
                dims["n_audio_state"],
            )
        theirs = sum(x.numel() for x in only(weights, "decoder.").values())
        made_up = 2 * (2 * dim + 1)  # blank and unknown
        untied = count * (dim + 1)
        assert parameters(decoder) == theirs + untied + made_up + 2 * layers * dim


def test_published_nemo_models_have_our_tensors(full_size):
    for model, weights in full_size("nemo_canary"):
        options, parts = model["options"], ("transf_decoder.", "log_softmax.")
        with torch.device("meta"):
            decoder = build(
                nemo_decoder.decoder_config(options["decoder"], "config.json"),
                nemo_decoder.DECODER,
                only(nemo_decoder.decoder_tensors(weights), *parts),
                arrange_units(options["vocab_size"], sos=4, eos=3, blank=2, unk=0),
                options["encoder"]["d_model"],
            )
        theirs = only(weights, *parts)
        assert parameters(decoder) == sum(x.numel() for n, x in theirs.items() if not n.endswith("pos_enc"))


def test_published_icefall_models_have_our_tensors(full_size):
    for model, weights in full_size("icefall"):
        options = model["options"]
        units = arrange_units(options["vocab_size"], sos=1, eos=1, blank=0, unk=2)
        assert units.inputs == units.outputs == list(range(options["vocab_size"]))
        theirs = only(weights, "attention_decoder.")
        with torch.device("meta"):
            decoder = build(
                icefall_decoder.decoder_config(options["attention_decoder"]),
                icefall_decoder.DECODER,
                theirs,
                units,
                max(options["encoder_dim"]),
            )
        assert parameters(decoder) == sum(x.numel() for x in theirs.values())


def test_losses_of_icefall(golden_set):
    golden, forced = golden_set("icefall_zipformer2"), of_icefall(golden_set)
    with torch.no_grad():
        log_probs = forced.log_probs(forced.y, forced.y_lens, forced.tokens)
    targets, lens = golden["att.ys_out"].clamp(min=0), forced.token_lens
    found = -log_probs.gather(2, targets[..., None])[..., 0]
    valid = valid_mask(lens, targets.shape[1])
    close(found[valid], golden["att.nll"][valid])
    smoothing = golden.config["attention_decoder"]["label_smoothing"]
    loss = label_smoothed_cross_entropy(log_probs, targets, lens, smoothing).sum()
    torch.testing.assert_close(loss, golden["att.loss_label_smoothed_sum"], rtol=1e-4, atol=0)


def test_what_nemo_hears_of_its_own_tokens(golden_set):
    golden, forced = golden_set("nemo_canary_aed"), of_nemo(golden_set)
    dim = forced.decoder.config.dim
    rows = golden["dec.position_table_first_rows"]
    close(sinusoids(torch.arange(len(rows))[None], dim)[0] / dim**0.5, rows)
    seen: dict[str, Tensor] = {}
    modules = {"embedding_out": forced.decoder.embedding_norm, "hidden": forced.decoder.norm}
    modules |= {f"layer{i}.out": layer for i, layer in enumerate(forced.decoder.layers)}

    def keep(name):
        def hook(_, args, output):
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    with torch.no_grad():
        forced.log_probs(forced.y, forced.y_lens, forced.tokens)
    valid = valid_mask(forced.token_lens, forced.tokens.shape[1])
    for name in modules:
        close(seen[name][valid], golden[f"dec.{name}"][valid])
    for hook in hooks:
        hook.remove()
