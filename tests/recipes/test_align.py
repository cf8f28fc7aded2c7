"""asr align: every unit of every text gets its time; what cannot be aligned is listed and left out."""

import json
import random

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
from lhotse import MonoCut, Recording, SupervisionSegment

from asr.config import ExperimentConfig, save_config
from asr.data.alignment import KIND, token_ends
from asr.data.cuts import cut_text, join_cuts, open_cuts, read_cut, save_cuts
from asr.features import FbankConfig
from asr.model.align import Aligner
from asr.model.build import build_model
from asr.model.conformer import ConformerConfig
from asr.model.decoder import DecoderConfig
from asr.model.segmental import SegmentalConfig
from asr.tokens import load_tokenizer, train_tokenizer
from asr.train.checkpoint import load_model
from recipes.cli import main

TEXTS = ["ab ba", "a", "bab b a", "", "bb"]
SECONDS = [0.9, 0.3, 1.2, 0.4, 0.5]
RATES = [16000, 8000, 16000, 16000, 16000]


@pytest.fixture(params=[DecoderConfig])
def exp(request, tmp_path):
    """An experiment with a tiny untrained model."""
    torch.manual_seed(1)
    folder = tmp_path / "exp"
    tokenizer = train_tokenizer(TEXTS, "char", 0, folder / "tokens")
    sizes = {"dim": 16, "num_layers": 1, "num_heads": 2, "ff_dim": 16}
    config = ExperimentConfig(
        features=FbankConfig(num_bins=16),
        encoder=ConformerConfig(**sizes, kernel_size=3, subsampling_channels=2),
        decoder=request.param(**sizes),
    )
    save_config(config, folder / "config.yaml")
    model = build_model(config.features, config.encoder, config.decoder, config.loss, len(tokenizer.symbols))
    with torch.no_grad():
        model.ctc.weight.mul_(8)
    safetensors.torch.save_file(model.state_dict(), folder / "average.safetensors")
    return folder


@pytest.fixture
def manifest(tmp_path):
    """Noise with texts; one utterance at 8 kHz, one without text."""
    cuts = []
    for n, (text, seconds, rate) in enumerate(zip(TEXTS, SECONDS, RATES, strict=True)):
        path = tmp_path / f"{n}.wav"
        soundfile.write(path, np.random.default_rng(n).normal(0, 0.1, int(seconds * rate)), rate)
        recording = Recording.from_file(path, recording_id=f"u{n}")
        segment = SupervisionSegment(f"u{n}", f"u{n}", 0.0, recording.duration, text=text, speaker="s")
        cuts.append(MonoCut(f"u{n}", 0.0, recording.duration, 0, [segment], recording=recording))
    save_cuts(cuts, tmp_path / "train.jsonl.gz")
    return tmp_path / "train.jsonl.gz"


def times(cut, exp):
    tokenizer = load_tokenizer(exp / "tokens")
    return token_ends([cut], [[tokenizer.symbols[i] for i in tokenizer.encode(cut_text(cut))]])[0]


def expected_ends(cut, exp, **how):
    model, tokenizer, _ = load_model(exp)
    (spans,) = Aligner(model, "cpu", **how)(
        [read_cut(cut.resample(16000))], [tokenizer.encode(cut_text(cut))]
    )
    return [span.end_s for span in spans]


def run(exp, *args):
    return main(["align", str(exp), *map(str, args)])


def test_every_unit_has_the_time_of_the_likeliest_path(exp, manifest, tmp_path, capsys):
    out = tmp_path / "aligned" / "train.jsonl.gz"
    assert run(exp, manifest, "-o", out) == 0
    before, after = list(open_cuts(manifest)), list(open_cuts(out))
    assert [cut.id for cut in after] == [f"u{n}" for n in range(5)]
    for cut, old in zip(after, before, strict=True):
        assert times(cut, exp) == pytest.approx(expected_ends(old, exp), abs=1e-5)
        for item in (cut.supervisions[0].alignment or {}).get(KIND, []):
            assert item.score < 0
        cut.supervisions[0].alignment = None
        assert cut == old
    printed = capsys.readouterr()
    assert f"{out}: 5 utterances, 15 units, -" in printed.out
    assert "align train  5/5  100 %" in printed.err
    assert [path.name for path in out.parent.iterdir()] == ["train.jsonl.gz"]


