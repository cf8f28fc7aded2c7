"""Write graphs, units and model.json into one folder, all or nothing."""

import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from asr import __version__
from asr.errors import BundleError
from asr.model.decoder import SOS_EOS
from asr.model.encoder import look_ahead_layers
from asr.model.hybrid import HybridModel
from asr.runtime.bundle import hash_file
from asr.runtime.info import FORMAT, Features, ModelInfo, Streaming
from asr.tokens import tokens_hash
from export.onnx import state_fields
from export.states import decoder_fields

CHUNKS_MS = (160, 320, 640, 960)
CHUNK_MS = 640
LEFT_CHUNKS = 4
TOKEN_FILES = ("tokens.txt", "tokens.model", "lexicon.txt")


@dataclass(frozen=True)
class Origin:
    """Where the weights of a bundle come from."""

    source: str
    licence: str


def describe(model: HybridModel, tokens: Path, target: str, origin: Origin) -> ModelInfo:
    """model.json of a model, its files not yet listed."""
    fbank, encoder = model.fbank, model.encoder
    return ModelInfo(
        format=FORMAT,
        version=__version__,
        target=target,
        source=origin.source,
        licence=origin.licence,
        features=Features(
            sample_rate=fbank.config.sample_rate,
            num_bins=fbank.config.num_bins,
            frame_samples=fbank.frame_samples,
            shift_samples=fbank.shift_samples,
            snip_edges=fbank.config.snip_edges,
            fading=fbank.fading,
            framed=fbank.framed,
            max_samples=fbank.max_samples,
        ),
        subsampling=encoder.subsampling,
        dim=encoder.dim,
        overlap_frames=encoder.overlap_frames,
        num_tokens=model.num_tokens,
        tokens_sha256=tokens_hash(tokens),
        sos_eos=SOS_EOS,
        parameters=sum(p.numel() for p in model.parameters()),
        encoder_state=state_fields(model),
        has_ctc=model.ctc is not None,
        decoder_type=model.decoder.config.type,
        max_tokens=model.decoder.max_tokens,
        prompt=tuple(model.decoder.config.prompt),
        decoder_state=decoder_fields(model.decoder),
        streaming=streaming(model) if encoder.can_stream and fbank.framed else None,
        files={},
        chunking=model.decoder.chunking,
    )


def streaming(model: HybridModel) -> Streaming:
    """The streaming options of a model. The default is the longest chunk up to CHUNK_MS: of the chunks used
    in training, if any are listed, else of CHUNKS_MS up to the longest in training that fit its frames."""
    fbank, encoder = model.fbank, model.encoder
    unit, unit_ms = encoder.chunk_unit, round(1000 * encoder.chunk_unit * model.frame_s)
    longest = max(encoder.config.chunk.max_chunk // unit, 1) * unit_ms
    named = [context for context in encoder.config.chunk.named if context.chunk % unit == 0]
    trained = {context.chunk // unit * unit_ms: context.left for context in named}
    choices = tuple(sorted(trained)) or tuple(ms for ms in CHUNKS_MS if ms % unit_ms == 0 and ms <= longest)
    choices = choices or (longest,)
    chunk_ms = max((ms for ms in choices if ms <= CHUNK_MS), default=choices[0])
    left = trained.get(chunk_ms, -1)
    return Streaming(
        chunk_ms=chunk_ms,
        left_chunks=left if left >= 0 else LEFT_CHUNKS,
        chunk_choices_ms=choices,
        chunk_unit=unit,
        max_look_ahead=encoder.config.chunk.max_right,
        look_ahead_layers=look_ahead_layers(encoder),
        flush_frames=encoder.flush_frames(0),
        flush_samples=0 if fbank.config.snip_edges else fbank.frame_samples // 2,
    )


def write_bundle(graphs: dict[str, onnx.ModelProto], info: ModelInfo, tokens: Path, out: Path) -> ModelInfo:
    """Write the folder `out`, replacing a bundle that is already there; returns its model.json.

    BundleError if `out` is something else, or cannot be written.
    """
    check_out(out)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        folder = Path(temporary) / "bundle"
        folder.mkdir()
        for name, graph in graphs.items():
            onnx.helper.set_model_props(graph, {"tokens_sha256": info.tokens_sha256})
            onnx.save(graph, folder / f"{name}.onnx")
        for name in TOKEN_FILES:
            if (tokens / name).exists():
                shutil.copyfile(tokens / name, folder / name)
        info = replace(info, files={path.name: hash_file(path) for path in sorted(folder.iterdir())})
        info.write(folder)
        if out.exists():
            out.rename(Path(temporary) / "old")
        folder.rename(out)
    return info


def check_out(out: Path, marker: str = "model.json") -> None:
    """Raise BundleError unless a bundle can be written to `out`; called before the minutes of an export.

    marker: the file that identifies a folder of an earlier export.
    """
    if out.exists() and not (out.is_dir() and ((out / marker).exists() or not any(out.iterdir()))):
        raise BundleError(
            f"{out}: exists and is not a bundle, as it has no {marker}; choose another folder with -o"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BundleError(f"{out.parent}: {error.strerror}") from None
    if not os.access(out.parent, os.W_OK):
        raise BundleError(f"{out.parent}: not writable; choose another folder with -o")
