"""The figures of docs/streaming.md: what is attended to, and when words are written, by the library's rules.

python tools/draw_streaming.py [FOLDER]

They are schematics: the sentence and its alignment are made up, but the rules are those of asr.model and
asr.decode, with numbers small enough to be visible.

T encoder frames · U tokens
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from operator import le, lt
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from asr.decode.config import SearchConfig
from asr.decode.ctc import CtcGreedy
from asr.decode.policies import outside_margin
from asr.decode.scorer import BLANK, Chunking
from asr.model.chunked import insert_borders
from asr.model.decoder import SOS_EOS
from asr.model.masks import context_mask, window_mask
from asr.model.segmental import fit_ends
from asr.runtime.endpoint import EndpointConfig, Endpointer

FOLDER = Path(__file__).parents[1] / "docs" / "images"

WORDS = ("turn", "the", "light", "on")
STARTS, ENDS = (3, 10, 14, 26), (9, 13, 22, 33)
"""The first frame of each word, and the one after its last."""

SPIKES = (8, 12, 20, 31)
"""Where CTC emits each word, and where the decoder's attention is when it writes it."""

FRAME_S = 0.04
CHUNK = 8
"""Chunk of the encoder: the number of frames that arrive at a time."""

HEARING = Chunking(step=12, window=15, left=0, hears_eoc=True)
SEARCH = SearchConfig()

HEARD, PLACE, SPOKEN, FAINT = "#4c86c6", "#d1495b", "#edae49", "#b8b8b8"

Bools = NDArray[np.bool_]


# ---- the rules


def look_ahead_mask(num_frames: int, chunk: int, left: int, right: int = 0) -> Bools:
    """(T, T): which frames (columns) a frame (row) attends to in one layer of the encoder."""
    mask = context_mask(torch.tensor([0]), torch.tensor([num_frames]), 0, num_frames, chunk, left, right)
    return mask[0].numpy()


def through_layers(mask: Bools, num_layers: int) -> Bools:
    """(T, T): the receptive field of a frame after several layers."""
    return np.linalg.matrix_power(mask.astype(np.int64), num_layers) > 0


def utterance() -> int:
    """Frames up to the one at which the pause after the last word ends the utterance."""
    ended = Endpointer(EndpointConfig(), FRAME_S).advance(frame not in SPIKES for frame in range(1000))
    assert ended
    return ended[0]


class Hearing(NamedTuple):
    """What a decoder attends to when it writes each of its symbols."""

    name: str
    symbols: Sequence[str]
    mask: Bools
    """(symbols, T)"""


def hearings() -> list[Hearing]:
    """The `Hearing` of every type of decoder and mode."""
    num_frames = utterance()
    arrived = [arrives(partial(alignatt_allows, spike)) for spike in SPIKES]
    triggered = [spike + SEARCH.trigger_frames + 1 for spike in SPIKES]
    return [
        Hearing("joint, attention, rescore", [*WORDS, "end"], _up_to([num_frames] * 5)),
        Hearing(f"triggered, trigger_frames={SEARCH.trigger_frames}", WORDS, _up_to(triggered)),
        Hearing(f"alignatt, margin_frames={SEARCH.margin_frames}", WORDS, _up_to(arrived)),
        _segmental(num_frames),
        _chunked(num_frames),
    ]


def _mask(start: Tensor, end: Tensor) -> Bools:
    return window_mask(start, end, utterance())[0].numpy()


def _up_to(ends: Sequence[int]) -> Bools:
    end = torch.tensor([ends])
    return _mask(torch.zeros_like(end), end)


def _segmental(num_frames: int) -> Hearing:
    ends = fit_ends(torch.tensor([ENDS]), torch.tensor([len(ENDS)]), torch.tensor([num_frames]))
    starts = torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], 1)
    return Hearing("segmental", [*WORDS, "end"], _mask(starts, ends))


