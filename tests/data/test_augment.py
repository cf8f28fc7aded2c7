"""Augmentation has the stated effect and size, and is the same for the same seed, epoch and cut."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from lhotse.cut import Cut

from asr.data.augment import AugmentConfig, Augmenter, SpecAugment, SpecAugmentConfig, load_sounds
from asr.data.cuts import open_cuts, read_cut
from asr.errors import ConfigError, ManifestError

from .conftest import Corpus


@pytest.fixture
def cuts(corpus: Corpus) -> list[Cut]:
    return list(open_cuts(corpus([1.0 + 0.05 * n for n in range(20)])))


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    (tmp_path / "noise").mkdir()
    rng = np.random.default_rng(0)
    for name, seconds in (("short", 0.4), ("long", 5.0)):
        soundfile.write(
            tmp_path / "noise" / f"{name}.flac", 0.1 * rng.standard_normal(int(16000 * seconds)), 16000
        )
    return tmp_path / "noise"


def test_speed_changes_duration_and_pitch_and_keeps_the_id(cuts: list[Cut]) -> None:
    for factor in (0.9, 1.1):
        cut = Augmenter(AugmentConfig(speed=[factor]), 16000, 0).speed(cuts[0], 0)
        assert cut.id == cuts[0].id
        assert cut.duration == pytest.approx(1 / factor, abs=1e-3)
        samples = read_cut(cut)
        assert len(samples) == pytest.approx(16000 / factor, abs=2)
        peak = np.abs(np.fft.rfft(samples)).argmax() / len(samples) * 16000
        assert peak == pytest.approx(200 * factor, abs=2)


def test_speeds_are_drawn_for_each_cut_and_epoch(cuts: list[Cut]) -> None:
    augmenter = Augmenter(AugmentConfig(), 16000, 0)
    lengths = [[augmenter.speed(cut, epoch).duration / cut.duration for cut in cuts] for epoch in (0, 1, 0)]
    assert lengths[0] == lengths[2] != lengths[1]
    assert {round(length, 1) for length in lengths[0]} == {0.9, 1.0, 1.1}


@pytest.mark.parametrize("snr_db", [0.0, 15.0])
def test_noise_is_mixed_at_the_asked_ratio_over_the_whole_cut(
    cuts: list[Cut], noise: Path, snr_db: float
) -> None:
    config = AugmentConfig(noise=str(noise), noise_prob=1.0, noise_snr_db=[snr_db, snr_db])
    augmenter = Augmenter(config, 16000, 0)
    for cut in cuts[:8]:
        clean, noisy = read_cut(cut), read_cut(augmenter.surroundings(cut, 0))
        assert len(noisy) == len(clean)
        added = noisy - clean
        measured = 10 * np.log10(np.mean(clean**2) / np.mean(added**2))
        assert measured == pytest.approx(snr_db, abs=0.5)
        assert all(np.abs(part).max() > 0 for part in np.array_split(added, 20))


def test_ratios_are_drawn_from_the_range_and_some_cuts_stay_clean(cuts: list[Cut], noise: Path) -> None:
    config = AugmentConfig(noise=str(noise), noise_prob=0.5, noise_snr_db=[5, 20])
    changed = [Augmenter(config, 16000, 0).surroundings(cut, 0) for cut in cuts]
    ratios = [mixed.tracks[-1].snr for mixed, cut in zip(changed, cuts, strict=True) if mixed is not cut]
    assert 4 <= len(ratios) <= 16
    assert len(set(ratios)) == len(ratios)
    assert all(5 <= ratio <= 20 for ratio in ratios)


def test_surroundings_depend_on_seed_epoch_and_cut_alone(cuts: list[Cut], noise: Path) -> None:
    config = AugmentConfig(noise=str(noise), noise_prob=1.0)

    def noisy(seed: int, epoch: int, order: list[Cut]) -> dict[str, np.ndarray]:
        augmenter = Augmenter(config, 16000, seed)
        return {cut.id: read_cut(augmenter.surroundings(cut, epoch)) for cut in order}

    first = noisy(0, 0, cuts[:4])
    again = noisy(0, 0, cuts[3::-1])
    for name, samples in first.items():
        np.testing.assert_array_equal(samples, again[name])
        assert not np.array_equal(samples, noisy(0, 1, cuts[:4])[name])
        assert not np.array_equal(samples, noisy(1, 0, cuts[:4])[name])


def test_reverberation_is_the_room_and_keeps_length_and_power(cuts: list[Cut], tmp_path: Path) -> None:
    room = np.zeros(4000)
    room[[0, 1600]] = 1.0, 0.5  # an echo after 100 ms
    (tmp_path / "rir").mkdir()
    soundfile.write(tmp_path / "rir" / "echo.wav", room, 16000)
    augmenter = Augmenter(AugmentConfig(rir=str(tmp_path / "rir"), rir_prob=1.0), 16000, 0)
    clean = read_cut(cuts[3])
    wet = read_cut(augmenter.surroundings(cuts[3], 0))
    expected = np.convolve(clean, room)[: len(clean)]
    expected *= np.sqrt(np.mean(clean**2) / np.mean(expected**2))
    np.testing.assert_allclose(wet, expected, atol=2e-3)


def test_volumes_are_drawn_from_the_range_and_change_nothing_else(cuts: list[Cut], noise: Path) -> None:
    plain = AugmentConfig(noise=str(noise), noise_prob=1.0)
    loud = AugmentConfig(noise=str(noise), noise_prob=1.0, volume_db=[-12, 6])
    gains_db = []
    for cut in cuts:
        before, after = (
            read_cut(Augmenter(config, 16000, 0).surroundings(cut, 0)) for config in (plain, loud)
        )
        gain = np.sqrt(np.mean(after**2) / np.mean(before**2))
        np.testing.assert_allclose(after, gain * before, atol=1e-4)
        gains_db.append(20 * np.log10(gain))
    assert -12 <= min(gains_db) < -8
    assert 2 < max(gains_db) <= 6


def test_sounds_of_any_rate_and_more_channels_and_from_a_manifest(tmp_path: Path, corpus: Corpus) -> None:
    (tmp_path / "n").mkdir()
    soundfile.write(tmp_path / "n" / "stereo.wav", np.full((800, 2), 0.1), 8000)
    (sound,) = load_sounds(str(tmp_path / "n"), 16000)
    assert read_cut(sound).shape == (1600,)
    assert len(load_sounds(str(corpus([0.2, 0.3])), 16000)) == 2
    (tmp_path / "none").mkdir()
    with pytest.raises(ManifestError, match="no sound file"):
        load_sounds(str(tmp_path / "none"), 16000)


@pytest.mark.parametrize(
    "wrong",
    [
        {"speed": [0.1]},
        {"noise_snr_db": [20, 5]},
        {"noise_prob": 1.5},
        {"rir_prob": -1.0},
        {"volume_db": [3]},
    ],
)
def test_numbers_without_meaning_are_refused(wrong: dict[str, list[float]]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        AugmentConfig(**wrong)  # type: ignore[arg-type]


X_LENS = torch.tensor([400, 150, 30, 3])


def hidden(config: SpecAugmentConfig, seed: int = 0) -> torch.Tensor:
    x = torch.ones(4, 400, 80)
    return SpecAugment(config)(x, X_LENS, torch.Generator().manual_seed(seed)) == 0


def test_time_masks_keep_within_each_utterance_and_its_share() -> None:
    config = SpecAugmentConfig(num_freq_masks=0)
    total = 0
    for seed in range(50):
        rows = hidden(config, seed).all(dim=2)
        for row, length in zip(rows, X_LENS.tolist(), strict=True):
            assert not row[length:].any()
            assert row.sum() <= 0.15 * length
            total += int(row.sum())
    assert total > 50 * 0.03 * 400


def test_one_time_mask_is_no_longer_than_allowed() -> None:
    config = SpecAugmentConfig(num_time_masks=1, max_time_frames=20, max_time_share=1.0, num_freq_masks=0)
    lengths = [int(hidden(config, seed)[0, :, 0].sum()) for seed in range(200)]
    assert max(lengths) == 20
    assert min(lengths) == 0


def test_frequency_masks_are_bands_of_every_frame() -> None:
    config = SpecAugmentConfig(num_time_masks=0, num_freq_masks=1, max_freq_bins=27)
    widths = []
    for seed in range(200):
        bins = hidden(config, seed)
        assert (bins == bins[:, :1]).all()
        band = bins[0, 0].int()
        assert band.diff().abs().sum() <= 2
        widths.append(int(band.sum()))
    assert max(widths) == 27


def test_spec_augment_off_or_not_training_changes_nothing() -> None:
    x = torch.randn(4, 400, 80)
    off = SpecAugment(SpecAugmentConfig(num_time_masks=0, num_freq_masks=0))
    torch.testing.assert_close(off(x, X_LENS), x, rtol=0, atol=0)
    on = SpecAugment(SpecAugmentConfig())
    assert not torch.equal(on(x, X_LENS), x)
    torch.testing.assert_close(on.eval()(x, X_LENS), x, rtol=0, atol=0)


def test_spec_augment_follows_its_generator_and_differs_between_utterances() -> None:
    config = SpecAugmentConfig()
    assert torch.equal(hidden(config, 1), hidden(config, 1))
    assert not torch.equal(hidden(config, 1), hidden(config, 2))
    rows = hidden(SpecAugmentConfig(num_time_masks=0))
    assert not torch.equal(rows[0], rows[1])
