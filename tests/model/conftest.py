"""Tiny encoders, decoders and models, and how a stream is fed, for every test of asr/model."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from asr.context import Context
from asr.features import FbankConfig
from asr.losses import LossConfig
from asr.model.build import ENCODERS, build_model
from asr.model.conformer import Conformer, ConformerConfig
from asr.model.decoder import DecoderConfig, TransformerDecoder
from asr.model.encoder import Encoder
from asr.model.hybrid import HybridModel
from asr.model.masks import ChunkConfig
from asr.model.state import State

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


SMALL = {"dim": 24, "num_layers": 2, "num_heads": 2, "ff_dim": 32}

TINY: dict[str, dict[str, object]] = {
    "conformer": {**SMALL, "kernel_size": 5, "subsampling_channels": 4, "chunk": ChunkConfig(max_right=1)},
    "wenet-conformer": {**SMALL, "kernel_size": 4},
    "fast-conformer": {**SMALL, "kernel_size": 5, "subsampling_channels": 4, "causal": True},
    "zipformer": {
        "dims": [12, 20, 16],
        "unmasked_dims": [8, 10, 12],
        "rates": [1, 2, 8],
        "depths": [1, 2, 1],
        "num_heads": [2, 1, 3],
        "query_dims": [4, 6, 5],
        "value_dims": [3, 4, 2],
        "position_head_dims": [2, 2, 2],
        "position_dim": 6,
        "ff_dims": [16, 12, 16],
        "kernel_sizes": [9, 5, 3],
        "causal": True,
    },
}
"""Small sizes of every encoder that can stream."""

WHOLE = ("firered", "whisper")
"""Those that cannot (test_streaming.py checks that)."""


@pytest.fixture(params=WHOLE)
def whole_encoder(request: pytest.FixtureRequest) -> Encoder:
    config, kind = ENCODERS[request.param]
    return kind(config(**SMALL, chunk=ChunkConfig(dynamic=False)), NUM_BINS)


@pytest.fixture(params=[name for name in ENCODERS if name not in WHOLE])
def any_encoder(request: pytest.FixtureRequest) -> Callable[..., Encoder]:
    """Builds each streaming encoder of ENCODERS, with no parameter equal to zero."""
    assert request.param in TINY, "give this encoder its tiny sizes in TINY, so that it is tested"

    def build(**changes: object) -> Encoder:
        config, kind = ENCODERS[request.param]
        encoder = kind(config(**TINY[request.param] | changes), NUM_BINS).eval()
        assert encoder.can_stream
        with torch.no_grad():
            for x in encoder.parameters():
                x += 0.1 * torch.randn_like(x)
        return encoder

    return build


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
def stream() -> Callable[..., tuple[Tensor, State]]:
    """Feed an encoder `chunks_per_call` chunks at a time; the last call may be short.

    If the encoder needs frames after the end, all streams end with one call, which takes the rest of each.
    """

    def feed(
        encoder: Encoder, x: Tensor, x_lens: Tensor, context: Context, chunks_per_call: int = 1
    ) -> tuple[Tensor, State]:
        size, overlap = context.chunk * chunks_per_call * encoder.subsampling, encoder.overlap_frames
        flush = encoder.flush_frames(context.delay)
        frames = -(-x.shape[1] // encoder.subsampling)
        whole = -(-frames // encoder.chunk_unit) * encoder.chunk_unit
        width = context.width if context.left >= 0 else whole + context.delay
        state = encoder.init_state(len(x), width, context.delay)
        parts, done = [], 0
        while done + overlap < x.shape[1] or not parts:
            is_last = bool(flush and x_lens.min() - done <= size + overlap)
            part = x[:, done:] if is_last else x[:, done : done + size + overlap]
            lens = (x_lens - done).clamp(0, part.shape[1])
            done = x.shape[1] if is_last else done + size
            if is_last:
                part = F.pad(part, (0, 0, 0, flush), value=9.0)
            y, y_lens, state = encoder(part, lens, state, *context)
            parts.append([row[:n] for row, n in zip(y, y_lens, strict=True)])
        return pad_sequence([torch.cat(rows) for rows in zip(*parts, strict=True)], batch_first=True), state

    return feed
