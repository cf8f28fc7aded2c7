"""`asr tokenizer`: the units of a model, from the text of manifests."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from asr.errors import ManifestError
from asr.tokens import UNK, Tokenizer, normalise, train_tokenizer


def tokenizer(
    manifests: Annotated[
        list[Path], typer.Argument(help="CutSet manifests (.jsonl, .jsonl.gz), or .txt with one text a line")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="folder to write tokens.txt and tokens.model to")],
    kind: Annotated[str, typer.Option(help="unigram, bpe, char or phone")] = "unigram",
    vocab: Annotated[
        int, typer.Option(help="number of units; for char an upper limit, 0: no limit; not for phone")
    ] = 0,
    lexicon: Annotated[
        Path | None, typer.Option(help="for phone: file of lines word phone phone ...")
    ] = None,
) -> None:
    """Make a tokenizer from the text of manifests, and print how well its units cover that text.

    Example: asr tokenizer data/manifests/mini_train.jsonl.gz --vocab 500 -o data/unigram500
    """
    made = train_tokenizer(read_texts(manifests), kind, vocab, out, lexicon)
    print(f"{out}: {kind}, {_coverage(made, manifests)}")


def read_texts(paths: list[Path]) -> Iterator[str]:
    """The text of every supervision of CutSet manifests, also inside mixed cuts, or the lines of .txt."""
    for path in paths:
        for number, line in _lines(path):
            if path.suffix == ".txt":
                yield line
            elif line.strip():
                yield from _texts_of_line(line, f"{path}:{number}")


def _texts_of_line(line: str, where: str) -> Iterator[str]:
    try:
        cut = json.loads(line)
        supervisions = [s for one in _plain_cuts(cut) for s in one.get("supervisions", [])]
        texts = [supervision.get("text") for supervision in supervisions]
    except json.JSONDecodeError as error:
        raise ManifestError(
            f"{where}: not JSON at column {error.colno}; is this a CutSet manifest?"
        ) from None
    except (AttributeError, KeyError, TypeError):
        raise ManifestError(f"{where}: expected a cut with supervisions, found {line[:60]!r}") from None
    yield from (text for text in texts if text)


def _plain_cuts(cut: dict[str, Any]) -> list[dict[str, Any]]:
    return [track["cut"] for track in cut["tracks"]] if "tracks" in cut else [cut]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02X} at column {error.start + 1}"
        raise ManifestError(f"{path}:{number}: {found} is not UTF-8; convert the file with iconv") from None
    except FileNotFoundError:
        raise ManifestError(f"{path}: not found; make manifests with asr prepare or a recipe") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise ManifestError(f"{path}: damaged gzip after line {number}; make it again") from None
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}") from None


def _coverage(made: Tokenizer, manifests: list[Path]) -> str:
    """Read the texts again: their length in units, and what is not covered."""
    num_texts = num_words = num_ids = num_unknown = 0
    for text in read_texts(manifests):
        ids = made.encode(text)
        num_texts += 1
        num_words += len(normalise(text).split())
        num_ids += len(ids)
        num_unknown += ids.count(UNK)
    per_word = num_ids / max(num_words, 1)
    return (
        f"{len(made.symbols):,} units; {num_texts:,} texts, {num_words:,} words, "
        f"{per_word:.2f} units per word, {num_unknown:,} unknown"
    )
