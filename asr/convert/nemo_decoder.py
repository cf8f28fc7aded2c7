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
from asr.convert.options import Options
from asr.errors import CheckpointError
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


WITHOUT_EFFECT = (
    *("_target_", "vocab_size", "num_token_types"),
    *("embedding_dropout", "attn_score_dropout", "attn_layer_dropout"),
)
"""Options of training, or that show in the shapes of tensors."""


def decoder_tensors(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that DECODER expects: keys and values of the encoder's output, and a table to add."""
    found = dict(weights)
    if TABLE in found and found[TABLE].dim() == 2:
        found[TABLE] = found[TABLE] * math.sqrt(found[TABLE].shape[1])
    weight, bias = (found.pop(f"encoder_decoder_proj.{x}", None) for x in ("weight", "bias"))
    if weight is not None and bias is not None:
        for name in [x for x in found if x.endswith(tuple(f"{x}weight" for x in _memory()))]:
            matrix, to = found[name], f"{name.removesuffix('weight')}bias"
            shapes = [matrix.shape[:1], matrix.shape[1:], bias.shape]
            if shapes != [found[to].shape, weight.shape[:1], weight.shape[:1]] or weight.dim() != 2:
                raise CheckpointError(
                    f"encoder_decoder_proj.weight {tuple(weight.shape)} does not fit {name} "
                    f"{tuple(matrix.shape)}, or its bias does not"
                )
            found[name], found[to] = matrix @ weight, matrix @ bias + found[to]
    return found


def decoder_config(section: Mapping[str, Any], where: str) -> DecoderConfig:
    """Our configuration, from their section `transf_decoder`: its `config_dict`, if there is one.

    where: the file, for errors. Raises CheckpointError for what our decoder does not support.
    """
    outer = Options(section, where, "transf_decoder.")
    options = outer.part("config_dict") if "config_dict" in section else outer
    if not options.switch("pre_ln", False):
        raise options.wrong("pre_ln", False, "true, as our decoder has no norms after the modules")
    config = DecoderConfig(
        dim=options.count("hidden_size", 0),
        num_layers=options.count("num_layers", 0),
        num_heads=options.count("num_attention_heads", 0),
        ff_dim=options.count("inner_size", 0),
        activation=options.choice("hidden_act", "relu", ("relu", "gelu", "silu")),
        positions="learnt" if options.switch("learn_positional_encodings", False) else "sinusoid",
        num_positions=options.count("max_sequence_length", 512),
        embedding_norm=True,
        final_norm=outer.switch("pre_ln_final_layer_norm", True),
        dropout=options.number("ffn_dropout", 0.0),
    )
    options.only({}, WITHOUT_EFFECT)
    return config


def _memory() -> tuple[str, ...]:
    return tuple(DECODER.layers["decoder."].memory)
