"""silero-vad: needs the extra `vad`, but for what happens without it."""

import csv
from pathlib import Path

import numpy as np
import pytest

from asr.audio import read
from asr.decode.config import SearchConfig
from asr.decode.modes import decode
from asr.decode.scorer import Floats
from asr.errors import BundleError, MissingExtra
from asr.runtime import Bundle, voice
from asr.runtime.cutter import CutConfig, Cutter
from asr.runtime.onnx_scorer import OnnxScorer
from asr.runtime.recording import Recording, RecordingConfig
from asr.runtime.voice import FILE, VoiceActivity, find_model
from asr.wer import NOTHING, align, count_errors, words


@pytest.fixture(scope="module")
def network() -> Path:
    try:
        return find_model()
    except MissingExtra as error:
        pytest.skip(str(error))


def hear(activity: VoiceActivity, samples: Floats, block: int = 16000) -> list[float]:
    heard = [p for i in range(0, len(samples), block) for p in activity.accept(samples[i : i + block])]
    return heard + activity.finish()


def test_speech_is_told_from_silence_and_noise(network: Path, speech: list[Floats]):
    noise = np.random.default_rng(0).normal(0, 0.03, 48000).astype(np.float32)
    silence = np.zeros(48000, np.float32)
    for samples in speech:
        heard = hear(VoiceActivity(16000, network), np.concatenate([silence, noise, samples]))
        assert max(heard[:185]) < 0.25
        assert np.mean(np.array(heard[190:]) > 0.4) > 0.6


@pytest.mark.parametrize("block", [1, 511, 512, 7777])
def test_how_samples_arrive_changes_nothing(network: Path, speech: list[Floats], block: int):
    samples = speech[0][:20000]
    expected = hear(VoiceActivity(16000, network), samples, len(samples))
    assert len(expected) == 40  # the last one is incomplete
    assert hear(VoiceActivity(16000, network), samples, block) == expected


def test_eight_kilohertz_are_heard_too(network: Path, speech_data: Path):
    samples = read(sorted((speech_data / "fsdd_8k").rglob("*.flac"))[0], 8000)
    activity = VoiceActivity(8000, network)
    assert activity.window == 256
    assert max(hear(activity, samples)) > 0.5
    assert max(hear(VoiceActivity(8000, network), np.zeros(8000, np.float32))) < 0.25


@pytest.mark.parametrize("silence_s", [0.0, 0.4, 3.0])
@pytest.mark.parametrize("noise", [1e-5, 3e-3])
def test_what_is_loud_in_joined_utterances_is_in_a_piece(
    network: Path, speech_data: Path, silence_s: float, noise: float
):
    """Real speech, also joined without pauses: none of it is lost at the borders of pieces."""
    paths = sorted((speech_data / "librispeech_mini").rglob("*.opus"))[::150]
    random = np.random.default_rng(0)
    utterances = [read(path) for path in paths]
    parts = [part for x in utterances for part in (x, np.zeros(round(16000 * silence_s), np.float32))]
    samples = np.concatenate(parts)
    samples += random.normal(0, noise, len(samples)).astype(np.float32)
    activity = VoiceActivity(16000, network)
    cutter = Cutter(CutConfig(), 16000, activity.window, 640)
    pieces = cutter.accept(samples, activity.accept(samples)) + cutter.finish(activity.finish())
    kept = np.zeros(len(samples), bool)
    for piece in pieces:
        kept[piece.start : piece.start + len(piece.samples)] = True
    assert len(pieces) > 4
    levels = np.sqrt(np.square(samples[: len(samples) // 320 * 320].reshape(-1, 320)).mean(1))
    loud = levels > 0.1 * np.quantile(levels, 0.95)
    lost = ~kept[: len(loud) * 320 : 320][loud]
    assert lost.mean() < 0.002
    if silence_s == 3.0:
        assert kept.mean() < 0.95


def test_without_the_network_the_line_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(voice, "PACKAGES", ("no_such_package",))
    with pytest.raises(MissingExtra, match=r"pip install 'asr-toolkit\[vad\]'"):
        VoiceActivity(16000)


def test_another_network_of_that_name_is_refused_and_no_package_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "some_package" / FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(b"another")
    (tmp_path / "some_package" / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(voice, "PACKAGES", ("some_package",))
    with pytest.raises(BundleError, match=r"not the network of silero-vad 6.2; pip install"):
        find_model()
    with pytest.raises(BundleError, match="cannot open it"):
        VoiceActivity(16000, path)


def test_other_sample_rates_are_refused_with_a_way_out():
    with pytest.raises(BundleError, match=r"takes 22,050 Hz, voice activity detection 8,000 or 16,000 Hz"):
        VoiceActivity(22050)


@pytest.mark.slow
@pytest.mark.parametrize("silence_s", [0.0, 0.5])
@pytest.mark.parametrize("mode", ["ctc-prefix", "rescore"])
def test_a_joined_recording_is_heard_as_well_as_its_utterances(
    network: Path, speech_data: Path, trained_bundle: Path, mode: str, silence_s: float
):
    """Real utterances with known text, joined: no more errors than when decoded one by one, and no more
    deletions, above all where they meet."""
    bundle, folder = Bundle.load(trained_bundle), speech_data / "librispeech_mini"
    rows = list(csv.DictReader((folder / "transcripts.tsv").open(), delimiter="\t", quoting=csv.QUOTE_NONE))
    rows = [row for row in rows if row["split"] == "test"][:60]
    utterances, texts = [read(folder / row["audio"]) for row in rows], [row["text"] for row in rows]
    scorer = OnnxScorer(bundle)
    alone = [decode(scorer, mode, [x], SearchConfig())[0][0] for x in utterances]
    apart = [
        align(words(a), words(bundle.tokenizer.decode(b.tokens))) for a, b in zip(texts, alone, strict=True)
    ]
    silence = np.zeros(round(16000 * silence_s), np.float32)
    blocks = (np.concatenate([x, silence]) for x in utterances)
    found = Recording(bundle, RecordingConfig(mode=mode)).batches(blocks)
    text = " ".join(event.text for batch in found for event in batch.events)
    joined = align(words(" ".join(texts)), words(text))
    expected, errors = (count_errors(pairs) for pairs in ([y for x in apart for y in x], joined))
    assert errors.rate < expected.rate + 0.01
    assert errors.dels < 1.1 * expected.dels + 5
    heard = [hyp for ref, hyp in joined if ref != NOTHING]
    borders, at = [], 0
    for pairs in apart:
        alone_heard = [hyp for ref, hyp in pairs if ref != NOTHING]
        end = at + len(alone_heard)
        borders += [(alone_heard[0], heard[at]), (alone_heard[-1], heard[end - 1])]
        at = end
    lost = sum(b == NOTHING for _, b in borders)
    assert lost <= sum(a == NOTHING for a, _ in borders) + 0.1 * len(borders)
