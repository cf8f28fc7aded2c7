"""`asr bench --latency`: one line per setting, a file with everything, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from asr.audio import write
from asr.runtime import Bundle, Stream
from export.verify import made_sound
from recipes.cli import main

Result = tuple[int, str, str]


@pytest.fixture
def asr(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """`asr bench ...` -> exit status, standard output, standard error."""

    def run(*args: object) -> Result:
        status = main(["bench", *map(str, args)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def bundle(tiny_bundles: Path, tmp_path: Path) -> Path:
    """The tiny bundle with a lexicon, so that it can align words of its letters."""
    folder = shutil.copytree(tiny_bundles / "cpu-fp32", tmp_path / "bundle")
    words = {word for text in texts(folder) for word in text.split()} | {"ab"}
    lines = [f"{word} {' '.join(word)}\n" for word in sorted(words) if set(word) <= set("abcdefghijklmnop")]
    (folder / "lexicon.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def sounds() -> list:
    sound = made_sound(7.0, 16000)
    return [sound[:48000], sound[48000:]]


def texts(folder: Path) -> list[str]:
    """The bundle's text for each recording."""
    found = []
    for sound in sounds():
        stream = Stream(Bundle.load(folder))
        events = stream.accept(sound) + stream.finish()
        found.append(" ".join(event.text for event in events if event.final))
    return found


def write_manifest(folder: Path, spoken: list[str]) -> Path:
    from lhotse import MonoCut, Recording, SupervisionSegment

    from asr.data.cuts import save_cuts

    cuts = []
    for number, (sound, text) in enumerate(zip(sounds(), spoken, strict=True)):
        name = f"u{number}"
        write(folder / f"{name}.wav", sound)
        recording = Recording.from_file(folder / f"{name}.wav", recording_id=name)
        said = SupervisionSegment(name, name, 0.0, recording.duration, text=text)
        cuts.append(MonoCut(name, 0.0, recording.duration, 0, [said], recording=recording))
    save_cuts(cuts, folder / "test.jsonl.gz")
    return folder / "test.jsonl.gz"


def test_every_mode_with_every_chunk_is_a_line(asr, bundle: Path, tmp_path: Path):
    manifest = write_manifest(tmp_path, texts(bundle))
    modes = ("--mode", "ctc-prefix", "--mode", "rescore")
    chunks = ("--chunk-ms", 640, "--chunk-ms", 160)
    out_file = tmp_path / "new" / "late.json"
    status, out, err = asr(bundle, manifest, "--latency", *modes, *chunks, "-o", out_file)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        [mode, ms] for mode in ("ctc-prefix", "rescore") for ms in ("640", "160")
    ]
    assert "WER 0.00 %" in lines[0]
    assert all(name in line for name in ("AL ", "LAAL ", "DAL ", "first ", "last ", "RTF ") for line in lines)
    report = json.loads(out_file.read_text(encoding="utf-8"))
    assert (report["utterances"], report["audio_s"]) == (2, 7)
    assert report["command"].startswith("asr")
    assert report["machine"]["threads"] == 1
    assert report["machine"]["cores"] > 0
    assert [(s["config"]["mode"], s["config"]["chunk_ms"]) for s in report["settings"]] == [
        (line.split()[0], int(line.split()[1])) for line in lines
    ]
    for setting in report["settings"]:
        assert setting["errors"]["ref"] == report["words"] == sum(len(text.split()) for text in texts(bundle))
        assert setting["aware"]["laal"] > setting["unaware"]["laal"] > 0
    assert report["settings"][0]["unaware"]["word"]["count"] > 0
    assert out_file.with_suffix(".png").exists()


def test_the_look_ahead_of_a_setting_is_said(asr, bundle: Path, tmp_path: Path):
    manifest = write_manifest(tmp_path, texts(bundle))
    settings = {}
    for look_ahead in (0, 1):
        context = ("--chunk-ms", 160, "--look-ahead", look_ahead, "--limit", 1)
        status, out, _ = asr(bundle, manifest, "--latency", *context)
        assert status == 0
        assert ("160 ms  look-ahead 320 ms  WER" in out) == bool(look_ahead)
        assert ("look-ahead" in out) == bool(look_ahead)
        status, out, _ = asr(bundle, manifest, "--latency", *context, "--json")
        (settings[look_ahead],) = json.loads(out)["settings"]
    assert [settings[n]["config"]["look_ahead"] for n in (0, 1)] == [0, 1]
    assert [settings[n]["look_ahead_ms"] for n in (0, 1)] == [0, 320]


