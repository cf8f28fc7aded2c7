"""Every corpus recipe: its run.sh as a table of contents, and prepare.py on a tiny corpus."""

import importlib.util
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile

from asr.audio import write
from asr.data.cuts import cut_speaker, cut_text, open_cuts
from recipes.tables import Row, read_table, write_table

EGS = Path(__file__).parents[2] / "egs"
RECIPES = sorted(path.parent.name for path in EGS.glob("*/run.sh"))


def load(path: Path) -> ModuleType:
    """Load a module of a recipe, which is not a package, so that it can import its neighbours."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def call(*command: object, cwd: Path) -> str:
    """Run a command as a user would, with this interpreter's `asr` and `python` first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def copied(recipe: str, root: Path) -> Path:
    """The recipe copied to a repository of its own, since run.sh writes next to itself."""
    folder = root / "egs" / recipe
    folder.parent.mkdir(parents=True)
    (root / "recipes").symlink_to(EGS.parent / "recipes")
    folder.mkdir()
    for file in ("run.sh", "prepare.py", "conf"):
        if (EGS / recipe / file).exists():
            (folder / file).symlink_to(EGS / recipe / file)
    return folder


def sound(path: Path, seconds: float = 1.0, sample_rate: int = 16000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(str(path)))
    write(path, 0.1 * rng.standard_normal(int(seconds * sample_rate)).astype(np.float32), sample_rate)
    return path


@pytest.mark.parametrize("recipe", RECIPES)
def test_run_sh_explains_itself_from_anywhere(recipe, tmp_path):
    run = EGS / recipe / "run.sh"
    assert run.stat().st_mode & 0o111
    call("bash", "-n", run, cwd=tmp_path)
    out = call("bash", run, "--help", cwd=tmp_path)
    assert "./run.sh" in out
    assert "--stop-stage" in out


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_whole(recipe):
    missing = [
        name for name in ("README.md", "RESULTS.md", "conf/train.yaml") if not (EGS / recipe / name).exists()
    ]
    assert not missing


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_sh_has_no_branch_but_its_stages(recipe):
    lines = (EGS / recipe / "run.sh").read_text().splitlines()
    conditions = [line for line in lines if line.strip().startswith(("if ", "case ", "while ", "[", "test "))]
    assert all(line.startswith("if stage ") for line in conditions)
    assert len(lines) <= 60


@pytest.mark.parametrize("path", sorted(EGS.glob("*/conf/*.yaml")), ids=lambda x: f"{x.parts[-3]}-{x.stem}")
def test_the_configuration_is_valid(path):
    """By itself, and merged after train.yaml."""
    from asr.config import load_config

    load_config([path.with_name("train.yaml"), path], [])


@pytest.mark.parametrize("model", sorted((EGS.parent / "recipes/conf").glob("*.yaml")), ids=lambda x: x.stem)
@pytest.mark.parametrize("recipe", RECIPES)
def test_any_model_can_be_trained_on_any_corpus_as_it_is(recipe, model):
    from asr.config import load_config

    run = (EGS / recipe / "run.sh").read_text()
    assert re.search(r'--config (conf/train\.yaml|"\$config") --config "\$model_config"', run)
    found, alone = load_config([EGS / recipe / "conf/train.yaml", model]), load_config([model])
    assert (found.encoder, found.decoder, found.loss) == (alone.encoder, alone.decoder, alone.loss)
    if alone.optim.type == "scaled-adam":  # its rates have another unit
        assert (found.optim.type, found.optim.lr) == (alone.optim.type, alone.optim.lr)


# Tables


def test_a_table_is_read_as_it_was_written(tmp_path):
    rows = [
        Row("b", str(tmp_path / "b.wav"), "s", "test", "two"),
        Row("a", "a.wav", "r", "train", 'say "one"'),
    ]
    write_table(rows, tmp_path / "t.tsv")
    a, b = read_table(tmp_path / "t.tsv")
    assert b == rows[0]
    assert a == rows[1]._replace(audio=str(tmp_path / "a.wav"))


# Speech Commands


def test_commands_splits_by_the_published_lists(tmp_path):
    for name in ("bed/aa_nohash_0", "bed/bb_nohash_0", "go/cc_nohash_1", "_background_noise_/tap"):
        sound(tmp_path / "corpus" / f"{name}.wav")
    (tmp_path / "corpus" / "validation_list.txt").write_text("bed/bb_nohash_0.wav\n")
    (tmp_path / "corpus" / "testing_list.txt").write_text("go/cc_nohash_1.wav\n")
    call(sys.executable, EGS / "commands" / "prepare.py", "corpus", "data", cwd=tmp_path)
    rows = [row[2:] for row in read_table(tmp_path / "data" / "transcripts.tsv")]
    assert rows == [("aa", "train", "bed"), ("bb", "dev", "bed"), ("cc", "test", "go")]


