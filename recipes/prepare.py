"""`asr prepare`: check a corpus in any usual format, and write a manifest that is fit to train on."""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lhotse.cut import Cut
    from rich.table import Table

    from asr.data.check import LeftOut, Report, Rules

KINDS = ("tsv", "folder", "kaldi", "cuts")


def prepare(
    inputs: Annotated[list[Path], typer.Argument(help="TSV files, folders or manifests")],
    output: Annotated[str, typer.Option("-o", help="DIR/PREFIX to write; without it, only check")] = "",
    source: Annotated[str, typer.Option("--from", help="tsv, folder, kaldi or cuts; default: detected")] = "",
    split: Annotated[str, typer.Option(help="take only this split of a TSV")] = "",
    tokens: Annotated[str, typer.Option(help="tokenizer folder; check that texts fit units and frames")] = "",
    subsampling: Annotated[int, typer.Option(help="subsampling of the encoder, for --tokens")] = 4,
    min_s: Annotated[float, typer.Option(help="leave out shorter utterances, in seconds")] = 0.1,
    max_s: Annotated[float, typer.Option(help="leave out longer utterances, in seconds")] = 30.0,
    test: Annotated[str, typer.Option(help="leave out the speakers of this manifest")] = "",
    store_audio: Annotated[str, typer.Option(help="decode once, to 16 kHz WAV files in this folder")] = "",
    headers_only: Annotated[bool, typer.Option("--headers-only", help="read only headers of audio")] = False,
    allow_pipes: Annotated[
        bool, typer.Option("--allow-pipes", help="run commands of wav.scp and manifests; needs --store-audio")
    ] = False,
    jobs: Annotated[int, typer.Option(help="processes that read audio; 0: one per core")] = 0,
) -> None:
    """Check a corpus, print what is in it, and write a manifest of the utterances fit for training.

    Writes PREFIX.jsonl.gz, a lhotse CutSet, and PREFIX_left_out.jsonl: what is not in it and why.

    Example: asr prepare corpus/transcripts.tsv --split train -o data/manifests/corpus_train
    """
    from functools import partial

    from asr.data.check import Report, check_audio, screen
    from asr.data.check import store_audio as store
    from asr.errors import ConfigError

    if allow_pipes and not store_audio:
        raise ConfigError("--allow-pipes: needs --store-audio DIR, as no other verb runs commands")
    report = Report()
    read = partial(store, folder=Path(store_audio)) if store_audio else None if headers_only else check_audio
    rules = _rules(tokens, subsampling, min_s, max_s, test)
    cuts = _import(inputs, source, split, allow_pipes, report.left_out)
    kept = screen(cuts, rules, report, read, jobs or os.cpu_count() or 1)
    _write(_with_progress(kept), output, report)
    _show(report)


def _rules(tokens: str, subsampling: int, min_s: float, max_s: float, test: str) -> Rules:
    from asr.data.check import Rules
    from asr.data.cuts import cut_speaker, open_cuts
    from asr.tokens import load_tokenizer

    speakers = {cut_speaker(cut) for cut in open_cuts(test)} if test else set()
    return Rules(
        min_s=min_s,
        max_s=max_s,
        tokenizer=load_tokenizer(tokens) if tokens else None,
        subsampling=subsampling,
        test_speakers=frozenset(speakers - {""}),
    )


def _import(
    inputs: list[Path], source: str, split: str, allow_pipes: bool, left_out: list[LeftOut]
) -> Iterator[Cut]:
    from asr.data import importers
    from asr.data.cuts import open_cuts
    from asr.errors import ConfigError

    for path in inputs:
        kind = source or _kind(path)
        if split and kind != "tsv":
            raise ConfigError(f"--split {split}: {path} is read as {kind}, which has no splits")
        if kind == "tsv":
            yield from importers.from_tsv(path, left_out, split)
        elif kind == "folder":
            yield from importers.from_folder(path, left_out)
        elif kind == "kaldi":
            yield from importers.from_kaldi(path, left_out, allow_pipes)
        elif kind == "cuts":
            yield from open_cuts(path, allow_pipes)
        else:
            raise ConfigError(f"--from {kind}: no such source; expected one of {', '.join(KINDS)}")


def _kind(path: Path) -> str:
    if path.is_dir():
        shar = any(path.glob("cuts.*.jsonl*"))
        return "kaldi" if (path / "wav.scp").exists() else "cuts" if shar else "folder"
    return "cuts" if path.name.endswith((".jsonl", ".jsonl.gz")) else "tsv"


def _write(kept: Iterable[Cut], output: str, report: Report) -> None:
    """Write what was kept and what was left out, or without an output only check everything."""
    from asr.data.cuts import save_cuts
    from asr.errors import ManifestError, naming_full_disk

    manifest, left_out = Path(f"{output}.jsonl.gz"), Path(f"{output}_left_out.jsonl")
    if output:
        save_cuts(kept, manifest)
        rows = (json.dumps(vars(item), ensure_ascii=False) + "\n" for item in report.left_out)
        with naming_full_disk(left_out):
            left_out.write_text("".join(rows), encoding="utf-8")
        print(f"{manifest} and {left_out} written", file=sys.stderr)
    else:
        deque(kept, maxlen=0)
    if not report.num_kept:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in report.reasons.most_common())
        raise ManifestError(f"0 of {len(report.left_out):,} utterances left: {reasons or 'there are none'}")


def _with_progress(cuts: Iterable[Cut]) -> Iterator[Cut]:
    """The same cuts, with a progress display on a terminal, or a line per 10,000 of them elsewhere."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("prepare  {task.completed:,} utterances"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("prepare", total=None)
        for number, cut in enumerate(cuts, 1):
            yield cut
            progress.advance(task)
            if not console.is_terminal and number % 10_000 == 0:
                print(f"prepare  {number:,} utterances", file=sys.stderr)


def _show(report: Report) -> None:
    from rich.console import Console

    console = Console()
    console.print(_totals(report))
    console.print(_durations(report))
    if report.left_out:
        console.print(_left_out(report))
    if report.unknown:
        common = "  ".join(f"{c!r} {count:,}" for c, count in report.unknown.most_common(20))
        print(f"{len(report.unknown)} characters become <unk>; texts that contain them: {common}")


def _totals(report: Report) -> Table:
    table = _table("", "")
    table.add_row("utterances", f"{report.num_kept:,}")
    table.add_row("hours", f"{report.seconds / 3600:,.2f}")
    table.add_row("speakers", f"{len(set(report.speakers) - {''}):,}")
    distinct = "".join(sorted(report.characters))
    shown = distinct if len(distinct) <= 100 else distinct[:100] + "..."
    table.add_row("characters", f"{report.characters.total():,}, {len(distinct):,} distinct: {shown}")
    return table


def _durations(report: Report) -> Table:
    """A histogram of at most ten bars."""
    step = max(report.durations, default=0) // 10 + 1
    counts = [0] * (max(report.durations, default=0) // step + 1)
    for second, count in report.durations.items():
        counts[second // step] += count
    table = _table("seconds", "utterances")
    for index, count in enumerate(counts):
        bar = "█" * round(40 * count / max(counts))
        table.add_row(f"{index * step}-{(index + 1) * step}", f"{count:>9,}  {bar}")
    return table


def _left_out(report: Report) -> Table:
    table = _table("left out", "utterances", "first of them")
    for reason, count in report.reasons.most_common():
        first = next(item for item in report.left_out if item.reason == reason)
        table.add_row(reason, f"{count:,}", f"{first.id}  {first.detail}".strip())
    return table


def _table(*columns: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=any(columns), header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(Text(column), overflow="fold")
    return table
