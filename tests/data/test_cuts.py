"""Manifests keep what they are given and name a wrong line; short utterances are joined."""

import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet
from lhotse.cut import Cut

from asr.data.cuts import (
    Manifest,
    balance_texts,
    count_cuts,
    ctc_frames,
    ctc_frames_needed,
    cut_speaker,
    cut_text,
    join_cuts,
    join_neighbours,
    open_cuts,
    read_cut,
    save_cuts,
)
from asr.data.importers import from_tsv
from asr.errors import AudioError, ManifestError

from .conftest import Corpus, write_tone, write_tsv


def test_what_is_saved_is_opened_and_lhotse_reads_it_too(corpus: Corpus, tmp_path: Path) -> None:
    cuts = list(open_cuts(corpus([0.2, 0.3])))
    save_cuts(cuts, tmp_path / "again.jsonl.gz")
    assert list(open_cuts(tmp_path / "again.jsonl.gz")) == cuts
    assert list(CutSet.from_file(tmp_path / "again.jsonl.gz")) == cuts
    assert count_cuts(tmp_path / "again.jsonl.gz") == 2


def test_a_save_that_breaks_off_leaves_the_old_manifest(corpus: Corpus) -> None:
    path = corpus([0.2, 0.3])

    def broken() -> Iterator[Cut]:
        yield from open_cuts(path)
        raise ValueError("source broke")

    with pytest.raises(ValueError, match="source broke"):
        save_cuts(broken(), path)
    assert count_cuts(path) == 2
    assert not list(path.parent.glob("part-*"))


def test_a_shar_folder_opens_like_a_manifest(corpus: Corpus, tmp_path: Path) -> None:
    cuts = open_cuts(corpus([0.2, 0.3]))
    (tmp_path / "shar").mkdir()
    cuts.to_shar(tmp_path / "shar", fields={"recording": "wav"}, shard_size=10)
    opened = list(open_cuts(tmp_path / "shar"))
    assert [cut_text(cut) for cut in opened] == ["word 0", "word 1"]
    assert len(read_cut(opened[1])) == 4800
    assert count_cuts(tmp_path / "shar") == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{broken", "train.jsonl.gz:3: not a lhotse cut"),
        (b'{"id": "a", "type": "MonoCut", "surprise": 1}', "train.jsonl.gz:3: not a lhotse cut"),
        (
            b'{"id": "r", "sources": [], "sampling_rate": 1, "num_samples": 1, "duration": 1}',
            "found a Recording",
        ),
    ],
)
def test_a_wrong_line_is_named(corpus: Corpus, line: bytes, message: str) -> None:
    path = corpus([0.2, 0.3])
    with gzip.open(path, "ab") as file:
        file.write(b"\n" * (not gzip.decompress(path.read_bytes()).endswith(b"\n")) + line + b"\n")
    with pytest.raises(ManifestError, match=message):
        list(open_cuts(path))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("duration", "long", "duration is 'long', expected a number"),
        ("duration", float("nan"), "duration is nan, expected a number"),
        ("start", -1.0, "start is -1.0 s, expected 0 or more"),
        ("text", 5, "text is 5, expected a string"),
    ],
)
def test_a_value_that_makes_no_sense_is_named(
    corpus: Corpus, tmp_path: Path, field: str, value: object, message: str
) -> None:
    with gzip.open(corpus([0.2]), "rb") as file:
        row = json.loads(file.read())
    (row["supervisions"][0] if field == "text" else row)[field] = value
    path = tmp_path / "changed.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(ManifestError, match=re.escape(f"changed.jsonl:1: {message}")):
        list(open_cuts(path))


def test_commands_in_a_shar_folder_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    with gzip.open(corpus([0.2]), "rb") as file:
        row = json.loads(file.read())
    row["recording"]["sources"] = [{"type": "command", "channels": [0], "source": f"touch {tmp_path}/ran"}]
    folder = tmp_path / "shar"
    folder.mkdir()
    with gzip.open(folder / "cuts.000000.jsonl.gz", "wt") as out:
        out.write(json.dumps(row) + "\n")
    assert len(list(open_cuts(folder, allow_pipes=True))) == 1
    with pytest.raises(ManifestError, match="audio of type command"):
        list(open_cuts(folder))


def test_a_damaged_gzip_file_is_named(corpus: Corpus) -> None:
    path = corpus([0.2])
    whole = path.read_bytes()
    for damaged in (whole[:-12], b"no gzip" + whole, whole[:30] + b"\xff" * 40 + whole[70:]):
        path.write_bytes(damaged)
        for read in (list, len):
            with pytest.raises(ManifestError, match=r"train\.jsonl\.gz: not a complete gzip file"):
                read(Manifest(path))


def test_no_manifest_and_no_kind_of_manifest_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no such manifest"):
        open_cuts(tmp_path / "none.jsonl.gz")
    with pytest.raises(ManifestError, match="not a manifest"):
        open_cuts(tmp_path)


