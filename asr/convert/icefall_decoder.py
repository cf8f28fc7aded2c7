"""The attention decoder of icefall's checkpoints; its units are the same as ours, in the same order."""

from collections.abc import Mapping
from typing import Any

from asr.convert.names import Layers, Names
from asr.model.decoder import DecoderConfig

PLACE = "attention_decoder.decoder."

DECODER = Names(
    heads={"decoder.embedding.": f"{PLACE}embed.", "decoder.out.": f"{PLACE}output_layer."},
    layers={
        "decoder.": Layers(
            f"{PLACE}layers.",
            {
                "attention.project.": ("self_attn.linear_q.", "self_attn.linear_k.", "self_attn.linear_v."),
                "attention.out.": ("self_attn.out_proj.",),
                "attention_norm.": ("norm_self_attn.",),
                "cross_norm.": ("norm_src_attn.",),
                "cross.query.": ("src_attn.linear_q.",),
                "cross.out.": ("src_attn.out_proj.",),
                "feed_forward.0.": ("norm_ff.",),
                "feed_forward.1.": ("feed_forward.0.",),
                "feed_forward.4.": ("feed_forward.3.",),
            },
            memory=("src_attn.linear_k.", "src_attn.linear_v."),
        )
    },
)


def decoder_config(options: Mapping[str, Any]) -> DecoderConfig:
    """Our configuration, from their training options without the prefix "attention_decoder"."""
    dim, attention_dim = options["decoder_dim"], options["attention_dim"]
    return DecoderConfig(
        dim=dim,
        num_layers=options["num_decoder_layers"],
        num_heads=options["num_heads"],
        attention_dim=0 if attention_dim == dim else attention_dim,
        ff_dim=options["feedforward_dim"],
        positions="sinusoid",
        final_norm=False,
    )
