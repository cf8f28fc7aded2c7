"""The exported folder: model.json, ONNX graphs and units. Every byte is checked on loading.

    model.json      description of the model, and size and SHA-256 of every other file
    encoder.onnx    (window of samples, context, state) -> (y, CTC log-probabilities, state): features are in
                    the graph; for encoders that cannot stream (window of samples) -> (y, log-probabilities),
                    or (samples) as input if features depend on the whole utterance
    memory.onnx     y -> keys and values for the decoder's cross-attention, once per utterance
    decoder.onnx    (tree of tokens, memory, state) -> (log-probabilities of what follows each token,
                    attention of the heads that guide streaming, state)
    reverse.onnx    (tree of tokens from right to left, y, its frames) -> log-probabilities; for models with
                    a second decoder
    length.onnx     (frames of y, tokens before them, durations) -> log-odds that a segment ends, and length
                    counts; for segmental decoders
    fire.onnx       y -> weights of its frames that sum to the number of words; for models that count words
    tokens.txt      the units; with tokens.model or lexicon.txt beside it if text is to be encoded

A flipped byte in the weights would load without complaint and only cost accuracy, hence the hashes. Graphs
are opened from the checked bytes, so a graph that keeps weights in another file cannot be opened.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from asr.decode.words import word_starts
from asr.errors import BundleError
from asr.runtime.info import Field, FileHash, ModelInfo, read_info
from asr.tokens import Tokenizer, load_tokenizer, tokens_hash

GRAPHS = ("encoder", "memory", "decoder")
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

INPUT = {
    "encoder": ("window", "samples"),
    "memory": ("y",),
    "decoder": ("k",),
    "reverse": ("y_lens",),
    "length": ("durations",),
    "fire": ("y",),
}
"""The inputs by which each graph is recognised: it has one of these."""


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle. Sessions are created on first use, and shared by all streams."""

    folder: Path
    info: ModelInfo
    tokenizer: Tokenizer
    threads: int
    providers: tuple[str, ...]
    """The execution providers of onnxruntime, best first."""
    _graphs: dict[str, bytes]

    @classmethod
    def load(cls, folder: str | Path, threads: int = 1, device: str = "") -> Self:
        """Read and check a bundle, or that of an experiment. BundleError says which file is missing, damaged
        or of another version.

        device: cpu or cuda; by default that of the bundle's target. A CPU runs any, though not all fast.
        """
        folder = _inner(Path(folder))
        if threads < 0:
            raise BundleError(f"threads is {threads}, expected 1 or more, or 0 for all cores")
        info = read_info(folder)
        providers = _providers(folder, info.target, device)
        tokenizer = load_tokenizer(folder)
        _check_units(folder, info, tokenizer)
        contents = {name: _read(folder, name, file) for name, file in info.files.items()}
        missing = [name for name in GRAPHS if f"{name}.onnx" not in contents]
        if missing:
            raise BundleError(f"{folder}: model.json lists no {missing[0]}.onnx; export again")
        graphs = {name[:-5]: data for name, data in contents.items() if name.endswith(".onnx")}
        return cls(folder, info, tokenizer, threads, providers, graphs)

    @cached_property
    def word_starts(self) -> NDArray[np.bool_]:
        """Units before which a word is complete (V,)."""
        return word_starts(self.tokenizer.words, self.info.num_tokens)

    @cached_property
    def encoder(self) -> ort.InferenceSession:
        return self._session("encoder")

    @cached_property
    def encoder_state(self) -> tuple[Field, ...]:
        """The state of one stream. BundleError if model.json and the graph disagree about it."""
        if problem := _unlike(self.encoder, self.info):
            raise BundleError(
                f"{self.folder}/encoder.onnx: {problem}, which does not match model.json; export again"
            )
        return self.info.encoder_state

    @cached_property
    def memory(self) -> ort.InferenceSession:
        return self._session("memory")

    @cached_property
    def decoder(self) -> ort.InferenceSession:
        return self._session("decoder")

    @cached_property
    def reverse(self) -> ort.InferenceSession:
        return self._session("reverse")

    @cached_property
    def length(self) -> ort.InferenceSession:
        return self._session("length")

    @cached_property
    def fire(self) -> ort.InferenceSession:
        return self._session("fire")

    def _session(self, name: str) -> ort.InferenceSession:
        """Open a graph, and free its bytes."""
        path = self.folder / f"{name}.onnx"
        try:
            session = ort.InferenceSession(
                self._graphs.pop(name),
                session_options(self.threads),
                providers=list(self.providers),
                disabled_optimizers=["SkipLayerNormFusion"],  # slower on CPUs than the two it replaces
            )
        except Exception as error:  # onnxruntime has no common base class for its errors
            raise BundleError(
                f"{path}: onnxruntime {ort.__version__} cannot open it ({error}); export again"
            ) from None
        of_tokens = session.get_modelmeta().custom_metadata_map.get("tokens_sha256")
        inputs = [x.name for x in session.get_inputs()]
        if of_tokens is None or not set(INPUT[name]) & set(inputs):
            what = "does not say which tokens.txt it belongs to" if of_tokens is None else "is another graph"
            raise BundleError(f"{path}: {what} (its inputs are {', '.join(inputs)}); export again")
        if of_tokens != self.info.tokens_sha256:
            raise BundleError(f"{path}: belongs to another tokens.txt than model.json says; export again")
        return session


