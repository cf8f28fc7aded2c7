"""Checkpoints of FireRedASR-AED (arXiv:2501.14350): the encoder and the decoder.

A folder with model.pth.tar, cmvn.ark, dict.txt, and the SentencePiece model if there is one.

The key projections of the decoder have no bias, nor does its output layer, which is tied to the embedding:
our biases are zeros. There is no CTC head.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from asr.config import ExperimentConfig, TrainConfig
from asr.convert.converted import Converted, Tokens, decoder_alone, fresh_model, parts_to_load
from asr.convert.kaldi import read_cmvn
from asr.convert.names import Layers, Names, Units, add_biases, arrange_units, count_layers, load, num_rows
from asr.convert.options import Options
from asr.convert.source import Source
from asr.convert.units import our_symbols, read_units, splitter
from asr.errors import CheckpointError
from asr.features import FbankConfig
from asr.model.decoder import DecoderConfig
from asr.model.firered import FireRedConfig
from asr.tokens import SPACE, TWIN

BLANK, UNK = 0, 1
"""Their ids of these units."""

FILES = ("model.pth.tar", "cmvn.ark", "dict.txt", "*.model")
"""Files to fetch from a hub."""

MARK = r"^encoder\.layer_stack\.\d+\.mhsa\."
"""A tensor that no other family has."""

SIZES = (
    "idim",
    "odim",
    "d_model",
    "n_head",
    "n_layers_enc",
    "n_layers_dec",
    "kernel_size",
    "sos_id",
    "eos_id",
)

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


def read(source: Source) -> Converted:
    """Read a FireRedASR-AED checkpoint. Raises CheckpointError for what our model does not support."""
    file = source.weights_file("model.pth.tar", "*.pth.tar", "*.pt")
    found = source.tensors(file, "model_state_dict")
    args = read_args(found.others.get("args"), str(file))
    check_layers(found.weights, args, str(file))
    dictionary = source.file("dict.txt", "tokens.txt", "units.txt")
    theirs = read_dictionary(source.text(dictionary), str(dictionary))
    if len(theirs) != args["odim"]:
        raise CheckpointError(
            f"{dictionary}: {len(theirs)} units, the checkpoint has {args['odim']}; it is from another model"
        )
    config = ExperimentConfig(
        features=FbankConfig(num_bins=args["idim"], high_freq_hz=0.0, snip_edges=True, scale=32768.0),
        encoder=encoder_config(args),
        decoder=decoder_config(args),
        train=TrainConfig(cmvn=False),
        **decoder_alone(),
    )
    order = units(args)
    symbols = our_symbols(theirs, order, str(dictionary))
    model = fresh_model(config, len(symbols), found.weights, str(file))
    load(parts_to_load(model), tensors(found.weights), NAMES, str(file), order)
    statistics = source.file("cmvn.ark", "cmvn.txt")
    mean, istd = read_cmvn(source.data(statistics), args["idim"], str(statistics))
    model.cmvn.mean.copy_(mean)
    model.cmvn.istd.copy_(istd)
    tokens = Tokens(symbols, splitter(source, symbols, "*.model"))
    return Converted(config, tokens, model, found.notes)


def read_dictionary(text: str, where: str) -> list[str]:
    """The units of dict.txt, as their reader takes them: a line without an id has that of its place, and an
    empty one or `<space>` is a space, as the space of SentencePiece is, too."""
    lines = [line.split() or ["<space>"] for line in text.rstrip("\r\n").split("\n")]
    numbered = (f"{line[0]} {line[1] if len(line) > 1 else i}" for i, line in enumerate(lines))
    theirs = read_units("\n".join(numbered), where)
    space = SPACE + TWIN if SPACE in theirs else SPACE
    return [space if symbol == "<space>" else symbol for symbol in theirs]


def read_args(found: Any, where: str) -> dict[str, Any]:
    """The options of a checkpoint, all of them numbers; CheckpointError if one is missing or invalid."""
    values = found if isinstance(found, Mapping) else getattr(found, "__dict__", None)
    if not values or not set(SIZES) <= set(values):
        raise CheckpointError(
            f"{where}: no args with {', '.join(SIZES)} in it; not a FireRedASR-AED checkpoint"
        )
    options = Options(values, where, "args.")
    args: dict[str, Any] = {name: options.count(name, 0) for name in SIZES}
    if not max(args["sos_id"], args["eos_id"]) < args["odim"]:
        raise CheckpointError(f"{where}: args {args}, expected ids below odim")
    return args | {"residual_dropout": options.number("residual_dropout", 0.1)}


def check_layers(weights: Mapping[str, Tensor], args: Mapping[str, Any], where: str) -> None:
    """Check layers and channels before building a model that might be larger than any file."""
    for part, name in (("encoder", "n_layers_enc"), ("decoder", "n_layers_dec")):
        count = count_layers(weights, f"{part}.layer_stack.")
        if count != args[name]:
            raise CheckpointError(f"{where}: {count} layers of the {part}, args.{name} is {args[name]}")
    channels = num_rows(weights, "decoder.layer_norm_out.weight")
    if channels != args["d_model"]:
        raise CheckpointError(f"{where}: {channels} channels, args.d_model is {args['d_model']}")


def tensors(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that NAMES expects: theirs, with biases."""
    return add_biases(weights, r"^decoder\.(tgt_word_prj|layer_stack\.\d+\.(self|cross)_attn\.w_ks)")


def units(args: Mapping[str, Any]) -> Units:
    """Our units, from the `args` of a checkpoint."""
    return arrange_units(args["odim"], args["sos_id"], args["eos_id"], BLANK, UNK)


def encoder_config(args: Mapping[str, Any]) -> FireRedConfig:
    """Our encoder configuration, from the `args` of a checkpoint."""
    return FireRedConfig(
        dim=args["d_model"],
        num_layers=args["n_layers_enc"],
        num_heads=args["n_head"],
        ff_dim=4 * args["d_model"],
        kernel_size=args["kernel_size"],
        dropout=args["residual_dropout"],
    )


def decoder_config(args: Mapping[str, Any]) -> DecoderConfig:
    """Our decoder configuration, from the `args` of a checkpoint."""
    return DecoderConfig(
        dim=args["d_model"],
        num_layers=args["n_layers_dec"],
        num_heads=args["n_head"],
        ff_dim=4 * args["d_model"],
        activation="gelu",
        positions="sinusoid",
        dropout=args["residual_dropout"],
    )
