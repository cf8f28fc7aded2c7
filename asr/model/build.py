"""The registry of encoders and decoders: add yours here."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from asr.errors import ConfigError
from asr.features import FbankConfig
from asr.losses import LossConfig
from asr.model.absent import AbsentConfig
from asr.model.chunked import ChunkedConfig, ChunkedDecoder
from asr.model.conformer import Conformer, ConformerConfig
from asr.model.decoder import DecoderConfig, TransformerDecoder
from asr.model.fast_conformer import FastConformer, FastConformerConfig
from asr.model.firered import FireRedConfig, FireRedEncoder
from asr.model.hybrid import HybridModel
from asr.model.segmental import SegmentalConfig, SegmentalDecoder
from asr.model.wenet import WenetConformer, WenetConformerConfig
from asr.model.whisper import WhisperConfig, WhisperDecoderConfig, WhisperEncoder
from asr.model.zipformer import Zipformer, ZipformerConfig

EncoderConfig = (
    ConformerConfig
    | WenetConformerConfig
    | ZipformerConfig
    | FastConformerConfig
    | FireRedConfig
    | WhisperConfig
)

ENCODERS: dict[str, tuple[type[EncoderConfig], Callable[[Any, int], Any]]] = {
    "conformer": (ConformerConfig, Conformer),
    "wenet-conformer": (WenetConformerConfig, WenetConformer),
    "zipformer": (ZipformerConfig, Zipformer),
    "fast-conformer": (FastConformerConfig, FastConformer),
    "firered": (FireRedConfig, FireRedEncoder),
    "whisper": (WhisperConfig, WhisperEncoder),
}
"""The first is the default."""

DECODERS: dict[str, tuple[type[DecoderConfig], type[TransformerDecoder]]] = {
    "transformer": (DecoderConfig, TransformerDecoder),
    "segmental": (SegmentalConfig, SegmentalDecoder),
    "chunked": (ChunkedConfig, ChunkedDecoder),
    "whisper": (WhisperDecoderConfig, TransformerDecoder),
    "none": (AbsentConfig, TransformerDecoder),
}


def build_model(
    features: FbankConfig, encoder: EncoderConfig, decoder: DecoderConfig, loss: LossConfig, num_tokens: int
) -> HybridModel:
    """A model with fresh parameters for num_tokens units, blank and sos/eos included.

    Raises ConfigError if the sizes do not fit each other.
    """
    if loss.ctc is None and decoder.type == "none":
        raise ConfigError(
            "loss.ctc: null, and decoder.type is none: there is nothing to learn; set one of them"
        )
    _check_sizes("encoder", encoder)
    if decoder.type != "none":
        _check_sizes("decoder", decoder)
    _, encoder_class = ENCODERS[encoder.type]
    _, decoder_class = DECODERS[decoder.type]
    built = encoder_class(encoder, features.num_bins)
    forwards = decoder_class(decoder, num_tokens, built.dim)
    backwards = None
    if decoder.reverse_layers:
        backwards = decoder_class(
            replace(decoder, num_layers=decoder.reverse_layers, reverse_layers=0), num_tokens, built.dim
        )
    return HybridModel(features, built, forwards, loss, num_tokens, backwards)


def _check_sizes(part: str, config: EncoderConfig | DecoderConfig) -> None:
    for name in ("dim", "num_layers", "num_heads", "ff_dim", "kernel_size", "subsampling_channels"):
        value = getattr(config, name, 1)
        if isinstance(value, int) and value < 1:
            raise ConfigError(f"{part}.{name} is {value}; expected at least 1")
    dropout = getattr(config, "dropout", 0.0)
    if isinstance(dropout, float) and not 0 <= dropout < 1:
        raise ConfigError(f"{part}.dropout is {dropout}; expected at least 0 and below 1")
