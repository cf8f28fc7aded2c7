"""Public checkpoints under our names: which of their tensors make up each of ours.

A tensor of ours is one of theirs, or several one below the other: queries, keys and values of a layer, keys
and values of the cross-attention of all layers. What a family does not have, or has in another form, it
brings into this form first: `add_biases`, and functions beside its names.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from asr.errors import CheckpointError

MADE_UP = -1
"""A unit that a family does not have: nothing goes in, and nothing comes out."""

NEVER = -1e4
"""The logit of such a unit."""

INPUTS = re.compile(r"^(reverse_)?decoder\.embedding\.")
OUTPUTS = re.compile(r"^(ctc|(reverse_)?decoder\.out)\.")
"""Tensors of ours that have a row for each unit."""


@dataclass(frozen=True)
class Layers:
    """The numbered layers of a part of the model."""

    place: str
    """Theirs, up to the number."""

    names: Mapping[str, Sequence[str]]
    """How names in a layer begin: ours, and theirs, several one below the other."""

    memory: Sequence[str] = ()
    """Theirs of the keys and values of cross-attention, which are one tensor of ours for all layers."""


@dataclass(frozen=True)
class Names:
    """How a family calls what is ours."""

    heads: Mapping[str, str]
    """How names outside of layers begin: ours, and theirs."""

    layers: Mapping[str, Layers] = field(default_factory=dict)
    """Of each part of ours, as "decoder."."""

    computed: str = r"(?!)"
    """A pattern of what is in their files and needs no place in ours."""

    def sources(self, ours: Sequence[str]) -> dict[str, list[str]]:
        """For each of our names, those of theirs that make it up."""
        return {name: self._sources(name, ours) for name in ours}

    def _sources(self, name: str, ours: Sequence[str]) -> list[str]:
        for head, place in self.heads.items():
            if name.startswith(head):
                return [place + name.removeprefix(head)]
        part = next(x for x in self.layers if name.startswith(x))
        layers, rest = self.layers[part], name.removeprefix(part)
        if rest.startswith("cross."):
            start = f"{part}layers."
            count = len({x.removeprefix(start).split(".")[0] for x in ours if x.startswith(start)})
            kind = rest.removeprefix("cross.")
            return [f"{layers.place}{i}.{x}{kind}" for x in layers.memory for i in range(count)]
        number, rest = rest.removeprefix("layers.").split(".", 1)
        prefix = next(x for x in layers.names if rest.startswith(x))
        return [f"{layers.place}{number}.{x}{rest.removeprefix(prefix)}" for x in layers.names[prefix]]


class Units(NamedTuple):
    """Which rows of their matrices belong to each of our units; MADE_UP where there is none."""

    inputs: list[int]
    """Of the embedding."""

    outputs: list[int]
    """Of what ends in a softmax."""


def arrange_units(count: int, sos: int, eos: int, blank: int = MADE_UP, unk: int = MADE_UP) -> Units:
    """Blank, sos/eos, unknown, and then the other units of `count` in their order.

    Where sos and eos are two, our unit 1 goes in as sos and comes out as eos. Their sos is also a unit of its
    own, since nothing but the search keeps it out of a text; their eos never goes in.
    """
    rest = [i for i in range(count) if i not in (blank, eos, unk)]
    return Units([blank, sos, unk, *rest], [blank, eos, unk, *rest])


def load(
    model: nn.Module, weights: Mapping[str, Tensor], names: Names, where: str, units: Units | None = None
) -> None:
    """Load a state dict of another family into a HybridModel, or into a part of one under the same names.

    where: the file, for errors. units: None for the same units in the same order. Raises CheckpointError
    where tensors are missing, unused, or of another shape, with the names and shapes of all of them.
    """
    wanted = model.state_dict()
    sources = names.sources(list(wanted))
    used = {x for many in sources.values() for x in many}
    computed = re.compile(names.computed)
    problems = [
        f"{x} {tuple(weights[x].shape)} is unused"
        for x in weights
        if x not in used and not computed.search(x)
    ]
    found = {}
    for name, tensor in wanted.items():
        expected = f"{name} {tuple(tensor.shape)}"
        if missing := [x for x in sources[name] if x not in weights]:
            problems += [f"{x} is missing for {expected}" for x in missing]
            continue
        parts = [weights[x] for x in sources[name]]
        value = torch.cat(parts) if len(parts) > 1 else parts[0]
        order = _order(name, units)
        taken = _take(value, order) if order and len(value) == max(order) + 1 else value
        if _sizes(taken) != _sizes(tensor) or (order and taken is value):
            problems.append(f"{', '.join(sources[name])} {tuple(value.shape)} does not fit {expected}")
            continue
        if tensor.is_floating_point() and not value.is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            problems.append(
                f"{', '.join(sources[name])} {tuple(value.shape)} of {kind} does not fit {expected}"
            )
            continue
        found[name] = taken.reshape(tensor.shape)
    if problems:
        raise CheckpointError(f"{where}: {len(problems)} tensors do not fit: {'; '.join(problems)}")
    model.load_state_dict(found)


def count_layers(weights: Mapping[str, Tensor], place: str) -> int:
    """How many numbers follow `place` in names."""
    return len({name.removeprefix(place).split(".")[0] for name in weights if name.startswith(place)})


def add_biases(weights: Mapping[str, Tensor], pattern: str) -> dict[str, Tensor]:
    """The tensors, and a bias of zeros for each matrix whose name matches, up to ".weight", and has none."""
    matching = re.compile(rf"{pattern}\.weight$")
    found = {
        f"{name.removesuffix('weight')}bias": x.new_zeros(len(x))
        for name, x in weights.items()
        if matching.search(name)
    }
    return found | dict(weights)


def _order(name: str, units: Units | None) -> list[int]:
    """Which row each of our units has in theirs; empty where a tensor has no row for each."""
    if units is None:
        return []
    return units.inputs if INPUTS.match(name) else units.outputs if OUTPUTS.match(name) else []


def _take(value: Tensor, order: Sequence[int]) -> Tensor:
    """Rows in our order, and what those are that a family does not have."""
    index = torch.tensor(order, device=value.device)
    made_up = (index == MADE_UP).view(-1, *[1] * (value.dim() - 1))
    return value[index.clamp(min=0)].where(~made_up, NEVER if value.dim() == 1 else 0.0)


def _sizes(x: Tensor) -> list[int]:
    """The shape without dimensions of one, which kernels of one frame have or have not."""
    return [n for n in x.shape if n > 1]
