"""Which encoders and decoders there are: add yours here."""

from asr.features import FbankConfig
from asr.losses import LossConfig
from asr.model.conformer import Conformer, ConformerConfig
from asr.model.decoder import DecoderConfig, TransformerDecoder
from asr.model.hybrid import HybridModel

ENCODERS: dict[str, tuple[type[ConformerConfig], type[Conformer]]] = {
    "conformer": (ConformerConfig, Conformer),
}

DECODERS: dict[str, tuple[type[DecoderConfig], type[TransformerDecoder]]] = {
    "transformer": (DecoderConfig, TransformerDecoder),
}


def build_model(
    features: FbankConfig, encoder: ConformerConfig, decoder: DecoderConfig, loss: LossConfig, num_tokens: int
) -> HybridModel:
    """A model with fresh parameters for num_tokens units, blank and sos/eos included.

    Raises ConfigError where the sizes do not fit each other.
    """
    _, encoder_class = ENCODERS[encoder.type]
    _, decoder_class = DECODERS[decoder.type]
    built = encoder_class(encoder, features.num_bins)
    return HybridModel(features, built, decoder_class(decoder, num_tokens, built.dim), loss, num_tokens)
