"""Public checkpoints under our names: which of their tensors make up each of ours.

A tensor of ours is one of theirs, or several stacked: queries, keys and values of a layer, keys and values of
the cross-attention of all layers. Tensors that a family lacks, or has in another form, are first brought into
this form: by `add_biases`, and by functions beside its names.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from asr.errors import CheckpointError

MADE_UP = -1
"""A unit that a family does not have: its embedding is 0, and it is never predicted."""

NEVER = -1e4
"""The logit of such a unit."""

INPUTS = re.compile(r"^(reverse_)?decoder\.embedding\.")
OUTPUTS = re.compile(r"^(ctc|(reverse_)?decoder\.out)\.")
"""Our tensors that have a row per unit."""


@dataclass(frozen=True)
class Layers:
    """The numbered layers of a part of the model."""

    place: str
    """Their name, up to the number."""

    names: Mapping[str, Sequence[str]]
    """Prefixes of names in a layer: ours -> theirs, several being stacked."""

    memory: Sequence[str] = ()
    """Their keys and values of cross-attention, which are one tensor of ours for all layers."""


@dataclass(frozen=True)
class Names:
    """The names of a family for our tensors."""

    heads: Mapping[str, str]
    """Prefixes of names outside of layers: ours -> theirs."""

    layers: Mapping[str, Layers] = field(default_factory=dict)
    """The layers of each of our parts, such as "decoder."."""

    computed: str = r"(?!)"
    """A pattern for tensors in their files that have no counterpart in ours."""

    def sources(self, ours: Sequence[str]) -> dict[str, list[str]]:
        """Our names -> those of their tensors that make up each."""
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
    """The row of their matrices for each of our units; MADE_UP if there is none."""

    inputs: list[int]
    """Rows of the embedding."""

    outputs: list[int]
    """Rows of the output layers."""


def arrange_units(count: int, sos: int, eos: int, blank: int = MADE_UP, unk: int = MADE_UP) -> Units:
    """Blank, sos/eos, unknown, and then the other units of `count` in their order.

    If sos and eos are two units, our unit 1 is sos as input and eos as output. Their sos also remains a unit
    of its own, since only the search keeps it out of a text; their eos is never an input.
    """
    rest = [i for i in range(count) if i not in (blank, eos, unk)]
    return Units([blank, sos, unk, *rest], [blank, eos, unk, *rest])


def load(
    model: nn.Module, weights: Mapping[str, Tensor], names: Names, where: str, units: Units | None = None
) -> None:
    """Load a state dict of another family into a HybridModel, or into a part of one under the same names.

    where: the file, for errors. units: None for the same units in the same order. Raises CheckpointError if
    tensors are missing, unused, or of another shape, with the names and shapes of all of them.
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
        parts = {x: weights[x] for x in sources[name]}
        taken = _taken(list(parts.values()), tensor, _order(name, units))
        if taken is None:
            given = ", ".join(f"{x} {tuple(part.shape)}{_kind(part)}" for x, part in parts.items())
            problems.append(f"{given} does not fit {expected}")
            continue
        found[name] = taken.reshape(tensor.shape)
    if problems:
        raise CheckpointError(f"{where}: {len(problems)} tensors do not fit: {'; '.join(problems)}")
    model.load_state_dict(found)


def count_layers(weights: Mapping[str, Tensor], place: str) -> int:
    """How many different numbers follow `place` in names."""
    return len({name.removeprefix(place).split(".")[0] for name in weights if name.startswith(place)})


def num_rows(weights: Mapping[str, Tensor], name: str) -> int:
    """The first size of a tensor; 0 if it is missing or a single number."""
    found = weights.get(name)
    return found.shape[0] if found is not None and found.dim() else 0


def add_biases(weights: Mapping[str, Tensor], pattern: str) -> dict[str, Tensor]:
    """The tensors, plus a zero bias for each matrix that lacks one if its name before ".weight" matches."""
    matching = re.compile(rf"{pattern}\.weight$")
    found = {
        f"{name.removesuffix('weight')}bias": x.new_zeros(x.shape[:1])
        for name, x in weights.items()
        if matching.search(name)
    }
    return found | dict(weights)


def _taken(parts: Sequence[Tensor], wanted: Tensor, order: Sequence[int]) -> Tensor | None:
    """Their tensors as one, with rows in our order; None if it is not of the size and kind of ours."""
    if wanted.is_floating_point() and not all(x.is_floating_point() for x in parts):
        return None
    if len({(x.dim(), x.shape[1:]) for x in parts}) > 1:
        return None
    value = torch.cat(list(parts)) if len(parts) > 1 and parts[0].dim() else parts[0]
    if order and (not value.dim() or len(value) != max(order) + 1):
        return None
    value = _take(value, order) if order else value
    return value if _sizes(value) == _sizes(wanted) else None


def _kind(x: Tensor) -> str:
    """The type of a tensor for messages, where it is none of a weight."""
    return "" if x.is_floating_point() else f" of {str(x.dtype).removeprefix('torch.')}"


def _order(name: str, units: Units | None) -> list[int]:
    """Their row for each of our units; empty if a tensor has no row per unit."""
    if units is None:
        return []
    return units.inputs if INPUTS.match(name) else units.outputs if OUTPUTS.match(name) else []


def _take(value: Tensor, order: Sequence[int]) -> Tensor:
    """Rows in our order, with constants for units that a family does not have."""
    index = torch.tensor(order, device=value.device)
    made_up = (index == MADE_UP).view(-1, *[1] * (value.dim() - 1))
    return value[index.clamp(min=0)].where(~made_up, NEVER if value.dim() == 1 else 0.0)


def _sizes(x: Tensor) -> list[int]:
    """The shape without dimensions of size 1, which pointwise kernels may or may not have."""
    return [n for n in x.shape if n != 1]
