"""Free Spoken Digit Dataset as two tables, data/official.tsv and data/speakers.tsv.

    python prepare.py CORPUS data

CORPUS is the published repository (recordings/7_jackson_32.wav), or a folder with a transcripts.tsv.

Each table has the splits train, dev and test:

official    of each digit and speaker, recordings 0 to 4 are test, as its authors define; 5 to 9 are dev
speakers    one speaker is test and one is dev; neither is in train
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from asr.errors import ManifestError
from recipes.cli import guard
from recipes.tables import TABLE, Row, read_table, write_table

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
HELD_OUT = {"george": "dev", "yweweler": "test"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", type=Path)
    parser.add_argument("data", type=Path, help="folder to write")
    args = parser.parse_args()
    own_table = args.corpus / TABLE
    rows = list(read_table(own_table) if own_table.exists() else published(args.corpus))
    write_table((row._replace(split=official(row)) for row in rows), args.data / "official.tsv")
    write_table(
        (row._replace(split=HELD_OUT.get(row.speaker, "train")) for row in rows), args.data / "speakers.tsv"
    )


def published(corpus: Path) -> Iterator[Row]:
    for sound in (corpus / "recordings").glob("*.wav"):
        digit, speaker, _ = sound.stem.split("_")
        yield Row(sound.stem, str(sound.absolute()), speaker, "", DIGITS[int(digit)])


def official(row: Row) -> str:
    """The split, by the number at the end of `digit_speaker_number`."""
    number = row.utt_id.rpartition("_")[2]
    if not number.isdigit():
        raise ManifestError(f"{row.utt_id}: not named digit_speaker_number, so in neither split")
    return "test" if int(number) < 5 else "dev" if int(number) < 10 else "train"


if __name__ == "__main__":
    sys.exit(guard(main))
