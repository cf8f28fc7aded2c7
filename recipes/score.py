"""`asr score`: error rates of hypotheses, their confidence intervals, and where the errors are."""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import typer

from asr import wer
from asr.errors import ConfigError, ManifestError
from asr.tokens import normalise
from asr.wer import ErrorCount, Interval, Pairs

NUM_COMMONEST = 10
NUM_WORST = 5


def score(
    target: Annotated[
        Path, typer.Argument(help="hyp.jsonl, or an experiment: all of its decode/*/hyp.jsonl")
    ],
    cer: Annotated[bool, typer.Option("--cer", help="count characters, not words")] = False,
    compare: Annotated[
        Path | None, typer.Option(help="another hyp.jsonl: is it better on the same utterances?")
    ] = None,
    by_speaker: Annotated[bool, typer.Option("--by-speaker", help="also print every speaker")] = False,
    align: Annotated[
        Path | None, typer.Option(help="write utterances with errors to this file, aligned")
    ] = None,
    ignore_case: Annotated[bool, typer.Option("--ignore-case", help="A equals a")] = False,
    ignore_punctuation: Annotated[
        bool, typer.Option("--ignore-punctuation", help="drop punctuation, except apostrophes")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object per set")] = False,
) -> None:
    """Print word or character error rates with 95 % intervals, the commonest errors and the worst utterances.

    Writes all of it to wer.txt beside each hyp.jsonl. For an experiment, prints one line per set and mode.

    Example: asr score exp/conformer-s/decode/test_ctc-prefix/hyp.jsonl --by-speaker
    """
    text = Normaliser(ignore_case, ignore_punctuation)
    results = [Result(path, read_rows(path), cer, text) for path in _hyp_files(target)]
    width = max(len(result.name) for result in results)
    for result in results:
        report = list(report_lines(result))
        _write(result.path.with_name("wer.txt"), [*report, *speaker_lines(result)])
        if as_json:
            print(json.dumps(result.as_dict(by_speaker), ensure_ascii=False))
        else:
            details = (
                [*report[1:], *(speaker_lines(result) if by_speaker else [])] if len(results) == 1 else []
            )
            print("\n".join([total_line(result, width), *details]))
    if align is not None:
        _write(align, [line for result in results for line in alignment_lines(result)])
    if compare is not None:
        if len(results) > 1:
            raise ConfigError(
                f"{target}: has {len(results)} sets; --compare needs one hyp.jsonl on each side"
            )
        _print_comparison(results[0], Result(compare, read_rows(compare), cer, text), as_json)


@dataclass(frozen=True)
class Normaliser:
    """Reduces a text to what is compared."""

    ignore_case: bool
    ignore_punctuation: bool

    def __call__(self, text: str) -> str:
        text = normalise(text)
        if self.ignore_case:
            text = text.casefold()
        if self.ignore_punctuation:
            text = text.replace("’", "'")
            text = "".join(c if c == "'" or unicodedata.category(c)[0] != "P" else " " for c in text)
        return " ".join(text.split())


@dataclass
class Row:
    """One line of hyp.jsonl; hyp is None if the utterance was not decoded."""

    id: str
    speaker: str
    ref: str
    hyp: str | None


class Result:
    """The rows of one hyp.jsonl, aligned."""

    def __init__(self, path: Path, rows: list[Row], cer: bool, text: Normaliser) -> None:
        self.path, self.rows, self.cer = path, rows, cer
        self.name = _set_name(path)
        split = wer.characters if cer else wer.words
        self.refs = [text(row.ref) for row in rows]
        self.alignments: list[Pairs] = [
            wer.align(split(ref), split(text(row.hyp or "")))
            for ref, row in zip(self.refs, rows, strict=True)
        ]
        self.counts = [wer.count_errors(pairs) for pairs in self.alignments]
        self.total = wer.total(self.counts)
        if not self.total.ref:
            raise ManifestError(f"{path}: no utterance has a reference; decode a set with text to score it")

    @property
    def missing(self) -> int:
        return sum(row.hyp is None for row in self.rows)

    @cached_property
    def interval(self) -> Interval:
        return wer.interval(self.counts)

    @property
    def measure(self) -> str:
        return "CER" if self.cer else "WER"

    def by_speaker(self) -> dict[str, ErrorCount]:
        speakers: dict[str, ErrorCount] = {}
        for row, count in zip(self.rows, self.counts, strict=True):
            speakers[row.speaker] = speakers.get(row.speaker, ErrorCount()) + count
        return dict(sorted(speakers.items(), key=lambda item: -item[1].rate))

    def as_dict(self, with_speakers: bool) -> dict[str, Any]:
        speakers = {name: _as_dict(count) for name, count in self.by_speaker().items()}
        return {
            "path": str(self.path),
            "measure": self.measure,
            **_as_dict(self.total),
            "low": self.interval.low,
            "high": self.interval.high,
            "utterances": len(self.rows),
            "missing": self.missing,
            **({"speakers": speakers} if with_speakers else {}),
        }


def _as_dict(count: ErrorCount) -> dict[str, float]:
    return {"rate": count.rate, "ref": count.ref, "ins": count.ins, "del": count.dels, "sub": count.subs}


# Reading


def _hyp_files(target: Path) -> list[Path]:
    if not target.is_dir():
        return [target]
    found = sorted(target.glob("decode/*/hyp.jsonl"))
    if not found:
        raise ConfigError(f"{target}: has no decode/*/hyp.jsonl; run asr decode {target} MANIFEST first")
    return found


def _set_name(path: Path) -> str:
    """`test-clean  ctc-prefix` of .../decode/test-clean_ctc-prefix/hyp.jsonl."""
    from asr.decode.modes import MODES

    if path.name != "hyp.jsonl":
        return path.stem
    folder = path.resolve().parent.name
    for mode in MODES:
        before, found, after = folder.rpartition(f"_{mode}")
        if found and (not after or after.startswith("_")):
            return f"{before}  {mode}{after}"
    return folder


def read_rows(path: Path) -> list[Row]:
    """The utterances of a hyp.jsonl; ManifestError with the number of an invalid line."""
    rows: list[Row] = []
    lines: dict[str, int] = {}
    for number, line in _lines(path):
        row = _parse_row(line, f"{path}:{number}")
        if row.id in lines:
            raise ManifestError(f"{path}:{number}: utterance {row.id} is already on line {lines[row.id]}")
        lines[row.id] = number
        rows.append(row)
    if not rows:
        raise ManifestError(f"{path}: holds no utterances; run asr decode again")
    return rows + [row for row in _failed(path.with_name("failures.jsonl")) if row.id not in lines]


def _failed(path: Path) -> list[Row]:
    """The utterances that asr decode could not read, if their references are listed."""
    lines = list(_lines(path)) if path.exists() else []
    return [_parse_row(line, f"{path}:{number}") for number, line in lines if '"ref"' in line]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8") as stream:
            yield from ((number, line) for number, line in enumerate(stream, start=1) if line.strip())
    except FileNotFoundError:
        raise ConfigError(f"{path}: not found; asr decode writes it") from None
    except UnicodeDecodeError:
        raise ManifestError(f"{path}: not UTF-8 text, expected the hyp.jsonl of asr decode") from None
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or str(error)).lower()}") from None


