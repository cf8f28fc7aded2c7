"""Waveform -> log-mel frames, equal to Kaldi's fbank, as differentiable and exportable matrix products.

Per frame: remove the mean, pre-emphasise, multiply by the window, Fourier transform, power, mel triangles,
logarithm. Window and Fourier transform are one product; everything stays float32 when the rest of a model is
quantized. The power does not depend on the origin of time. With the origin at the middle of the frame, about
which the window is symmetric, the real part is a sum over the even part of the frame and the imaginary part
one over the odd part, each of half the length. At this size, that is as fast as an FFT.

N utterances · S samples · T frames, 10 ms apart · F mel bins
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.errors import ConfigError

PREEMPHASIS = 0.97
FLOOR = torch.finfo(torch.float32).eps


@dataclass(kw_only=True, slots=True)
class FbankConfig:
    """The features of a model; the defaults are those of Kaldi's successors and of sherpa-onnx."""

    type: Literal["kaldi", "whisper", "nemo"] = "kaldi"
    """Kaldi's features, or those of asr/whisper_features.py or asr/nemo_features.py."""

    sample_rate: int = 16000
    """Sample rate in Hz."""

    num_bins: int = 80
    """F, the number of mel triangles."""

    frame_ms: float = 25.0
    """Length of a frame."""

    shift_ms: float = 10.0
    """Frame shift."""

    low_freq_hz: float = 20.0
    """Lower edge of the first triangle."""

    high_freq_hz: float = -400.0
    """Upper edge of the last triangle; zero or negative counts from half the sample rate."""

    snip_edges: bool = False
    """True: only frames that lie within the utterance. False: one frame per shift, mirroring the edges."""

    scale: float = 1.0
    """Factor applied to samples in [-1, 1] first: 32768 for checkpoints trained on 16-bit integers."""

    window_s: float = 0.0
    """Type whisper: utterances are padded with silence to this length, and must not be longer."""

    normalize: Literal["none", "per_feature", "all_features"] = "none"
    """Type nemo: normalise utterances to mean 0 and variance 1, per bin or over all bins; not in streams."""

    def __post_init__(self) -> None:
        if self.normalize != "none" and self.type != "nemo":
            raise ConfigError(
                f"normalize is {self.normalize}; expected none with features of type {self.type}"
            )


