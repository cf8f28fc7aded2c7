"""The Transformer decoder of NeMo models that have one, such as Canary (arXiv:2406.19674).

It adds sinusoids divided by sqrt(C) to an unscaled embedding, followed by a norm; ours adds sinusoids to an
embedding times sqrt(C), which is the same after the norm. If encoder and decoder have different sizes, there
is a projection between them; ours is part of the keys and values of cross-attention.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from asr.convert.names import Layers, Names
from asr.errors import ConfigError
from asr.model.decoder import DecoderConfig

PLACE = "transf_decoder."
TABLE = f"{PLACE}_embedding.position_embedding.weight"

DECODER = Names(
    heads={
        "decoder.embedding.": f"{PLACE}_embedding.token_embedding.",
        "decoder.positions.": f"{PLACE}_embedding.position_embedding.",
        "decoder.embedding_norm.": f"{PLACE}_embedding.layer_norm.",
        "decoder.norm.": f"{PLACE}_decoder.final_layer_norm.",
        "decoder.out.": "log_softmax.mlp.layer0.",
    },
    layers={
        "decoder.": Layers(
            f"{PLACE}_decoder.layers.",
            {
                "attention.project.": (
                    "first_sub_layer.query_net.",
                    "first_sub_layer.key_net.",
                    "first_sub_layer.value_net.",
                ),
                "attention.out.": ("first_sub_layer.out_projection.",),
                "attention_norm.": ("layer_norm_1.",),
                "cross_norm.": ("layer_norm_2.",),
                "cross.query.": ("second_sub_layer.query_net.",),
                "cross.out.": ("second_sub_layer.out_projection.",),
                "feed_forward.0.": ("layer_norm_3.",),
                "feed_forward.1.": ("third_sub_layer.dense_in.",),
                "feed_forward.4.": ("third_sub_layer.dense_out.",),
            },
            memory=("second_sub_layer.key_net.", "second_sub_layer.value_net."),
        )
    },
    computed=r"\.pos_enc$",
)


def decoder_tensors(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that DECODER expects: keys and values of the encoder's output, and a table to add."""
    found = dict(weights)
    if TABLE in found:
        found[TABLE] = found[TABLE] * math.sqrt(found[TABLE].shape[1])
    weight, bias = (found.pop(f"encoder_decoder_proj.{x}", None) for x in ("weight", "bias"))
    if weight is not None and bias is not None:
        for name in [x for x in found if x.endswith(tuple(f"{x}weight" for x in _memory()))]:
            matrix, to = found[name], f"{name.removesuffix('weight')}bias"
            found[name], found[to] = matrix @ weight, matrix @ bias + found[to]
    return found


def decoder_config(options: Mapping[str, Any]) -> DecoderConfig:
    """Our configuration, from their `transf_decoder`. ConfigError for post-norm."""
    if not options["pre_ln"]:
        raise ConfigError(
            "transf_decoder.pre_ln: false, and our decoder has no norms after the modules; expected true"
        )
    return DecoderConfig(
        dim=options["hidden_size"],
        num_layers=options["num_layers"],
        num_heads=options["num_attention_heads"],
        ff_dim=options["inner_size"],
        activation=options["hidden_act"],
        positions="learnt" if options["learn_positional_encodings"] else "sinusoid",
        num_positions=options["max_sequence_length"],
        embedding_norm=True,
        final_norm=options["pre_ln_final_layer_norm"],
        dropout=options["ffn_dropout"],
    )


def _memory() -> tuple[str, ...]:
    return tuple(DECODER.layers["decoder."].memory)
