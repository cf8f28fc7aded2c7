"""Waveform -> log-mel frames of Whisper (Radford et al., arXiv:2212.04356, section 2.2).

The samples are padded with silence to the window of the model, mirrored at both ends, cut into frames centred
at multiples of the shift, multiplied by a Hann window, Fourier transformed, squared, and summed by the
triangles of Slaney's Auditory Toolbox. The decimal logarithm is floored at 8 below the largest value of the
window, then mapped to (x + 4) / 4. Every frame thus depends on the loudest one, and on the silence: both are
part of the model.

N utterances · S samples · T frames, 10 ms apart · F mel bins · K bins of the spectrum
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.errors import AudioError, ConfigError
from asr.features import FbankConfig

FLOOR = 1e-10
RANGE = 8.0
"""Powers of ten between the loudest and the quietest value of a window."""

LINEAR_HZ = 1000.0
"""Slaney's mel is linear up to here, and logarithmic above."""


class WhisperFbank(nn.Module):
    """As asr.features.Fbank, but every utterance becomes `window_s` seconds long, all of it valid."""

    framed = False  # the loudest frame of the utterance affects all others
    fading = 0.0

    fourier: Tensor
    mel: Tensor

    def __init__(self, config: FbankConfig) -> None:
        super().__init__()
        if not config.window_s > 0:
            raise ConfigError(
                f"features.window_s: {config.window_s:g}; features of type whisper need the window of the "
                "model in seconds, as in 30"
            )
        self.config = config
        self.frame_samples = round(config.sample_rate * 0.001 * config.frame_ms)
        self.shift_samples = round(config.sample_rate * 0.001 * config.shift_ms)
        self.window_samples = self.max_samples = round(config.sample_rate * config.window_s)
        self.register_buffer("fourier", _fourier_matrix(self.frame_samples).float(), persistent=False)
        self.register_buffer("mel", slaney_mel(config, self.frame_samples).float(), persistent=False)

    def num_frames(self, sample_lens: Tensor) -> Tensor:
        """Samples -> frames, element by element: always those of the window."""
        return torch.full_like(sample_lens, self.window_samples // self.shift_samples)

    def forward(self, samples: Tensor, sample_lens: Tensor) -> tuple[Tensor, Tensor]:
        """The frames of whole utterances and of the silence after them.

        samples (N, S) in [-1, 1], sample_lens (N,). Returns x (N, T, F), x_lens (N,), all T. Raises
        AudioError if an utterance is longer than the window.
        """
        longest = samples.shape[1] if torch.compiler.is_exporting() else int(sample_lens.max())
        if not torch.compiler.is_exporting() and longest > self.window_samples:
            raise AudioError(
                f"{longest / self.config.sample_rate:.1f} s of audio, and the model takes "
                f"{self.config.window_s:g} s at most; cut it at pauses, as asr transcribe does"
            )
        samples = samples[:, : self.window_samples]
        heard = torch.arange(samples.shape[1], device=samples.device) < sample_lens[:, None]
        samples = F.pad(torch.where(heard, samples, 0.0), (0, self.window_samples - samples.shape[1]))
        sides = self.frame_samples // 2
        x = self.frames(F.pad(samples[:, None], (sides, sides), mode="reflect")[:, 0])
        x_lens = self.num_frames(sample_lens)
        return x[:, : self.window_samples // self.shift_samples], x_lens

    def frames(self, window: Tensor) -> Tensor:
        """The frames that lie within a window of samples, all that the model takes at once.

        window (N, (T - 1) * shift_samples + frame_samples). Returns x (N, T, F).
        """
        parts = (window * self.config.scale).unfold(1, self.frame_samples, self.shift_samples)
        real, imaginary = (parts @ self.fourier).chunk(2, dim=-1)
        x = ((real.square() + imaginary.square()) @ self.mel).clamp(min=FLOOR).log10()
        x = torch.maximum(x, x.amax((1, 2), keepdim=True) - RANGE)
        return (x + 4) / 4


def slaney_mel(config: FbankConfig, fft_size: int) -> Tensor:
    """Triangles of equal area, linear in frequency, with edges evenly spaced on Slaney's mel scale:
    (K, F), K = fft_size // 2 + 1; float64.

    Raises ConfigError if they do not fit below half the sample rate.
    """
    nyquist = config.sample_rate / 2
    low, high = config.low_freq_hz, config.high_freq_hz
    high = high if high > 0 else nyquist + high
    if not 0 <= low < high <= nyquist:
        raise ConfigError(
            f"features: mel bins from {low:g} to {high:g} Hz do not fit samples at {config.sample_rate} Hz"
        )
    edges = _hertz(torch.linspace(_mel(low), _mel(high), config.num_bins + 2, dtype=torch.float64))
    bins = torch.linspace(0, nyquist, fft_size // 2 + 1, dtype=torch.float64)[:, None]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    triangles = torch.minimum((bins - left) / (centre - left), (right - bins) / (right - centre))
    return triangles.clamp(min=0) * 2 / (right - left)


def _fourier_matrix(size: int) -> Tensor:
    """The periodic Hann window times cosine, then times sine: (size, 2 K)."""
    i = torch.arange(size, dtype=torch.float64)
    hann = 0.5 - 0.5 * torch.cos(2 * math.pi * i / size)
    angle = 2 * math.pi * (i[:, None] * torch.arange(size // 2 + 1) % size) / size
    return hann[:, None] * torch.cat([torch.cos(angle), torch.sin(angle)], dim=1)


def _mel(freq_hz: float) -> float:
    """200 / 3 Hz per mel up to 1000 Hz, which is 15 mel; above, 27 mel per factor of 6.4."""
    if freq_hz < LINEAR_HZ:
        return freq_hz * 3 / 200
    return 15 + 27 * math.log(freq_hz / LINEAR_HZ) / math.log(6.4)


def _hertz(mel: Tensor) -> Tensor:
    return torch.where(mel < 15, mel * 200 / 3, LINEAR_HZ * 6.4 ** ((mel - 15) / 27))