def test_commands_joins_words_of_one_speaker(tmp_path):
    rows = []
    for split in ("train", "dev", "test"):
        for i in range(6):
            file = sound(tmp_path / "corpus" / f"{split}{i}.wav")
            rows.append(Row(f"{split}{i}", str(file), f"{split}{i % 2}", split, f"word{i}"))
    write_table(rows, tmp_path / "corpus" / "transcripts.tsv")
    folder = copied("commands", tmp_path)
    call(
        "bash",
        folder / "run.sh",
        "--corpus",
        tmp_path / "corpus",
        "--vocab",
        20,
        "--stop-stage",
        3,
        cwd=tmp_path,
    )

    joined = list(open_cuts(folder / "data" / "manifests" / "test.jsonl.gz"))
    said = sorted(word for cut in joined for word in cut_text(cut).split())
    assert said == sorted(f"word{i}" for i in range(6))
    for cut in joined:
        assert len({supervision.speaker for supervision in cut.supervisions}) == 1
        assert all(
            int(word.removeprefix("word")) % 2 == int(cut_speaker(cut)[-1]) for word in cut_text(cut).split()
        )
    assert (folder / "data" / "tokens" / "tokens.txt").exists()


# Digits


def test_fsdd_has_the_official_split_and_one_by_speaker(tmp_path):
    for speaker in ("george", "yweweler", "theo"):
        for number in (0, 7, 10):
            sound(tmp_path / "corpus" / "recordings" / f"3_{speaker}_{number}.wav", 0.4, 8000)
    call(sys.executable, EGS / "fsdd" / "prepare.py", "corpus", "data", cwd=tmp_path)
    official = {row.utt_id: row.split for row in read_table(tmp_path / "data" / "official.tsv")}
    assert official["3_theo_0"] == "test"
    assert official["3_theo_7"] == "dev"
    assert official["3_theo_10"] == "train"
    splits = {row.speaker: row.split for row in read_table(tmp_path / "data" / "speakers.tsv")}
    assert splits == {"george": "dev", "yweweler": "test", "theo": "train"}
    assert {row.text for row in read_table(tmp_path / "data" / "speakers.tsv")} == {"three"}


# LibriSpeech


def librispeech(root: Path, parts: dict[str, list[str]]) -> Path:
    """A corpus in the published layout: part/SPEAKER/CHAPTER/, two utterances of each speaker."""
    for part, speakers in parts.items():
        for speaker in speakers:
            chapter = root / part / speaker / "1"
            lines = [f"{speaker}-1-{i:04d} MADE OF SPEAKER {speaker} NUMBER {i}\n" for i in range(2)]
            for line in lines:
                sound(chapter / f"{line.split()[0]}.flac", 1.5)
            (chapter / f"{speaker}-1.trans.txt").write_text("".join(lines))
    return root


def test_mini_librispeech_shares_dev_clean_between_dev_and_test(tmp_path):
    corpus = librispeech(tmp_path / "c", {"train-clean-5": ["10", "11"], "dev-clean-2": ["20", "21", "22"]})
    folder = copied("mini_librispeech", tmp_path)
    call("bash", folder / "run.sh", "--corpus", corpus, "--stop-stage", 1, cwd=tmp_path)
    speakers = {
        split: {cut_speaker(cut) for cut in open_cuts(folder / "data" / "manifests" / f"{split}.jsonl.gz")}
        for split in ("train", "dev", "test")
    }
    assert speakers == {"train": {"10", "11"}, "dev": {"20", "22"}, "test": {"21"}}


def test_librispeech_takes_the_parts_it_is_told(tmp_path):
    corpus = librispeech(
        tmp_path / "c", {"train-a": ["10"], "train-b": ["11"], "dev-a": ["20"], "test-a": ["30"]}
    )
    folder = copied("librispeech", tmp_path)
    parts = ["--train", "train-a train-b", "--dev", "", "--test", ""]
    call(
        "bash", folder / "run.sh", "--corpus", corpus, *parts, "--vocab", 28, "--stop-stage", 2, cwd=tmp_path
    )
    texts = [cut_text(cut) for cut in open_cuts(folder / "data" / "manifests" / "train-b.jsonl.gz")]
    assert texts == ["MADE OF SPEAKER 11 NUMBER 0", "MADE OF SPEAKER 11 NUMBER 1"]
    assert (folder / "data" / "bpe28" / "tokens.model").exists()


