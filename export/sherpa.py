"""Export of models in formats that released sherpa-onnx runs unmodified.

    ctc         offline, CTC: the contract `zipformer_ctc`, which any encoder can implement
    streaming   online, CTC: the contract `wenet_ctc`; chunk and left context are arguments of the recognizer
    zipformer   online, CTC: the contract `zipformer2_ctc`; chunk and left context are fixed
    aed         offline, attention decoder: the contract `moonshine_v2`, from samples, so with any features
    fire_red    offline, attention decoder: the contract `fire_red_asr`

The runtime computes the features for all but `aed`, so they must be those of the model: mel bins from 20 Hz
to 7600 (`fire_red`: 8000, and frames that lie within the utterance). Its C++ passes tensors by position and
reads sizes from metadata; a missing entry ends its process.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import onnx
import torch
from torch.export import Dim

from asr.errors import ConfigError
from asr.features import FbankConfig
from asr.model.conformer import Conformer
from asr.model.decoder import SOS_EOS
from asr.model.hybrid import HybridModel
from asr.model.zipformer import Zipformer
from export.onnx import Trace
from export.sherpa_conformer import offline_graph, online_graph
from export.sherpa_graphs import (
    RATE,
    AudioDecoder,
    AudioEncoder,
    FireRedDecoder,
    FireRedEncoder,
    OfflineCtc,
    OnlineCtc,
)
from export.sherpa_zipformer import OnlineZipformer, fixed_context, zipformer_metadata, zipformer_trace

MAX_TOKENS = 512
"""Maximum tokens of an utterance in `fire_red`."""


@dataclass(frozen=True)
class Artefact:
    """One model that sherpa-onnx can load."""

    graphs: dict[str, Trace]
    """File stem -> what to trace."""

    metadata: dict[str, Any]
    """Metadata of the first graph."""

    written: dict[str, Callable[[], onnx.ModelProto]] = field(default_factory=dict)
    """File stem -> how to make a hand-written graph, which is then checked against the traced module."""


def artefacts(model: HybridModel) -> tuple[dict[str, Artefact], dict[str, str]]:
    """By name, the artefacts that a model can be exported as, and why it cannot be the others.

    Raises ConfigError if there is none.
    """
    found, left_out = {}, {}
    for name, (reason, make) in CONTRACTS.items():
        if why := reason(model):
            left_out[name] = why
        else:
            found[name] = make(model.eval())
    if not found:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        raise ConfigError(f"sherpa-onnx cannot run this model: {reasons}")
    return found, left_out


def _no_ctc(model: HybridModel) -> str:
    if model.ctc is None:
        return "the model has no CTC head"
    if model.encoder.subsampling % RATE:
        return f"encoder frames are {model.encoder.subsampling} feature frames, no multiple of {RATE}"
    return _other_features(model, FbankConfig())


def _no_streaming(model: HybridModel) -> str:
    if not isinstance(model.encoder, Conformer):
        return f"the encoder is of type {model.encoder.config.type}, expected conformer"
    return _no_ctc(model)


def _no_zipformer(model: HybridModel) -> str:
    encoder = model.encoder
    if not isinstance(encoder, Zipformer):
        return f"the encoder is of type {encoder.config.type}, expected zipformer"
    if not encoder.config.causal:
        return "encoder.causal is false, and the encoder cannot stream"
    if not encoder.config.chunk.named:
        return "encoder.chunk names no chunk that the model was trained with, and its runtime has a fixed one"
    return _no_ctc(model)


def _no_aed(model: HybridModel) -> str:
    config = model.decoder.config
    if config.type != "transformer":
        return f"the decoder is of type {config.type}, expected transformer"
    if config.prompt:
        return "its decoder begins with a prompt"
    kind = model.fbank.config.type
    return "" if kind == "kaldi" else f"features.type is {kind}, expected kaldi"


def _no_fire_red(model: HybridModel) -> str:
    return _no_aed(model) or _other_features(model, FbankConfig(high_freq_hz=0.0, snip_edges=True))


def _other_features(model: HybridModel, theirs: FbankConfig) -> str:
    names = (
        "type",
        "sample_rate",
        "num_bins",
        "frame_ms",
        "shift_ms",
        "low_freq_hz",
        "high_freq_hz",
        "snip_edges",
    )
    for name in names:
        ours, needed = getattr(model.fbank.config, name), getattr(theirs, name)
        if ours != needed:
            return f"features.{name} is {ours}, its runtime has {needed}"
    return ""


def offline_ctc(model: HybridModel) -> Artefact:
    inputs = {"x": torch.randn(2, 50, model.fbank.config.num_bins), "x_lens": torch.tensor([50, 43])}
    n = Dim("N")
    dynamic: dict[str, dict[int, Any]] = {"x": {0: n, 1: Dim("T", min=1)}, "x_lens": {0: n}}
    module = OfflineCtc(model).eval()
    trace = Trace(module, inputs, dynamic, ["log_probs", "log_probs_len"], 0)
    artefact = Artefact({"model": trace}, {"model_type": "zipformer2_ctc"})
    if isinstance(model.encoder, Conformer):
        artefact.written["model"] = partial(offline_graph, module)
    return artefact


def online_ctc(model: HybridModel) -> Artefact:
    module = OnlineCtc(model).eval()
    encoder, config = module.encoder, module.encoder.config
    chunk, cached = 4, 8
    rate = encoder.subsampling
    shape = (config.num_layers, config.num_heads, cached * module.repeats, 2 * encoder.head_dim)
    inputs = {
        "x": torch.randn(1, chunk * rate, encoder.num_bins),
        "offset": torch.tensor([cached * module.repeats]),
        "required_cache_size": torch.tensor([cached * module.repeats]),
        "attn_cache": torch.zeros(shape),
        "conv_cache": torch.zeros(config.num_layers, 1, config.dim, module.columns + module.spare),
        "attn_mask": torch.ones(1, 1, (chunk + cached) * module.repeats, dtype=torch.bool),
    }
    dynamic: dict[str, dict[int, Any]] = {name: {} for name in inputs}
    dynamic["x"] = {1: rate * Dim("M", min=1)}
    dynamic["attn_cache"] = {2: module.repeats * Dim("W", min=1) if module.repeats > 1 else Dim("W", min=1)}
    dynamic["attn_mask"] = {2: Dim("K", min=1)}
    outputs = ["log_probs", "next_att_cache", "next_conv_cache"]
    metadata = {
        "model_type": "wenet_ctc",
        "head": config.num_heads,
        "num_blocks": config.num_layers,
        "output_size": config.dim,
        "cnn_module_kernel": module.columns + module.spare + 1,
        "right_context": RATE - 1,
        "subsampling_factor": RATE,
        "vocab_size": model.decoder.out.out_features,
    }
    trace = Trace(module, inputs, dynamic, outputs, 0)
    return Artefact({"model": trace}, metadata, {"model": partial(online_graph, module)})


def online_zipformer(model: HybridModel) -> Artefact:
    module = OnlineZipformer(model, fixed_context(model)).eval()
    return Artefact({"model": zipformer_trace(module)}, zipformer_metadata(module))


def audio_aed(model: HybridModel) -> Artefact:
    config = model.decoder.config
    audio = Trace(
        AudioEncoder(model).eval(),
        {"audio": torch.randn(1, 8000)},
        {"audio": {1: Dim("S", min=800)}},
        ["hidden"],
        0,
    )
    t, u, e = Dim("T", min=1), Dim("U"), Dim("E")
    size = 2 * config.num_layers * config.dim
    names = [
        f"{i}.{part}.{kind}"
        for i in range(config.num_layers)
        for part in ("decoder", "encoder")
        for kind in ("key", "value")
    ]
    shape = (1, config.num_heads, 2, model.decoder.head_dim)
    inputs = {
        "input_ids": torch.ones(1, 1, dtype=torch.int64),
        "encoder_hidden_states": torch.randn(1, 7, size),
        **{f"past_key_values.{name}": torch.zeros(shape) for name in names},
        "use_cache_branch": torch.tensor([True]),
    }
    dynamic: dict[str, dict[int, Any]] = {"input_ids": {}, "encoder_hidden_states": {1: t}}
    dynamic |= {f"past_key_values.{name}": {2: e if "encoder" in name else u} for name in names}
    dynamic["use_cache_branch"] = {}
    outputs = ["logits", *(f"present.{name}" for name in names)]
    step = Trace(AudioDecoder(model).eval(), inputs, dynamic, outputs, len(names) + 1)
    return Artefact({"encoder": audio, "decoder": step}, {"model_type": "moonshine_v2"})


def fire_red(model: HybridModel) -> Artefact:
    config = model.decoder.config
    num_bins = model.fbank.config.num_bins
    inputs = {"x": torch.randn(1, 50, num_bins), "x_len": torch.tensor([50])}
    encoder = Trace(
        FireRedEncoder(model).eval(),
        inputs,
        {"x": {1: Dim("T", min=1)}, "x_len": {}},
        ["n_layer_cross_k", "n_layer_cross_v"],
        0,
    )
    cache = (config.num_layers, 1, 16, config.num_heads, model.decoder.head_dim)
    memory = (1, config.num_layers, config.num_heads, 7, model.decoder.head_dim)
    t, u = Dim("T", min=1), Dim("U")
    step = Trace(
        FireRedDecoder(model).eval(),
        {
            "tokens": torch.ones(1, 1, dtype=torch.int64),
            "in_n_layer_self_k_cache": torch.zeros(cache),
            "in_n_layer_self_v_cache": torch.zeros(cache),
            "n_layer_cross_k": torch.randn(memory),
            "n_layer_cross_v": torch.randn(memory),
            "offset": torch.zeros(1, dtype=torch.int64),
        },
        {
            "tokens": {},
            "in_n_layer_self_k_cache": {2: u},
            "in_n_layer_self_v_cache": {2: u},
            "n_layer_cross_k": {3: t},
            "n_layer_cross_v": {3: t},
            "offset": {},
        },
        ["logits", "out_n_layer_self_k_cache", "out_n_layer_self_v_cache"],
        0,
    )
    metadata = {
        "num_decoder_layers": config.num_layers,
        "num_head": config.num_heads,
        "head_dim": model.decoder.head_dim,
        "sos": SOS_EOS,
        "eos": SOS_EOS,
        "max_len": MAX_TOKENS,
        "cmvn_mean": ",".join("0" * num_bins),
        "cmvn_inv_stddev": ",".join("1" * num_bins),
    }
    return Artefact({"encoder": encoder, "decoder": step}, metadata)


CONTRACTS: dict[str, tuple[Callable[[HybridModel], str], Callable[[HybridModel], Artefact]]] = {
    "ctc": (_no_ctc, offline_ctc),
    "streaming": (_no_streaming, online_ctc),
    "zipformer": (_no_zipformer, online_zipformer),
    "aed": (_no_aed, audio_aed),
    "fire_red": (_no_fire_red, fire_red),
}
"""Name -> why a model cannot be exported as that, "" if it can; and how to export it."""
