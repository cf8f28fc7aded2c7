"""Compares a bundle with its model: log-probabilities, units and words, at once and in chunks.

In float32 the two are the same function, up to rounding. With 8-bit matrices they are not, and what counts is
whether the words are the same. The limits are defined here, and exceeding one is an error.

S samples · T encoder frames · V units
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from kaldialign import edit_distance

from asr.context import WHOLE, Context
from asr.decode.config import SearchConfig
from asr.decode.ctc import CtcGreedy
from asr.decode.modes import AT_END, decode
from asr.decode.scorer import Floats, Scorer
from asr.errors import BundleError
from asr.runtime.bundle import Bundle
from asr.runtime.endpoint import EndpointConfig
from asr.runtime.info import ModelInfo
from asr.runtime.onnx_scorer import OnnxScorer
from asr.runtime.stream import Stream
from asr.runtime.utterance import StreamConfig
from asr.tokens import Tokenizer
from asr.wer import total, word_errors

MAX_DIFFERENCE = 1e-3
"""Maximum difference of any float32 log-probability above `LIKELY`, on real audio: rounding in 12 layers."""

LIKELY = -20.0
"""Log-probabilities below this are irrelevant."""

MAX_UNITS = 5.0
"""Per cent of units that an int8 target may change, ..."""

MAX_WER = 0.5
"""... and per cent of words by which it may be worse."""

MIN_WORDS = 1000
"""Fewer reference words than this say nothing about half a per cent."""


MADE_TOKENS = 15
"""The number of made tokens after which predictions of a decoder without CTC are compared."""


class Utterance(NamedTuple):
    name: str
    samples: Floats
    text: str


Encode = Callable[[Floats], Floats]
"""Samples (S,) -> CTC log-probabilities (T, V)."""


@dataclass(frozen=True)
class Answers:
    """The outputs of one model for the utterances in one context."""

    log_probs: list[Floats]
    tokens: list[tuple[int, ...]]
    wer: float | None
    """In per cent; None without reference words."""
    num_words: int


@dataclass(frozen=True)
class Comparison:
    """Two models on the same utterances."""

    max_difference: float
    same: int
    """Utterances with the same units."""
    total: int
    units: float
    """Per cent of units that differ."""
    wer: tuple[float | None, float | None]
    num_words: int


def at_once(scorer: Scorer, context: Context) -> Encode:
    """One call per utterance, in any context: the reference for streams."""
    if not scorer.has_ctc:
        return lambda samples: follows(scorer, samples)
    return lambda samples: scorer.encode([samples], context)[0][0]


def follows(scorer: Scorer, samples: Floats) -> Floats:
    """Log-probabilities (U, V) of what the decoder would write after each of some made tokens: these are
    compared if there is no CTC head."""
    _, memory = scorer.encode([samples])
    state, rows = scorer.start(memory, np.zeros(1, np.int64)), []
    made = np.random.default_rng(0).integers(0, scorer.num_tokens, MADE_TOKENS)
    for token in [scorer.sos_eos, *made.tolist()]:
        step = scorer.step(state, np.array([token]), scorer.num_tokens)
        rows.append(step.log_probs[0][np.argsort(step.ids[0])])
        state = step.state
    return np.stack(rows)


def in_chunks(bundle: Bundle, context: Context) -> Encode:
    """Call by call with the state in between, like a stream."""
    return lambda samples: encode_in_chunks(OnnxScorer(bundle), samples, context)[1]


def encode_in_chunks(scorer: OnnxScorer, samples: Floats, context: Context) -> tuple[Floats, Floats]:
    """The encoder's output y (T, C) and CTC log-probabilities (T, V), as in a stream."""
    info = scorer.bundle.info
    framer, state = scorer.framer(), scorer.init_state(context)
    framer.accept(samples)
    framer.finish()
    ys, log_probs = [np.zeros((0, info.dim), np.float32)], [np.zeros((0, scorer.num_tokens), np.float32)]
    size = context.chunk * info.subsampling + info.overlap_frames
    while num := min(framer.ready(), size):
        is_last = num == framer.ready()
        flush = info.flush_frames(context) if is_last else 0
        window = framer.take(num, again=0 if is_last else info.overlap_frames)
        out = scorer.advance(window[None], np.array([num]), context, state, flush)
        state = out.state
        ys.append(out.y[0, : out.y_lens[0]])
        log_probs.append(out.log_probs[0, : out.y_lens[0]])
    return np.concatenate(ys), np.concatenate(log_probs)


