"""The result of reading a checkpoint of any family: everything that an experiment needs."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from asr.config import ExperimentConfig
from asr.losses import LossConfig
from asr.model.absent import AbsentConfig
from asr.model.build import build_model
from asr.model.hybrid import HybridModel


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


def fresh_model(config: ExperimentConfig, num_tokens: int) -> HybridModel:
    """The model of a configuration, in eval mode, with all parameters still to be loaded."""
    return build_model(config.features, config.encoder, config.decoder, config.loss, num_tokens).eval()