def _parse_row(line: str, where: str) -> Row:
    try:
        data = json.loads(line)
        row = Row(data["id"], data.get("speaker") or "-", data["ref"], data.get("hyp"))
    except json.JSONDecodeError as error:
        raise ManifestError(f"{where}: not JSON at column {error.colno}; run asr decode again") from None
    except KeyError as error:
        raise ManifestError(
            f"{where}: has no {error.args[0]!r}; expected the hyp.jsonl of asr decode"
        ) from None
    except (AttributeError, TypeError):
        raise ManifestError(f"{where}: found {line[:40]!r}, expected an object") from None
    if not all(isinstance(value, str) for value in (row.id, row.speaker, row.ref, row.hyp or "")):
        raise ManifestError(f"{where}: id, speaker, ref and hyp must be text")
    return row


# The report


def total_line(result: Result, width: int = 0) -> str:
    count, unit = result.total, "characters" if result.cer else "words"
    missing = f"  {result.missing:,} without a hypothesis, counted as deletions" if result.missing else ""
    return (
        f"{result.name:{width}}  {result.measure} {100 * count.rate:.2f} % "
        f"[95 % {100 * result.interval.low:.2f}-{100 * result.interval.high:.2f}] "
        f"[{count.ref:,} {unit}: {_parts(count)}]{missing}"
    )