def encoding(bundle: Bundle, context: Context) -> Encode:
    """The way a bundle is used in a context: at once, or as a stream."""
    return at_once(OnnxScorer(bundle), WHOLE) if context == WHOLE else in_chunks(bundle, context)


def contexts(info: ModelInfo) -> list[Context]:
    """At once, with the bundle's chunks, with the shortest, and with look-ahead if it was trained; only at
    once if the encoder cannot stream."""
    if info.streaming is None or not info.has_ctc:
        return [WHOLE]
    chunks = {info.streaming.chunk_ms, min(info.streaming.chunk_choices_ms)}
    frames = sorted((info.chunk_frames(ms) for ms in chunks), reverse=True)
    found = [WHOLE, *(Context(chunk, info.streaming.left_chunks) for chunk in frames)]
    return [*found, looking_ahead(info)] if info.streaming.max_look_ahead else found


def looking_ahead(info: ModelInfo) -> Context:
    """The shortest chunks with the maximum look-ahead of training, or one chunk if none was trained."""
    chunk = info.chunk_frames(min(info.stream.chunk_choices_ms))
    return Context(chunk, info.stream.left_chunks, max(info.stream.max_look_ahead, 1))


def possible_contexts(info: ModelInfo) -> list[Context]:
    """`contexts`, plus look-ahead whenever it is possible."""
    can_look_ahead = len(contexts(info)) > 1 and info.stream.look_ahead_layers > 0
    return list(dict.fromkeys([*contexts(info), *([looking_ahead(info)] if can_look_ahead else [])]))


def answer(
    encode: Encode, utterances: Sequence[Utterance], tokenizer: Tokenizer, has_ctc: bool = True
) -> Answers:
    """Log-probabilities, greedy units, and, with CTC, the word error rate of their text."""
    log_probs = [encode(utterance.samples) for utterance in utterances]
    if not has_ctc:
        return Answers(log_probs, [tuple(x.argmax(1).tolist()) for x in log_probs], None, 0)
    tokens = []
    for frames in log_probs:
        search = CtcGreedy()
        search.advance(frames)
        tokens.append(search.best().tokens)
    errors = total(
        word_errors(utterance.text, tokenizer.decode(ids))
        for utterance, ids in zip(utterances, tokens, strict=True)
        if utterance.text
    )
    return Answers(log_probs, tokens, 100 * errors.rate if errors.ref else None, errors.ref)


def compare(reference: Answers, other: Answers) -> Comparison:
    """How far `other` is from `reference`."""
    largest, wrong, units = 0.0, 0, 0
    for a, b in zip(reference.log_probs, other.log_probs, strict=True):
        likely = np.maximum(a, b) > LIKELY
        largest = max(largest, float(np.abs(a - b)[likely].max(initial=0.0)))
    for x, y in zip(reference.tokens, other.tokens, strict=True):
        wrong += edit_distance(list(x), list(y))["total"]
        units += len(x)
    same = sum(x == y for x, y in zip(reference.tokens, other.tokens, strict=True))
    return Comparison(
        largest,
        same,
        len(reference.tokens),
        100 * wrong / max(units, 1),
        (reference.wer, other.wer),
        reference.num_words,
    )


