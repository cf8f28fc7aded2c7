"""No decoder, for models of a CTC head alone: the smallest that there can be, of zeros, which no mode asks.

Everything that has a place for a decoder, checkpoints and bundles among it, stays as it is.
"""

from dataclasses import dataclass
from typing import Literal

from asr.model.decoder import DecoderConfig


@dataclass(kw_only=True, slots=True)
class AbsentConfig(DecoderConfig):
    """What stands for no decoder; nothing but `type` need be given."""

    type: Literal["none"] = "none"

    dim: int = 2

    num_layers: int = 1

    num_heads: int = 1

    ff_dim: int = 1

    positions: Literal["sinusoid"] = "sinusoid"

    dropout: float = 0.0
