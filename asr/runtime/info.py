"""model.json: what a model is, what inputs it takes, and the hashes of the files beside it."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from asr.context import WHOLE, Context
from asr.decode.scorer import Chunking
from asr.errors import BundleError

FORMAT = 5
STRICT = ConfigDict(extra="forbid")
SIZE = re.compile(r"([1-9]\d*\*)?[WRU](/[1-9]\d*)?")
"""A variable dimension, as `parse_size` reads it."""

DTYPES = ("float32", "float16", "int64", "int32", "bool")


@checked(frozen=True, config=STRICT)
class Features:
    """The format of samples, and how windows of them are cut. The features themselves are in the graph."""

    sample_rate: int
    num_bins: int
    frame_samples: int
    shift_samples: int
    snip_edges: bool
    fading: float
    """If not 0, samples are 0 before an utterance, and after it each is this fraction of the one before."""

    framed: bool
    """Whether features can be computed from windows of samples; if not, the graph takes whole utterances."""

    max_samples: int
    """Maximum samples of an utterance; 0: no limit."""

    def __post_init__(self) -> None:
        _expect_at_least(1, self, "sample_rate", "num_bins", "frame_samples", "shift_samples")
        _expect_at_least(0, self, "max_samples")


@checked(frozen=True, config=STRICT)
class Field:
    """One tensor of a state: its shape for one stream, or one hypothesis.

    A size is a number; or "W", encoder frames cached as left context, "R", those that wait for their
    look-ahead, or "U", tokens so far; or a multiple or a fraction of one, such as "2*W" or "W/4".
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype of {self.name} is {self.dtype}, expected one of {', '.join(DTYPES)}")
        for size in self.shape:
            if (isinstance(size, int) and size < 0) or (isinstance(size, str) and not SIZE.fullmatch(size)):
                raise ValueError(f"{size!r} in the shape of {self.name}, expected a size")

    def sizes(self, variables: Mapping[str, int]) -> list[int]:
        """The shape for given values of the variables."""
        return [x if isinstance(x, int) else _evaluate(x, variables) for x in self.shape]


@checked(frozen=True, config=STRICT)
class Streaming:
    """The default context of a stream; the graph takes any."""

    chunk_ms: int
    left_chunks: int
    chunk_choices_ms: tuple[int, ...]
    """The chunks that the model was trained on and the bundle was verified with."""

    chunk_unit: int
    """A chunk is a multiple of this many encoder frames."""

    max_look_ahead: int
    """Maximum look-ahead of every layer in training, in chunks. More is possible, but untrained."""

    look_ahead_layers: int
    """Layers that wait for their look-ahead, one after another; 0 if none was trained to look ahead."""

    flush_frames: int
    """Feature frames that the last call needs after its own, besides those for look-ahead."""

    flush_samples: int
    """Mirrored samples after the end that complete the last frame; `Stream.finish` adds them."""

    def __post_init__(self) -> None:
        _expect_at_least(1, self, "chunk_ms", "chunk_unit")
        counts = ("left_chunks", "max_look_ahead", "look_ahead_layers", "flush_frames", "flush_samples")
        _expect_at_least(0, self, *counts)


@checked(frozen=True, config=STRICT)
class FileHash:
    """Size and hash of one file beside model.json."""

    size: int
    sha256: str