def test_manifests_go_into_one_and_batches_change_nothing(exp, manifest, tmp_path):
    assert run(exp, manifest, "-o", tmp_path / "a.jsonl", "--batch-s", "0.1") == 0
    assert run(exp, manifest, manifest, "-o", tmp_path / "b.jsonl", "--batch-s", "100") == 0
    alone, twice = list(open_cuts(tmp_path / "a.jsonl")), list(open_cuts(tmp_path / "b.jsonl"))
    assert [cut.id for cut in twice] == 2 * [cut.id for cut in alone]
    for a, b in zip(alone + alone, twice, strict=True):
        assert times(a, exp) == pytest.approx(times(b, exp), abs=1e-5)


def test_joined_utterances_are_aligned(exp, manifest, tmp_path):
    joined = join_cuts(list(open_cuts(manifest))[::2], random.Random(0), (3, 3))
    joined = [cut.resample(16000) for cut in joined]
    save_cuts(joined, tmp_path / "joined.jsonl.gz")
    assert run(exp, tmp_path / "joined.jsonl.gz", "-o", tmp_path / "out.jsonl.gz") == 0
    (cut,) = open_cuts(tmp_path / "out.jsonl.gz")
    assert len(cut.supervisions) == 3
    assert times(cut, exp) == pytest.approx(expected_ends(joined[0], exp), abs=1e-5)


def test_chunks_are_an_alignment_of_their_own(exp, manifest, tmp_path):
    assert run(exp, manifest, "-o", tmp_path / "whole.jsonl.gz") == 0
    assert run(exp, manifest, "-o", tmp_path / "chunks.jsonl.gz", "--chunk-ms", "80") == 0
    whole, chunks = (
        [
            item.score
            for cut in open_cuts(path)
            for item in (cut.supervisions[0].alignment or {}).get(KIND, [])
        ]
        for path in (tmp_path / "whole.jsonl.gz", tmp_path / "chunks.jsonl.gz")
    )
    assert len(whole) == len(chunks)
    assert whole != chunks


@pytest.mark.parametrize("exp", [SegmentalConfig], indirect=True)
def test_a_segmental_decoder_aligns_anew(exp, manifest, tmp_path):
    assert run(exp, manifest, "-o", tmp_path / "ctc.jsonl.gz") == 0
    assert run(exp, tmp_path / "ctc.jsonl.gz", "-o", tmp_path / "again.jsonl.gz", "--segments") == 0
    first, again = (list(open_cuts(tmp_path / name)) for name in ("ctc.jsonl.gz", "again.jsonl.gz"))
    assert [times(cut, exp) for cut in again] != [times(cut, exp) for cut in first]
    for cut in again:
        assert times(cut, exp) == pytest.approx(expected_ends(cut, exp, segments=True), abs=1e-5)


def test_what_cannot_be_aligned_is_listed_and_left_out(exp, manifest, tmp_path, capsys):
    cuts = list(open_cuts(manifest))
    cuts[0].supervisions[0].text = "ab " * 20
    save_cuts(cuts, manifest)
    (tmp_path / "2.wav").write_bytes(b"RIFF")
    out = tmp_path / "aligned" / "train.jsonl.gz"
    assert run(exp, manifest, "-o", out) == 3
    assert [cut.id for cut in open_cuts(out)] == ["u1", "u3", "u4"]
    rows = [json.loads(line) for line in (out.parent / "train.failures.jsonl").open(encoding="utf-8")]
    failures = {row["id"]: row["error"] for row in rows}
    assert set(failures) == {"u0", "u2"}
    assert failures["u0"] == "0.90 s is too short for the 59 units of its text"
    assert "2.wav" in failures["u2"]
    assert "2 of 5 utterances could not be aligned, listed in" in capsys.readouterr().err
    cuts[0].supervisions[0].text = "ab"
    save_cuts([cuts[0]], manifest)
    assert run(exp, manifest, "-o", out) == 0
    assert [path.name for path in out.parent.iterdir()] == ["train.jsonl.gz"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--chunk-ms", "100"], "--chunk-ms 100: not a multiple of 40 ms"),
        (["--segments"], "decoder is of type transformer, expected segmental"),
        (["--batch-s", "0"], "--batch-s 0.0: expected more than 0"),
        (["--checkpoint", "none"], "none: no such file"),
        (["-o", "train.json"], "-o train.json: not the name of a manifest"),
    ],
)
def test_wrong_options_are_refused(exp, manifest, tmp_path, options, message, capsys):
    assert run(exp, manifest, "-o", tmp_path / "out.jsonl.gz", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl.gz").exists()
