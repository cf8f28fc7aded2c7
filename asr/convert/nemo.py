"""Public NeMo checkpoints: features, Fast Conformer and CTC head, under the names of HybridModel.

Their blank is the last unit of CTC, and there is no sos/eos: `arrange_units` makes that one up.
"""

from collections.abc import Mapping
from typing import Any

from asr.convert.names import Layers, Names
from asr.errors import CheckpointError
from asr.features import PREEMPHASIS, FbankConfig
from asr.model.fast_conformer import FastConformerConfig
from asr.model.masks import ChunkConfig

LAYER = {
    "feed_forward_1.0.": ("norm_feed_forward1.",),
    "feed_forward_1.1.": ("feed_forward1.linear1.",),
    "feed_forward_1.4.": ("feed_forward1.linear2.",),
    "attention_norm.": ("norm_self_att.",),
    "attention.project.": ("self_attn.linear_q.", "self_attn.linear_k.", "self_attn.linear_v."),
    "attention.position.": ("self_attn.linear_pos.",),
    "attention.content_bias": ("self_attn.pos_bias_u",),
    "attention.position_bias": ("self_attn.pos_bias_v",),
    "attention.out.": ("self_attn.linear_out.",),
    "convolution.norm.": ("norm_conv.",),
    "convolution.gated.": ("conv.pointwise_conv1.",),
    "convolution.depthwise.": ("conv.depthwise_conv.",),
    "convolution.depthwise_norm.": ("conv.batch_norm.",),  # whatever its kind
    "convolution.out.": ("conv.pointwise_conv2.",),
    "feed_forward_2.0.": ("norm_feed_forward2.",),
    "feed_forward_2.1.": ("feed_forward2.linear1.",),
    "feed_forward_2.4.": ("feed_forward2.linear2.",),
    "norm.": ("norm_out.",),
}
ENCODER = {
    "encoder.front.convolutions.": "encoder.pre_encode.conv.",
    "encoder.front.out.": "encoder.pre_encode.out.",
}
NEMO = Names(
    ENCODER | {"ctc.": "decoder.decoder_layers.0."},
    {"encoder.": Layers("encoder.layers.", LAYER)},
    computed=r"^preprocessor\.featurizer\.(window|fb)$",
)
"""For `load`: encoder and CTC head."""

OPTIONS: dict[str, tuple[Any, ...]] = {
    "subsampling": ("dw_striding",),
    "self_attention_model": ("rel_pos", "rel_pos_local_attn"),
    "att_context_style": ("regular", "chunked_limited"),
    "untie_biases": (True,),
    "global_attn_separate": (False,),
    "global_tokens_spacing": (1,),
    "reduction": (None,),
    "stochastic_depth_drop_prob": (0, 0.0),
}
"""Their options that ours lacks, and the values that match our behaviour; the first is the default."""

PREPROCESSOR: dict[str, tuple[Any, ...]] = {
    "window": ("hann",),
    "normalize": ("per_feature", "all_features", "NA", None),
    "preemph": (PREEMPHASIS,),
    "log": (True,),
    "log_zero_guard_type": ("add",),
    "log_zero_guard_value": (2**-24,),
    "mag_power": (2.0,),
    "mel_norm": ("slaney",),
    "frame_splicing": (1,),
    "exact_pad": (False,),
}


def encoder_config(options: Mapping[str, Any], where: str) -> FastConformerConfig:
    """The section `encoder` of a NeMo model's configuration, as ours.

    where: the file, for errors. Raises CheckpointError for what our encoder does not support.
    """
    _expect(options, OPTIONS, "encoder", where)
    dim, kernel_size = options["d_model"], options.get("conv_kernel_size", 31)
    causal = bool(options.get("causal_downsampling", False))
    if (options.get("conv_context_size") in ("causal", [kernel_size - 1, 0])) != causal:
        raise CheckpointError(f"{where}: encoder.causal_downsampling and encoder.conv_context_size disagree")
    sizes = options.get("att_context_size") or [-1, -1]
    sizes = [sizes] if isinstance(sizes[0], int) else [list(x) for x in sizes]
    limits, contexts = list(sizes[0]), []
    if options.get("att_context_style") == "chunked_limited":
        limits, contexts = [-1, -1], [x for x in sizes if x[1] >= 0]
    is_local = options.get("self_attention_model") == "rel_pos_local_attn"
    return FastConformerConfig(
        dim=dim,
        num_layers=options["n_layers"],
        num_heads=options.get("n_heads", 4),
        ff_dim=dim * options.get("ff_expansion_factor", 4),
        kernel_size=kernel_size,
        subsampling=options.get("subsampling_factor", 4),
        subsampling_channels=_positive(options.get("subsampling_conv_channels", -1), dim),
        causal=causal,
        norm=options.get("conv_norm_type", "batch_norm"),
        bias=options.get("use_bias", True),
        scale_input=options.get("xscaling", True),
        context=limits,
        global_tokens=options.get("global_tokens", 0) if is_local else 0,
        dropout=options.get("dropout", 0.1),
        chunk=ChunkConfig(dynamic=bool(contexts), contexts=contexts),
    )


def features_config(options: Mapping[str, Any], where: str) -> FbankConfig:
    """The section `preprocessor` of a NeMo model's configuration, as ours.

    where: the file, for errors. Raises CheckpointError for what our features do not support.
    """
    sample_rate, window_s = options.get("sample_rate", 16000), options.get("window_size", 0.02)
    window_samples = round(sample_rate * window_s)
    expected = PREPROCESSOR | {"n_fft": (None, 1 << (window_samples - 1).bit_length())}
    _expect(options, expected, "preprocessor", where)
    normalize = options.get("normalize", "per_feature")
    return FbankConfig(
        type="nemo",
        sample_rate=sample_rate,
        num_bins=options.get("features", 64),
        frame_ms=1000 * window_s,
        shift_ms=1000 * options.get("window_stride", 0.01),
        low_freq_hz=options.get("lowfreq", 0),
        high_freq_hz=options.get("highfreq") or 0,
        normalize="none" if normalize in ("NA", None) else normalize,
    )


def _expect(
    options: Mapping[str, Any], expected: Mapping[str, tuple[Any, ...]], section: str, where: str
) -> None:
    for key, values in expected.items():
        if options.get(key, values[0]) not in values:
            choice = " or ".join(map(str, values))
            raise CheckpointError(
                f"{where}: {section}.{key} is {options[key]}; only {choice} can be converted"
            )


def _positive(number: int, otherwise: int) -> int:
    return number if number > 0 else otherwise
