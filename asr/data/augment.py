"""Augmentation: speed, reverberation, noise and volume of cuts (lhotse), SpecAugment of features (torch).

The augmentation of a cut depends only on (seed, epoch, cut id), not on workers, ranks or the reading order.
"""

from __future__ import annotations

import io
import random
from dataclasses import dataclass, field
from pathlib import Path

import soundfile
import torch
from lhotse import Recording
from lhotse.audio import AudioSource
from lhotse.cut import Cut
from torch import Tensor, nn

from asr.data.cuts import open_cuts, read_cut
from asr.errors import ConfigError, ManifestError

MEMORY_S = 3600.0
"""Noises, or impulse responses, of at most this many seconds in total are kept decoded in memory: 115 MB."""

AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".opus", ".mp3"}


@dataclass(kw_only=True, slots=True)
class SpecAugmentConfig:
    """SpecAugment (arXiv:1904.08779), time masks adapted to the length (arXiv:1912.05533); 0 masks is off."""

    num_time_masks: int = 10
    """Time masks per utterance; fewer if they would exceed max_time_share."""

    max_time_frames: int = 50
    """Longest time mask, in frames of 10 ms."""

    max_time_share: float = 0.15
    """Largest share of an utterance that all time masks together may cover."""

    num_freq_masks: int = 2
    """Frequency masks per utterance."""

    max_freq_bins: int = 27
    """Widest frequency mask, in mel bins."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_time_share <= 1:
            raise ConfigError(f"max_time_share is {self.max_time_share}; expected a share between 0 and 1")


@dataclass(kw_only=True, slots=True)
class AugmentConfig:
    speed: list[float] = field(default_factory=lambda: [0.9, 1.0, 1.1])
    """Speed factors, one of which is drawn for each utterance in each epoch; 1.1 is faster; [] is off."""

    noise: str = ""
    """Manifest of noises, or a folder of audio files; "" is off."""

    noise_prob: float = 0.5
    """Share of utterances that get noise."""

    noise_snr_db: list[float] = field(default_factory=lambda: [5.0, 30.0])
    """Lowest and highest signal-to-noise ratio, in decibels."""

    rir: str = ""
    """Manifest of room impulse responses, or a folder of audio files; "" is off."""

    rir_prob: float = 0.3
    """Share of utterances that get reverberation."""

    volume_db: list[float] = field(default_factory=list)
    """Lowest and highest gain in decibels, for example [-10, 10], drawn for each utterance; [] is off."""

    spec_augment: SpecAugmentConfig = field(default_factory=SpecAugmentConfig)

    def __post_init__(self) -> None:
        if any(not 0.5 <= factor <= 2 for factor in self.speed):
            raise ConfigError(f"speed is {self.speed}; expected factors between 0.5 and 2")
        if len(self.noise_snr_db) != 2 or self.noise_snr_db[0] > self.noise_snr_db[1]:
            raise ConfigError(f"noise_snr_db is {self.noise_snr_db}; expected the lowest and the highest")
        if self.volume_db and (len(self.volume_db) != 2 or self.volume_db[0] > self.volume_db[1]):
            raise ConfigError(f"volume_db is {self.volume_db}; expected the lowest and the highest, or none")
        for name in ("noise_prob", "rir_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a share between 0 and 1")


class Augmenter:
    """Speed, reverberation, noise, volume; all lazy: a changed cut is a manifest entry until it is read."""

    def __init__(self, config: AugmentConfig, sample_rate: int, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.noises = load_sounds(config.noise, sample_rate) if config.noise else []
        self.rirs = load_sounds(config.rir, sample_rate) if config.rir else []

    def speed(self, cut: Cut, epoch: int) -> Cut:
        """The cut at a random speed, under its own id; runs before batching, as it changes the duration."""
        if not self.config.speed:
            return cut
        factor = self._rng("speed", cut, epoch).choice(self.config.speed)
        return cut if factor == 1 else cut.perturb_speed(factor, affix_id=False)

    def surroundings(self, cut: Cut, epoch: int) -> Cut:
        """The cut with random reverberation and noise, each with its probability, and random volume."""
        rng = self._rng("surroundings", cut, epoch)
        in_room, in_noise = rng.random() < self.config.rir_prob, rng.random() < self.config.noise_prob
        if self.rirs and in_room:
            cut = cut.reverb_rir(rng.choice(self.rirs).recording, affix_id=False)
        if self.noises and in_noise:
            noise = _stretch_of_noise(self.noises, cut.duration, rng)
            cut = cut.mix(noise, snr=rng.uniform(*self.config.noise_snr_db), preserve_id="left")
        if self.config.volume_db:
            cut = cut.perturb_volume(10 ** (rng.uniform(*self.config.volume_db) / 20), affix_id=False)
        return cut

    def _rng(self, purpose: str, cut: Cut, epoch: int) -> random.Random:
        return random.Random(f"{purpose} {self.seed} {epoch} {cut.id}")


def _stretch_of_noise(noises: list[Cut], duration_s: float, rng: random.Random) -> Cut:
    """A random stretch of a random noise; if that is too short, others follow it."""
    noise = rng.choice(noises)
    start = rng.uniform(0, max(0.0, noise.duration - duration_s))
    noise = noise.truncate(offset=start, duration=min(duration_s, noise.duration - start))
    while noise.duration < duration_s:
        noise = noise.append(rng.choice(noises))
    return noise.truncate(duration=duration_s)


def load_sounds(path: str, sample_rate: int) -> list[Cut]:
    """The first channel of each recording of a manifest or folder at `sample_rate`; ManifestError if none."""
    if Path(path).is_dir():
        files = sorted(p for p in Path(path).rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES)
        sounds = [Recording.from_file(p, recording_id=str(p)).to_cut() for p in files]
    else:
        sounds = list(open_cuts(path))
    if not sounds:
        raise ManifestError(f"{path}: no sound file; expected one of {' '.join(sorted(AUDIO_SUFFIXES))}")
    mono = [sound if sound.num_channels == 1 else sound.to_mono()[0] for sound in sounds]
    at_rate = [sound.resample(sample_rate) for sound in mono]
    small = sum(sound.duration for sound in at_rate) <= MEMORY_S
    return [_in_memory(sound) for sound in at_rate] if small else at_rate


def _in_memory(sound: Cut) -> Cut:
    """The recording as 16-bit WAV in memory: reading a stretch is fast, while a codec would decode it all."""
    wav = io.BytesIO()
    soundfile.write(wav, read_cut(sound).clip(-1, 1), sound.sampling_rate, format="WAV", subtype="PCM_16")
    source = AudioSource("memory", [0], wav.getvalue())
    return Recording(sound.id, [source], sound.sampling_rate, sound.num_samples, sound.duration).to_cut()


class SpecAugment(nn.Module):
    """Masks stretches of time and bands of frequency with 0, the mean of normalised features, in training."""

    def __init__(self, config: SpecAugmentConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor, x_lens: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x (N, T, F), x_lens (N,) -> (N, T, F). `generator` on the device of x; None is torch's own."""
        if not self.training:
            return x
        config = self.config
        lens = x_lens.to(x.device)[:, None]
        in_time = _stretches(self._longest_times(lens), lens, x.shape[1], generator)
        num_bins = torch.full_like(lens, x.shape[2])
        widest = num_bins.clamp(max=config.max_freq_bins).expand(-1, config.num_freq_masks)
        in_freq = _stretches(widest, num_bins, x.shape[2], generator)
        return x.masked_fill(in_time[:, :, None] | in_freq[:, None, :], 0.0)

    def _longest_times(self, lens: Tensor) -> Tensor:
        """(N, 1) -> (N, M): the maximal length of each time mask that keeps all within max_time_share."""
        config = self.config
        total = lens * config.max_time_share
        count = (total / max(1, config.max_time_frames)).ceil().clamp(1, max(1, config.num_time_masks))
        longest = (total / count).clamp(max=config.max_time_frames)
        return longest * (torch.arange(config.num_time_masks, device=lens.device) < count)


def _stretches(longest: Tensor, lens: Tensor, size: int, generator: torch.Generator | None) -> Tensor:
    """(N, M) maximal lengths, (N, 1) lens -> (N, size), True within any of M random stretches."""
    random_start, random_length = torch.rand(2, *longest.shape, device=longest.device, generator=generator)
    length = (random_length * (longest.floor() + 1)).floor()
    start = (random_start * (lens - length + 1)).floor()
    index = torch.arange(size, device=longest.device)
    covered = (index >= start[:, :, None]) & (index < (start + length)[:, :, None])
    return covered.any(dim=1)
