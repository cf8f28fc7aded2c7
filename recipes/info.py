"""`asr info`: what a checkpoint, an experiment or a bundle is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asr.errors import BundleError, CheckpointError

if TYPE_CHECKING:
    from asr.model.masks import ChunkConfig

MODEL_JSON = "model.json"


def info(
    path: Annotated[Path, typer.Argument(help="experiment, checkpoint, .safetensors file or bundle")],
) -> None:
    """Describe a checkpoint, an experiment or a bundle; torch is not needed for a bundle.

    Example: asr info exp/conformer-s
    """
    if (path / MODEL_JSON).is_file():
        about = _bundle(path / MODEL_JSON)
    elif (path / "config.yaml").is_file():
        about = _experiment(path)
    elif (path / "meta.json").is_file():
        about = _checkpoint(path)
    elif path.suffix == ".safetensors":
        about = _weights(path)
    else:
        raise CheckpointError(
            f"{path}: neither an experiment, a checkpoint, a .safetensors file nor a bundle"
        )
    for name, value in about.items():
        print(f"{name:<14}{value}")


def _bundle(file: Path) -> dict[str, Any]:
    """The content of model.json, without file hashes."""
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{file}: {error}") from None
    if not isinstance(about, dict):
        raise BundleError(f"{file}: expected the description of a bundle; export it again")
    plain = {key: _plain(value) for key, value in about.items()}
    size = sum(part.stat().st_size for part in file.parent.iterdir() if part.is_file())
    return {"bundle": file.parent, **plain, "size": f"{size / 1e6:.1f} MB"}


def _plain(value: Any) -> str:
    """A value of model.json in one line: figures with names, states with shapes, files by name."""
    if isinstance(value, dict):
        return _figures(value)
    if isinstance(value, list):
        return ", ".join(
            f"{part.get('name')} {part.get('shape')}" if isinstance(part, dict) else str(part)
            for part in value
        )
    return str(value)


def _experiment(path: Path) -> dict[str, Any]:
    from asr.config import load_config
    from asr.convert.origin import read_origin
    from asr.train.checkpoint import AVERAGE, about_weights, checkpoints, pointed
    from asr.train.report import read_metrics

    config = load_config([path / "config.yaml"])
    found = checkpoints(path)
    about: dict[str, Any] = {"experiment": path, "encoder": config.encoder.type}
    if origin := read_origin(path):
        about["converted"] = f"from {origin.family} {origin.source}, by asr {origin.asr}"
        about["licence"] = origin.licence
        about |= {f"note {i}": note for i, note in enumerate(origin.notes, 1)}
    about["trained in"] = _contexts(config.encoder.chunk)
    about["checkpoints"] = f"{len(found)}, {found[0].name} to {found[-1].name}" if found else "none"
    if best := pointed(path, "best"):
        about["best"] = best.name
    if found:
        about |= _size(found[-1] / "model.safetensors")
    if (path / AVERAGE).is_file() and not origin:
        about["average of"] = ", ".join(about_weights(path / AVERAGE)["sources"])
    if (path / AVERAGE).is_file() and not found:
        about |= _size(path / AVERAGE)
    rows = read_metrics(path / "metrics.jsonl")
    for kind in ("train", "valid"):
        last = next((row for row in reversed(rows) if row["kind"] == kind), None)
        if last:
            about[f"last {kind}"] = _figures(last)
    return about


def _contexts(chunk: ChunkConfig) -> str:
    if not chunk.dynamic:
        return "whole utterances"
    if chunk.named:
        return f"chunks of {', '.join(map(str, sorted({x.chunk for x in chunk.named})))} frames"
    return f"chunks up to {chunk.max_chunk} frames, {chunk.max_right} of look-ahead"


def _checkpoint(path: Path) -> dict[str, Any]:
    from asr.train.checkpoint import verify

    meta = verify(path)
    about = {"checkpoint": path, "step": f"{meta['step']:,}", "written by": f"asr {meta['asr']}"}
    about |= {"encoder": meta["config"]["encoder"]["type"], "best": _figures(meta["metrics"])}
    return {**about, **_size(path / "model.safetensors"), "files": "verified"}


def _weights(file: Path) -> dict[str, Any]:
    from asr.train.checkpoint import about_weights

    about = about_weights(file)
    return {
        "weights": file,
        "written by": f"asr {about.get('asr')}",
        "average of": about.get("sources"),
        **_size(file),
    }


def _size(file: Path) -> dict[str, str]:
    from asr.train.checkpoint import read_weights

    weights = read_weights(file)
    total = sum(tensor.numel() for tensor in weights.values())
    return {"parameters": f"{total / 1e6:.2f} M in {len(weights)} tensors"}


def _figures(values: dict[str, Any]) -> str:
    kept = {key: value for key, value in values.items() if key != "kind"}
    return ", ".join(
        key if isinstance(value, dict) else f"{key} {_short(value)}" for key, value in kept.items()
    )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
