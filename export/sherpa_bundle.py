"""Write everything that sherpa-onnx can run of a model into one folder, all or nothing."""

import base64
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch

from asr import __version__
from asr.errors import BundleError
from asr.model.hybrid import HybridModel
from asr.runtime.bundle import hash_file
from asr.tokens import SPACE, load_tokenizer
from export.bundle import Origin, check_out
from export.gate import Limit, Report, gate
from export.onnx import Trace, export
from export.quantize import quantize
from export.sherpa import Artefact, artefacts
from export.sherpa_evaluation import SherpaEvaluator

MARKER = "sherpa.json"
"""Lists what the folder holds, and why no more; a folder with this file may be overwritten."""

MAX_DIFFERENCE = 1e-3
"""Maximum difference between the outputs of a float32 graph and of its module for the same input."""

COMMANDS = {
    "ctc": """\
recognizer = sherpa_onnx.OfflineRecognizer.from_zipformer_ctc(
    model="ctc/model.int8.onnx", tokens="ctc/tokens.txt")

    sherpa-onnx-offline --zipformer-ctc-model=ctc/model.int8.onnx --tokens=ctc/tokens.txt a.wav
    sherpa-onnx-microphone-offline --zipformer-ctc-model=ctc/model.int8.onnx --tokens=ctc/tokens.txt""",
    "streaming": """\
recognizer = sherpa_onnx.OnlineRecognizer.from_wenet_ctc(
    model="streaming/model.int8.onnx", tokens="streaming/tokens.txt", chunk_size=16, num_left_chunks=4)

    sherpa-onnx --wenet-ctc-model=streaming/model.int8.onnx --tokens=streaming/tokens.txt \\
      --wenet-ctc-chunk-size=16 --wenet-ctc-num-left-chunks=4 a.wav
    sherpa-onnx-microphone --wenet-ctc-model=streaming/model.int8.onnx --tokens=streaming/tokens.txt

A chunk is in frames of 40 ms, so 16 are 640 ms{step}. The last chunk is decoded only when it is full: pass as
much silence behind an utterance, and 0.1 s more.""",
    "zipformer": """\
recognizer = sherpa_onnx.OnlineRecognizer.from_zipformer2_ctc(
    model="zipformer/model.int8.onnx", tokens="zipformer/tokens.txt")

    sherpa-onnx --zipformer2-ctc-model=zipformer/model.int8.onnx --tokens=zipformer/tokens.txt a.wav
    sherpa-onnx-microphone --zipformer2-ctc-model=zipformer/model.int8.onnx --tokens=zipformer/tokens.txt

A chunk is {chunk_ms} ms. The last one is decoded only when it is full: pass as much silence behind an
utterance, and 0.2 s more.""",
    "aed": """\
recognizer = sherpa_onnx.OfflineRecognizer.from_moonshine_v2(
    encoder="aed/encoder.int8.onnx", decoder="aed/decoder.int8.onnx", tokens="aed/tokens.txt")

    sherpa-onnx-offline --moonshine-encoder=aed/encoder.int8.onnx \\
      --moonshine-merged-decoder=aed/decoder.int8.onnx --tokens=aed/tokens.txt a.wav""",
    "fire_red": """\
recognizer = sherpa_onnx.OfflineRecognizer.from_fire_red_asr(
    encoder="fire_red/encoder.int8.onnx", decoder="fire_red/decoder.int8.onnx", tokens="fire_red/tokens.txt")

    sherpa-onnx-offline --fire-red-asr-encoder=fire_red/encoder.int8.onnx \\
      --fire-red-asr-decoder=fire_red/decoder.int8.onnx --tokens=fire_red/tokens.txt a.wav

The recognizer writes at most 6 tokens a second (8 in newer versions).""",
}
"""How each artefact is loaded: Python, then its programs."""

README = """\
# {source}

Licence of the weights: {licence}. Written by version {version} of the toolkit. Every graph is there in
float32 and, as `*.int8.onnx`, with 8-bit matrices.
"""


@dataclass(frozen=True)
class Written:
    """The contents of the folder."""

    sizes: dict[str, int]
    """File -> bytes."""

    left_out: dict[str, str]
    """Artefact -> why it is missing."""

    reports: dict[str, Report]
    """Artefact -> the outcome of the word error rate limit."""


