"""Public Whisper checkpoints: a dict of `dims` and `model_state_dict` (arXiv:2212.04356)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from asr.convert.names import MADE_UP, Layers, Names, Units, add_biases
from asr.convert.whisper_decoder import DECODER, decoder_tensors
from asr.errors import CheckpointError
from asr.features import FbankConfig
from asr.model.whisper import WhisperConfig, sinusoid_table

POSITIONS = "encoder.positional_embedding"

ENCODER = Names(
    heads={
        "encoder.front.0.": "encoder.conv1.",
        "encoder.front.1.": "encoder.conv2.",
        "encoder.norm.": "encoder.ln_post.",
    },
    layers={
        "encoder.": Layers(
            "encoder.blocks.",
            {
                "attention_norm.": ("attn_ln.",),
                "attention.project.": ("attn.query.", "attn.key.", "attn.value."),
                "attention.out.": ("attn.out.",),
                "feed_forward.0.": ("mlp_ln.",),
                "feed_forward.1.": ("mlp.0.",),
                "feed_forward.4.": ("mlp.2.",),
            },
        )
    },
    computed=f"^{POSITIONS}$",
)

NAMES = Names(ENCODER.heads | DECODER.heads, ENCODER.layers | DECODER.layers, ENCODER.computed)

FRAME_S = 0.01
"""Of the features."""

NUM_TIMES = 1501
NUM_MARKS = 8
"""Units that are neither pieces nor languages nor times: asr/whisper_tokens.py."""

ENGLISH_ONLY = 51864
"""Units of the models of English alone, which have one piece less than the others."""


def encoder_config(dims: Mapping[str, Any]) -> WhisperConfig:
    """Ours, from the `dims` of a checkpoint."""
    return WhisperConfig(
        dim=dims["n_audio_state"],
        num_layers=dims["n_audio_layer"],
        num_heads=dims["n_audio_head"],
        ff_dim=4 * dims["n_audio_state"],
        window=dims["n_audio_ctx"],
    )


def features_config(dims: Mapping[str, Any]) -> FbankConfig:
    """Ours, from the `dims` of a checkpoint."""
    return FbankConfig(
        type="whisper",
        num_bins=dims["n_mels"],
        low_freq_hz=0.0,
        high_freq_hz=0.0,
        window_s=2 * dims["n_audio_ctx"] * FRAME_S,
    )


def encoder_tensors(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What ENCODER expects: keys with a bias."""
    return add_biases(weights, r"^encoder\.blocks\.\d+\.attn\.key")


def tensors(weights: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """What NAMES expects; CheckpointError where the encoder's positions are others than ours."""
    found = weights[POSITIONS]
    if not found.is_meta and not torch.allclose(found.float(), sinusoid_table(*found.shape), atol=1e-3):
        raise CheckpointError(
            f"{where}: {POSITIONS} are not the sinusoids of Whisper, and cannot be represented"
        )
    return decoder_tensors(encoder_tensors(weights))


def whisper_units(count: int, start: int, end: int) -> Units:
    """Which of `count` units ours are; start of the transcript, end of the text.

    The start keeps a unit of its own, as nothing but the decoding keeps it out of an answer; the end, which
    never goes in, has none.
    """
    rest = [i for i in range(count) if i != end]
    return Units([MADE_UP, start, MADE_UP, *rest], [MADE_UP, end, MADE_UP, *rest])


def num_languages(num_units: int) -> int:
    """Of a published model: 99, and 100 from large-v3 on."""
    return 99 if num_units <= ENGLISH_ONLY + 1 else num_units - (ENGLISH_ONLY + 1) + 99


def num_pieces(num_units: int) -> int:
    """Of a published model: what is neither a language nor a mark nor a time."""
    return num_units - num_languages(num_units) - NUM_MARKS - NUM_TIMES
