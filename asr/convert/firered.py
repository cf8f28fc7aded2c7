"""Checkpoints of FireRedASR-AED (arXiv:2501.14350): the encoder and the decoder.

Keys of the decoder have no bias, and its output, which is the embedding, has none either: ours are zeros.
There is no CTC head.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from asr.convert.names import Layers, Names, Units, add_biases, arrange_units
from asr.model.decoder import DecoderConfig
from asr.model.firered import FireRedConfig

BLANK, UNK = 0, 1
"""Their ids of the two."""

ENCODER_LAYER = {
    "feed_forward_1.": ("ffn1.net.",),
    "attention.query_norm.": ("mhsa.layer_norm_q.",),
    "attention.key_norm.": ("mhsa.layer_norm_k.",),
    "attention.value_norm.": ("mhsa.layer_norm_v.",),
    "attention.query.": ("mhsa.w_qs.",),
    "attention.key.": ("mhsa.w_ks.",),
    "attention.value.": ("mhsa.w_vs.",),
    "attention.position.": ("mhsa.linear_pos.",),
    "attention.content_bias": ("mhsa.pos_bias_u",),
    "attention.position_bias": ("mhsa.pos_bias_v",),
    "attention.out.": ("mhsa.fc.",),
    "convolution.norm.": ("conv.pre_layer_norm.",),
    "convolution.gated.": ("conv.pointwise_conv1.",),
    "convolution.depthwise.": ("conv.depthwise_conv.",),
    "convolution.depthwise_norm.": ("conv.batch_norm.",),
    "convolution.out.": ("conv.pointwise_conv2.",),
    "feed_forward_2.": ("ffn2.net.",),
    "norm.": ("layer_norm.",),
}
DECODER_LAYER = {
    "attention.project.": ("self_attn.w_qs.", "self_attn.w_ks.", "self_attn.w_vs."),
    "attention.out.": ("self_attn.fc.",),
    "attention_norm.": ("self_attn_norm.",),
    "cross_norm.": ("cross_attn_norm.",),
    "cross.query.": ("cross_attn.w_qs.",),
    "cross.out.": ("cross_attn.fc.",),
    "feed_forward.0.": ("mlp_norm.",),
    "feed_forward.1.": ("mlp.w_1.",),
    "feed_forward.4.": ("mlp.w_2.",),
}
NAMES = Names(
    heads={
        "encoder.front.convolutions.": "encoder.input_preprocessor.conv.",
        "encoder.front.out.": "encoder.input_preprocessor.out.",
        "decoder.embedding.": "decoder.tgt_word_emb.",
        "decoder.norm.": "decoder.layer_norm_out.",
        "decoder.out.": "decoder.tgt_word_prj.",
    },
    layers={
        "encoder.": Layers("encoder.layer_stack.", ENCODER_LAYER),
        "decoder.": Layers(
            "decoder.layer_stack.", DECODER_LAYER, memory=("cross_attn.w_ks.", "cross_attn.w_vs.")
        ),
    },
    computed=r"\.positional_encoding\.pe$",
)


def tensors(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What NAMES expects: theirs, with biases."""
    return add_biases(weights, r"^decoder\.(tgt_word_prj|layer_stack\.\d+\.(self|cross)_attn\.w_ks)")


def units(args: Mapping[str, Any]) -> Units:
    """Ours, from the `args` of a checkpoint."""
    return arrange_units(args["odim"], args["sos_id"], args["eos_id"], BLANK, UNK)


def encoder_config(args: Mapping[str, Any]) -> FireRedConfig:
    """Ours, from the `args` of a checkpoint."""
    return FireRedConfig(
        dim=args["d_model"],
        num_layers=args["n_layers_enc"],
        num_heads=args["n_head"],
        ff_dim=4 * args["d_model"],
        kernel_size=args["kernel_size"],
        dropout=args["residual_dropout"],
    )


def decoder_config(args: Mapping[str, Any]) -> DecoderConfig:
    """Ours, from the `args` of a checkpoint."""
    return DecoderConfig(
        dim=args["d_model"],
        num_layers=args["n_layers_dec"],
        num_heads=args["n_head"],
        ff_dim=4 * args["d_model"],
        activation="gelu",
        positions="sinusoid",
        dropout=args["residual_dropout"],
    )
