"""The placeholder decoder of CTC-only models: as small as possible, zero once converted, and used by no mode.

It lets everything that expects a decoder, such as checkpoints and bundles, stay unchanged.
"""

from dataclasses import dataclass
from typing import Literal

from asr.model.decoder import DecoderConfig


@dataclass(kw_only=True, slots=True)
class AbsentConfig(DecoderConfig):
    """Configuration of the placeholder; only `type` has to be given."""

    type: Literal["none"] = "none"

    dim: int = 2

    num_layers: int = 1

    num_heads: int = 1

    ff_dim: int = 1

    positions: Literal["sinusoid"] = "sinusoid"

    dropout: float = 0.0
