"""Every source gives the same cuts; an error for a wrong line names file, line and remedy."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from lhotse import Recording, RecordingSet, SupervisionSegment, SupervisionSet

from asr.data.cuts import cut_speaker, cut_text, read_cut
from asr.data.importers import LeftOut, from_folder, from_kaldi, from_lhotse, from_tsv
from asr.errors import ManifestError

from .conftest import HEADER, write_tone, write_tsv

ROW = ("a", "a.wav", "s", "train", "x", "", "en")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tone(tmp_path / "a.wav", 0.5)
    write_tone(tmp_path / "b.wav", 0.4, 1)
    return tmp_path


def test_tsv(folder: Path) -> None:
    path = write_tsv(folder, [ROW, ("b", "b.wav", "t", "test", "y z", "0.4", "de")])
    first, second = from_tsv(path, [])
    assert (first.id, cut_text(first), cut_speaker(first), first.duration) == ("a", "x", "s", 0.5)
    assert second.supervisions[0].language == "de"
    assert len(read_cut(second)) == 6400
    assert [cut.id for cut in from_tsv(path, [], split="test")] == ["b"]


def test_byte_order_mark_line_ends_and_empty_lines_do_not_matter(folder: Path) -> None:
    path = write_tsv(folder, [ROW])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    (cut,) = from_tsv(path, [])
    assert (cut.id, cut.supervisions[0].language) == ("a", "en")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([HEADER[:1] + HEADER[2:]], "tsv:1: no column audio"),
        ([HEADER, ROW[:-1]], "tsv:2: 6 columns, the header has 7"),
        ([HEADER, ROW, ROW], "tsv:3: id a already appears at .*tsv:2"),
        ([HEADER, ("", *ROW[1:])], "tsv:2: the id is empty"),
        (
            [HEADER, ("b", "none.wav", *ROW[2:]), ROW],
            "tsv:2: 1 of 2 sound files are missing, first .*none.wav",
        ),
        ([HEADER, (*ROW[:4], "x\0", "", "")], "tsv:2: NUL byte at column 18"),
    ],
)
def test_a_wrong_line_of_a_tsv_is_named(folder: Path, lines: list[tuple[str, ...]], message: str) -> None:
    path = folder / "t.tsv"
    path.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
    with pytest.raises(ManifestError, match=message):
        list(from_tsv(path, []))


def test_a_byte_that_is_not_utf8_is_named_with_its_column(folder: Path) -> None:
    path = write_tsv(folder, [ROW])
    path.write_bytes(path.read_bytes().replace(b"\tx\t", b"\tcaf\xe9\t"))
    with pytest.raises(ManifestError, match=r"tsv:2: byte 0xE9 at column 20 is not UTF-8; .*iconv"):
        list(from_tsv(path, []))


def test_a_split_that_is_not_there_names_those_that_are(folder: Path) -> None:
    with pytest.raises(ManifestError, match="no line has split dev; its splits are train"):
        list(from_tsv(write_tsv(folder, [ROW]), [], split="dev"))


def test_one_bad_header_does_not_cost_the_corpus(folder: Path) -> None:
    (folder / "b.wav").write_text("<html>not found</html>")
    left_out: list[LeftOut] = []
    rows = [ROW, ("b", "b.wav", *ROW[2:])]
    assert [cut.id for cut in from_tsv(write_tsv(folder, rows), left_out)] == ["a"]
    assert [(item.id, item.reason) for item in left_out] == [("b", "unreadable")]


def test_folder_of_sound_and_text(folder: Path) -> None:
    (folder / "a.txt").write_text("hello there\n")
    write_tone(folder / "öl reader" / "c d.wav", 0.2)
    (folder / "öl reader" / "c d.txt").write_text("über\n", encoding="utf-8")
    left_out: list[LeftOut] = []
    cuts = {cut.id: cut for cut in from_folder(folder, left_out)}
    assert {name: cut_text(cut) for name, cut in cuts.items()} == {
        "a": "hello there",
        "öl reader-c d": "über",
    }
    assert cut_speaker(cuts["öl reader-c d"]) == "öl reader"
    assert [item.reason for item in left_out] == ["no transcript"]


def test_folder_like_librispeech(tmp_path: Path) -> None:
    chapter = tmp_path / "84" / "121123"
    write_tone(chapter / "84-121123-0000.flac", 0.3)
    (chapter / "84-121123.trans.txt").write_text("84-121123-0000 GO DO YOU HEAR\n")
    (cut,) = from_folder(tmp_path, [])
    assert (cut.id, cut_text(cut), cut_speaker(cut)) == ("84-121123-0000", "GO DO YOU HEAR", "84")


def test_a_folder_without_text_is_an_error(folder: Path) -> None:
    with pytest.raises(ManifestError, match="2 sound files, none with a transcript"):
        list(from_folder(folder, []))


Kaldi = Callable[..., Path]


@pytest.fixture
def kaldi(folder: Path) -> Kaldi:
    def make(**files: str) -> Path:
        texts = {"wav.scp": f"r {folder}/a.wav\n", "text": "r x y\n", "utt2spk": "r s1\n"} | files
        for name, text in texts.items():
            (folder / name).write_text(text)
        return folder

    return make


def test_kaldi_with_segments(kaldi: Kaldi) -> None:
    path = kaldi(segments="u1 r 0.1 0.3\nu2 r 0.3 0.52\n", text="u1 x\nu2 y\n", utt2spk="u1 s1\nu2 s2\n")
    first, second = from_kaldi(path, [])
    assert (first.start, first.duration) == (0.1, pytest.approx(0.2))
    assert second.duration == pytest.approx(0.2)  # 20 ms beyond the audio is rounding
    assert (cut_text(second), cut_speaker(second)) == ("y", "s2")
    assert abs(read_cut(first) - read_cut(next(from_kaldi(kaldi(segments=""), [])))[1600:4800]).max() < 1e-6


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"segments": "r r 0.3 0.2\n"}, "segments:1: 0.3 to 0.2 s is not a valid segment"),
        ({"segments": "r r nan 0.2\n"}, "segments:1: nan to"),
        ({"segments": "r r -1 0.2\n"}, "segments:1: -1 to"),
        ({"segments": "r r 0.2\n"}, "segments:1: .* expected RECORDING START END"),
        ({"segments": "r r 0.1 0.6\n"}, "segments:1: r ends at 0.600 s, its audio at 0.500 s"),
        ({"segments": "r other 0.1 0.2\n"}, "segments: 1 ids are not in .*wav.scp, first other"),
        ({"text": "r x\nq y\n"}, "text: 1 ids are not in .*wav.scp, first q"),
        ({"text": "r x\nr y\n"}, "text:2: r already appears at .*text:1"),
        ({"wav.scp": "r sox a.wav -t wav - |\n"}, "wav.scp:1: a pipe, which would run sox .*--allow-pipes"),
        ({"wav.scp": "r gone.wav\n"}, "1 of 1 sound files are missing, first .*gone.wav"),
    ],
)
def test_a_wrong_line_of_a_kaldi_directory_is_named(
    kaldi: Kaldi, files: dict[str, str], message: str
) -> None:
    with pytest.raises(ManifestError, match=message):
        list(from_kaldi(kaldi(**files), []))


def test_pipes_run_when_allowed_and_a_failing_one_is_left_out(kaldi: Kaldi, folder: Path) -> None:
    shutil.copy(folder / "a.wav", folder / "c.wav")
    path = kaldi(**{"wav.scp": f"r cat {folder}/c.wav |\nq false |\n", "text": "r x\nq y\n"})
    left_out: list[LeftOut] = []
    (cut,) = from_kaldi(path, left_out, allow_pipes=True)
    assert len(read_cut(cut)) == 8000
    assert [(item.id, item.detail) for item in left_out] == [("q", "false |: exit status 1")]


def test_lhotse_recordings_and_supervisions(folder: Path) -> None:
    recordings = RecordingSet.from_recordings([Recording.from_file(folder / "a.wav")])
    spans = [("u1", 0.0, 0.2), ("u2", 0.2, 0.3)]
    segments = [SupervisionSegment(name, "a", start, length, text=name) for name, start, length in spans]
    cuts = list(from_lhotse(recordings, SupervisionSet.from_segments(segments)))
    assert [(cut.id, cut_text(cut), cut.start, cut.duration) for cut in cuts] == [
        ("u1", "u1", 0.0, 0.2),
        ("u2", "u2", 0.2, 0.3),
    ]
