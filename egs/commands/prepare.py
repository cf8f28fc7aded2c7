"""Google Speech Commands (arXiv:1804.03209) as a table: data/transcripts.tsv, splits train, dev and test.

    python prepare.py CORPUS data

CORPUS is the corpus as published, one folder per word beside validation_list.txt and testing_list.txt, or a
folder with its own transcripts.tsv. Either way no speaker is in two splits.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

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
    """`bed/0c540988_nohash_0.wav` is speaker 0c540988 saying "bed"; the lists name what is held out."""
    splits = {line: "dev" for line in (corpus / "validation_list.txt").read_text().split()}
    splits |= {line: "test" for line in (corpus / "testing_list.txt").read_text().split()}
    for sound in corpus.glob("[!_]*/*.wav"):  # _background_noise_ is not speech
        word, name = sound.parent.name, sound.stem
        split = splits.get(f"{word}/{sound.name}", "train")
        yield Row(f"{word}_{name}", str(sound.absolute()), name.split("_")[0], split, word)


if __name__ == "__main__":
    sys.exit(guard(main))
