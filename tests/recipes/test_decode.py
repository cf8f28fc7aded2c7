"""asr decode: what it writes, what it prints, and how it continues after what it cannot read."""

import gzip
import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
from lhotse import MonoCut, Recording, SupervisionSegment

from asr.config import ExperimentConfig, save_config
from asr.data.cuts import save_cuts
from asr.decode.modes import modes_for
from asr.features import FbankConfig
from asr.model.build import build_model
from asr.model.conformer import ConformerConfig
from asr.model.decoder import DecoderConfig
from asr.tokens import train_tokenizer
from recipes.cli import main
from recipes.decode import Recogniser
from recipes.sets import batches as batches_of

TEXTS = ["ab ba", "a", "bab b a", "b"]
SECONDS = [0.9, 0.3, 1.2, 0.3]


@pytest.fixture
def exp(tmp_path):
    """An experiment with a tiny untrained model that produces some text."""
    torch.manual_seed(1)
    folder = tmp_path / "exp"
    tokenizer = train_tokenizer(TEXTS, "char", 0, folder / "tokens")
    config = ExperimentConfig(
        features=FbankConfig(num_bins=16),
        encoder=ConformerConfig(
            dim=16, num_layers=1, num_heads=2, ff_dim=16, kernel_size=3, subsampling_channels=2
        ),
        decoder=DecoderConfig(dim=16, num_layers=1, num_heads=2, ff_dim=16),
    )
    save_config(config, folder / "config.yaml")
    model = build_model(config.features, config.encoder, config.decoder, config.loss, len(tokenizer.symbols))
    with torch.no_grad():
        model.ctc.weight.mul_(8)
        model.ctc.bias[1] = -30.0  # no CTC emits sos/eos after training
        model.decoder.out.weight.mul_(4)
        model.decoder.out.bias[1] = -2.0  # or the best text would be the empty one
    safetensors.torch.save_file(model.state_dict(), folder / "average.safetensors")
    return folder


@pytest.fixture
def manifest(tmp_path):
    def make(name="dev", broken=()):
        cuts = []
        for n, (text, seconds) in enumerate(zip(TEXTS, SECONDS, strict=True)):
            path, rate = tmp_path / f"{name}-{n}.wav", 8000 if n == 1 else 16000
            noise = np.random.default_rng(n).normal(0, 0.1, int(seconds * rate))
            soundfile.write(path, noise, rate)
            recording = Recording.from_file(path, recording_id=f"{name}-{n}")
            if n in broken:
                path.write_bytes(path.read_bytes()[:20])
            supervision = SupervisionSegment(
                f"{name}-{n}", recording.id, 0.0, recording.duration, text=text, speaker=f"s{n}"
            )
            cuts.append(MonoCut(recording.id, 0.0, recording.duration, 0, [supervision], recording=recording))
        save_cuts(cuts, tmp_path / f"{name}.jsonl.gz")
        return tmp_path / f"{name}.jsonl.gz"

    return make


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("mode", modes_for("transformer"))
def test_every_mode_writes_complete_rows_in_order(exp, manifest, mode, capsys):
    assert main(["decode", str(exp), str(manifest()), "--mode", mode, "--nbest", "3"]) == 0
    rows = rows_of(exp / "decode" / f"dev_{mode}" / "hyp.jsonl")
    assert [row["id"] for row in rows] == ["dev-0", "dev-1", "dev-2", "dev-3"]
    assert [row["ref"] for row in rows] == TEXTS
    assert [row["speaker"] for row in rows] == ["s0", "s1", "s2", "s3"]
    np.testing.assert_allclose([row["duration_s"] for row in rows], SECONDS, atol=1e-3)
    assert any(row["words"] for row in rows)
    for row in rows:
        assert row["hyp"] == row["nbest"][0]["hyp"] == " ".join(w["word"] for w in row["words"])
        assert row["score"] == row["nbest"][0]["score"]
        for word in row["words"]:
            assert 0 <= word["start_s"] < word["end_s"] <= row["duration_s"] + 0.04
            assert 0 <= word["confidence"] <= 1
    out = capsys.readouterr().out
    assert out.startswith(f"dev  {mode}  WER ")
    assert " % [7 words: " in out
    assert "  RTF " in out


def test_batches_chunks_and_several_sets(exp, manifest, capsys):
    sets = [str(manifest("one")), str(manifest("two"))]
    assert main(["decode", str(exp), *sets, "--batch-s", "0.1", "--chunk-ms", "160"]) == 0
    alone = rows_of(exp / "decode" / "one_ctc-prefix_c160" / "hyp.jsonl")
    assert main(["decode", str(exp), *sets, "--batch-s", "100", "--chunk-ms", "160"]) == 0
    together = rows_of(exp / "decode" / "one_ctc-prefix_c160" / "hyp.jsonl")
    assert [row["hyp"] for row in alone] == [row["hyp"] for row in together]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["one", "two"] * 2
    assert main(["decode", str(exp), *sets]) == 0
    whole = rows_of(exp / "decode" / "one_ctc-prefix" / "hyp.jsonl")
    assert [row["score"] for row in whole] != [row["score"] for row in together]
    context = ["--chunk-ms", "160", "--left-chunks", "2", "--look-ahead", "1"]
    assert main(["decode", str(exp), *sets, *context]) == 0
    ahead = rows_of(exp / "decode" / "one_ctc-prefix_c160_l2_r1" / "hyp.jsonl")
    assert [row["score"] for row in ahead] != [row["score"] for row in together]


