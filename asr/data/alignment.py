"""Fixed alignments: when each unit of a text is spoken, kept in the manifest beside the text.

A supervision has `alignment={"token": [AlignmentItem, ...]}`: an item for each unit of its text, with the
unit as its symbol, and times in seconds from the start of the supervision. When lhotse mixes, truncates,
joins or pads cuts, it moves that start and not the alignment; when it changes the speed, it scales both. The
times of a supervision thus stay right whatever is done to its cut.

A space that is a unit of its own (characters, phones) belongs to the word after it. Between joined words that
were aligned separately, the space has no item; it then is the pause, and ends where the next word starts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lhotse.cut import Cut, MixedCut
from lhotse.supervision import AlignmentItem

from asr.data.cuts import cut_text, spoken
from asr.errors import ManifestError
from asr.tokens import SPACE

if TYPE_CHECKING:
    from asr.tokens import Tokenizer

KIND = "token"
"""Our key in `alignment`, besides those for words or phones that a corpus may provide."""

TOLERANCE_S = 0.01
"""Tolerated deviation of times and cut ends from rounding to samples; anything above is an error."""


def with_alignment(cut: Cut, tokenizer: Tokenizer, spans: Sequence[tuple[float, float, float]]) -> Cut:
    """The cut with an alignment. spans: start and end in seconds of the cut, and score, for each unit.

    Raises ManifestError if the units of a joined text differ from those of its parts.
    """
    segments = cut.supervisions
    left = iter(spans)
    items = {
        id(segment): [_item(unit, next(left), segment.start) for unit in units]
        for segment, units in zip(spoken(segments), _parts(cut, tokenizer), strict=True)
    }
    aligned = (items.get(id(segment)) for segment in segments)
    if not isinstance(cut, MixedCut):
        return _with_items(cut, aligned)
    tracks = [
        track if track.mute else replace(track, cut=_with_items(track.cut, aligned)) for track in cut.tracks
    ]
    return replace(cut, tracks=tracks)


def _item(unit: str, span: tuple[float, float, float], origin_s: float) -> AlignmentItem:
    start_s, end_s, score = span
    return AlignmentItem(unit, round(start_s - origin_s, 6), round(end_s - start_s, 6), round(score, 4))


def _with_items(cut: Cut, aligned: Iterator[list[AlignmentItem] | None]) -> Cut:
    """The cut, each supervision with the next of the alignments; None leaves a supervision as it is."""
    if not cut.supervisions:
        return cut
    segments = [
        segment if items is None else replace(segment, alignment={**(segment.alignment or {}), KIND: items})
        for segment, items in zip(cut.supervisions, aligned, strict=False)
    ]
    return replace(cut, supervisions=segments)


def _parts(cut: Cut, tokenizer: Tokenizer) -> list[list[str]]:
    """The units of each supervision with text, as they occur in those of the whole text."""
    whole = _units(tokenizer, cut_text(cut))
    parts: list[list[str]] = []
    num_units = 0
    for segment in spoken(cut.supervisions):
        part = _units(tokenizer, segment.text)
        if num_units and _begins_with_space(whole[num_units:]) and not _begins_with_space(part):
            part = [SPACE, *part]
        parts.append(part)
        num_units += len(part)
    if (found := list(itertools.chain(*parts))) != whole:
        raise ManifestError(
            f"{cut.id}: the units of its words are not those of its joined text: "
            f"{_first_difference(found, whole)}; use a tokenizer whose units stay within words"
        )
    return parts


def _units(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.symbols[token] for token in tokenizer.encode(text)]


def _begins_with_space(units: Sequence[str]) -> bool:
    return list(units[:1]) == [SPACE]


def token_ends(cuts: Sequence[Cut], units: Sequence[Sequence[str]]) -> list[list[float]]:
    """The end of each unit of each cut, in seconds from the start of the cut; empty if no cut is aligned.

    units: of the text of each cut. Times do not decrease, and lie within the cut. Raises ManifestError if
    only some cuts have an alignment, or if one does not fit its text or its audio.
    """
    without = [cut for cut, row in zip(cuts, units, strict=True) if row and not _is_aligned(cut)]
    if without and len(without) == sum(map(bool, units)):
        return [[] for _ in cuts]
    if without:
        raise ManifestError(
            f"{without[0].id}: has no alignment, other utterances have one; run asr align on all manifests"
        )
    return [_ends_of(cut, row) for cut, row in zip(cuts, units, strict=True)]


def _is_aligned(cut: Cut) -> bool:
    return any(KIND in (segment.alignment or {}) for segment in cut.supervisions)


def _ends_of(cut: Cut, units: Sequence[str]) -> list[float]:
    found: list[tuple[str, float]] = []
    for segment in spoken(cut.supervisions):
        items = (segment.alignment or {}).get(KIND, [])
        symbols = [item.symbol for item in items]
        if found and _begins_with_space(units[len(found) :]) and not _begins_with_space(symbols):
            found.append((SPACE, segment.start))
        found += [(item.symbol, segment.start + item.end) for item in items]
    symbols = [symbol for symbol, _ in found]
    if symbols != list(units):
        raise ManifestError(
            f"{cut.id}: alignment does not fit its text: {_first_difference(symbols, units)}; "
            "run asr align again"
        )
    return _checked(cut, found)


def _checked(cut: Cut, found: Sequence[tuple[str, float]]) -> list[float]:
    """The end times, made non-decreasing and clipped to the cut after a check."""
    ends: list[float] = []
    for number, (symbol, end_s) in enumerate(found):
        least_s = ends[-1] if ends else 0.0
        if not least_s - TOLERANCE_S <= end_s <= cut.duration + TOLERANCE_S:
            raise ManifestError(
                f"{cut.id}: unit {number} of its alignment, {symbol}, ends at {end_s:.3f} s, expected "
                f"{least_s:.3f} to {cut.duration:.3f} s; run asr align again"
            )
        ends.append(min(max(end_s, least_s), cut.duration))
    return ends


def _first_difference(found: Sequence[str], expected: Sequence[str]) -> str:
    """`from unit 3 on: b c d, expected ▁b c d`"""
    pairs = itertools.zip_longest(found, expected)
    first = next(number for number, (a, b) in enumerate(pairs) if a != b)
    a, b = (" ".join(row[first : first + 5]) or "nothing" for row in (found, expected))
    return f"from unit {first} on {a}, expected {b}"