@checked(frozen=True, config=STRICT)
class ModelInfo:
    """model.json."""

    format: int
    version: str
    """The version of the toolkit that wrote it."""

    target: str
    """The key in export's TARGETS."""

    source: str
    """The experiment and the checkpoint."""

    licence: str
    features: Features
    subsampling: int
    """Feature frames per encoder frame."""

    dim: int
    """C, the dimension of the encoder's output."""

    overlap_frames: int
    """Feature frames that a call needs after its own; the next call of a stream is given them again."""

    num_tokens: int
    tokens_sha256: str
    sos_eos: int
    parameters: int
    encoder_state: tuple[Field, ...]
    has_ctc: bool
    """Whether the encoder's graph outputs CTC log-probabilities."""

    decoder_type: str
    """The type of decoder, which determines the modes it supports."""

    max_tokens: int
    """The maximum length of the decoder's input, including sos/eos and a prompt; 0: no limit."""

    prompt: tuple[str, ...]
    """Units between sos/eos and every text that are no part of it."""

    decoder_state: tuple[Field, ...]
    streaming: Streaming | None
    """None: the encoder takes whole utterances only, and has no state."""

    files: dict[str, FileHash]
    chunking: Chunking | None = None
    """The chunks of a decoder of type "chunked"."""

    figures: dict[str, Any] = field(default_factory=dict)
    """Measurements made at export."""

    def __post_init__(self) -> None:
        _expect_at_least(1, self, "subsampling", "dim", "num_tokens")
        _expect_at_least(0, self, "overlap_frames", "sos_eos", "max_tokens")
        if self.sos_eos >= self.num_tokens:
            raise ValueError(f"sos_eos is {self.sos_eos}, and there are {self.num_tokens} tokens")

    def write(self, folder: Path) -> None:
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (folder / "model.json").write_text(text + "\n", encoding="utf-8")

    @property
    def has_reverse(self) -> bool:
        """Whether there is a right-to-left decoder."""
        return "reverse.onnx" in self.files

    @property
    def has_fire(self) -> bool:
        """Whether there is a head that counts words."""
        return "fire.onnx" in self.files

    @property
    def frame_s(self) -> float:
        """Seconds of audio per encoder frame."""
        return self.subsampling * self.features.shift_samples / self.features.sample_rate

    def chunk_frames(self, chunk_ms: int) -> int:
        """Milliseconds -> encoder frames; BundleError if streams cannot use such chunks."""
        unit = self.stream.chunk_unit
        unit_ms = round(1000 * self.frame_s * unit)
        if chunk_ms <= 0 or chunk_ms % unit_ms:
            frames = "encoder frame" if unit == 1 else f"unit of {unit} encoder frames"
            raise BundleError(
                f"a chunk of {chunk_ms} ms is not a multiple of {unit_ms} ms, this model's {frames}; "
                f"pass {max(chunk_ms // unit_ms, 1) * unit_ms}"
            )
        return chunk_ms // unit_ms * unit

    @property
    def stream(self) -> Streaming:
        """`streaming`; BundleError if the model cannot stream."""
        if self.streaming is None:
            raise BundleError(
                f"{self.source}: its encoder takes whole utterances only, and cannot stream; "
                "use asr decode without --chunk-ms, or a model with a causal encoder"
            )
        return self.streaming

    def check_context(self, context: Context) -> None:
        """Raise BundleError if the encoder does not support a context."""
        if context == WHOLE:
            return
        unit = self.stream.chunk_unit
        if context.chunk % unit:
            raise BundleError(f"a chunk of {context.chunk} encoder frames is not a multiple of {unit}")
        if context.right and not self.stream.look_ahead_layers:
            raise BundleError(
                f"a look-ahead of {context.right} chunks, and this model was not trained to look ahead; "
                "expected 0, or a model trained with encoder.chunk.max_right"
            )

    def late_frames(self, context: Context) -> int:
        """Encoder frames by which outputs of a stream lag, as each layer waits for its look-ahead."""
        return self.streaming.look_ahead_layers * context.delay if self.streaming else 0

    def flush_frames(self, context: Context) -> int:
        """Feature frames that the last call of a stream needs after its own to output everything."""
        constant = self.streaming.flush_frames if self.streaming else 0
        return constant + self.late_frames(context) * self.subsampling

    @property
    def min_frames(self) -> int:
        """The fewest feature frames that a call can have, including those that do not count."""
        return self.subsampling + self.overlap_frames if self.overlap_frames else 1

    @property
    def context_inputs(self) -> tuple[str, ...]:
        """Which parts of a Context the encoder's graph takes."""
        if self.streaming is None:
            return ()
        return Context._fields if self.streaming.look_ahead_layers else ("chunk", "left")


def read_info(folder: Path) -> ModelInfo:
    """Read model.json, checking its format before anything else in it."""
    path = folder / "model.json"
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        what = "no such folder" if not folder.is_dir() else "no model.json in it"
        raise BundleError(f"{folder}: {what}; make a bundle with asr export") from None
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise BundleError(f"{path}: not JSON ({error}); export again") from None
    version = data.get("format") if isinstance(data, dict) else None
    if not isinstance(version, int):
        raise BundleError(f"{path}: has no format number; this is not a bundle of asr export")
    if version != FORMAT:
        remedy = "export again or update" if version > FORMAT else "export again"
        raise BundleError(
            f"{folder}: model.json says format {version}, this version reads {FORMAT}; {remedy}"
        )
    try:
        return TypeAdapter(ModelInfo).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{x}." for x in first["loc"])[:-1]
        problem = first["msg"].removeprefix("Value error, ")
        problem = problem[0].lower() + problem[1:]
        raise BundleError(f"{path}: {where + ': ' if where else ''}{problem}; export again") from None


def parse_size(size: str) -> tuple[str, Fraction]:
    """A variable size of a state, such as "2*W/3" -> "W", 2/3."""
    rest, _, divisor = size.partition("/")
    factor, _, name = rest.rpartition("*")
    return name, Fraction(int(factor or 1), int(divisor or 1))


def _expect_at_least(least: int, owner: object, *names: str) -> None:
    for name in names:
        if getattr(owner, name) < least:
            raise ValueError(f"{name} is {getattr(owner, name)}, expected at least {least}")


def _evaluate(size: str, variables: Mapping[str, int]) -> int:
    name, share = parse_size(size)
    return int(share * variables[name])
