"""Public icefall checkpoints: their tensors, under the names of HybridModel.

A folder with pretrained.pt (or epoch-N.pt), tokens.txt, and bpe.model if there is one, at any depth. Sizes
are inferred from shapes; anything else is read from the checkpoint, or from icefall.yaml.

The front, the Zipformer, its CTC head and its attention decoder are mapped.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from asr.config import ExperimentConfig, TrainConfig
from asr.convert.converted import Converted, Tokens, ctc_alone, fresh_model, parts_to_load
from asr.convert.icefall_decoder import DECODER, PLACE, decoder_config
from asr.convert.names import Names, Units, arrange_units, load, num_rows
from asr.convert.options import Options
from asr.convert.source import Source
from asr.convert.units import find_unit, maybe_unit, our_symbols, read_units, splitter
from asr.errors import CheckpointError
from asr.features import FbankConfig
from asr.model.decoder import DecoderConfig
from asr.model.masks import ChunkConfig
from asr.model.zipformer import ZipformerConfig

FRONT = {
    "convolutions.0.": "conv.0.",
    "convolutions.1.": "conv.4.",
    "convolutions.2.": "conv.7.",
    "mix.depthwise.": "convnext.depthwise_conv.",
    "mix.expand.": "convnext.pointwise_conv1.",
    "mix.contract.": "convnext.pointwise_conv2.",
    "out.": "out.",
    "norm.": "out_norm.",
}
LAYER = {
    "unused_scale": "bypass_scale",
    "bypass.scale": "bypass.bypass_scale",
    "bypass_middle.scale": "bypass_mid.bypass_scale",
    "weights.project.": "self_attn_weights.in_proj.",
    "weights.position.": "self_attn_weights.linear_pos.",
    "nonlinear.project.": "nonlin_attention.in_proj.",
    "nonlinear.out.": "nonlin_attention.out_proj.",
    "norm.": "norm.",
}
for _i in "123":
    LAYER |= {
        f"feed_forward_{_i}.hidden.": f"feed_forward{_i}.in_proj.",
        f"feed_forward_{_i}.out.": f"feed_forward{_i}.out_proj.",
        f"attention_{_i}.project.": f"self_attn{_i}.in_proj.",
        f"attention_{_i}.out.": f"self_attn{_i}.out_proj.",
        f"convolution_{_i}.gated.": f"conv_module{_i}.in_proj.",
        f"convolution_{_i}.depthwise.past.": f"conv_module{_i}.depthwise_conv.causal_conv.",
        f"convolution_{_i}.depthwise.within.": f"conv_module{_i}.depthwise_conv.chunkwise_conv.",
        f"convolution_{_i}.depthwise.edges": f"conv_module{_i}.depthwise_conv.chunkwise_conv_scale",
        f"convolution_{_i}.depthwise.": f"conv_module{_i}.depthwise_conv.",
        f"convolution_{_i}.out.": f"conv_module{_i}.out_proj.",
    }
HEADS = {
    "ctc.": "ctc_output.1.",
    "encoder.downsample.scores": "encoder.downsample_output.bias",
    **{f"encoder.front.{ours}": f"encoder_embed.{theirs}" for ours, theirs in FRONT.items()},
}
STACK = re.compile(r"encoder\.stacks\.(\d+)\.(.*)")
"""What follows the number belongs to the stack, or to one of its layers."""

TRANSDUCER = r"^(decoder|joiner|simple_am_proj|simple_lm_proj)\."
"""The transducer, which most checkpoints contain as well."""

FILES = ("*pretrained.pt", "epoch-*.pt", "*.safetensors", "*tokens.txt", "*bpe.model", "*icefall.yaml")
"""Files to fetch from a hub."""

MARK = r"^encoder_embed\.convnext\."
"""A tensor that no other family has."""


KERNEL = "conv_module1.depthwise_conv."

OPTIONS = (
    *("feature_dim", "num_heads", "query_head_dim", "pos_head_dim", "value_head_dim"),
    *("attention_decoder_num_heads", "encoder_unmasked_dim"),
)
"""What icefall.yaml may hold."""

ASK_FOR_OPTIONS = (
    "write feature_dim, num_heads, query_head_dim, pos_head_dim, value_head_dim, attention_decoder_num_heads "
    "into icefall.yaml beside it, where they are not icefall's defaults"
)


def read(source: Source) -> Converted:
    """Read an icefall checkpoint. Raises CheckpointError for what our model does not support."""
    file = source.weights_file("pretrained.pt", "epoch-*.pt", "*.safetensors")
    tensors = source.tensors(file, "model")
    weights = tensors.weights
    if not (num_units := num_rows(weights, f"{HEADS['ctc.']}weight")):
        raise CheckpointError(f"{file}: no CTC head; a transducer alone cannot be represented")
    options = _options(source, tensors.others, str(file))
    has_decoder = any(name.startswith(PLACE) for name in weights)
    parts: dict[str, Any] = {"decoder": _decoder(weights, options)} if has_decoder else ctc_alone()
    encoder, num_bins = encoder_config(weights, options), _num_bins(weights, options)
    config = ExperimentConfig(
        features=FbankConfig(num_bins=num_bins), encoder=encoder, train=TrainConfig(cmvn=False), **parts
    )
    units, tokens = _units(source, num_units)
    model = fresh_model(config, len(tokens.symbols), weights, str(file))
    loaded = parts_to_load(model)
    load(loaded, weights, all_names(list(loaded.state_dict())), str(file), units)
    left = [f"{name} {tuple(x.shape)}" for name, x in weights.items() if re.match(TRANSDUCER, name)]
    notes = [*tensors.notes] + [f"the transducer is left out: {', '.join(left)}"] * bool(left)
    return Converted(config, tokens, model, tuple(notes))


def _options(source: Source, others: Mapping[str, Any], where: str) -> Options:
    """What shapes do not determine: the training options, from the checkpoint or from a file."""
    if file := source.maybe("icefall.yaml"):
        options = source.yaml(file)
        for name in options:
            if name not in OPTIONS:
                raise CheckpointError(f"{file}: {name}, expected {', '.join(OPTIONS)}")
        return Options(options, str(file))
    return Options(others, where)


def encoder_config(weights: Mapping[str, Tensor], options: Options) -> ZipformerConfig:
    """Sizes from shapes where possible, otherwise from options under icefall's names; published models have
    its defaults. Raises CheckpointError if the two disagree."""
    found = [_stack_sizes(weights, i) for i in range(_count(weights, r"^encoder\.encoders\.(\d+)\."))]
    if not found or min(x["depths"] for x in found) < 1:
        raise CheckpointError(f"{options.where}: no stacks of layers numbered from 0")
    sizes: dict[str, Any] = {name: [x[name] for x in found] for name in found[0]}
    size = len(found)
    queries, values, positions = (
        options.counts(name, size, default)
        for name, default in (("query_head_dim", 32), ("value_head_dim", 12), ("pos_head_dim", 4))
    )
    heads = [rows // dim for rows, dim in zip(sizes["positions"], positions, strict=True)]
    heads = options.counts("num_heads", size) if "num_heads" in options.values else heads
    rows = zip(sizes["projected"], sizes["valued"], heads, queries, positions, values, strict=True)
    if any((h * (2 * q + p), h * v) != (both, valued) for both, valued, h, q, p, v in rows):
        raise CheckpointError(
            f"{options.where}: {heads} heads of {queries}, {positions} and {values} channels do not fit; "
            f"{ASK_FOR_OPTIONS}"
        )
    causal = any(".chunkwise_conv." in name for name in weights)
    unit = math.lcm(2, *sizes["rates"]) // 2  # chunks are multiples of it
    chunks = sorted({-(-chunk // unit) * unit for chunk in (8, 16, 32)})
    return ZipformerConfig(
        dims=sizes["dims"],
        rates=sizes["rates"],
        depths=sizes["depths"],
        ff_dims=sizes["ff_dims"],
        kernel_sizes=sizes["kernel_sizes"],
        unmasked_dims=options.counts("encoder_unmasked_dim", size, min(sizes["dims"])),
        num_heads=heads,
        query_dims=queries,
        value_dims=values,
        position_head_dims=positions,
        position_dim=sizes["position_dim"][0],
        causal=causal,
        chunk=ChunkConfig(dynamic=causal, max_chunk=32, chunks=[*chunks, 0], left_frames=[32, 64, 128, -1]),
    )


def _stack_sizes(weights: Mapping[str, Tensor], number: int) -> dict[str, int]:
    place = f"encoder.encoders.{number}."
    downsample = weights.get(f"{place}downsample.bias")
    layers = f"{place}layers." if downsample is None else f"{place}encoder.layers."
    depth = _count(weights, rf"^{re.escape(layers)}(\d+)\.")

    def shape(name: str, otherwise: str = "") -> list[int]:
        return _shape(weights, f"{layers}0.{name}", f"{layers}0.{otherwise or name}")

    return {
        "dims": shape("norm.bias")[0],
        "rates": 1 if downsample is None else num_rows(weights, f"{place}downsample.bias"),
        "depths": depth,
        "ff_dims": shape("feed_forward2.in_proj.weight")[0],
        "kernel_sizes": shape(f"{KERNEL}weight", f"{KERNEL}chunkwise_conv.weight")[-1],
        "projected": shape("self_attn_weights.in_proj.weight")[0],
        "positions": shape("self_attn_weights.linear_pos.weight")[0],
        "position_dim": shape("self_attn_weights.linear_pos.weight")[-1],
        "valued": shape("self_attn1.in_proj.weight")[0],
    }


def _shape(weights: Mapping[str, Tensor], name: str, otherwise: str = "") -> list[int]:
    """The sizes of a tensor; CheckpointError if it is missing, empty or a single number."""
    found = weights.get(name, weights.get(otherwise))
    if found is None or not found.dim() or not found.numel():
        raise CheckpointError(f"{name} is missing; damaged, or of another Zipformer")
    return list(found.shape)


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    """How many different numbers the names contain, if they are 0, 1, 2, ...; else 0."""
    numbers = {int(match[1]) for name in weights if (match := re.match(pattern, name))}
    return len(numbers) if numbers == set(range(len(numbers))) else 0


def _num_bins(weights: Mapping[str, Tensor], options: Options) -> int:
    """F, which must fit the channels after the front: ((F - 1) // 2 - 1) // 2 for each of its maps."""
    num_bins = options.count("feature_dim", 80)
    out, maps = weights.get("encoder_embed.out.weight"), weights.get("encoder_embed.conv.7.bias")
    if out is None or maps is None or out.dim() != 2 or not maps.dim():
        raise CheckpointError(f"{options.where}: no front end of a Zipformer of 2023 or later")
    if out.shape[1] != len(maps) * (((num_bins - 1) // 2 - 1) // 2):
        raise CheckpointError(
            f"{options.where}: its front end does not take {num_bins} bins; {ASK_FOR_OPTIONS}"
        )
    return num_bins


def _decoder(weights: Mapping[str, Tensor], options: Options) -> DecoderConfig:
    width = _shape(weights, f"{PLACE}layers.0.self_attn.linear_q.bias")[0]
    return decoder_config(
        {
            "decoder_dim": _shape(weights, f"{PLACE}embed.weight")[-1],
            "attention_dim": width,
            "num_decoder_layers": _count(weights, rf"^{re.escape(PLACE)}layers\.(\d+)\."),
            "num_heads": options.count("attention_decoder_num_heads", 8),
            "feedforward_dim": _shape(weights, f"{PLACE}layers.0.feed_forward.0.bias")[0],
        }
    )


def _units(source: Source, count: int) -> tuple[Units, Tokens]:
    """tokens.txt in our order, without the symbols that only graphs need, and the model that splits text."""
    file = source.file("tokens.txt")
    theirs = read_units(source.text(file), str(file))
    theirs = [x for i, x in enumerate(theirs) if i < count or not re.fullmatch(r"#\d+", x)]
    if len(theirs) != count:
        raise CheckpointError(
            f"{file}: {len(theirs)} units, the checkpoint has {count}; it is from another model"
        )
    end = maybe_unit(theirs, "<sos/eos>", "<eos>")
    blank = find_unit(theirs, str(file), "<blk>", "<blank>", "<eps>")
    units = arrange_units(count, end, end, blank, maybe_unit(theirs, "<unk>", "<UNK>"))
    symbols = our_symbols(theirs, units, str(file))
    return units, Tokens(symbols, splitter(source, symbols, "bpe.model"))


def all_names(ours: Sequence[str]) -> Names:
    """Their names for all of ours; the transducer is ignored, and so is a decoder if ours has none."""
    has_decoder = any(name.startswith("decoder.") for name in ours)
    others = TRANSDUCER if has_decoder else rf"{TRANSDUCER}|^{re.escape(PLACE)}"
    return Names({**icefall_names(ours), **DECODER.heads}, DECODER.layers, others)


def icefall_names(ours: Sequence[str]) -> dict[str, str]:
    """Our names -> those in an icefall checkpoint. Names of other parts are left out."""
    slow = {match[1] for x in ours if (match := STACK.match(x)) and match[2].startswith("downsample.")}
    return {name: theirs for name in ours if (theirs := _name(name, slow))}


def _name(name: str, slow: set[str]) -> str:
    """slow: numbers of the stacks that downsample."""
    if not (match := STACK.match(name)):
        return _replaced(name, HEADS)
    number, rest = match[1], match[2]
    place = f"encoder.encoders.{number}."
    if rest == "downsample.scores":
        return f"{place}downsample.bias"
    if rest == "bypass.scale":
        return f"{place}out_combiner.bypass_scale"
    _, layer, rest = rest.split(".", 2)
    return f"{place}{'encoder.' if number in slow else ''}layers.{layer}.{_replaced(rest, LAYER)}"


def _replaced(name: str, prefixes: Mapping[str, str]) -> str:
    """name with its first matching prefix replaced; empty if none matches."""
    return next((new + name[len(old) :] for old, new in prefixes.items() if name.startswith(old)), "")
