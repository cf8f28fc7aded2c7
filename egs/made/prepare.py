"""Sentences of grammar.txt, spoken by eSpeak NG, with noise: transcripts.tsv with splits train, dev and test,
and demo.wav, a few test sentences in a row, with its text in demo.txt.

    python prepare.py data
    python prepare.py data --train 20000        more speech, for longer training

No sentence and no timbre of dev or test is in another split. The same options give the same samples.
"""

import argparse
import multiprocessing
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from grammar import draw, read_grammar
from speech import ACCENTS, Engine, Spoken, Timbre, draw_timbre, lay_out_data

from asr.audio import SAMPLE_RATE, read, write
from recipes.cli import guard
from recipes.tables import TABLE, Row, write_table

PROCESS_UTTERANCES = 125
"""Utterances one process speaks, in order (see speech.py); eSpeak takes at most 349 voices and timbres."""

TIMBRES = {"train": 400, "dev": 50, "test": 50}

DEMO_SENTENCES = 3
DEMO_PAUSE_S = 1.0

Splits = dict[str, list[Spoken]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder to write")
    parser.add_argument("--train", type=int, default=7000, help="number of utterances (7000)")
    parser.add_argument("--dev", type=int, default=100, help="number of utterances (100)")
    parser.add_argument("--test", type=int, default=150, help="number of utterances (150)")
    parser.add_argument("--seed", type=int, default=3, help="seed of sentences, voices and noise (3)")
    args = parser.parse_args()
    splits = plan({"train": args.train, "dev": args.dev, "test": args.test}, args.seed)
    check_disjoint(splits)
    data = args.data.resolve()
    files = record(splits, data)
    write_table(rows(splits, files, data), data / TABLE)
    write_demo(splits["test"][:DEMO_SENTENCES], files["test"], data)


def plan(sizes: dict[str, int], seed: int) -> Splits:
    """What is said in each split, by whom and how; dev and test do not depend on the size of train."""
    texts = draw_texts(sizes, random.Random(seed))
    splits = {}
    for split, count in TIMBRES.items():
        rng = random.Random(f"{split} {seed}")
        timbres = [draw_timbre(f"{split}{number}", rng) for number in range(count)]
        splits[split] = [draw_manner(text, timbres, rng) for text in texts[split]]
    return splits


def draw_texts(sizes: dict[str, int], rng: random.Random) -> dict[str, list[str]]:
    """Sentences of dev and test are all different; train may contain a sentence twice.

    About half of train expands any name of the grammar, often to one word: words are learnt from short
    utterances first.
    """
    rules = read_grammar(Path(__file__).with_name("grammar.txt"))
    held_out: dict[str, None] = {}
    while len(held_out) < sizes["dev"] + sizes["test"]:
        held_out[draw(rules, rng)] = None
    train: list[str] = []
    while len(train) < sizes["train"]:
        text = draw(rules, rng, rng.choice(["SENTENCE", rng.choice(list(rules))]))
        train += [] if text in held_out else [text]
    rest = list(held_out)
    return {"train": train, "dev": rest[: sizes["dev"]], "test": rest[sizes["dev"] :]}


def draw_manner(text: str, timbres: Sequence[Timbre], rng: random.Random) -> Spoken:
    return Spoken(
        text,
        accent=rng.choice(ACCENTS),
        timbre=rng.choice(timbres),
        words_per_minute=rng.randint(130, 185),
        pitch=rng.randint(20, 80),
        pitch_range=rng.randint(20, 80),
        snr_db=rng.uniform(20, 40),
        seed=rng.getrandbits(32),
    )


def check_disjoint(splits: Splits) -> None:
    """A result on sentences or voices of the training data would mean nothing."""
    for one, other in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert not {s.text for s in splits[one]} & {s.text for s in splits[other]}, (one, other)
        assert not {s.timbre for s in splits[one]} & {s.timbre for s in splits[other]}, (one, other)


def record(splits: Splits, data: Path) -> dict[str, list[Path]]:
    """Speak everything into 16-bit files, on all cores, each process always speaking the same utterances."""
    files = {
        split: [data / "wav" / split / f"{i:05d}.wav" for i in range(len(splits[split]))] for split in splits
    }
    for split in splits:
        (data / "wav" / split).mkdir(parents=True, exist_ok=True)
    jobs = [
        list(zip(splits[split], files[split], strict=True))[i : i + PROCESS_UTTERANCES]
        for split in splits
        for i in range(0, len(splits[split]), PROCESS_UTTERANCES)
    ]
    with multiprocessing.get_context("fork").Pool(maxtasksperchild=1) as pool:
        pool.map(record_some, jobs, chunksize=1)
    return files


def record_some(jobs: Sequence[tuple[Spoken, Path]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        lay_out_data(Path(folder), {spoken.timbre for spoken, _ in jobs})
        engine = Engine(Path(folder))
        for spoken, file in jobs:
            write(file, engine.speak(spoken))


def rows(splits: Splits, files: dict[str, list[Path]], data: Path) -> Iterator[Row]:
    """The utterances as lines of a table in the folder `data`."""
    for split, utterances in splits.items():
        for spoken, file in zip(utterances, files[split], strict=True):
            audio = str(file.relative_to(data))
            yield Row(f"{split}-{file.stem}", audio, spoken.voice, split, spoken.text)


def write_demo(utterances: Sequence[Spoken], files: Sequence[Path], data: Path) -> None:
    """The first utterances of the test in a row, with pauses, as a microphone would record them."""
    pause = np.zeros(int(DEMO_PAUSE_S * SAMPLE_RATE))
    parts = [part for file in files[: len(utterances)] for part in (read(file), pause)]
    write(data / "demo.wav", np.concatenate(parts))
    (data / "demo.txt").write_text("".join(f"{spoken.text}\n" for spoken in utterances), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(guard(main))
