"""asr prepare: what it prints, what it writes, what it leaves out, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, Recording, SupervisionSegment
from lhotse.audio import AudioSource

from asr.data.cuts import open_cuts, read_cut
from asr.tokens import train_tokenizer
from recipes.cli import main

TEXTS = {
    "a": "one two",
    "b": "three",
    "long": "four",
    "dense": "x" * 60,
    "empty": "",
    "bad": "five",
    "t": "six",
}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    lines = ["utt_id\taudio\tspeaker\tsplit\ttext"]
    for number, (name, text) in enumerate(TEXTS.items()):
        seconds = 3.0 if name == "long" else 0.5
        tone = 0.1 * np.sin(0.1 * (number + 1) * np.arange(int(8000 * seconds)))
        soundfile.write(tmp_path / f"{name} ü.wav", tone, 8000)
        lines.append(
            f"{name}\t{name} ü.wav\tspeaker{number % 2}\t{'test' if name == 't' else 'train'}\t{text}"
        )
    (tmp_path / "bad ü.wav").write_bytes((tmp_path / "bad ü.wav").read_bytes()[:20])
    path = tmp_path / "transcripts.tsv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run(*args: object) -> int:
    return main(["prepare", *map(str, args), "--jobs", "1"])


def test_the_table_the_manifest_and_what_was_left_out(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_tokenizer(["onetwhrfuivx "], "char", 0, tmp_path / "tokens")
    prefix = tmp_path / "out" / "train"
    options = ["--split", "train", "--max-s", 2, "--tokens", tmp_path / "tokens", "-o", prefix]
    assert run(table, *options, "--store-audio", tmp_path / "wav") == 0
    cuts = list(open_cuts(f"{prefix}.jsonl.gz"))
    assert [cut.id for cut in cuts] == ["a", "b"]
    assert [len(read_cut(cut)) for cut in cuts] == [8000, 8000]  # 0.5 s at 16 kHz
    rows = [json.loads(line) for line in Path(f"{prefix}_left_out.jsonl").read_text().splitlines()]
    assert {row["id"]: row["reason"] for row in rows} == {
        "bad": "unreadable",
        "long": "longer than 2 s",
        "dense": "too few frames for the text",
        "empty": "empty text",
    }
    shown = capsys.readouterr().out
    for words in (
        ["utterances", "2"],
        ["hours", "0.00"],
        ["speakers", "2"],
        ["too few frames", "1", "dense"],
    ):
        assert any(all(word in line for word in words) for line in shown.splitlines())


def test_without_output_nothing_is_written(table: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert run(table) == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_speakers_of_the_test_set_are_left_out(table: Path, tmp_path: Path) -> None:
    assert run(table, "--split", "test", "-o", tmp_path / "test") == 0
    assert run(table, "--split", "train", "--test", tmp_path / "test.jsonl.gz", "-o", tmp_path / "train") == 0
    assert [cut.id for cut in open_cuts(tmp_path / "train.jsonl.gz")] == ["b", "dense"]


def test_a_manifest_and_a_folder_are_sources_too(table: Path, tmp_path: Path) -> None:
    assert run(table, "-o", tmp_path / "all") == 0
    assert run(tmp_path / "all.jsonl.gz", "--headers-only", "-o", tmp_path / "again") == 0
    assert list(open_cuts(tmp_path / "again.jsonl.gz")) == list(open_cuts(tmp_path / "all.jsonl.gz"))
    (tmp_path / "a ü.txt").write_text("one two\n")
    assert run(tmp_path, "-o", tmp_path / "folder") == 0
    assert [cut.id for cut in open_cuts(tmp_path / "folder.jsonl.gz")] == ["a ü"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--max-s", "0.2"], "0 of 7 utterances left: 5 longer than 0.2 s"),
        (["--split", "dev"], "no line has split dev; its splits are test, train"),
        (["--from", "csv"], "--from csv: no such source; expected one of tsv, folder, kaldi, cuts"),
        (["--from", "cuts"], "not a manifest"),
    ],
)
def test_refusals_are_one_line(
    table: Path, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(table, *args) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "source"),
    [("command", "touch ran; cat a.wav"), ("url", "pipe:touch ran; cat a.wav")],
)
@pytest.mark.parametrize("is_response", [False, True])
def test_a_command_in_a_manifest_is_run_only_if_allowed(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    source: str,
    is_response: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    soundfile.write("a.wav", np.ones(8000) / 9, 8000)
    recording, crafted = Recording.from_file("a.wav"), Recording.from_file("a.wav")
    crafted.sources[0] = AudioSource(kind, [0], source)
    cut = (recording.reverb_rir(crafted) if is_response else crafted).to_cut()
    cut.supervisions = [SupervisionSegment("a", cut.recording_id, 0, 1.0, text="one")]
    CutSet.from_cuts([cut]).to_file("cuts.jsonl")
    assert run(Path("cuts.jsonl")) == 2
    assert f"cuts.jsonl:1: audio of type {kind}, which may run commands" in capsys.readouterr().err
    assert run(Path("cuts.jsonl"), "--allow-pipes") == 2
    assert "--allow-pipes: needs --store-audio" in capsys.readouterr().err
    assert not Path("ran").exists()
    assert run(Path("cuts.jsonl"), "--allow-pipes", "--store-audio", "wav", "-o", "cuts") == 0
    assert Path("ran").exists()
    assert len(list(open_cuts("cuts.jsonl.gz"))) == 1
