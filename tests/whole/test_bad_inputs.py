"""User errors: one line that names the file, what is wrong and what to do, and exit status 2."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

RATE = 16000
SECOND = np.sin(np.arange(RATE) * 0.1).astype(np.float32) * 0.3


def one_line(answer: Any, *parts: str) -> None:
    """Exit status 2, no traceback, and a last line that contains every part."""
    assert answer.status == 2, answer.err
    assert "Traceback" not in answer.err
    last = answer.err.strip().splitlines()[-1]
    assert last.startswith("asr: "), last
    for part in parts:
        assert part in last, last


def truncated_header(path: Path) -> None:
    soundfile.write(path, SECOND, RATE)
    path.write_bytes(path.read_bytes()[:20])


def with_nan(path: Path) -> None:
    samples = SECOND.copy()
    samples[100] = np.nan
    soundfile.write(path, samples, RATE, subtype="FLOAT")


BAD_SOUND: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "empty file": (lambda path: path.write_bytes(b""), ["empty"]),
    "truncated header": (truncated_header, []),
    "not a number": (with_nan, ["100"]),
    "a web page": (lambda path: path.write_text("<!DOCTYPE html><html></html>"), ["HTML"]),
    "rate of 1 Hz": (lambda path: soundfile.write(path, SECOND, 1), ["1 Hz"]),
    "nine channels": (lambda path: soundfile.write(path, np.stack([SECOND] * 9, 1), RATE), ["9"]),
}


@pytest.mark.parametrize("kind", BAD_SOUND)
def test_bad_sound_is_named(project: Any, run: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    write, parts = BAD_SOUND[kind]
    path = tmp_path / "a b.wav"
    write(path)
    one_line(run("transcribe", project.bundle, path), "a b.wav", *parts)


def test_a_missing_file_and_a_folder_without_sound(
    project: Any, run: Callable[..., Any], tmp_path: Path
) -> None:
    one_line(run("transcribe", project.bundle, tmp_path / "no.wav"), "no.wav")
    one_line(run("transcribe", project.bundle, tmp_path), str(tmp_path))


def test_one_bad_file_does_not_stop_the_others(project: Any, run: Callable[..., Any], tmp_path: Path) -> None:
    soundfile.write(tmp_path / "good.wav", SECOND, RATE)
    (tmp_path / "bad.wav").write_bytes(b"")
    answer = run("transcribe", project.bundle, tmp_path, "-o", tmp_path / "out")
    assert answer.status == 3
    assert "bad.wav" in answer.err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["good.txt"]


GOOD_SOUND: dict[str, Callable[[Path], Any]] = {
    "flac named wav": lambda path: soundfile.write(path, SECOND, RATE, format="FLAC"),
    "44.1 kHz stereo": lambda path: soundfile.write(path, np.stack([SECOND] * 2, 1), 44100),
    "20 ms": lambda path: soundfile.write(path, SECOND[:320], RATE),
    "no sample": lambda path: soundfile.write(path, SECOND[:0], RATE),
    "silence": lambda path: soundfile.write(path, np.zeros(3 * RATE), RATE),
}


@pytest.mark.parametrize("kind", GOOD_SOUND)
def test_odd_sound_is_transcribed(project: Any, run: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    path = tmp_path / "odd.wav"
    GOOD_SOUND[kind](path)
    answer = run("transcribe", project.bundle, path, "--format", "json")
    assert answer.status == 0, answer.err


BAD_ROWS = {
    "u1\tu0.wav\ts\ttrain\t": "empty text",
    "u1\tgone.wav\ts\ttrain\tabc": "gone.wav",
    "u1\tempty.wav\ts\ttrain\tabc": "empty.wav",
    "u1\tu0.wav\ts\ttrain\t" + "abc" * 50: "too few frames for the text",
    "u0\tu0.wav\ts\ttrain\tcab": "u0 already appears at",
}


def write_table(folder: Path, *rows: str) -> Path:
    table = folder / "corpus.tsv"
    lines = ["utt_id\taudio\tspeaker\tsplit\ttext", *rows]
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table


@pytest.mark.parametrize("row", BAD_ROWS, ids=BAD_ROWS.values())
def test_bad_lines_of_a_corpus_are_left_out_and_listed(
    project: Any, run: Callable[..., Any], tmp_path: Path, row: str
) -> None:
    shutil.copy(project.folder / "u0.wav", tmp_path)
    (tmp_path / "empty.wav").write_bytes(b"")
    table = tmp_path / "corpus.tsv"
    table.write_text(
        f"utt_id\taudio\tspeaker\tsplit\ttext\nu0\tu0.wav\ts\ttrain\tabc\n{row}\n", encoding="utf-8"
    )
    answer = run("prepare", table, "-o", tmp_path / "out", "--tokens", project.tokens)
    assert answer.status in (0, 2), answer.err
    if answer.status:  # a corpus that contradicts itself
        return one_line(answer, "corpus.tsv", BAD_ROWS[row])
    left_out = (tmp_path / "out_left_out.jsonl").read_text(encoding="utf-8")
    assert BAD_ROWS[row] in left_out
    with gzip.open(tmp_path / "out.jsonl.gz", "rt") as kept:
        assert len(list(kept)) == 1


def test_unknown_characters_are_counted(project: Any, run: Callable[..., Any], tmp_path: Path) -> None:
    shutil.copy(project.folder / "u0.wav", tmp_path)
    table = write_table(tmp_path, "u0\tu0.wav\ts\ttrain\tazc")
    answer = run("prepare", table, "-o", tmp_path / "out", "--tokens", project.tokens)
    assert "'z' 1" in answer.out


def test_the_same_speaker_in_train_and_test(project: Any, run: Callable[..., Any], tmp_path: Path) -> None:
    answer = run("prepare", project.manifest, "--test", project.manifest, "-o", tmp_path / "out")
    one_line(answer, "0 of 24")
    assert "speaker" in (tmp_path / "out_left_out.jsonl").read_text(encoding="utf-8")


def test_missing_audio_of_a_manifest_ends_training_by_name(
    project: Any, run: Callable[..., Any], tmp_path: Path
) -> None:
    with gzip.open(project.manifest, "rt", encoding="utf-8") as file:
        text = file.read().replace(str(project.folder), str(tmp_path))
    manifest = tmp_path / "moved.jsonl.gz"
    with gzip.open(manifest, "wt", encoding="utf-8") as file:
        file.write(text)
    answer = run("train", *project.settings, "--set", f"data.train=[{manifest}]", "--exp", tmp_path / "exp")
    one_line(answer, ".wav")


BAD_SETTINGS = {
    "encoder.dmi=3": ["encoder.dmi", "did you mean dim"],
    "encoder.dim=wide": ["encoder.dim", "wide"],
    "encoder.type=zip": ["encoder", "conformer"],
    "encoder.dim=33": ["encoder.dim", "33"],
    "data.tokens=nowhere": ["nowhere"],
    "data.train=[nowhere.jsonl]": ["nowhere.jsonl"],
}


@pytest.mark.parametrize("setting", BAD_SETTINGS)
def test_bad_configuration_names_its_path(
    project: Any, run: Callable[..., Any], tmp_path: Path, setting: str
) -> None:
    answer = run("train", *project.settings, "--set", setting, "--exp", tmp_path / "exp")
    one_line(answer, *BAD_SETTINGS[setting])


def test_an_unknown_key_in_a_file_names_the_file(
    project: Any, run: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "my.yaml").write_text("encoder: {chunk: {max_chunks: 3}}\n", encoding="utf-8")
    answer = run("train", *project.settings, "--config", tmp_path / "my.yaml", "--exp", tmp_path / "exp")
    one_line(answer, "my.yaml", "encoder.chunk.max_chunks", "max_chunk")


def copy_of(project: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(project.experiment, tmp_path / "exp"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_checkpoint_of_another_configuration(project: Any, run: Callable[..., Any], tmp_path: Path) -> None:
    exp = copy_of(project, tmp_path)
    answer = run("train", *project.settings, "--set", "encoder.ff_dim=48", "--exp", exp)
    one_line(answer, "ff_dim", "48", "64")


@pytest.mark.parametrize("harm", [flip, lambda path: path.write_bytes(b""), lambda path: path.unlink()])
def test_a_damaged_checkpoint_is_never_used(
    project: Any, run: Callable[..., Any], tmp_path: Path, harm: Callable[[Path], Any]
) -> None:
    exp = copy_of(project, tmp_path)
    for weights in exp.glob("checkpoints/*/model.safetensors"):
        harm(weights)
    answer = run("train", *project.settings, "--set", "optim.max_steps=12", "--exp", exp)
    one_line(answer, "checkpoints")


@pytest.mark.parametrize("name", ["encoder.onnx", "decoder.onnx", "tokens.txt"])
def test_a_damaged_bundle_is_refused(
    project: Any, run: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    bundle = Path(shutil.copytree(project.bundle, tmp_path / "bundle"))
    flip(bundle / name)
    one_line(run("transcribe", bundle, project.folder / "u0.wav"), name)


def test_a_bundle_of_a_newer_format(project: Any, run: Callable[..., Any], tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(project.bundle, tmp_path / "bundle"))
    about = json.loads((bundle / "model.json").read_text(encoding="utf-8"))
    about["format"] += 1
    (bundle / "model.json").write_text(json.dumps(about), encoding="utf-8")
    one_line(run("transcribe", bundle, project.folder / "u0.wav"), "model.json", "format")


def test_units_that_do_not_fit_the_model(project: Any, run: Callable[..., Any], tmp_path: Path) -> None:
    exp = copy_of(project, tmp_path)
    with (exp / "tokens" / "tokens.txt").open("a", encoding="utf-8") as file:
        file.write("q 99\n")
    answer = run("export", exp, "-o", tmp_path / "bundle")
    one_line(answer, "tokens")


def test_an_output_folder_that_cannot_be_written(
    project: Any, run: Callable[..., Any], tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for args in (
        ["transcribe", project.bundle, project.folder / "u0.wav", "-o", file / "out.txt"],
        ["export", project.experiment, "-o", file / "bundle"],
        ["train", *project.settings, "--exp", file / "exp"],
        ["prepare", project.manifest, "-o", file / "out"],
        ["tokenizer", project.manifest, "--kind", "char", "-o", file / "tokens"],
    ):
        one_line(run(*args), str(file))


def test_two_trainings_in_one_folder(project: Any, run: Callable[..., Any], tmp_path: Path) -> None:
    exp = copy_of(project, tmp_path)
    code = "import sys; from pathlib import Path; from asr.train.lock import hold\n"
    code += "with hold(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(exp)], **pipes) as other:  # type: ignore[call-overload]
        assert other.stdout.readline() == b"held\n"
        one_line(run("train", *project.settings, "--exp", exp), str(exp), f"process {other.pid}")
        other.stdin.close()


def test_no_microphone(project: Any, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    one_line(run("transcribe", project.bundle, "--mic"), "sounddevice")


def test_a_pipe_that_nobody_reads_ends_quietly(project: Any) -> None:
    code = "import sys; from recipes.cli import main; sys.exit(main(sys.argv[1:]))"
    sounds = [str(project.folder / "u0.wav")] * 1
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", code, "transcribe", str(project.bundle), *sounds, "--format", "json"],
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert done.returncode == 141
    assert b"Traceback" not in done.stderr
