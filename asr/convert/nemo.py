"""Public NeMo checkpoints: features, Fast Conformer and CTC head, under the names of HybridModel.

Their blank is the last unit of CTC, and there is no sos/eos: `arrange_units` makes that one up.
"""

from collections.abc import Mapping
from typing import Any

from asr.convert.names import Layers, Names
from asr.convert.options import Options
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
    "untie_biases": (True,),
    "global_attn_separate": (False,),
    "global_tokens_spacing": (1,),
    "reduction": (None,),
    "stochastic_depth_drop_prob": (0, 0.0),
}
"""Their options that ours lacks, and the values that match our behaviour; the first is the default."""

WITHOUT_EFFECT = (
    *("_target_", "feat_in", "feat_out", "subsampling_conv_chunking_factor", "pos_emb_max_len"),
    *("reduction_position", "reduction_factor", "att_context_probs", "att_chunk_context_size"),
    *("dropout_pre_encoder", "dropout_emb", "dropout_att", "stochastic_depth_mode"),
    *("stochastic_depth_start_layer", "use_pytorch_sdpa", "use_pytorch_sdpa_backends"),
    "sync_max_audio_length",
)
"""Options of training or speed, or that show in the shapes of tensors."""

PREPROCESSOR: dict[str, tuple[Any, ...]] = {
    "window": ("hann",),
    "preemph": (PREEMPHASIS,),
    "log": (True,),
    "log_zero_guard_type": ("add",),
    "log_zero_guard_value": (2**-24,),
    "mag_power": (2.0,),
    "mel_norm": ("slaney",),
    "frame_splicing": (1,),
    "exact_pad": (False,),
    "n_window_size": (None,),
    "n_window_stride": (None,),
}
UNUSED = (
    *("_target_", "dither", "pad_to", "pad_value", "rng", "nb_augmentation_prob", "nb_max_freq"),
    *("use_torchaudio", "stft_exact_pad", "stft_conv"),
)
"""Options of the preprocessor for training, for padding, or that its versions ignore."""


def encoder_config(section: Mapping[str, Any], where: str) -> FastConformerConfig:
    """The section `encoder` of a NeMo model's configuration, as ours.

    where: the file, for errors. Raises CheckpointError for what our encoder does not support.
    """
    options = Options(section, where, "encoder.")
    for name, values in OPTIONS.items():
        options.one_of(name, values)
    attention = options.one_of("self_attention_model", ("rel_pos", "rel_pos_local_attn"))
    global_tokens = options.count("global_tokens", 0, least=0)
    dim, kernel_size = options.count("d_model", 0), options.count("conv_kernel_size", 31)
    causal = options.switch("causal_downsampling", False)
    if (options.value("conv_context_size") in ("causal", [kernel_size - 1, 0])) != causal:
        raise CheckpointError(f"{where}: encoder.causal_downsampling and encoder.conv_context_size disagree")
    limits, contexts = _contexts(options)
    config = FastConformerConfig(
        dim=dim,
        num_layers=options.count("n_layers", 0),
        num_heads=options.count("n_heads", 4),
        ff_dim=dim * options.count("ff_expansion_factor", 4),
        kernel_size=kernel_size,
        subsampling=options.one_of("subsampling_factor", (4, 8)),
        subsampling_channels=_positive(options.count("subsampling_conv_channels", -1, least=-1), dim),
        causal=causal,
        norm=options.one_of("conv_norm_type", ("batch_norm", "layer_norm")),
        bias=options.switch("use_bias", True),
        scale_input=options.switch("xscaling", True),
        context=limits,
        global_tokens=global_tokens if attention == "rel_pos_local_attn" else 0,
        dropout=options.number("dropout", 0.1),
        chunk=ChunkConfig(dynamic=bool(contexts), contexts=contexts),
    )
    options.only({}, WITHOUT_EFFECT)
    return config


def _contexts(options: Options) -> tuple[list[int], list[list[int]]]:
    """The frames that a whole utterance sees around itself, and the contexts of training in chunks."""
    given = options.value("att_context_size") or [-1, -1]
    sizes = given if isinstance(given, list) and isinstance(given[0], list) else [given]
    for size in sizes:
        if not isinstance(size, list) or [type(x) for x in size] != [int, int] or min(size) < -1:
            raise options.wrong("att_context_size", given, "[left, right] in frames")
    if options.one_of("att_context_style", ("regular", "chunked_limited")) == "regular":
        return list(sizes[0]), []
    return [-1, -1], [list(x) for x in sizes if x[1] >= 0]


def features_config(section: Mapping[str, Any], where: str) -> FbankConfig:
    """The section `preprocessor` of a NeMo model's configuration, as ours.

    where: the file, for errors. Raises CheckpointError for what our features do not support.
    """
    options = Options(section, where, "preprocessor.")
    sample_rate = options.count("sample_rate", 16000, least=1000)
    window_s = options.number("window_size", 0.02, least=0.001)
    window_samples = round(sample_rate * window_s)
    expected = PREPROCESSOR | {"n_fft": (None, 1 << (window_samples - 1).bit_length())}
    for name, values in expected.items():
        options.one_of(name, values)
    normalize = options.one_of("normalize", ("per_feature", "all_features", "NA", None))
    config = FbankConfig(
        type="nemo",
        sample_rate=sample_rate,
        num_bins=options.count("features", 64),
        frame_ms=1000 * window_s,
        shift_ms=1000 * options.number("window_stride", 0.01, least=0.001),
        low_freq_hz=options.number("lowfreq", 0, most=sample_rate),
        high_freq_hz=options.number("highfreq", 0, most=sample_rate),
        normalize="none" if normalize in ("NA", None) else normalize,
    )
    options.only({}, UNUSED)
    return config


def _positive(number: int, otherwise: int) -> int:
    return number if number > 0 else otherwise
