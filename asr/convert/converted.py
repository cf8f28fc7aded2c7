"""The result of reading a checkpoint of any family: everything that an experiment needs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from asr.config import ExperimentConfig
from asr.errors import CheckpointError
from asr.losses import LossConfig
from asr.model.absent import AbsentConfig
from asr.model.build import build_model
from asr.model.hybrid import HybridModel

MOST_GROWTH = 3
"""Ours has two matrices where theirs is used twice, and zeros for biases or a decoder that they lack."""

COMPUTED = 2**25
"""Numbers that ours computes, such as the matrices of the Fourier transform and the mel bins."""


class Tokens(NamedTuple):
    """The units of a converted model."""

    symbols: list[str]
    """The symbol of each id."""

    model: bytes | None = None
    """A SentencePiece model, if there is one that splits text into exactly these units."""


@dataclass(frozen=True)
class Converted:
    """A public checkpoint as a model of this toolkit."""

    config: ExperimentConfig
    tokens: Tokens
    model: HybridModel
    notes: tuple[str, ...] = ()
    """What was changed in conversion, what was left out, and what to know when decoding."""


def ctc_alone() -> dict[str, Any]:
    """The configuration parts for a model without a decoder."""
    return {"decoder": AbsentConfig(), "loss": LossConfig(ctc=1.0, attention=0.0)}


def decoder_alone() -> dict[str, Any]:
    """The configuration parts for a model without a CTC head."""
    return {"loss": LossConfig(ctc=None, attention=1.0)}


def parts_to_load(model: HybridModel, *others: str) -> nn.ModuleDict:
    """Encoder, CTC head and decoder of a model, and others by name, for `asr.convert.names.load`.

    A missing decoder is replaced by zeros.
    """
    names = ["encoder", *others, *(["ctc"] if model.ctc is not None else [])]
    if model.decoder.config.type == "none":
        with torch.no_grad():
            for x in model.decoder.parameters():
                x.zero_()
    else:
        names.append("decoder")
    return nn.ModuleDict({name: model.get_submodule(name) for name in names})


def fresh_model(
    config: ExperimentConfig, num_tokens: int, weights: Mapping[str, Tensor], where: str
) -> HybridModel:
    """The model of a configuration, in eval mode, with all parameters still to be loaded.

    Raises CheckpointError if it would be much larger than the weights for it, before it takes any memory.
    where: the file, for errors.
    """
    parts = (config.features, config.encoder, config.decoder, config.loss, num_tokens)
    with torch.device("meta"):
        planned = build_model(*parts)
    needed = sum(x.numel() for x in [*planned.parameters(), *planned.buffers()])
    held = sum(x.numel() for x in weights.values())
    if needed > MOST_GROWTH * held + COMPUTED:
        raise CheckpointError(
            f"{where}: options of a model with {needed:,} numbers, the weights have {held:,}; they are of "
            "different models"
        )
    return build_model(*parts).eval()
