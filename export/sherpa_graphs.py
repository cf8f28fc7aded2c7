"""The modules that are traced for sherpa-onnx: a HybridModel behind the inputs and outputs of its contracts.

Frames of these contracts last 40 ms, which determines word times and how many tokens a decoder may write: a
model with longer frames repeats each, which changes nothing for CTC and cross-attention.

N utterances · T feature frames · T' encoder frames · S samples · F mel bins · C channels · L layers · H heads
· D channels per head · W cached frames · U tokens · K kernel · V units
"""

import math
from typing import cast

import torch
from torch import Tensor, nn

from asr.features import FLOOR
from asr.model.conformer import Conformer, ConformerState
from asr.model.decoder import SOS_EOS, DecoderState, Order
from asr.model.hybrid import HybridModel

RATE = 4
"""Feature frames per frame of the contracts."""

LOUD = 32768.0
"""The factor on samples in [-1, 1], except for `OfflineCtc` and `AudioEncoder`."""


def scale_change(theirs: float, ours: float) -> float:
    """The difference in log-mel energies between samples times `theirs` and times `ours`."""
    return 2 * math.log(ours / theirs)


def rescaled(x: Tensor, theirs: float, ours: float) -> Tensor:
    """Log-mel energies (..., F) of samples times `theirs` -> of samples times `ours`, with the same floor."""
    change = scale_change(theirs, ours)
    return (x + change).clamp(min=math.log(FLOOR)) if change else x


class OfflineCtc(nn.Module):
    """x (N, T, F), x_lens (N,) -> log-probabilities (N, T / 4, V) and their lengths."""

    def __init__(self, model: HybridModel) -> None:
        super().__init__()
        self.model = model
        self.repeats = model.encoder.subsampling // RATE

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        x = rescaled(x, 1.0, self.model.fbank.config.scale)
        y, y_lens = self.model.encode(self.model.cmvn(x), x_lens)
        log_probs = self.model.ctc_log_probs(y).repeat_interleave(self.repeats, dim=1)
        return log_probs, y_lens * self.repeats