# One's own recordings


def test_folder_reads_text_beside_sound(tmp_path):
    for split in ("train", "dev", "test"):
        file = sound(tmp_path / "own" / split / f"of-{split}" / "a.flac")
        file.with_suffix(".txt").write_text(f"said in {split}\n")
    folder = copied("folder", tmp_path)
    call("bash", folder / "run.sh", "--corpus", tmp_path / "own", "--stop-stage", 0, cwd=tmp_path)
    (cut,) = open_cuts(folder / "data" / "manifests" / "test.jsonl.gz")
    assert cut_text(cut) == "said in test"
    assert cut_speaker(cut) == "of-test"


# Made speech


@pytest.fixture(scope="module")
def made() -> ModuleType:
    return load(EGS / "made" / "prepare.py")


def test_made_speech_is_the_same_again_whatever_the_size_of_train(tmp_path):
    for folder, size in (("one", 3), ("two", 5)):
        sizes = ["--train", size, "--dev", 2, "--test", 3]
        call(sys.executable, EGS / "made" / "prepare.py", folder, *sizes, cwd=tmp_path)
    assert (tmp_path / "one" / "demo.txt").read_text() == (tmp_path / "two" / "demo.txt").read_text()
    # eSpeak NG's own noise differs from run to run; what it says, in which voice and for how long does not
    tables = [list(read_table(tmp_path / name / "transcripts.tsv")) for name in ("one", "two")]
    spoken = [[(row.text, row.speaker) for row in rows if row.split == "test"] for rows in tables]
    assert spoken[0] == spoken[1] != []
    lengths = [soundfile.info(tmp_path / name / "demo.wav").duration for name in ("one", "two")]
    assert lengths[0] == pytest.approx(lengths[1], abs=0.05)
    rows = list(read_table(tmp_path / "one" / "transcripts.tsv"))
    assert [row.split for row in rows].count("test") == 3
    assert len({(tmp_path / "one" / row.audio).read_bytes() for row in rows}) == 8
    assert (tmp_path / "one" / "demo.txt").read_text().splitlines() == [
        r.text for r in rows if r.split == "test"
    ]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_made_test_has_other_sentences_and_voices_but_no_other_words(made, seed):
    splits = made.plan({"train": 5000, "dev": 100, "test": 150}, seed)
    made.check_disjoint(splits)
    texts = {split: {spoken.text for spoken in splits[split]} for split in splits}
    assert len(texts["test"]) == 150
    known = {word for text in texts["train"] for word in text.split()}
    assert {word for text in texts["test"] | texts["dev"] for word in text.split()} <= known


def test_made_check_finds_a_shared_voice_or_sentence(made):
    splits = made.plan({"train": 5, "dev": 2, "test": 2}, seed=1)
    with pytest.raises(AssertionError):
        made.check_disjoint({**splits, "test": splits["dev"]})


def test_our_timbres_are_heard(made, tmp_path):
    """The engine does not report an unknown timbre but uses another one."""
    speech = sys.modules["speech"]
    said = {
        name: [speech.Spoken("oh", "en-us", speech.Timbre(name, f"pitch {hz} {hz}\n"), snr_db=60)]
        for name, hz in (("high", 250), ("low", 80))
    }
    files = made.record(said, tmp_path)
    high, low = (voice_hz(files[name][0]) for name in said)
    assert 1.5 * low < high


def voice_hz(path: Path) -> float:
    """The pitch of a recording, by the first peak of its autocorrelation."""
    samples, rate = soundfile.read(path)
    power = np.abs(np.fft.rfft(samples, 2 * len(samples))) ** 2
    shortest = rate // 400
    return rate / (shortest + np.argmax(np.fft.irfft(power)[shortest : rate // 50]))


def test_drawn_timbres_differ_in_length_of_the_vocal_tract(made):
    speech = sys.modules["speech"]
    rng = random.Random(0)
    shifts = []
    for number in range(200):
        lines = speech.draw_timbre(f"t{number}", rng).variant.splitlines()
        formants = [float(line.split()[2]) for line in lines if line.startswith("formant")]
        assert len(formants) == 9
        assert max(formants) < 1.12 * min(formants)
        shifts.append(np.mean(formants))
    assert min(shifts) < 92
    assert max(shifts) > 115


def test_the_grammar_says_about_a_hundred_and_fifty_words(made):
    rules = made.read_grammar(EGS / "made" / "grammar.txt")
    assert all(word in rules for ways in rules.values() for way in ways for word in way if word.isupper())
    assert 140 <= len(sys.modules["grammar"].words(rules)) <= 160
