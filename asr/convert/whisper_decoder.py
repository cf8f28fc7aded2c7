"""The decoder of Whisper (arXiv:2212.04356).

Its embedding is not scaled, so ours is theirs divided by our scale; its output layer is the same matrix,
without a bias, and its key projections have none either.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from asr.convert.names import Layers, Names, add_biases
from asr.model.whisper import WhisperDecoderConfig

EMBEDDING, OUT = "decoder.token_embedding.weight", "decoder.out.weight"

DECODER = Names(
    heads={
        "decoder.embedding.": "decoder.token_embedding.",
        "decoder.positions.weight": "decoder.positional_embedding",
        "decoder.norm.": "decoder.ln.",
        "decoder.out.": "decoder.out.",
    },
    layers={
        "decoder.": Layers(
            "decoder.blocks.",
            {
                "attention.project.": ("attn.query.", "attn.key.", "attn.value."),
                "attention.out.": ("attn.out.",),
                "attention_norm.": ("attn_ln.",),
                "cross_norm.": ("cross_attn_ln.",),
                "cross.query.": ("cross_attn.query.",),
                "cross.out.": ("cross_attn.out.",),
                "feed_forward.0.": ("mlp_ln.",),
                "feed_forward.1.": ("mlp.0.",),
                "feed_forward.4.": ("mlp.2.",),
            },
            memory=("cross_attn.key.", "cross_attn.value."),
        )
    },
)


def decoder_tensors(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that DECODER expects: a separate output layer, biases, and an embedding to be scaled."""
    rows = weights[EMBEDDING]
    untied = {EMBEDDING: rows / math.sqrt(rows.shape[1]), OUT: rows}
    return add_biases({**weights, **untied}, r"^decoder\.(out|blocks\.\d+\.(cross_)?attn\.key)")


def decoder_config(dims: Mapping[str, Any]) -> WhisperDecoderConfig:
    """Our decoder configuration, from the `dims` of a checkpoint."""
    return WhisperDecoderConfig(
        dim=dims["n_text_state"],
        num_layers=dims["n_text_layer"],
        num_heads=dims["n_text_head"],
        ff_dim=4 * dims["n_text_state"],
        num_positions=dims["n_text_ctx"],
    )