def write_sherpa(
    model: HybridModel,
    tokens: Path,
    origin: Origin,
    out: Path,
    limit: Limit | None = None,
    only: Sequence[str] = (),
) -> Written:
    """Export everything that sherpa-onnx can run of a model, or `only` some of it.

    ConfigError if there is nothing to export; BundleError, without writing anything, if a graph differs from
    the model, or if the 8-bit graphs exceed the limit.
    """
    check_out(out, MARKER)
    found, left_out = artefacts(model.eval().cpu())
    found = {name: x for name, x in found.items() if not only or name in only}
    tokenizer = load_tokenizer(tokens)
    reports: dict[str, Report] = {}
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        folder = Path(temporary) / "sherpa"
        for name, artefact in found.items():
            (folder / name).mkdir(parents=True)
            (folder / name / "tokens.txt").write_text(
                _tokens(tokenizer.symbols, in_base64=name == "aed"), encoding="utf-8"
            )
            metadata = artefact.metadata | {"version": 1, "model_author": "", "comment": origin.source}
            graphs = {
                stem: artefact.written.get(stem, partial(export, trace, stem))()
                for stem, trace in artefact.graphs.items()
            }
            for stem, trace in artefact.graphs.items():
                check(trace, graphs[stem])
            quantized = {stem: quantize(graph) for stem, graph in graphs.items()}
            if limit:
                evaluator = SherpaEvaluator(name, model, tokenizer, limit.utterances)
                quantized, reports[name] = gate(graphs, quantize, evaluator, limit)
            for stem, graph in graphs.items():
                for x, path in ((graph, f"{stem}.onnx"), (quantized[stem], f"{stem}.int8.onnx")):
                    onnx.helper.set_model_props(x, {key: str(value) for key, value in metadata.items()})
                    onnx.save(x, folder / name / path)
        (folder / "README.md").write_text(_readme(found, model, origin), encoding="utf-8")
        files = {str(path.relative_to(folder)): hash_file(path) for path in sorted(folder.rglob("*.*"))}
        listed = {path: {"size": x.size, "sha256": x.sha256} for path, x in files.items()}
        info: dict[str, Any] = {"version": __version__, "source": origin.source, "licence": origin.licence}
        info |= {"gate": {name: x.as_dict() for name, x in reports.items()}} if reports else {}
        text = json.dumps(info | {"left_out": left_out, "files": listed}, indent=2, ensure_ascii=False)
        (folder / MARKER).write_text(text + "\n", encoding="utf-8")
        if out.exists():
            shutil.move(out, Path(temporary) / "old")
        folder.rename(out)
    return Written({path: x.size for path, x in files.items()}, left_out, reports)


def check(trace: Trace, graph: onnx.ModelProto) -> None:
    """Raise BundleError unless a graph matches its module, also for inputs twice as long as in its trace."""
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    longer = {name: _twice(x, trace.dynamic[name]) for name, x in trace.inputs.items()}
    for inputs in (trace.inputs, longer):
        found = session.run(None, {name: x.numpy() for name, x in inputs.items()})
        with torch.inference_mode():
            expected = trace.module(*inputs.values())
        expected = expected if isinstance(expected, tuple) else (expected,)
        for name, ours, theirs in zip(trace.outputs, expected, found, strict=True):
            difference = np.abs(ours.numpy() - theirs).max(initial=0)
            if not difference <= MAX_DIFFERENCE:
                raise BundleError(
                    f"{graph.graph.name}.onnx: {name} is {difference:.1e} from the checkpoint's"
                )


def _twice(x: torch.Tensor, dynamic: dict[int, Any]) -> torch.Tensor:
    """The input repeated twice along every dynamic dimension."""
    return x.repeat([2 if i in dynamic else 1 for i in range(x.dim())])


def _tokens(symbols: list[str], in_base64: bool) -> str:
    """The units as sherpa-onnx reads them; in base64 they are bytes of the text, so a space is one."""
    if in_base64:
        plain = (symbol.replace(SPACE, " ").encode() for symbol in symbols)
        symbols = [base64.b64encode(symbol).decode() for symbol in plain]
    return "".join(f"{symbol} {i}\n" for i, symbol in enumerate(symbols))


def _readme(found: Mapping[str, Artefact], model: HybridModel, origin: Origin) -> str:
    parts = [README.format(source=origin.source, licence=origin.licence, version=__version__)]
    frames = model.encoder.subsampling // 4
    step = f"; take a multiple of {frames}" if frames > 1 else ""
    for name, artefact in found.items():
        chunk_ms = str(10 * artefact.metadata.get("decode_chunk_len", 0))
        said = COMMANDS[name].replace("{step}", step).replace("{chunk_ms}", chunk_ms)
        code, _, programs = said.partition("\n\n")
        parts.append(f"## {name}\n\n```python\n{code}\n```\n\n{programs}\n")
    return "\n".join(parts)