class OnlineCtc(nn.Module):
    """A chunk of frames and two caches -> log-probabilities and the caches.

    The first cache (L, H, W, 2 D) holds keys and values. The second, (L, 1, C, K' - 1), holds the state of
    the convolutions in its first K - 1 columns, and the frames that the subsampling needs in the others.
    """

    def __init__(self, model: HybridModel) -> None:
        super().__init__()
        self.model = model
        self.encoder = cast(Conformer, model.encoder)
        config = self.encoder.config
        self.repeats = self.encoder.subsampling // RATE
        self.frames_shape = (1, self.encoder.front.past_frames, self.encoder.num_bins)
        self.num_frames = self.frames_shape[1] * self.frames_shape[2]
        self.spare = -(-self.num_frames // (config.num_layers * config.dim))
        self.columns = config.kernel_size - 1

    def forward(
        self,
        x: Tensor,
        offset: Tensor,
        required_cache_size: Tensor,
        attn_cache: Tensor,
        conv_cache: Tensor,
        attn_mask: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        chunk = torch.full(
            (), x.shape[1] // self.encoder.subsampling
        )  # a Python number would be a constant in the trace
        left = required_cache_size[0] // (chunk * self.repeats)
        x = self.model.cmvn(rescaled(x, LOUD, self.model.fbank.config.scale))
        x_lens = torch.full_like(offset, x.shape[1])
        state = self._state(attn_cache, conv_cache, (offset - required_cache_size) // self.repeats)
        y, _, state = self.encoder(x, x_lens, state, chunk, left)
        log_probs = self.model.ctc_log_probs(y).repeat_interleave(self.repeats, dim=1)
        return log_probs, *self._caches(state, attn_cache)

    def _state(self, attn_cache: Tensor, conv_cache: Tensor, offset: Tensor) -> ConformerState:
        cached = attn_cache.shape[2] // self.repeats
        keys, values = attn_cache[None, :, :, attn_cache.shape[2] - cached :].chunk(2, dim=-1)
        conv, frames = conv_cache.split([self.columns, self.spare], dim=3)
        empty = self.encoder.init_state(1, 0)
        return ConformerState(
            frames=frames.flatten()[: self.num_frames].view(self.frames_shape),
            keys=keys,
            values=values,
            pending=empty.pending,
            queries=empty.queries,
            conv=conv.transpose(0, 1),
            offset=offset,
        )

    def _caches(self, state: ConformerState, attn_cache: Tensor) -> tuple[Tensor, Tensor]:
        cached = torch.cat([state.keys, state.values], dim=-1)[0]
        unused = attn_cache[:, :, : attn_cache.shape[2] - cached.shape[2]]
        conv = state.conv.transpose(0, 1)
        spare = nn.functional.pad(
            state.frames.flatten(), (0, conv[..., :1].numel() * self.spare - self.num_frames)
        )
        return torch.cat([unused, cached], dim=2), torch.cat([conv, spare.view(*conv.shape[:3], -1)], dim=3)


class AudioEncoder(nn.Module):
    """Samples (1, S), at least a frame of them -> keys and values of the decoder (1, T', 2 L H D)."""

    def __init__(self, model: HybridModel) -> None:
        super().__init__()
        self.model = model
        self.repeats = max(model.encoder.subsampling // RATE, 1)

    def forward(self, samples: Tensor) -> Tensor:
        x = self.model.cmvn(self.model.fbank.frames(self._window(samples)))
        y, _ = self.model.encode(x, torch.full_like(samples[:, 0], x.shape[1], dtype=torch.int64))
        memory = torch.stack(self.model.decoder.memory(y))
        return memory.permute(1, 4, 0, 2, 3, 5).flatten(2).repeat_interleave(self.repeats, dim=1)

    def _window(self, samples: Tensor) -> Tensor:
        """The samples mirrored at both ends, like asr/features.py."""
        fbank = self.model.fbank
        shift, length = fbank.shift_samples, fbank.frame_samples
        if not fbank.config.snip_edges:
            before, after = length // 2 - shift // 2, length // 2
            ends = samples[:, :before].flip(1), samples[:, -after:].flip(1)
            samples = torch.cat([ends[0], samples, ends[1]], dim=1)
        num_frames = (samples.shape[1] - length) // shift + 1
        return samples.narrow(1, 0, (num_frames - 1) * shift + length)


class AudioDecoder(nn.Module):
    """One token and the caches -> logits of the next; the encoder's output holds the keys and values.

    In the contract the start is 1 and the end 2; here both are 1, and 2 is `<unk>`, which is never written.
    """

    def __init__(self, model: HybridModel) -> None:
        super().__init__()
        self.decoder = model.decoder

    def forward(self, tokens: Tensor, hidden: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        config = self.decoder.config
        past = caches[:-1]  # the last input says whether they are used: they are empty at first
        memory = hidden.unflatten(2, (2, config.num_layers, config.num_heads, -1)).permute(2, 0, 3, 4, 1, 5)
        state = DecoderState(*(torch.stack(past[i::4], dim=1) for i in range(2)))
        y_lens = torch.full_like(tokens[:, 0], hidden.shape[1])
        logits, _, state = self.decoder(tokens, *memory.unbind(0), y_lens, state)
        end = logits[..., SOS_EOS : SOS_EOS + 1]
        logits = torch.cat([logits[..., :1], torch.full_like(end, -1e4), end, logits[..., 3:]], dim=-1)
        pairs = zip(state.keys.unbind(1), state.values.unbind(1), past[2::4], past[3::4], strict=True)
        return logits, *(x for pair in pairs for x in pair)


class FireRedEncoder(nn.Module):
    """x (1, T, F) of samples times 32768, x_lens (1,) -> keys and values of the decoder."""

    def __init__(self, model: HybridModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.model.cmvn(rescaled(x, LOUD, self.model.fbank.config.scale))
        return self.model.decoder.memory(self.model.encode(x, x_lens)[0])


class FireRedDecoder(nn.Module):
    """One token, caches (L, 1, U, H, D) with room for all tokens, and where to write -> logits and caches."""

    def __init__(self, model: HybridModel) -> None:
        super().__init__()
        self.decoder = model.decoder

    def forward(
        self,
        tokens: Tensor,
        keys: Tensor,
        values: Tensor,
        cross_keys: Tensor,
        cross_values: Tensor,
        offset: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        place = torch.arange(keys.shape[2], device=keys.device)
        seen = torch.cat([place < offset, torch.ones_like(offset, dtype=torch.bool)])
        state = DecoderState(*(cache.permute(1, 0, 3, 2, 4) for cache in (keys, values)))
        y_lens = torch.full_like(tokens[:, 0], cross_keys.shape[3])
        order = Order(offset[None], seen[None, None])
        logits, _, state = self.decoder(tokens, cross_keys, cross_values, y_lens, state, order=order)
        here = (place == offset)[:, None, None]
        written = (
            torch.where(here, new[:, :, :, -1:].permute(1, 0, 3, 2, 4), cache)
            for new, cache in ((state.keys, keys), (state.values, values))
        )
        return logits, *written
