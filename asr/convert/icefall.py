"""Public icefall checkpoints: their tensors, under the names of HybridModel.

What is mapped is the front, the Zipformer and its CTC head.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from asr.errors import CheckpointError

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
"""What comes behind the number is of the stack, or of one of its layers."""

OTHERS = re.compile(r"^(decoder|joiner|simple_am_proj|simple_lm_proj|attention_decoder)\.")
"""Heads of other kinds that a checkpoint may have."""


def icefall_names(ours: Sequence[str]) -> dict[str, str]:
    """For each of our names, that in an icefall checkpoint. Names of other parts are left out."""
    slow = {match[1] for x in ours if (match := STACK.match(x)) and match[2].startswith("downsample.")}
    return {name: theirs for name in ours if (theirs := _name(name, slow))}


def _name(name: str, slow: set[str]) -> str:
    """slow: numbers of the stacks that take several frames together."""
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
    """name with the first prefix that it has replaced; empty where it has none."""
    return next((new + name[len(old) :] for old, new in prefixes.items() if name.startswith(old)), "")


def load_icefall(
    model: nn.Module, weights: Mapping[str, Tensor], where: str, order: Sequence[int] | None = None
) -> None:
    """Load encoder and CTC head of an icefall state dict into a HybridModel, or a part of one.

    where: the file, for errors. order: our unit i is their unit order[i]; None for the same order. Raises
    CheckpointError where tensors are missing, unused, or of another shape, with the names of all of them.
    """
    wanted = model.state_dict()
    names = icefall_names(list(wanted))
    problems = [f"{x} is unused" for x in _unused(weights, names.values())]
    found = {}
    for name, theirs in names.items():
        expected = tuple(wanted[name].shape)
        if theirs not in weights:
            problems.append(f"{theirs} is missing for {name} {expected}")
            continue
        value = weights[theirs]
        if _sizes(value) != _sizes(wanted[name]):
            problems.append(f"{theirs} {tuple(value.shape)} does not fit {name} {expected}")
            continue
        if order is not None and name.startswith("ctc."):
            value = value[torch.tensor(order, device=value.device)]
        found[name] = value.reshape(expected)
    if problems:
        raise CheckpointError(f"{where}: {len(problems)} tensors do not fit: {'; '.join(problems)}")
    model.load_state_dict(found, strict=False)


def _unused(theirs: Iterable[str], used: Iterable[str]) -> list[str]:
    known = set(used)
    return [x for x in theirs if x not in known and not OTHERS.match(x)]


def _sizes(x: Tensor) -> list[int]:
    """The shape without dimensions of one, which kernels of one frame have or have not."""
    return [n for n in x.shape if n > 1]
