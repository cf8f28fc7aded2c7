"""Waveform -> log-mel frames of NeMo's models.

Pre-emphasis of the waveform, silence before and after it, frames centred at multiples of the shift, times a
symmetric Hann window, Fourier transform, power, the triangles of Slaney's Auditory Toolbox, and the logarithm
of that plus 2^-24. Optionally, each bin or all bins together are normalised to mean 0 and variance 1 over the
utterance; such a model needs whole utterances, as their end affects every frame.

N utterances · S samples · T frames, 10 ms apart · F mel bins · K bins of the spectrum
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.errors import ConfigError
from asr.features import PREEMPHASIS, FbankConfig
from asr.whisper_features import slaney_mel

GUARD = 2.0**-24
SPREAD_GUARD = 1e-5
"""Added to a standard deviation."""

PIECE_FRAMES = 8192
"""Frames of a long recording that are computed at once."""


class NemoFbank(nn.Module):
    """As asr.features.Fbank. The first sample of a frame only serves the pre-emphasis of the second."""

    max_samples = 0
    fading = PREEMPHASIS
    """Pre-emphasis turns samples that fade like this into silence."""

    fourier: Tensor
    mel: Tensor

    def __init__(self, config: FbankConfig) -> None:
        super().__init__()
        self.config = config
        self.framed = config.normalize == "none"
        window_samples = round(config.sample_rate * 0.001 * config.frame_ms)
        self.frame_samples = window_samples + 1
        self.shift_samples = round(config.sample_rate * 0.001 * config.shift_ms)
        fft_size = 1 << (window_samples - 1).bit_length()
        fourier, mel = _fourier_matrix(window_samples, fft_size), slaney_mel(config, fft_size)
        self.register_buffer("fourier", fourier.float(), persistent=False)
        self.register_buffer("mel", mel.float(), persistent=False)

    def num_frames(self, sample_lens: Tensor) -> Tensor:
        """Samples -> frames, element by element."""
        return sample_lens // self.shift_samples

    def forward(self, samples: Tensor, sample_lens: Tensor) -> tuple[Tensor, Tensor]:
        """The frames of whole utterances; padding has no effect, and its frames are 0.

        samples (N, S) in [-1, 1], sample_lens (N,). Returns x (N, T, F), x_lens (N,).
        """
        x_lens, length = self.num_frames(sample_lens), samples.shape[1] // self.shift_samples
        if length == 0:
            return samples.new_zeros(len(samples), 0, self.config.num_bins), x_lens
        before = (self.frame_samples - 1) // 2
        heard = torch.arange(samples.shape[1], device=samples.device) < sample_lens[:, None]
        samples = torch.where(heard, _emphasise(F.pad(samples, (1, 0))), 0.0)
        more = self.frame_samples - 1 - self.shift_samples
        samples = F.pad(samples, (before, length * self.shift_samples + more - before - samples.shape[1]))
        if torch.compiler.is_exporting():  # the number of pieces is unknown then
            return self.normalise(self._log_mel(samples), x_lens), x_lens
        size, pieces = PIECE_FRAMES * self.shift_samples, []
        for first in range(0, length * self.shift_samples, size):
            pieces.append(self._log_mel(samples[:, first : first + size + more]))
        return self.normalise(torch.cat(pieces, dim=1), x_lens), x_lens

    def frames(self, window: Tensor) -> Tensor:
        """The frames that lie within a window of samples: the part that a stream uses and a graph contains.

        window (N, (T - 1) * shift_samples + frame_samples). Returns x (N, T, F). Frame t of an utterance
        begins at sample t * shift_samples - frame_samples // 2 - 1. Raises ConfigError if frames are
        normalised over the utterance.
        """
        if self.config.normalize != "none":
            raise ConfigError(
                f"features.normalize: {self.config.normalize} needs whole utterances and cannot stream or be "
                "exported; expected none"
            )
        return self._log_mel(_emphasise(window))

    def normalise(self, x: Tensor, x_lens: Tensor) -> Tensor:
        """x (N, T, F), normalised as configured over the x_lens (N,) valid frames; 0 after them."""
        valid = (torch.arange(x.shape[1], device=x.device) < x_lens[:, None])[..., None]
        x = torch.where(valid, x, 0.0)
        if self.config.normalize == "none":
            return x
        over = (1,) if self.config.normalize == "per_feature" else (1, 2)
        count = (x_lens * (1 if over == (1,) else x.shape[2]))[:, None, None]
        x = torch.where(valid, x - x.sum(over, keepdim=True) / count.clamp(min=1), 0.0)
        variance = x.square().sum(over, keepdim=True) / (count - 1).clamp(min=1)
        return x / (variance.sqrt() + SPREAD_GUARD)

    def _log_mel(self, emphasised: Tensor) -> Tensor:
        parts = (emphasised * self.config.scale).unfold(1, self.frame_samples - 1, self.shift_samples)
        real, imaginary = (parts @ self.fourier).chunk(2, dim=-1)
        return ((real.square() + imaginary.square()) @ self.mel + GUARD).log()


def _emphasise(samples: Tensor) -> Tensor:
    """(N, S) -> (N, S - 1)."""
    return samples[:, 1:] - PREEMPHASIS * samples[:, :-1]


def _fourier_matrix(size: int, fft_size: int) -> Tensor:
    """The symmetric Hann window times cosine, then times sine: (size, 2 K). Power does not depend on the
    position of the window in the transform."""
    i = torch.arange(size, dtype=torch.float64)
    hann = 0.5 - 0.5 * torch.cos(2 * math.pi * i / (size - 1))
    angle = 2 * math.pi * (i[:, None] * torch.arange(fft_size // 2 + 1) % fft_size) / fft_size
    return hann[:, None] * torch.cat([torch.cos(angle), torch.sin(angle)], dim=1)
