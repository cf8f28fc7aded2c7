"""Comparison with sherpa-onnx: what is compared, by which process, and what cannot be."""

from pathlib import Path

import numpy as np
import pytest

from asr.errors import BundleError
from asr.runtime import Bundle
from export import peers
from export.bundle import Origin, describe, write_bundle
from export.onnx import export_graphs
from export.peers import Duel, Run, Task, duel, keep_up, multiply_adds, peak, worker
from export.sherpa_bundle import write_sherpa
from export.verify import made_sound

pytest.importorskip("sherpa_onnx", reason="the extra bench is not installed")


@pytest.fixture(scope="module")
def folder(tiny_model, tiny_bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("peers") / "sherpa"
    write_sherpa(tiny_model, tiny_bundles, Origin("tiny", ""), out, only=["streaming"])
    return out


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    path = tmp_path / "sound.npy"
    np.save(path, made_sound(2.0, 16000))
    return path


def test_both_hear_all_of_the_sound_in_every_use(
    folder: Path, tiny_bundles: Path, sound: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(peers, "MAX_STREAMS", 2)
    bundle = Bundle.load(tiny_bundles / "cpu-int8")
    *news, found = duel(bundle, folder, sound, 640, rounds=2)
    assert isinstance(found, Duel)
    assert news[:-2] == [row.name for row in found.rows] == ["live", "file", "4 streams", "16 streams"]
    for row in found.rows:
        median, low, high = row.ratios
        assert 0 < low <= median <= high
        assert 0 < row.limit_share < 1
    assert set(found.streams) == set(found.round_ms) == set(found.memory_mb) == {"ours", "theirs"}


def test_a_worker_hears_as_many_streams_and_chunks_as_it_is_told(tiny_bundles: Path, sound: Path):
    with worker("ours", str(tiny_bundles / "cpu-int8"), str(sound), "640", "4") as run:
        for task, audio_s, rounds in (
            (Task(), 2.0, 4),
            (Task(3), 6.0, 4),
            (Task(chunks_per_call=2), 2.0, 2),
            (Task(2, 1, 1.0), 2.0, 2),
        ):
            found = run(task)
            assert (found.audio_s, len(found.rounds_s)) == (audio_s, rounds)
            assert found.cpu_s > 0


def test_a_worker_that_ends_says_why(sound: Path, tmp_path: Path):
    with (
        worker("ours", str(tmp_path / "none"), str(sound), "640", "4") as run,
        pytest.raises(BundleError, match=r"none: ours ended: .*no such folder"),
    ):
        run(Task())


@pytest.mark.parametrize("capacity", [0, 1, 7, 37, 200, 1000])
def test_the_most_streams_are_found_within_an_eighth(capacity: int):
    def run(task: Task) -> Run:
        return Run(8.0, 1.0, [0.5 if task.streams <= capacity else 0.7] * 10, 1.0)

    found = keep_up(run, 0.64)
    assert found <= capacity
    assert found >= min(capacity, peers.MAX_STREAMS) * 7 / 8


def test_work_is_counted_from_the_matrices(tiny_bundles: Path):
    """The same in 8 bits as in float32: layers run 25 times a second, features 100 times."""
    ours, theirs = (multiply_adds(Bundle.load(tiny_bundles / x)) for x in ("cpu-int8", "cpu-fp32"))
    layer = 4 * 32 * 64 + 32 * 96 + 32 * 32 + 32 * 64 + 32 * 32
    rest, features = 8 * 20 * 32 + 32 * 22, 2 * 200 * 256 + 256 * 80
    assert ours == theirs == 25 * (2 * layer + rest) + 100 * features


def test_a_core_does_more_than_nothing():
    assert peak("cpu-fp32", size=64, rounds=2) > 1e6
    assert peak("cpu-int8", size=64, rounds=2) > 1e6


def test_what_cannot_be_compared_is_refused(folder: Path, tiny_bundles: Path, sound: Path, tmp_path: Path):
    bundle = Bundle.load(tiny_bundles / "cpu-int8")
    with pytest.raises(BundleError, match="has no streaming model; write one with asr export --target"):
        next(duel(bundle, tmp_path, sound, 640, 1))
    with pytest.raises(BundleError, match="650 ms is not a multiple of 40 ms"):
        next(duel(bundle, folder, sound, 650, 1))


@pytest.mark.slow
def test_a_zipformer_is_compared_with_the_contract_of_zipformers(
    zipformer_model, tiny_bundles: Path, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(peers, "MAX_STREAMS", 2)
    write_sherpa(zipformer_model, tiny_bundles, Origin("", ""), tmp_path / "sherpa", only=["zipformer"])
    info = describe(zipformer_model, tiny_bundles, "cpu-fp32", Origin("", ""))
    write_bundle(export_graphs(zipformer_model), info, tiny_bundles, tmp_path / "bundle")
    bundle = Bundle.load(tmp_path / "bundle")
    *_, found = duel(bundle, tmp_path / "sherpa", sound, 640, rounds=1)
    assert isinstance(found, Duel)
    assert [row.name for row in found.rows] == ["live", "file", "4 streams", "16 streams"]
    with pytest.raises(BundleError, match="its chunk is 640 ms, not 320; pass --chunk-ms 640"):
        next(duel(bundle, tmp_path / "sherpa", sound, 320, 1))