def check_float32(found: Comparison, what: str) -> None:
    """Raise BundleError unless the two are the same function."""
    if not found.max_difference <= MAX_DIFFERENCE:
        raise BundleError(
            f"{what}: log-probabilities differ by {found.max_difference:.1e} from the checkpoint's, "
            f"expected at most {MAX_DIFFERENCE:.0e}; please report this"
        )


def check_int8(found: Comparison, what: str) -> None:
    """Raise BundleError unless the words are nearly the same."""
    before, after = found.wer
    is_measured = found.num_words >= MIN_WORDS and before is not None and after is not None
    if is_measured and after - before > MAX_WER:  # type: ignore[operator]
        problem = f"word error rate {after:.2f} % instead of {before:.2f} %, expected at most {MAX_WER} more"
    elif found.units > MAX_UNITS:
        problem = f"{found.units:.1f} % of units change, expected at most {MAX_UNITS}"
    else:
        return
    raise BundleError(f"{what}: {problem}; export with --max-wer-increase, or --target cpu-fp32")


def count_same_searches(mode: str, first: Scorer, second: Scorer, utterances: Sequence[Utterance]) -> int:
    """Number of utterances for which a decoding mode finds the same units with both models."""
    same = 0
    for utterance in utterances:
        found = [decode(scorer, mode, [utterance.samples], SearchConfig()) for scorer in (first, second)]
        a, b = (nbest[0].tokens for (nbest,) in found)
        same += a == b
    return same


def count_same_streams(
    mode: str, first: Scorer, bundle: Bundle, utterances: Sequence[Utterance], context: Context
) -> int:
    """Number of utterances for which a stream of a bundle outputs what a decoding mode finds with a model in
    the same context."""
    config = StreamConfig(
        mode=mode,
        chunk_ms=round(1000 * context.chunk * bundle.info.frame_s),
        left_chunks=context.left,
        look_ahead=context.right,
        endpoint=EndpointConfig(trailing_s=1e6, silence_s=1e6, max_s=1e6),
    )
    same = 0
    for utterance in utterances:
        stream = Stream(bundle, config)
        events = stream.accept(utterance.samples) + stream.finish()
        found = " ".join(event.text for event in events if event.final)
        heard = decode(first, "ctc-greedy", [utterance.samples], config.search, context)[0][0]
        expected = decode(first, mode, [utterance.samples], config.search, context)[0][0]
        if mode in AT_END and not heard.tokens:  # a stream does not run the decoder on silence
            expected = heard
        same += found == bundle.tokenizer.decode(expected.tokens)
    return same


def check_searches(mode: str, same: int, count: int) -> None:
    """Raise BundleError unless every utterance is the same."""
    if same < count:
        differ = f"{mode}: units differ in {count - same} of {count} utterances"
        raise BundleError(f"{differ} from the checkpoint's; please report this")


def made_sound(duration_s: float, sample_rate: int) -> Floats:
    """Noise whose loudness and spectrum vary like those of speech: the same every time."""
    rng = np.random.default_rng(0)
    num = int(duration_s * sample_rate)
    noise = rng.normal(0, 1, num)
    dark = np.convolve(noise, np.exp(-np.arange(64) / 12.0), "same") / 2.5
    at = np.arange(0, num + sample_rate // 8, sample_rate // 8)
    loudness = np.interp(np.arange(num), at, rng.gamma(0.8, 0.06, len(at)))
    colour = np.interp(np.arange(num), at, rng.random(len(at)))
    return (loudness * (colour * noise + (1 - colour) * dark)).clip(-1, 1).astype(np.float32)


def read_utterances(manifest: Path, count: int, sample_rate: int) -> list[Utterance]:
    """The first `count` utterances of a manifest, at the rate of a model."""
    from asr.data.cuts import cut_text, open_cuts, read_cut

    cuts = islice(open_cuts(manifest), count)
    return [Utterance(cut.id, read_cut(cut.resample(sample_rate)), cut_text(cut)) for cut in cuts]