def test_bad_audio_is_listed_and_the_rest_decoded(exp, manifest, capsys):
    assert main(["decode", str(exp), str(manifest(broken=(2,)))]) == 3
    folder = exp / "decode" / "dev_ctc-prefix"
    assert [row["id"] for row in rows_of(folder / "hyp.jsonl")] == ["dev-0", "dev-1", "dev-3"]
    (failure,) = rows_of(folder / "failures.jsonl")
    assert failure["id"] == "dev-2"
    assert failure["path"].endswith("dev-2.wav")
    assert "1 of 4 utterances could not be decoded" in capsys.readouterr().err
    assert main(["decode", str(exp), str(manifest())]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["hyp.jsonl"]


def test_audio_comes_at_the_rate_of_the_model(exp, manifest, monkeypatch):
    heard = []
    run = Recogniser.run
    monkeypatch.setattr(Recogniser, "run", lambda self, x: heard.extend(map(len, x)) or run(self, x))
    assert main(["decode", str(exp), str(manifest())]) == 0
    assert sorted(heard) == sorted(round(16000 * seconds) for seconds in SECONDS)


def test_a_set_that_stops_leaves_the_earlier_result(exp, manifest, tmp_path, capsys):
    path = manifest()
    assert main(["decode", str(exp), str(path)]) == 0
    before = (exp / "decode" / "dev_ctc-prefix" / "hyp.jsonl").read_bytes()
    plain = tmp_path / "plain" / "dev.jsonl"
    plain.parent.mkdir()
    plain.write_bytes(gzip.decompress(path.read_bytes()) + b"{not json\n")
    assert main(["decode", str(exp), str(plain)]) == 2
    assert "dev.jsonl:5" in capsys.readouterr().err
    assert (exp / "decode" / "dev_ctc-prefix" / "hyp.jsonl").read_bytes() == before
    assert [x.name for x in (exp / "decode" / "dev_ctc-prefix").iterdir()] == ["hyp.jsonl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mode", "beam"], "no such mode: beam; expected one of ctc-greedy"),
        (["--chunk-ms", "100"], "--chunk-ms 100: not a multiple of 40 ms"),
        (["--look-ahead", "1"], "--look-ahead 1: expected 0 or more chunks, with their length in --chunk-ms"),
        (["--look-ahead", "-1", "--chunk-ms", "160"], "--look-ahead -1: expected 0 or more"),
        (["--beam", "0"], "beam is 0"),
        (["--batch-s", "0"], "--batch-s 0.0: expected more than 0"),
        (["--checkpoint", "none"], "none: no such file"),
    ],
)
def test_wrong_options_are_refused(exp, manifest, options, message, capsys):
    assert main(["decode", str(exp), str(manifest()), *options]) == 2
    assert message in capsys.readouterr().err


def test_sets_of_one_name_and_missing_models_are_refused(exp, manifest, tmp_path, capsys):
    path = manifest()
    assert main(["decode", str(exp), str(path), str(path)]) == 2
    assert "2 manifests are named dev" in capsys.readouterr().err
    assert main(["decode", str(tmp_path / "nothing"), str(path)]) == 2
    assert "nothing: no such experiment or bundle" in capsys.readouterr().err


def test_an_empty_set_is_an_error(exp, tmp_path, capsys):
    path = tmp_path / "none.jsonl"
    path.touch()
    assert main(["decode", str(exp), str(path)]) == 2
    assert "none.jsonl: no utterances in it" in capsys.readouterr().err


def test_batches_hold_so_many_padded_seconds():
    class Cut:
        def __init__(self, duration):
            self.duration = duration

    cuts = [Cut(d) for d in (3.0, 1.0, 20.0, 2.0, 3.0, 1.0)]
    batches = list(batches_of(cuts, 6.0))
    assert [[c.duration for _, c in batch] for batch in batches] == [[20.0], [3.0, 3.0], [2.0, 1.0, 1.0]]
    assert sorted(n for batch in batches for n, _ in batch) == list(range(6))


def test_a_bundle_is_decoded_like_an_experiment(tiny_bundles, manifest, tmp_path, capsys):
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundles / "cpu-fp32", bundle)
    assert main(["decode", str(bundle), str(manifest(broken=(0,))), "--mode", "rescore", "--nbest", "2"]) == 3
    rows = rows_of(bundle / "decode" / "dev_rescore" / "hyp.jsonl")
    assert [row["id"] for row in rows] == ["dev-1", "dev-2", "dev-3"]
    assert all({"ctc", "attention"} <= set(row["nbest"][0]) for row in rows)
    assert "dev  rescore  WER " in capsys.readouterr().out
