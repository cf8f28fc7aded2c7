"""Tiny encoders, decoders and models, and how a stream is fed, for every test of asr/model."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from asr.features import FbankConfig
from asr.losses import LossConfig
from asr.model.build import build_model
from asr.model.conformer import Conformer, ConformerConfig, ConformerState
from asr.model.decoder import DecoderConfig, TransformerDecoder
from asr.model.hybrid import HybridModel

NUM_BINS = 16
NUM_TOKENS = 11


def _encoder_config(**changes: object) -> ConformerConfig:
    sizes = {
        "dim": 24,
        "num_layers": 2,
        "num_heads": 2,
        "ff_dim": 32,
        "kernel_size": 5,
        "subsampling_channels": 4,
    }
    return ConformerConfig(**sizes | changes)  # type: ignore[arg-type]


def _decoder_config(**changes: object) -> DecoderConfig:
    return DecoderConfig(**{"dim": 16, "num_layers": 2, "num_heads": 2, "ff_dim": 32} | changes)  # type: ignore[arg-type]


@pytest.fixture
def tiny_encoder() -> Callable[..., Conformer]:
    def build(**changes: object) -> Conformer:
        return Conformer(_encoder_config(**changes), NUM_BINS).eval()

    return build


@pytest.fixture
def tiny_decoder() -> TransformerDecoder:
    return TransformerDecoder(_decoder_config(), NUM_TOKENS, memory_dim=24).eval()


@pytest.fixture
def tiny_model() -> HybridModel:
    features = FbankConfig(num_bins=NUM_BINS)
    decoder = _decoder_config(reverse_layers=1)
    return build_model(features, _encoder_config(), decoder, LossConfig(), NUM_TOKENS).eval()


@pytest.fixture
def stream() -> Callable[..., tuple[Tensor, ConformerState]]:
    """Feed an encoder `chunks_per_call` chunks at a time; the last call may be short."""

    def feed(
        encoder: Conformer, x: Tensor, x_lens: Tensor, chunk: int, left: int, chunks_per_call: int = 1
    ) -> tuple[Tensor, ConformerState]:
        num_frames = chunk * chunks_per_call
        state = encoder.init_state(len(x), max(left, 0) * chunk)
        parts, done = [], 0
        for part in x.split(num_frames * encoder.subsampling, dim=1):
            if left < 0:
                state = state.widen(num_frames)
            lens = (x_lens - done).clamp(0, part.shape[1])
            y, _, state = encoder(part, lens, state, chunk, left)
            parts.append(y)
            done += part.shape[1]
        return torch.cat(parts, dim=1), state

    return feed