class Fbank(nn.Module):
    """Log-mel energies of a power spectrum, floored at float32 epsilon, without dither."""

    framed = True
    """Whether `frames` of windows equal those of the whole utterance, so that streams can use windows."""

    max_samples = 0
    """The most samples of an utterance; 0: any number."""

    fading = 0.0
    """If not 0: samples before an utterance are 0, and each one after it is the previous one times this."""

    def __init__(self, config: FbankConfig) -> None:
        super().__init__()
        self.config = config
        self.frame_samples = int(config.sample_rate * 0.001 * config.frame_ms)
        self.shift_samples = int(config.sample_rate * 0.001 * config.shift_ms)
        fft_size = 1 << (self.frame_samples - 1).bit_length()
        cosine, sine = _fourier_matrices(self.frame_samples, fft_size)
        mel = _mel_matrix(config, fft_size)
        self.register_buffer("cosine", cosine.float(), persistent=False)
        self.register_buffer("sine", sine.float(), persistent=False)
        self.register_buffer("mel", mel.float(), persistent=False)

    cosine: Tensor
    sine: Tensor
    mel: Tensor

    def num_frames(self, sample_lens: Tensor) -> Tensor:
        """Samples -> frames, element by element."""
        if self.config.snip_edges:
            whole = 1 + (sample_lens - self.frame_samples) // self.shift_samples
            return whole.clamp(min=0)
        return (sample_lens + self.shift_samples // 2) // self.shift_samples

    def forward(self, samples: Tensor, sample_lens: Tensor) -> tuple[Tensor, Tensor]:
        """The frames of whole utterances; padding has no effect, and its frames are 0.

        samples (N, S) in [-1, 1], sample_lens (N,). Returns x (N, T, F), x_lens (N,).
        """
        x_lens = self.num_frames(sample_lens)
        num_frames = int(self.num_frames(torch.tensor(samples.shape[1])))
        if num_frames == 0:
            return samples.new_zeros(len(samples), 0, self.config.num_bins), x_lens
        num_samples = (num_frames - 1) * self.shift_samples + self.frame_samples
        if not self.config.snip_edges:
            samples = self._mirror(samples, sample_lens, num_samples)
        x = self.frames(samples[:, :num_samples])
        valid = torch.arange(num_frames, device=x.device) < x_lens[:, None]
        return torch.where(valid[..., None], x, 0.0), x_lens

    def frames(self, window: Tensor) -> Tensor:
        """The frames that lie within a window of samples: the part that a stream uses and a graph contains.

        window (N, (T - 1) * shift_samples + frame_samples). Returns x (N, T, F).
        """
        # builds frames from shared blocks: slicing blocks is much faster than indexing samples
        size = math.gcd(self.frame_samples, self.shift_samples)
        step = self.shift_samples // size
        blocks = (window * self.config.scale).unflatten(1, (-1, size))
        after = self.frame_samples // size - 1  # blocks of a frame after its first
        parts = [blocks[:, i : i - after or None : step] for i in range(after + 1)]
        x = torch.cat(parts, dim=-1)
        x = x - x.mean(-1, keepdim=True)
        x = x - PREEMPHASIS * torch.cat([x[..., :1], x[..., :-1]], dim=-1)
        half = len(self.cosine)
        late, early = x[..., -half:], x[..., :half].flip(-1)
        real, imaginary = (late + early) @ self.cosine, (late - early) @ self.sine
        energy = (real.square() + imaginary.square()) @ self.mel
        return energy.clamp(min=FLOOR).log()

    def _mirror(self, samples: Tensor, sample_lens: Tensor, num_samples: int) -> Tensor:
        """Reflect each utterance at both ends: -1 -> 0, -2 -> 1, n -> n - 1, with period 2 n.

        No valid frame reaches a whole frame beyond an end, so samples further out stay as they are.
        """
        reach = self.frame_samples
        first = self.shift_samples // 2 - self.frame_samples // 2
        n = sample_lens.clamp(min=1)[:, None]
        step = torch.arange(reach, device=samples.device)
        ends = torch.cat([(step - reach).expand(len(n), -1), n + step], dim=1)
        position = ends % (2 * n)
        reflected = samples.gather(1, torch.minimum(position, 2 * n - 1 - position))
        padded = F.pad(samples, (reach, reach)).scatter(1, ends + reach, reflected)
        return padded[:, reach + first : reach + first + num_samples]


class Cmvn(nn.Module):
    """Global mean and variance normalisation, part of checkpoint and graph; identity by default."""

    mean: Tensor
    istd: Tensor

    def __init__(self, num_bins: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_bins))
        self.register_buffer("istd", torch.ones(num_bins))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., F) -> the same shape, mean 0 and variance 1 over the frames it was estimated on."""
        return (x - self.mean) * self.istd

    @classmethod
    def from_frames(cls, frames: Iterable[Tensor]) -> Self:
        """Estimate from utterances, (T, F) each; raises ValueError if there is no frame."""
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for x in frames:
            count += len(x)
            total = total + x.double().sum(0).cpu()
            squares = squares + x.double().square().sum(0).cpu()
        if count == 0:
            raise ValueError("no frames to estimate mean and variance from")
        mean = total / count
        cmvn = cls(len(mean))
        cmvn.mean.copy_(mean)
        cmvn.istd.copy_((squares / count - mean.square()).clamp(min=1e-6).rsqrt())
        return cmvn


def _fourier_matrices(frame_samples: int, fft_size: int) -> tuple[Tensor, Tensor]:
    """Povey's window times cosine and times sine, from the middle of a frame on: (ceil(frame_samples / 2),
    fft_size / 2) each, without Nyquist. The middle sample of an odd frame is in both halves, so it is halved.
    """
    i = torch.arange(frame_samples // 2, frame_samples, dtype=torch.float64)
    window = (0.5 - 0.5 * torch.cos(2 * math.pi * i / (frame_samples - 1))) ** 0.85
    time = i - (frame_samples - 1) / 2
    window = torch.where(time == 0, window / 2, window)
    angle = 2 * math.pi * time[:, None] * torch.arange(fft_size // 2) / fft_size
    return window[:, None] * torch.cos(angle), window[:, None] * torch.sin(angle)


def _mel_matrix(config: FbankConfig, fft_size: int) -> Tensor:
    """Triangles that are linear in mel = 1127 ln(1 + f / 700): (fft_size / 2, F)."""
    nyquist = config.sample_rate / 2
    low, high = config.low_freq_hz, config.high_freq_hz
    high = high if high > 0 else nyquist + high
    if not 0 <= low < high <= nyquist:
        raise ConfigError(
            f"features: mel bins from {low:g} to {high:g} Hz do not fit samples at {config.sample_rate} Hz"
        )
    edges = torch.linspace(_mel(low), _mel(high), config.num_bins + 2, dtype=torch.float64)
    bins = torch.arange(fft_size // 2, dtype=torch.float64) * config.sample_rate / fft_size
    mel = (1127 * torch.log(1 + bins / 700))[:, None]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    return torch.minimum((mel - left) / (centre - left), (right - mel) / (right - centre)).clamp(min=0)


def _mel(freq_hz: float) -> float:
    return 1127 * math.log(1 + freq_hz / 700)
