"""Recordings of hours: cut where nobody speaks, and decoded in batches of pieces.

Every piece is encoded at once, like an utterance, so that any mode can search it, and models that cannot
stream work too. Memory holds one batch of pieces. Batches depend on the recording and the configuration
alone: a caller who has the events of the first ones need not decode them again.

S samples
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from asr.context import WHOLE, Context
from asr.decode.config import SearchConfig
from asr.decode.modes import check_name, decode, mode_of
from asr.decode.scorer import Floats, Hypothesis
from asr.runtime.bundle import Bundle
from asr.runtime.cutter import CutConfig, Cutter, Piece
from asr.runtime.events import Event, make_event
from asr.runtime.onnx_scorer import OnnxScorer
from asr.runtime.stream import check_samples
from asr.runtime.voice import VoiceActivity

BATCH_S = 60.0
"""Seconds of audio per batch of pieces."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordingConfig:
    """How a recording is decoded."""

    mode: str = ""
    """One of MODES; "": the model's default."""

    search: SearchConfig = field(default_factory=SearchConfig)

    cut: CutConfig = field(default_factory=CutConfig)

    context: Context = WHOLE
    """The context of attention within a piece."""

    def __post_init__(self) -> None:
        check_name(self.mode)


@dataclass(frozen=True)
class Batch:
    """The events of some consecutive pieces of a recording."""

    events: tuple[Event, ...]
    """Final events, in order, with times from the start of the recording."""

    end_s: float
    """Up to where the recording has been decoded."""


class Recording:
    """One recording, and the model that decodes it."""

    def __init__(self, bundle: Bundle, config: RecordingConfig) -> None:
        """ConfigError or BundleError if that is not possible, MissingExtra without silero-vad."""
        info = bundle.info
        info.check_context(config.context)
        self._scorer, self._rate = OnnxScorer(bundle), info.features.sample_rate
        self._config = replace(config, mode=mode_of(self._scorer, config.mode))
        self._unit = info.subsampling * info.features.shift_samples
        self._cut = config.cut
        if longest := info.features.max_samples:
            self._cut = replace(config.cut, max_s=min(config.cut.max_s, longest / self._rate))
        self._voice = VoiceActivity(self._rate)
        self.duration_s = 0.0
        """Seconds of audio read so far."""

    def batches(self, blocks: Iterable[Floats], num_known: int = 0) -> Iterator[Batch]:
        """Blocks of samples (S,), float32 in [-1, 1] at the bundle's sample rate -> batches in order.

        The first num_known batches are skipped without decoding them. AudioError for NaN.
        """
        pieces: list[Piece] = []
        for number, pieces in enumerate(_together(self._pieces(blocks), BATCH_S * self._rate)):
            if number >= num_known:
                events = tuple(self._decode(pieces))
                yield Batch(events, (pieces[-1].start + len(pieces[-1].samples)) / self._rate)

    def _pieces(self, blocks: Iterable[Floats]) -> Iterator[Piece]:
        cutter = Cutter(self._cut, self._rate, self._voice.window, self._unit)
        num_samples = 0
        for block in blocks:
            samples = check_samples(block, num_samples, finished=False)
            num_samples += len(samples)
            self.duration_s = num_samples / self._rate
            yield from cutter.accept(samples, self._voice.accept(samples))
        yield from cutter.finish(self._voice.finish())

    def _decode(self, pieces: list[Piece]) -> Iterator[Event]:
        """The events of pieces that have a text."""
        config, tokenizer = self._config, self._scorer.bundle.tokenizer
        samples = [piece.samples for piece in pieces]
        found = decode(self._scorer, config.mode, samples, config.search, config.context)
        for piece, nbest in zip(pieces, found, strict=True):
            hypothesis = self._own(nbest[0], piece)
            first_frame = piece.start // self._unit
            event = make_event(hypothesis, tokenizer, self._scorer.frame_s, first_frame, final=True)
            if event.text:
                yield event

    def _own(self, hypothesis: Hypothesis, piece: Piece) -> Hypothesis:
        """The hypothesis without words that belong to the previous or the next piece."""
        if math.isinf(piece.own_from_s) and math.isinf(piece.own_to_s):
            return hypothesis
        frames, start_s, frame_s = hypothesis.frames, piece.start / self._rate, self._scorer.frame_s
        spans = [
            (first, end)
            for _, first, end in self._scorer.bundle.tokenizer.words(hypothesis.tokens)
            if piece.own_from_s
            <= start_s + (frames[first] + frames[end - 1] + 1) / 2 * frame_s
            < piece.own_to_s
        ]
        kept = slice(spans[0][0], spans[-1][1]) if spans else slice(0)
        return replace(
            hypothesis,
            tokens=hypothesis.tokens[kept],
            frames=frames[kept],
            confidence=hypothesis.confidence[kept],
        )


def _together(pieces: Iterable[Piece], num_samples: float) -> Iterator[list[Piece]]:
    """Batches of pieces with num_samples together, or a little more."""
    batch: list[Piece] = []
    for piece in pieces:
        batch.append(piece)
        if sum(len(x.samples) for x in batch) >= num_samples:
            yield batch
            batch = []
    if batch:
        yield batch
