"""Mini LibriSpeech (OpenSLR 31) as a table: data/transcripts.tsv, splits train, dev and test.

    lhotse download librispeech --mini download
    python prepare.py download/LibriSpeech data

CORPUS is the corpus as published: train-clean-5 is train, and the speakers of dev-clean-2 are alternately dev
and test; or a folder with its own transcripts.tsv.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from asr.errors import ManifestError
from recipes.cli import guard
from recipes.tables import TABLE, Row, read_table, write_table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", type=Path)
    parser.add_argument("data", type=Path, help="folder to write")
    args = parser.parse_args()
    own_table = args.corpus / TABLE
    rows = read_table(own_table) if own_table.exists() else published(args.corpus)
    write_table(rows, args.data / TABLE)


def published(corpus: Path) -> Iterator[Row]:
    held_out = sorted({folder.name for folder in (corpus / "dev-clean-2").glob("*")})
    test = held_out[1::2]
    for row in utterances(corpus / "train-clean-5"):
        yield row._replace(split="train")
    for row in utterances(corpus / "dev-clean-2"):
        yield row._replace(split="test" if row.speaker in test else "dev")


def utterances(part: Path) -> Iterator[Row]:
    """Read from SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt, whose lines are "SPEAKER-CHAPTER-NUMBER TEXT"."""
    if not part.is_dir():
        raise ManifestError(
            f"{part}: no such folder; give the folder that holds train-clean-5 and dev-clean-2"
        )
    for table in part.rglob("*.trans.txt"):
        for line in table.read_text(encoding="utf-8").splitlines():
            utt_id, _, text = line.partition(" ")
            sound = table.with_name(f"{utt_id}.flac").absolute()
            yield Row(utt_id, str(sound), utt_id.split("-")[0], "", text)


if __name__ == "__main__":
    sys.exit(guard(main))
