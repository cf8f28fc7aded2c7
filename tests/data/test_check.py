"""What is left out and why, what is counted, and audio stored once."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse.cut import Cut

from asr.data.check import Report, Rules, check_audio, screen, store_audio, validate
from asr.data.cuts import cut_text, open_cuts, read_cut
from asr.data.importers import from_tsv
from asr.tokens import Tokenizer

from .conftest import Corpus, write_tone, write_tsv


def reasons(report: Report) -> dict[str, str]:
    return {item.id: item.reason for item in report.left_out}


@pytest.mark.parametrize(
    ("start", "duration", "is_kept"), [(0.0, 0.54, True), (0.0, 0.6, False), (-0.1, 0.6, False)]
)
def test_a_text_that_is_not_all_in_the_audio_is_left_out(
    corpus: Corpus, start: float, duration: float, is_kept: bool
) -> None:
    (cut,) = open_cuts(corpus([0.5]))
    cut.supervisions[0].start, cut.supervisions[0].duration = start, duration
    _, report = validate([cut], Rules())
    assert report.num_kept == is_kept
    if not is_kept:
        assert report.left_out[0].reason == "text of more than the audio"
        assert report.left_out[0].detail == "0.10 s of it are outside"


def test_each_rule_leaves_out_what_breaks_it_and_says_so(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = []
    for name, seconds, text in [
        ("good", 0.5, "abc"),
        ("silent", 0.5, " "),
        ("short", 0.05, "a"),
        ("long", 2.5, "abc"),
        ("dense", 0.2, "abcdef"),
        ("just", 0.2, "abcde"),
        ("repeats", 0.2, "abcdd"),
        ("broken", 0.5, "abc"),
        ("nan", 0.5, "abc"),
        ("known", 0.5, "abc"),
    ]:
        write_tone(tmp_path / f"{name}.wav", seconds)
        rows.append((name, f"{name}.wav", "tester" if name == "known" else "s", "train", text, "", ""))
    soundfile.write(tmp_path / "nan.wav", np.full(8000, np.nan), 16000, subtype="FLOAT")
    cuts = list(from_tsv(write_tsv(tmp_path, rows), []))
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    rules = Rules(max_s=2.0, tokenizer=tokenizer, test_speakers=frozenset({"tester"}))
    kept, report = validate([*cuts, cuts[0]], rules)
    assert list(kept.ids) == ["good", "just"]
    assert [(item.id, item.reason) for item in report.left_out] == [
        ("silent", "empty text"),
        ("short", "shorter than 0.1 s"),
        ("long", "longer than 2 s"),
        ("dense", "too few frames for the text"),
        ("repeats", "too few frames for the text"),
        ("broken", "unreadable"),
        ("nan", "unreadable"),
        ("known", "speaker of the test set"),
        ("good", "duplicate id"),
    ]
    details = {item.id: item.detail for item in report.left_out}
    assert details["repeats"] == "5 encoder frames, CTC needs 6"
    assert "8000 samples are not finite" in details["nan"]


def test_the_report_counts_what_is_kept(corpus: Corpus, tokenizer: Tokenizer) -> None:
    cuts = [*open_cuts(corpus([1.2, 1.3, 2.5, 0.5]))]
    cuts[2].supervisions[0].text = "word ß"
    _, report = validate(cuts, Rules(tokenizer=tokenizer))
    assert report.num_kept == 4
    assert report.seconds == pytest.approx(5.5)
    assert dict(report.speakers) == pytest.approx({"s0": 1.7, "s1": 1.3, "s2": 2.5})
    assert dict(report.durations) == {0: 1, 1: 2, 2: 1}
    assert report.characters["w"] == 4
    assert dict(report.unknown) == {"ß": 1}


def test_processes_find_what_one_finds_in_the_same_order(corpus: Corpus) -> None:
    path = corpus([0.2] * 20)
    (path.parent / "train" / "7.wav").write_bytes(b"RIFF")
    one, two = Report(), Report()
    alone = [cut.id for cut in screen(open_cuts(path), Rules(), one, check_audio)]
    assert [cut.id for cut in screen(open_cuts(path), Rules(), two, check_audio, num_jobs=2)] == alone
    assert reasons(one) == reasons(two) == {"train7": "unreadable"}


def stored(path: Path, folder: Path) -> list[Cut]:
    return list(screen(open_cuts(path), Rules(), Report(), partial(store_audio, folder=folder)))


def test_stored_audio_is_the_same_audio_at_the_asked_rate(corpus: Corpus, tmp_path: Path) -> None:
    path = corpus([0.5, 0.4], sample_rate=8000)
    for old, new in zip(open_cuts(path), stored(path, tmp_path / "wav"), strict=True):
        assert (new.id, cut_text(new), new.duration) == (old.id, cut_text(old), old.duration)
        assert soundfile.info(new.recording.sources[0].source).subtype == "PCM_16"
        np.testing.assert_allclose(read_cut(new), read_cut(old.resample(16000)), atol=1e-4)


def test_storing_again_writes_only_what_is_missing_or_broken_off(corpus: Corpus, tmp_path: Path) -> None:
    path = corpus([0.5, 0.4, 0.3])
    whole, short, gone = [Path(c.recording.sources[0].source) for c in stored(path, tmp_path / "wav")]
    before = whole.stat().st_mtime_ns
    short.write_bytes(short.read_bytes()[:1000])
    gone.unlink()
    again = stored(path, tmp_path / "wav")
    assert [len(read_cut(cut)) for cut in again] == [8000, 6400, 4800]
    assert whole.stat().st_mtime_ns == before
    assert not list((tmp_path / "wav").rglob("part-*"))


def test_any_id_is_a_file_name(tmp_path: Path) -> None:
    write_tone(tmp_path / "a.wav", 0.3)
    names = ["../up", "a/b c", "ö" * 200, "ö" * 199 + "u"]
    rows = [(name, "a.wav", "s", "train", "x", "", "") for name in names]
    manifest = list(from_tsv(write_tsv(tmp_path, rows), []))
    cuts = [store_audio(cut, tmp_path / "wav") for cut in manifest]
    files = {Path(cut.recording.sources[0].source) for cut in cuts}
    assert len(files) == 4
    assert all(file.resolve().is_relative_to(tmp_path / "wav") for file in files)
