"""Public WeNet checkpoints: U2 and U2++ Conformers (arXiv:2012.05481, arXiv:2106.05642).

A folder as WeNet publishes it: train.yaml, final.pt (or avg_N.pt), units.txt (or lang_char.txt), global_cmvn
if the checkpoint does not contain it, and the SentencePiece model if there is one.

Our parts are `cmvn`, `encoder` (WenetConformer), `ctc`, `decoder` (TransformerDecoder with ReLU and
sinusoids) and, if there is a second, right-to-left decoder, `reverse_decoder`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from asr.config import ExperimentConfig, TrainConfig
from asr.convert.converted import Converted, Tokens, fresh_model
from asr.convert.kaldi import read_cmvn
from asr.convert.names import Layers, Names, arrange_units, count_layers, load, num_rows
from asr.convert.options import Options
from asr.convert.source import Source
from asr.convert.units import find_unit, our_symbols, read_units, splitter
from asr.errors import CheckpointError
from asr.features import FbankConfig
from asr.losses import LossConfig
from asr.model.decoder import DecoderConfig
from asr.model.masks import ChunkConfig
from asr.model.wenet import WenetConformerConfig

MARK = r"^encoder\.encoders\.\d+\.self_attn\.linear_q\."
"""A tensor that no other family has."""

FILES = ("*.pt", "*.safetensors", "*.yaml", "global_cmvn", "*.txt", "*.model")
"""Files to fetch from a hub."""

ATTENTION = {
    "attention.project.": ("self_attn.linear_q.", "self_attn.linear_k.", "self_attn.linear_v."),
    "attention.out.": ("self_attn.linear_out.",),
}
ENCODER_LAYER = ATTENTION | {
    "feed_forward_1.0.": ("norm_ff_macaron.",),
    "feed_forward_1.1.": ("feed_forward_macaron.w_1.",),
    "feed_forward_1.4.": ("feed_forward_macaron.w_2.",),
    "attention_norm.": ("norm_mha.",),
    "attention.position.": ("self_attn.linear_pos.",),
    "attention.content_bias": ("self_attn.pos_bias_u",),
    "attention.position_bias": ("self_attn.pos_bias_v",),
    "convolution.norm.": ("norm_conv.",),
    "convolution.gated.": ("conv_module.pointwise_conv1.",),
    "convolution.depthwise.": ("conv_module.depthwise_conv.",),
    "convolution.depthwise_norm.": ("conv_module.norm.",),
    "convolution.out.": ("conv_module.pointwise_conv2.",),
    "feed_forward_2.0.": ("norm_ff.",),
    "feed_forward_2.1.": ("feed_forward.w_1.",),
    "feed_forward_2.4.": ("feed_forward.w_2.",),
    "norm.": ("norm_final.",),
}
DECODER_LAYER = ATTENTION | {
    "attention_norm.": ("norm1.",),
    "cross_norm.": ("norm2.",),
    "cross.query.": ("src_attn.linear_q.",),
    "cross.out.": ("src_attn.linear_out.",),
    "feed_forward.0.": ("norm3.",),
    "feed_forward.1.": ("feed_forward.w_1.",),
    "feed_forward.4.": ("feed_forward.w_2.",),
}
RIGHT = "decoder.right_decoder."
MEMORY = ("src_attn.linear_k.", "src_attn.linear_v.")

SINUSOIDS = r"\.pe$"
CMVN = ("encoder.global_cmvn.mean", "encoder.global_cmvn.istd")

LAYER_OPTIONS: dict[str, Any] = {
    "normalize_before": True,
    "concat_after": False,
    "layer_norm_type": "layer_norm",
    "norm_eps": 1e-5,
    "mlp_type": "position_wise_feed_forward",
    "mlp_bias": True,
    "query_bias": True,
    "key_bias": True,
    "value_bias": True,
    "n_kv_head": None,
    "head_dim": None,
}
ENCODER_OPTIONS = LAYER_OPTIONS | {
    "pos_enc_layer_type": "rel_pos",
    "selfattention_layer_type": "rel_selfattn",
    "activation_type": "swish",
    "use_cnn_module": True,
    "macaron_style": True,
    "positionwise_conv_kernel_size": 1,
    "conv_bias": True,
    "conv_norm_eps": 1e-5,
    "final_norm": True,
}
DECODER_OPTIONS = LAYER_OPTIONS | {
    "input_layer": "embed",
    "use_output_layer": True,
    "src_attention": True,
    "src_query_bias": True,
    "src_key_bias": True,
    "src_value_bias": True,
    "activation_type": "relu",
    "tie_word_embedding": False,
}
FBANK_OPTIONS: dict[str, Any] = {"feature_type": "fbank", "using_pitch": False, "window_type": "povey"}
"""Options of their layers and features, and the values that we support."""

TRAINING_ONLY = (
    *("dropout_rate", "positional_dropout_rate", "attention_dropout_rate", "self_attention_dropout_rate"),
    *("src_attention_dropout_rate", "gradient_checkpointing", "use_sdpa"),
)


def read(source: Source) -> Converted:
    """Read a WeNet checkpoint. Raises CheckpointError or ConfigError for what our model does not support."""
    file = source.weights_file("final.pt", "avg*.pt", "*.pt", "*.safetensors")
    options = Options(source.yaml(path := source.file("train.yaml", "*.yaml")), str(path))
    units_file = source.file("units.txt", "lang_char.txt", "words.txt", "dict.txt")
    theirs = read_units(source.text(units_file), str(units_file))
    tensors = source.tensors(file, "model", "state_dict")
    weights, notes = tensors.weights, [*tensors.notes]
    if empty := empty_decoder(weights):
        weights = {name: x for name, x in weights.items() if name not in empty}
        notes.append("the right-to-left decoder has no layers and is left out")
    config = read_config(options)
    _add_cmvn(source, options, weights, config.features.num_bins)
    _check_sizes(config, weights, len(theirs), str(file), str(units_file))
    units = arrange_units(len(theirs), *_special(options, theirs, str(units_file)))
    symbols = our_symbols(theirs, units, str(units_file))
    model = fresh_model(config, len(symbols), weights, str(file))
    load(model, weights, wenet_names(weights), str(file), units)
    tables = sum(name.endswith(".pe") for name in weights)
    notes += [f"{tables} tables of sinusoids are computed here"] * bool(tables)
    return Converted(config, Tokens(symbols, splitter(source, symbols, "*.model")), model, tuple(notes))


def read_config(options: Options) -> ExperimentConfig:
    """Our configuration, from train.yaml."""
    options.choice("model", "asr_model", ("asr_model", "asrmodel"))
    options.expect("encoder", "conformer")
    kind = options.choice("decoder", "bitransformer", ("transformer", "bitransformer"))
    head = options.part("model_conf")
    head.expect("apply_non_blank_embedding", False)
    share = head.number("ctc_weight", 0.5)
    encoder = _encoder(options.part("encoder_conf"))
    decoder = _decoder(options.part("decoder_conf"), encoder.dim, kind == "bitransformer")
    loss = LossConfig(
        ctc=share,
        attention=1 - share,
        reverse=head.number("reverse_weight", 0.0),
        label_smoothing=head.number("lsm_weight", 0.0),
    )
    return ExperimentConfig(
        features=_features(options),
        encoder=encoder,
        decoder=decoder,
        loss=loss,
        train=TrainConfig(cmvn=False),
    )


def _features(options: Options) -> FbankConfig:
    """Kaldi's features of 16-bit integers, up to half the sample rate, with frames only within the audio."""
    data = options.part("dataset_conf", "collate_conf")
    data.expect("feats_type", "fbank")
    fbank = data.part("fbank_conf", "feature_extraction_conf")
    for name, value in FBANK_OPTIONS.items():
        fbank.expect(name, value)
    num_bins = fbank.count("num_mel_bins", fbank.count("mel_bins", 80))
    if options.count("input_dim", num_bins) != num_bins:
        raise CheckpointError(f"{options.where}: input_dim is not the {num_bins} mel bins of fbank_conf")
    return FbankConfig(
        sample_rate=data.part("resample_conf").count("resample_rate", 16000, least=1000),
        num_bins=num_bins,
        frame_ms=fbank.number("frame_length", 25.0, least=1.0, most=1000.0),
        shift_ms=fbank.number("frame_shift", 10.0, least=1.0, most=1000.0),
        high_freq_hz=0.0,
        snip_edges=True,
        scale=32768.0,
    )


