"""Public WeNet checkpoints: their tensors, under the names of HybridModel.

Ours are `cmvn`, `encoder` (WenetConformer), `ctc`, `decoder` (TransformerDecoder with ReLU and sinusoids)
and, where there is a second one from right to left, `reverse_decoder`. A tensor of ours is one of theirs, or
several one below the other: queries, keys and values of a layer, keys and values of all layers.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from asr.errors import CheckpointError

ATTENTION = {
    "attention.project.": ("self_attn.linear_q.", "self_attn.linear_k.", "self_attn.linear_v."),
    "attention.out.": ("self_attn.linear_out.",),
}
ENCODER_LAYER = ATTENTION | {
    "feed_forward_1.0.": ("norm_ff_macaron.",),
    "feed_forward_1.1.": ("feed_forward_macaron.w_1.",),
    "feed_forward_1.4.": ("feed_forward_macaron.w_2.",),
    "attention_norm.": ("norm_mha.",),
    "attention.position.": ("self_attn.linear_pos.",),
    "attention.content_bias": ("self_attn.pos_bias_u",),
    "attention.position_bias": ("self_attn.pos_bias_v",),
    "convolution.norm.": ("norm_conv.",),
    "convolution.gated.": ("conv_module.pointwise_conv1.",),
    "convolution.depthwise.": ("conv_module.depthwise_conv.",),
    "convolution.depthwise_norm.": ("conv_module.norm.",),
    "convolution.out.": ("conv_module.pointwise_conv2.",),
    "feed_forward_2.0.": ("norm_ff.",),
    "feed_forward_2.1.": ("feed_forward.w_1.",),
    "feed_forward_2.4.": ("feed_forward.w_2.",),
    "norm.": ("norm_final.",),
}
DECODER_LAYER = ATTENTION | {
    "attention_norm.": ("norm1.",),
    "cross_norm.": ("norm2.",),
    "cross.query.": ("src_attn.linear_q.",),
    "cross.out.": ("src_attn.linear_out.",),
    "feed_forward.0.": ("norm3.",),
    "feed_forward.1.": ("feed_forward.w_1.",),
    "feed_forward.4.": ("feed_forward.w_2.",),
}
MEMORY = ("src_attn.linear_k.", "src_attn.linear_v.")

COMPUTED = re.compile(r"\.pe$")
"""Tables of sinusoids."""

PER_UNIT = re.compile(r"^(ctc|(reverse_)?decoder\.(embedding|out))\.")
"""Tensors of ours that have a row for each unit."""


def load_wenet(
    model: nn.Module, weights: Mapping[str, Tensor], where: str, order: Sequence[int] | None = None
) -> None:
    """Load a WeNet state dict into a HybridModel, or into a part of one under the same names.

    where: the file, for errors. order: our unit i is their unit order[i], since sos/eos is 1 here; None for
    the same order. Raises CheckpointError where tensors are missing, unused, or of another shape, with the
    names and shapes of all of them.
    """
    wanted = model.state_dict()
    sources = wenet_names(list(wanted), weights)
    used = {x for names in sources.values() for x in names}
    problems = [
        f"{x} {tuple(weights[x].shape)} is unused"
        for x in weights
        if x not in used and not COMPUTED.search(x)
    ]
    found = {}
    for name, tensor in wanted.items():
        expected = f"{name} {tuple(tensor.shape)}"
        if missing := [x for x in sources[name] if x not in weights]:
            problems += [f"{x} is missing for {expected}" for x in missing]
            continue
        parts = [weights[x] for x in sources[name]]
        value = torch.cat(parts) if len(parts) > 1 else parts[0]
        if _sizes(value) != _sizes(tensor):
            problems.append(f"{', '.join(sources[name])} {tuple(value.shape)} does not fit {expected}")
            continue
        if order is not None and PER_UNIT.match(name):
            value = value[torch.tensor(order, device=value.device)]
        found[name] = value.reshape(tensor.shape)
    if problems:
        raise CheckpointError(f"{where}: {len(problems)} tensors do not fit: {'; '.join(problems)}")
    model.load_state_dict(found)


def wenet_names(ours: Sequence[str], theirs: Iterable[str]) -> dict[str, list[str]]:
    """For each of our names, those in a WeNet checkpoint that make it up.

    Some of them depend on which others there are (`theirs`): one or two decoders, and where the front ends.
    """
    theirs = set(theirs)
    two = any(x.startswith("decoder.left_decoder.") for x in theirs)
    front = "linear." if "encoder.embed.linear.weight" in theirs else "out.0."
    heads = {
        "cmvn.": "encoder.global_cmvn.",
        "ctc.": "ctc.ctc_lo.",
        "encoder.front.convolutions.": "encoder.embed.conv.",
        "encoder.front.out.": f"encoder.embed.{front}",
        "encoder.norm.": "encoder.after_norm.",
    }
    layers = {"encoder.": ("encoder.encoders.", ENCODER_LAYER)}
    for decoder, prefix in (("decoder.", "left_"), ("reverse_decoder.", "right_")):
        place = f"decoder.{prefix}decoder." if two or prefix == "right_" else "decoder."
        for part, name in (("embedding.", "embed.0."), ("norm.", "after_norm."), ("out.", "output_layer.")):
            heads[decoder + part] = place + name
        layers[decoder] = (f"{place}decoders.", DECODER_LAYER)
    return {name: _sources(name, ours, heads, layers) for name in ours}


def _sources(
    name: str,
    ours: Sequence[str],
    heads: Mapping[str, str],
    layers: Mapping[str, tuple[str, Mapping[str, tuple[str, ...]]]],
) -> list[str]:
    for head, place in heads.items():
        if name.startswith(head):
            return [place + name.removeprefix(head)]
    part, _, rest = name.partition(".")
    place, names = layers[f"{part}."]
    if rest.startswith("cross."):
        numbers = {int(x.split(".")[2]) for x in ours if x.startswith(f"{part}.layers.")}
        return [f"{place}{i}.{x}{rest.removeprefix('cross.')}" for x in MEMORY for i in sorted(numbers)]
    _, number, rest = rest.split(".", 2)
    prefix = next(x for x in names if rest.startswith(x))
    return [f"{place}{number}.{x}{rest.removeprefix(prefix)}" for x in names[prefix]]


def _sizes(x: Tensor) -> list[int]:
    """The shape without dimensions of one, which kernels of one frame have or have not."""
    return [n for n in x.shape if n > 1]
