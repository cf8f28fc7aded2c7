from pathlib import Path

import pytest

from asr.runtime import Bundle, StreamConfig
from export.bench import bench
from export.verify import made_sound


@pytest.mark.parametrize("mode", ["ctc-greedy", "rescore"])
def test_figures_are_of_the_sound_that_was_fed(tiny_bundles: Path, mode: str):
    sound = made_sound(4.0, 16000)
    found = bench(Bundle.load(tiny_bundles / "cpu-int8"), [sound, sound[:32000]], StreamConfig(mode=mode))
    assert (found.audio_s, found.threads, found.chunk_ms, found.mode) == (6.0, 1, 640, mode)
    assert 0 < found.cpu_rtf < 1
    assert 0 < found.rtf < 2
    for median, high in (found.chunk_ms_p50_p95, found.first_partial_ms_p50_p95, found.final_ms_p50_p95):
        assert 0 < median <= high
    assert found.first_partial_ms_p50_p95[0] > 10
    assert found.peak_memory_mb > 10


def test_no_sound_is_no_error(tiny_bundles: Path):
    assert bench(Bundle.load(tiny_bundles / "cpu-int8"), [], StreamConfig()).rtf == 0