def _encoder(options: Options) -> WenetConformerConfig:
    static = options.count("static_chunk_size", 0, least=-1)
    causal = options.switch("causal", False)
    dynamic = options.switch("use_dynamic_chunk", False)
    config = WenetConformerConfig(
        dim=options.count("output_size", 256),
        num_layers=options.count("num_blocks", 6),
        num_heads=options.count("attention_heads", 4),
        ff_dim=options.count("linear_units", 2048),
        kernel_size=options.count("cnn_module_kernel", 15),
        causal=causal,
        norm=options.choice("cnn_module_norm", "batch_norm", ("batch_norm", "layer_norm")),
        input_layer=options.choice("input_layer", "conv2d", ("conv2d", "conv2d6", "conv2d8")),
        dropout=options.number("dropout_rate", 0.1),
        chunk=ChunkConfig(
            dynamic=causal and dynamic,
            max_chunk=static if static > 0 else 25,
            limit_left=options.switch("use_dynamic_left_chunk", False),
        ),
    )
    options.only(ENCODER_OPTIONS, TRAINING_ONLY)
    return config


def _decoder(options: Options, dim: int, both: bool) -> DecoderConfig:
    reverse_layers = options.count("r_num_blocks", 0, least=0)
    config = DecoderConfig(
        dim=dim,
        num_layers=options.count("num_blocks", 6),
        num_heads=options.count("attention_heads", 4),
        ff_dim=options.count("linear_units", 2048),
        activation="relu",
        positions="sinusoid",
        dropout=options.number("dropout_rate", 0.1),
        reverse_layers=reverse_layers if both else 0,
    )
    options.only(DECODER_OPTIONS, TRAINING_ONLY)
    return config