def test_another_bundle_may_align(asr, bundle: Path, tiny_bundles: Path, tmp_path: Path):
    manifest = write_manifest(tmp_path, ["ab", "ab qq ab"])
    cannot_spell = tiny_bundles / "cpu-fp32"
    status, out, _ = asr(
        cannot_spell, manifest, "--latency", "--alignment", bundle, "--json", "--limit", 1, "--chunk-ms", 320
    )
    assert status == 0
    report = json.loads(out)
    assert (report["words"], report["alignment"], report["bundle"]) == (1, str(bundle), str(cannot_spell))
    status, out, _ = asr(bundle, manifest, "--latency")
    assert status == 0
    assert "1 words not aligned" in out
    status, _, err = asr(cannot_spell, manifest, "--latency")
    assert status == 2
    assert "tokens.txt alone cannot encode" in err


BAD = {
    "nothing to hear": (["--latency"], "synthetic sound has no text; give a manifest with text"),
    "a sound": (["a.wav", "--latency"], "a.wav has no text; give a manifest with text"),
    "no such manifest": (["none.jsonl", "--latency"], "none.jsonl: no such manifest"),
    "no mode": (
        ["m.jsonl", "--latency", "--mode", "guess"],
        "no such mode: guess; expected one of ctc-greedy, ",
    ),
    "a chunk": (["m.jsonl", "--latency", "--chunk-ms", "640", "--chunk-ms", "50"], "not a multiple of 40 ms"),
    "a table": (["m.jsonl", "--latency", "-o", "late.csv"], "late.csv: expected FILE.json"),
    "against": (["m.jsonl", "--latency", "--against", "BUNDLE"], "does not go with --latency"),
    "no bundle": (["m.jsonl", "--latency", "--alignment", "none"], "none: no such folder"),
    "limit": (["m.jsonl", "--limit", "0"], "--limit 0: expected at least 1"),
    "modes to time": (["--mode", "rescore", "--mode", "joint"], "need --latency"),
    "chunks to time": (["--chunk-ms", "640", "--chunk-ms", "320"], "need --latency"),
    "figures to time": (["-o", "late.json"], "need --latency"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_not_possible_is_said(asr, tiny_bundles: Path, kind: str):
    args, expected = BAD[kind]
    folder = tiny_bundles / "cpu-fp32"
    status, out, err = asr(folder, *(folder if arg == "BUNDLE" else arg for arg in args))
    assert (status, out) == (2, "")
    assert expected in err
    assert len(err.splitlines()) == 1


def test_an_aligner_of_another_sample_rate_is_refused(asr, bundle: Path, tmp_path: Path):
    other = shutil.copytree(bundle, tmp_path / "other")
    text = (other / "model.json").read_text(encoding="utf-8")
    (other / "model.json").write_text(text.replace('"sample_rate": 16000', '"sample_rate": 8000'))
    status, _, err = asr(bundle, "m.jsonl", "--latency", "--alignment", other)
    assert status == 2
    assert f"{other}: for 8000 Hz, and {bundle} is for 16000" in err


def test_a_manifest_without_text_is_refused(asr, bundle: Path, tmp_path: Path):
    status, _, err = asr(bundle, write_manifest(tmp_path, ["", ""]), "--latency")
    assert status == 2
    assert "test.jsonl.gz: none of its first 2 utterances has text" in err


def test_a_comparison_with_sherpa_onnx_needs_a_round_and_a_streaming_model(asr, bundle: Path, tmp_path: Path):
    (tmp_path / "sherpa.json").write_text("{}")
    for options, message in (
        ((), "has no streaming model"),
        (("--rounds", 0), "--rounds 0: expected at least 1"),
    ):
        status, _, err = asr(bundle, "--against", tmp_path, *options)
        assert status == 2
        assert message in err