def test_channels_are_averaged_and_names_may_be_anything(tmp_path: Path) -> None:
    name = "mit Leerzeichen ü 'q'.wav"
    soundfile.write(tmp_path / name, np.stack([np.full(800, 0.5), np.full(800, 0.1)], axis=1), 16000)
    path = write_tsv(tmp_path, [("a b/ü", name, "s", "train", "x", "", "")])
    save_cuts(from_tsv(path, []), tmp_path / "a.jsonl")
    (cut,) = open_cuts(tmp_path / "a.jsonl")
    np.testing.assert_allclose(read_cut(cut), np.full(800, 0.3), atol=1e-4)


@pytest.mark.parametrize("damage", ["gone", "empty", "short", "nan"])
def test_audio_that_is_not_as_the_manifest_says_is_an_error(corpus: Corpus, damage: str) -> None:
    path = corpus([0.5])
    wav = path.parent / "train" / "0.wav"
    (cut,) = open_cuts(path)
    if damage == "gone":
        wav.unlink()
    elif damage == "empty":
        wav.write_bytes(b"")
    elif damage == "short":
        write_tone(wav, 0.3)
    else:
        soundfile.write(wav, np.full(8000, np.nan), 16000, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"0\.wav: \S+") as error:
        read_cut(cut)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("power", "rare"), [(1.0, 2), (0.5, 4.0), (0.0, 8)])
def test_rare_texts_are_repeated_by_the_power_of_their_number(
    corpus: Corpus, power: float, rare: float
) -> None:
    cuts = list(open_cuts(corpus([0.2] * 10)))
    for number, cut in enumerate(cuts):
        cut.supervisions[0].text = "rare" if number < 2 else "common"
    drawn = [balance_texts(cuts, random.Random(seed), power) for seed in range(50)]
    found = [Counter(map(cut_text, some)) for some in drawn]
    assert {count["common"] for count in found} == {8}
    assert np.mean([count["rare"] for count in found]) == pytest.approx(rare, abs=0.2)
    assert all(len({cut.id for cut in some}) == len(some) for some in drawn)


def joined(path: Path, seed: int = 0, **how: object) -> list[Cut]:
    return list(join_cuts(open_cuts(path), random.Random(seed), **how))  # type: ignore[arg-type]


def test_joining_uses_every_utterance_once_beside_others_of_its_speaker(corpus: Corpus) -> None:
    path = corpus([0.2 + 0.01 * n for n in range(40)])
    cuts = joined(path, words=(2, 5))
    said = [text for cut in cuts for text in cut_text(cut).split("word ")[1:]]
    assert sorted(int(text) for text in said) == list(range(40))
    for cut in cuts:
        assert {s.speaker for s in cut.supervisions} == {cut_speaker(cut)}
        assert len(cut.supervisions) <= 5
    assert len({cut.id for cut in cuts}) == len(cuts)


def test_joined_audio_is_its_parts_with_pauses_in_the_order_of_the_text(corpus: Corpus) -> None:
    path = corpus([0.3] * 6)
    parts = {cut_text(cut): read_cut(cut) for cut in open_cuts(path)}
    for cut in joined(path, words=(2, 2), pause_s=(0.1, 0.2)):
        samples = read_cut(cut)
        first, second = ("word" + text.rstrip() for text in cut_text(cut).split("word")[1:])
        np.testing.assert_allclose(samples[:4800], parts[first], atol=1e-6)
        np.testing.assert_allclose(samples[-4800:], parts[second], atol=1e-6)
        pause = samples[4800:-4800]
        assert 0.1 * 16000 - 1 <= len(pause) <= 0.2 * 16000 + 1
        assert not pause.any()


@pytest.mark.parametrize("count", [1, 2, 4, 100])
def test_neighbours_are_joined_in_their_order(corpus: Corpus, count: int) -> None:
    path = corpus([0.3] * 12)
    cuts = joined(path, words=(1, 3))
    whole = list(join_neighbours(cuts, random.Random(0), count))
    assert len(whole) == -(-len(cuts) // count)
    assert " ".join(map(cut_text, whole)) == " ".join(map(cut_text, cuts))
    assert len({cut.id for cut in whole}) == len(whole)
    speech = np.concatenate([read_cut(cut) for cut in whole])
    loud = np.concatenate([read_cut(cut) for cut in cuts])
    assert len(speech) >= len(loud) + (len(cuts) - len(whole)) * 1600 - len(cuts)
    np.testing.assert_allclose(speech[speech != 0], loud[loud != 0], atol=1e-6)


def test_joining_keeps_to_the_longest_and_depends_on_its_generator_alone(corpus: Corpus) -> None:
    path = corpus([0.5] * 30)
    cuts = joined(path, words=(1, 8), max_s=2.0)
    assert max(cut.duration for cut in cuts) <= 2.0
    assert len({len(cut.supervisions) for cut in cuts}) > 1
    assert [cut.id for cut in joined(path, max_s=2.0)] == [cut.id for cut in joined(path, max_s=2.0)]
    assert [cut.id for cut in joined(path)] != [cut.id for cut in joined(path, seed=1)]


def test_ctc_needs_a_frame_for_each_unit_and_one_between_equal_ones() -> None:
    assert ctc_frames_needed([]) == 0
    assert ctc_frames_needed([5, 6, 5]) == 3
    assert ctc_frames_needed([5, 5, 5]) == 5
    assert ctc_frames(0.16, 4) == 4
    assert ctc_frames(0.165, 4) == 5
    assert ctc_frames(0.16, 8) == 2
