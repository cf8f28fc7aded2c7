"""The table that `prepare.py` of a corpus writes for `asr prepare`: tab-separated, one line per utterance."""

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from asr.errors import ManifestError

TABLE = "transcripts.tsv"


class Row(NamedTuple):
    """The columns of a table."""

    utt_id: str
    audio: str
    """Path of the audio file, absolute or relative to the folder of the table."""

    speaker: str
    split: str
    text: str


def read_table(path: Path) -> Iterator[Row]:
    """The rows of a table, paths made absolute, other columns ignored. ManifestError if one is absent."""
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            for cells in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
                absent = [name for name in Row._fields if cells.get(name) is None]
                if absent:
                    raise ManifestError(
                        f"{path}: no column {', '.join(absent)}; expected {' '.join(Row._fields)}"
                    )
                row = Row(*(cells[name] for name in Row._fields))
                yield row._replace(audio=str(path.parent.absolute() / row.audio))
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}; give a folder that holds the corpus") from None


def write_table(rows: Iterable[Row], path: Path) -> None:
    """Write a table, and print how many utterances and speakers each split has. ManifestError for no rows."""
    rows = sorted(rows)
    if not rows:
        raise ManifestError(f"{path}: no utterance found; give the folder that holds the corpus")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as lines:
        for row in (Row._fields, *rows):
            print(*row, sep="\t", file=lines)
    for split in sorted({row.split for row in rows}):
        own = [row for row in rows if row.split == split]
        print(f"{path}: {split}, {len(own):,} utterances, {len({row.speaker for row in own}):,} speakers")