def _add_cmvn(source: Source, options: Options, weights: dict[str, Tensor], num_bins: int) -> None:
    """Mean and variance of the features: in the checkpoint, in a file, or none at all."""
    file = source.maybe("global_cmvn", "global_cmvn.*")
    given = read_cmvn(source.data(file), num_bins, str(file)) if file else None
    held = [weights.get(name) for name in CMVN]
    if all(x is None for x in held):
        named = options.text("cmvn", "") or options.text("cmvn_file", "")
        if named and not given:
            raise CheckpointError(f"{source.label}: incomplete, expected global_cmvn in it")
        given = given or (torch.zeros(num_bins), torch.ones(num_bins))
        weights |= zip(CMVN, given, strict=True)
    elif given and not all(
        x is not None and x.shape == y.shape and torch.allclose(x, y, rtol=1e-3, atol=1e-3)
        for x, y in zip(held, given, strict=True)
    ):
        raise CheckpointError(f"{file}: not the statistics that the checkpoint holds; it is of another model")


def _check_sizes(
    config: ExperimentConfig, weights: Mapping[str, Tensor], num_units: int, file: str, units_file: str
) -> None:
    """Reject sizes that would otherwise fail tensor by tensor, or build a model larger than any file."""
    names = wenet_names(weights).layers
    for part, expected in (
        ("encoder", config.encoder.num_layers),
        ("decoder", config.decoder.num_layers),
        ("reverse_decoder", config.decoder.reverse_layers),
    ):
        layers = count_layers(weights, names[f"{part}."].place)
        if layers != expected:
            raise CheckpointError(f"{file}: {layers} layers of the {part}, train.yaml says {expected}")
    rows = num_rows(weights, "ctc.ctc_lo.weight")
    if rows and rows != num_units:
        raise CheckpointError(
            f"{units_file}: {num_units} units, the checkpoint has {rows}; it is from another model"
        )
    dim = num_rows(weights, "encoder.after_norm.weight")
    if dim != config.encoder.dim:
        raise CheckpointError(f"{file}: {dim} channels, train.yaml says {config.encoder.dim}")


def _special(options: Options, theirs: list[str], where: str) -> tuple[int, int, int, int]:
    """Ids of sos, eos, blank and unk."""
    named = options.part("tokenizer_conf").part("special_tokens")
    last = len(theirs) - 1
    blank = options.part("ctc_conf").count("ctc_blank_id", named.count("<blank>", 0, least=0), least=0)
    found = [
        named.count("<sos>", last, least=0),
        named.count("<eos>", last, least=0),
        blank,
        named.count("<unk>", find_unit(theirs, where, "<unk>", "<UNK>", "[UNK]"), least=0),
    ]
    for i in found:
        if i > last:
            raise CheckpointError(f"{where}: {len(theirs)} units, and no id {i}, which {options.where} names")
    sos, eos, _, unk = found
    if len({eos, blank, unk}) < 3 or sos in (blank, unk):
        raise CheckpointError(
            f"{options.where}: blank {blank}, unk {unk}, sos {sos}, eos {eos} are not distinct"
        )
    return sos, eos, blank, unk


def empty_decoder(theirs: Iterable[str]) -> list[str]:
    """The tensors of a right-to-left decoder without layers, which hears nothing; by default it has none."""
    found = [name for name in theirs if name.startswith(RIGHT)]
    return [] if any(name.startswith(f"{RIGHT}decoders.") for name in found) else found


def wenet_names(theirs: Iterable[str]) -> Names:
    """Their names for our tensors, which depend on whether there are one or two decoders, and on where the
    front ends."""
    theirs = set(theirs)
    two = any(x.startswith("decoder.left_decoder.") for x in theirs)
    front = "linear." if "encoder.embed.linear.weight" in theirs else "out.0."
    heads = {
        "cmvn.": "encoder.global_cmvn.",
        "ctc.": "ctc.ctc_lo.",
        "encoder.front.convolutions.": "encoder.embed.conv.",
        "encoder.front.out.": f"encoder.embed.{front}",
        "encoder.norm.": "encoder.after_norm.",
    }
    layers = {"encoder.": Layers("encoder.encoders.", ENCODER_LAYER)}
    for decoder, prefix in (("decoder.", "left_"), ("reverse_decoder.", "right_")):
        place = f"decoder.{prefix}decoder." if two or prefix == "right_" else "decoder."
        for part, name in (("embedding.", "embed.0."), ("norm.", "after_norm."), ("out.", "output_layer.")):
            heads[decoder + part] = place + name
        layers[decoder] = Layers(f"{place}decoders.", DECODER_LAYER, MEMORY)
    return Names(heads, layers, SINUSOIDS)
