"""What a reader of a family gives: everything that an experiment needs."""

from dataclasses import dataclass
from typing import NamedTuple

from asr.config import ExperimentConfig
from asr.model.build import build_model
from asr.model.hybrid import HybridModel


class Tokens(NamedTuple):
    """The units of a converted model."""

    symbols: list[str]
    """Of each id."""

    model: bytes | None = None
    """A SentencePiece model, where one splits text into exactly these units."""


@dataclass(frozen=True)
class Converted:
    """A public checkpoint as a model of ours."""

    config: ExperimentConfig
    tokens: Tokens
    model: HybridModel
    notes: tuple[str, ...] = ()
    """What was changed on the way, what was left out, and what to know when decoding."""


def fresh_model(config: ExperimentConfig, num_tokens: int) -> HybridModel:
    """The model of a configuration, in eval mode, every parameter of which is still to be loaded."""
    return build_model(config.features, config.encoder, config.decoder, config.loss, num_tokens).eval()
