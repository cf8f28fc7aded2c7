from pathlib import Path

import numpy as np
import pytest

from asr.decode.scorer import Floats
from asr.runtime import Bundle, StreamConfig
from export.bench import Timings, bench, bench_against
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


def test_the_ratio_is_the_median_over_utterances(tiny_bundles: Path, monkeypatch: pytest.MonkeyPatch):
    ours, theirs = (Bundle.load(tiny_bundles / target) for target in ("cpu-int8", "cpu-fp32"))
    seconds = {ours.folder: iter([9.0, 1.0, 2.0, 1.0]), theirs.folder: iter([9.0, 3.0, 3.0, 2.0])}

    def run(bundle: Bundle, samples: Floats, config: StreamConfig, timings: Timings) -> None:
        timings.cpu_s.append(next(seconds[bundle.folder]))

    monkeypatch.setattr("export.bench._run", run)
    *_, ratio = bench_against(ours, theirs, [np.zeros(8, np.float32)] * 3, StreamConfig())
    assert (ratio.median, ratio.utterances) == (2.0, 3)
    assert ratio.quartiles == (1.75, 2.5)