def report_lines(result: Result) -> Iterator[str]:
    """The total, rates by length, the commonest errors, and the worst utterances."""
    yield total_line(result)
    yield "\nby length of the reference"
    for length, num, count in wer.by_length(result.counts):
        yield f"  {length:>8}  {100 * count.rate:7.2f} %  {num:6,} utterances  [{_parts(count)}]"
    found = wer.confusions(result.alignments)
    yield from _commonest(
        "substitutions", Counter({f"{ref} > {hyp}": n for (ref, hyp), n in found.subs.items()})
    )
    yield from _commonest("deletions", found.dels)
    yield from _commonest("insertions", found.ins)
    order = sorted(range(len(result.rows)), key=lambda i: -result.counts[i].total)
    worst = [i for i in order[:NUM_WORST] if result.counts[i].total]
    yield "\nworst utterances" if worst else "\nno errors"
    for i in worst:
        yield from aligned(result.rows[i].id, result.counts[i], result.alignments[i])


def speaker_lines(result: Result) -> Iterator[str]:
    yield "\nby speaker"
    speakers = result.by_speaker()
    width = max(map(len, speakers))
    for speaker, count in speakers.items():
        yield f"  {speaker:{width}}  {100 * count.rate:7.2f} %  {count.ref:7,}  [{_parts(count)}]"


def alignment_lines(result: Result) -> Iterator[str]:
    for row, count, pairs in zip(result.rows, result.counts, result.alignments, strict=True):
        if count.total:
            yield from aligned(row.id, count, pairs)


def aligned(name: str, count: ErrorCount, pairs: Pairs) -> list[str]:
    """An utterance with its reference above its hypothesis; `*` where one of them lacks a unit."""
    widths = [max(len(ref), len(hyp)) for ref, hyp in pairs]
    ref, hyp = (
        " ".join((pair[side] or "*" * width).ljust(width) for pair, width in zip(pairs, widths, strict=True))
        for side in (0, 1)
    )
    return [
        f"  {name}  [{_parts(count)}]",
        f"    ref  {ref.rstrip()}",
        f"    hyp  {hyp.rstrip()}",
    ]


def _commonest(what: str, counts: Counter[str]) -> list[str]:
    common = "   ".join(f"{unit} {num:,}" for unit, num in counts.most_common(NUM_COMMONEST))
    return [f"\ncommonest {what}", f"  {common}"] if counts else []


def _parts(count: ErrorCount) -> str:
    return f"{count.ins:,} ins, {count.dels:,} del, {count.subs:,} sub"


def _print_comparison(a: Result, b: Result, as_json: bool) -> None:
    """Compare both on the utterances of a; those missing in b count as deletions."""
    theirs = {row.id: i for i, row in enumerate(b.rows)}
    counts: list[ErrorCount] = []
    for row, ref, count in zip(a.rows, a.refs, a.counts, strict=True):
        i = theirs.pop(row.id, None)
        if i is not None and b.refs[i] != ref:
            raise ManifestError(f"{b.path}: utterance {row.id} has a different reference in {a.path}")
        counts.append(ErrorCount(count.ref, dels=count.ref) if i is None else b.counts[i])
    found = wer.compare(a.counts, counts)
    num_lacking = len(a.rows) - (len(b.rows) - len(theirs))
    if as_json:
        others = {"lacking": num_lacking, "more": len(theirs)}
        print(json.dumps({"compare": str(b.path), **_comparison_dict(found), **others}))
        return
    print(f"\ncompared with {b.path}: {_comparison_text(a.measure, wer.total(counts), found)}")
    if num_lacking:
        print(f"  {num_lacking:,} utterances missing from it are counted as deletions")
    if theirs:
        print(f"  {len(theirs):,} utterances found only in it are left out")


def _comparison_dict(found: wer.Comparison) -> dict[str, Any]:
    return {
        "difference": found.difference,
        "low": found.interval.low,
        "high": found.interval.high,
        "p": found.p,
        "significant": found.is_significant,
    }


def _comparison_text(measure: str, count: ErrorCount, found: wer.Comparison) -> str:
    low, high = 100 * found.interval.low, 100 * found.interval.high
    verdict = "better" if found.difference < 0 else "worse"
    verdict = verdict if found.is_significant else "no significant difference"
    change = f"{100 * found.difference:+.2f} [95 % {low:+.2f} to {high:+.2f}], p {found.p:.3f}"
    return f"{measure} {100 * count.rate:.2f} %, {change}: {verdict}"


def _write(path: Path, lines: Sequence[str]) -> None:
    try:
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {(error.strerror or str(error)).lower()}") from None