def _inner(folder: Path) -> Path:
    """The folder itself, or `bundle` in it, where `asr export` writes that of an experiment."""
    inner = folder / "bundle"
    is_within = (inner / "model.json").is_file() and not (folder / "model.json").is_file()
    return inner if is_within else folder


def _unlike(session: ort.InferenceSession, info: ModelInfo) -> str:
    """Which input of the encoder does not match the state in `info`; empty if all do."""
    fields = {field.name: [None, *field.shape] for field in info.encoder_state}
    others = {"window", "num_frames", *info.context_inputs}
    shapes = {x.name: x.shape for x in session.get_inputs() if x.name not in others}
    if unknown := sorted(shapes.keys() ^ fields.keys()):
        return f"{unknown[0]} is {'' if unknown[0] in shapes else 'not '}an input"
    for name, shape in shapes.items():
        said = fields[name]
        pairs = zip(shape, said, strict=False)
        if len(shape) != len(said) or any(
            a != b for a, b in pairs if isinstance(a, int) and isinstance(b, int)
        ):
            return f"input {name} is {shape}"
    return ""


def _providers(folder: Path, target: str, device: str) -> tuple[str, ...]:
    """The execution providers for a bundle; BundleError if it needs a GPU and this onnxruntime has none."""
    device = device or target.partition("-")[0]
    if device != "cuda":
        return (CPU,)
    if CUDA not in ort.get_available_providers():
        raise BundleError(
            f"{folder}: made for {target}, and this onnxruntime has no {CUDA}; pip install onnxruntime-gpu "
            "in its place, or export with --target cpu-int8"
        )
    return (CUDA, CPU)


def session_options(threads: int) -> ort.SessionOptions:
    """Options for one call at a time, without memory that grows with the number of different shapes."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.enable_mem_pattern = False
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def hash_file(path: Path) -> FileHash:
    """Size and SHA-256 of a file, as in model.json."""
    data = path.read_bytes()
    return FileHash(len(data), hashlib.sha256(data).hexdigest())


def _check_units(folder: Path, info: ModelInfo, tokenizer: Tokenizer) -> None:
    num_units = len(tokenizer.symbols)
    if num_units == info.num_tokens and tokens_hash(tokenizer.symbols) == info.tokens_sha256:
        return
    what = "in another order, or others" if num_units == info.num_tokens else f"expected {info.num_tokens}"
    raise BundleError(
        f"{folder}/tokens.txt: its {num_units} units are not those of the model ({what}); "
        "copy tokens.txt of the experiment, or export again"
    )


def _read(folder: Path, name: str, expected: FileHash) -> bytes:
    path = folder / name
    if Path(name).name != name:
        raise BundleError(f"{path}: model.json may only list files beside it; export again")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise BundleError(f"{path}: missing; copy the whole folder again, or export again") from None
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}") from None
    if len(data) != expected.size:
        raise BundleError(
            f"{path}: has {len(data):,} bytes, model.json says {expected.size:,}; "
            "copy it again, or export again"
        )
    if hashlib.sha256(data).hexdigest() != expected.sha256:
        raise BundleError(
            f"{path}: its SHA-256 is not that of model.json, so it is damaged; copy it again, or export again"
        )
    return data