def _chunked(num_frames: int) -> Hearing:
    tokens = torch.arange(len(WORDS))[None] + SOS_EOS + 1
    lens, ends = torch.tensor([len(WORDS)]), torch.tensor([ENDS])
    max_chunks = -(-num_frames // HEARING.step)
    targets = insert_borders(tokens, lens, ends, torch.tensor([num_frames]), HEARING.step, max_chunks)
    spans = [HEARING.span(k, num_frames) for k in targets.chunks[0].tolist()]
    start, end = torch.tensor(spans).T[:, None]
    symbols = ["EOC" if x == SOS_EOS else WORDS[x - SOS_EOS - 1] for x in targets.symbols[0].tolist()]
    name = f"chunked, step_frames={HEARING.step}, window_frames={HEARING.window}"
    return Hearing(name, symbols, _mask(start, end))


def alignatt_allows(place: int, num_frames: int) -> bool:
    """Whether a token may be written whose attention peaks at frame `place`, with num_frames arrived."""
    if place >= num_frames - 1:
        return False
    attention = np.eye(num_frames - 1, dtype=np.float32)[place : place + 1]
    return bool(outside_margin(attention, SEARCH)[0])


def arrives(is_enough: Callable[[int], bool]) -> int:
    """The number of frames, in whole encoder chunks, that first suffices; at most that of the utterance."""
    last = -(-utterance() // CHUNK) * CHUNK
    return next((n for n in range(CHUNK, last, CHUNK) if is_enough(n)), last)


def ctc_writes(word: int, num_frames: int) -> bool:
    """Whether the best CTC path of the frames so far has reached this word."""
    log_probs = np.full((num_frames, len(WORDS) + 2), -9.0, np.float32)
    log_probs[:, BLANK] = 0.0
    for u, spike in enumerate(SPIKES):
        if spike < num_frames:
            log_probs[spike, BLANK], log_probs[spike, SOS_EOS + 1 + u] = -9.0, 0.0
    search = CtcGreedy()
    search.advance(log_probs)
    return len(search.best().tokens) > word


class Writing(NamedTuple):
    """When a mode writes each word, in frames arrived."""

    modes: str
    first: list[int]
    for_good: list[int]
    """When it may no longer change."""


def writings() -> list[Writing]:
    """The `Writing` of every mode, if it makes no mistake and computing takes no time."""
    end = [arrives(lambda n: False)] * len(WORDS)
    ctc = [arrives(partial(ctc_writes, u)) for u in range(len(WORDS))]
    triggered = [arrives(partial(lt, spike + SEARCH.trigger_frames)) for spike in SPIKES]
    alignatt = [arrives(partial(alignatt_allows, spike)) for spike in SPIKES]
    segmental = [arrives(partial(lt, last)) for last in ENDS]
    windows = [(last - 1) // HEARING.step * HEARING.step + HEARING.window for last in ENDS]
    chunked = [arrives(partial(le, window)) for window in windows]
    return [
        Writing("ctc-greedy", ctc, ctc),
        Writing("ctc-prefix, rescore,\njoint, attention", ctc, end),
        Writing("triggered", triggered, triggered),
        Writing("alignatt", alignatt, alignatt),
        Writing("segmental", segmental, end),
        Writing("chunked", chunked, end),
    ]


# ---- the pictures


def masks() -> Figure:
    """The attention masks of the encoder."""
    left, ahead = look_ahead_mask(24, 4, 1), look_ahead_mask(24, 4, 1, 1)
    panels = {
        "whole utterance": look_ahead_mask(24, 0, -1),
        "chunk 4, all before": look_ahead_mask(24, 4, -1),
        "chunk 4, left context 1": left,
        "left context 1, through 2 layers": through_layers(left, 2),
        "chunk 4, left context 1,\nlook-ahead 1": ahead,
        "look-ahead 1, through 2 layers": through_layers(ahead, 2),
    }
    figure = Figure(figsize=(8.4, 6.2), layout="constrained")
    for axes, (name, mask) in zip(figure.subplots(2, 3).flat, panels.items(), strict=True):
        _draw_mask(axes, mask)
        axes.set_title(name, fontsize=9)
        axes.set_xticks(range(0, 25, 4))
        axes.set_yticks(range(0, 25, 4))
        axes.grid(color="white", linewidth=0.8)
        axes.set_aspect("equal")
    figure.supxlabel("frame that is heard", fontsize=9)
    figure.supylabel("frame that listens", fontsize=9)
    return figure


def hearing() -> Figure:
    """What decoders attend to when they write."""
    rows = hearings()
    figure = Figure(figsize=(8.4, 8.2), layout="constrained")
    heights = [1.5, *(len(x.symbols) for x in rows)]
    spoken, *panels = figure.subplots(len(heights), sharex=True, height_ratios=heights)
    _draw_spoken(spoken, 1.0)
    spoken.set(ylim=(0, 1), yticks=[])
    spoken.set_title("spoken", fontsize=9, loc="left")
    for axes, (name, symbols, mask) in zip(panels, rows, strict=True):
        _draw_mask(axes, mask)
        for y, symbol in enumerate(symbols):
            if symbol in WORDS:
                axes.plot(SPIKES[WORDS.index(symbol)] + 0.5, y + 0.5, ".", color=PLACE)
        axes.set_yticks(np.arange(len(symbols)) + 0.5, symbols)
        axes.set_title(name, fontsize=9, loc="left")
    panels[-1].set(xlim=(0, utterance()), xlabel="encoder frame (dot: spike of CTC)")
    return figure


def timeline() -> Figure:
    """When modes write."""
    rows = writings()
    figure = Figure(figsize=(8.4, 4.6), layout="constrained")
    axes = figure.subplots()
    last = arrives(lambda n: False)
    for n in range(0, last + 1, CHUNK):
        axes.axvline(n * FRAME_S, color=FAINT, linewidth=0.6, zorder=0)
    _draw_spoken(axes, FRAME_S, y=-0.8, height=0.6)
    for y, (_, first, for_good) in enumerate(rows):
        for n in sorted({*first, *for_good}):
            new = [w for w, a, b in zip(WORDS, first, for_good, strict=True) if n in (a, b)]
            kept = all(b <= n for a, b in zip(first, for_good, strict=True) if n in (a, b))
            face = HEARD if kept else "white"
            axes.plot(n * FRAME_S, y + 0.42, "o", color=HEARD, markerfacecolor=face, markersize=6)
            behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            at = n * FRAME_S, y + 0.26
            axes.text(*at, " ".join(new), ha="center", va="bottom", fontsize=8, bbox=behind)
    axes.set_yticks([-0.5, *(y + 0.42 for y in range(len(rows)))], ["spoken", *(x.modes for x in rows)])
    axes.set(xlim=(0, last * FRAME_S + 0.25), ylim=(len(rows) + 0.1, -1.0))
    axes.set_xlabel(
        f"seconds of sound that have arrived, in chunks of {CHUNK * FRAME_S * 1000:.0f} ms  "
        "(open: may still change; full: stays)"
    )
    axes.set_title("schematic: made-up alignment, no mistakes, computing takes no time", fontsize=9)
    return figure


def _draw_mask(axes: Axes, mask: Bools) -> None:
    """A bar for every run of frames."""
    for y, row in enumerate(mask):
        edges = np.flatnonzero(np.diff(row.astype(np.int8), prepend=0, append=0))
        runs = [(start, end - start) for start, end in edges.reshape(-1, 2).tolist()]
        axes.broken_barh(runs, (y + 0.06, 0.88), color=HEARD, linewidth=0)
    axes.set(xlim=(0, mask.shape[1]), ylim=(len(mask), 0))
    axes.set_axisbelow(False)


def _draw_spoken(axes: Axes, unit: float, y: float = 0.1, height: float = 0.8) -> None:
    for word, start, end in zip(WORDS, STARTS, ENDS, strict=True):
        axes.broken_barh([(start * unit, (end - start) * unit)], (y, height), color=SPOKEN, linewidth=0)
        axes.text((start + end) / 2 * unit, y + height / 2, word, ha="center", va="center", fontsize=8)


FIGURES: dict[str, Callable[[], Figure]] = {
    "streaming-masks.png": masks,
    "streaming-hearing.png": hearing,
    "streaming-timeline.png": timeline,
}


def draw(folder: Path) -> list[Path]:
    """Write all of them; the same files each time, with one version of matplotlib."""
    folder.mkdir(parents=True, exist_ok=True)
    style: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    files = []
    with matplotlib.rc_context(style):
        for name, figure in FIGURES.items():
            figure().savefig(folder / name, dpi=100, facecolor="white", metadata={"Software": None})
            files.append(folder / name)
    return files


if __name__ == "__main__":
    for file in draw(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER):
        print(file)
