"""Checkpoints of an experiment: save, find, verify, load, average.

exp/NAME/checkpoints/
  step-000500/model.safetensors   parameters and buffers
              ema.safetensors     their running average, if train.ema is set
              train_state.pt      optimizer, random states, data position: tensors and plain types only
              meta.json           step, format, configuration, hash of the tokens, and a hash of each file
  latest, best                    the names of two checkpoints, for people and scripts

Weights are safetensors, and train_state.pt loads with weights_only: a checkpoint cannot run code.
"""

import io
import json
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import asr
from asr.config import ExperimentConfig, differences, load_config
from asr.errors import CheckpointError
from asr.model.build import build_model
from asr.model.hybrid import HybridModel
from asr.tokens import Tokenizer, load_tokenizer, tokens_hash
from asr.train.heads import load_guide
from asr.train.storage import discard, verify_folder, write_file, write_folder

FORMAT = 1
WEIGHTS = "model.safetensors"
EMA = "ema.safetensors"
STATE = "train_state.pt"
AVERAGE = "average.safetensors"
MODEL_PARTS = ("features", "encoder", "decoder")
"""The parts of a configuration that determine which tensors exist and what they mean."""


def folder_of(exp_dir: Path) -> Path:
    return exp_dir / "checkpoints"


def path_of(exp_dir: Path, step: int) -> Path:
    return folder_of(exp_dir) / f"step-{step:06d}"


def save_checkpoint(
    exp_dir: Path, step: int, weights: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any], meta: dict
) -> Path:
    """Write a checkpoint, then point `latest` to it.

    weights: file name -> tensors.  state: what only training needs.  meta: see `describe`.
    Raises CheckpointError if it cannot be written; earlier checkpoints are then untouched.
    """
    files = {name: safetensors.torch.save(_contiguous(tensors)) for name, tensors in weights.items()}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    files[STATE] = buffer.getvalue()
    path = path_of(exp_dir, step)
    write_folder(path, files, {"step": step, **meta})
    point(exp_dir, "latest", path)
    return path


def describe(config: ExperimentConfig, tokens: Path, metrics: dict[str, float]) -> dict[str, Any]:
    """The contents of meta.json besides step and files."""
    return {
        "format": FORMAT,
        "asr": asr.__version__,
        "torch": torch.__version__,
        "tokens_sha256": tokens_hash(tokens),
        "config": asdict(config),
        "metrics": metrics,
    }


def checkpoints(exp_dir: Path) -> list[Path]:
    """Finished checkpoints by step, verified or not."""
    found = {int(p.name[5:]): p for p in folder_of(exp_dir).glob("step-*") if p.name[5:].isdigit()}
    return [found[step] for step in sorted(found)]


def verify(path: Path) -> dict[str, Any]:
    """The meta.json of a checkpoint, once all its files are verified. Raises CheckpointError otherwise."""
    meta = verify_folder(path)
    if meta.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: format {meta.get('format')}, written by asr {meta.get('asr')}; this is asr "
            f"{asr.__version__} and reads {FORMAT}; update"
        )
    return meta


def newest_valid(exp_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The last undamaged checkpoint; None if there are no checkpoints.

    Damaged ones are reported through `warn` and skipped. Raises CheckpointError if all are damaged, as
    training never silently starts over, or if the format is unknown.
    """
    found = checkpoints(exp_dir)
    reasons = []
    for path in reversed(found):
        try:
            verify_folder(path)
        except CheckpointError as error:
            reasons.append(str(error))
            warn(f"WARNING  {error}; going back to an earlier checkpoint")
        else:
            verify(path)
            return path
    if reasons:
        raise CheckpointError(
            f"{folder_of(exp_dir)}: none of {len(found)} checkpoints can be used, the last because "
            f"{reasons[0]}; remove the folder to start from scratch"
        )
    return None


def prune(exp_dir: Path, keep: int) -> None:
    """Remove all but the last `keep` checkpoints and the best."""
    best = pointed(exp_dir, "best")
    for path in checkpoints(exp_dir)[:-keep]:
        if path != best:
            discard(path)


def point(exp_dir: Path, name: str, path: Path) -> None:
    write_file(folder_of(exp_dir) / name, f"{path.name}\n".encode())


def pointed(exp_dir: Path, name: str) -> Path | None:
    """The checkpoint that `latest` or `best` names."""
    pointer = folder_of(exp_dir) / name
    return folder_of(exp_dir) / pointer.read_text().strip() if pointer.is_file() else None


def load_state(path: Path) -> dict[str, Any]:
    """train_state.pt on the CPU. Raises CheckpointError for anything but tensors and plain types."""
    try:
        return torch.load(path / STATE, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path / STATE}: not a training state: {reason}") from None


def load_weights(model: nn.Module, file: Path, saved: dict[str, Any], config: ExperimentConfig) -> None:
    """Copy the tensors of a file into a model.

    saved: the configuration of the file.  config: that of the model. Raises CheckpointError if tensors are
    missing, unknown or of other shapes, and names the differences between the two configurations.
    """
    weights = read_weights(file)
    own = model.state_dict()
    missing = [name for name in own if name not in weights]
    unknown = [name for name in weights if name not in own]
    reason = _other_shapes(weights, own)
    if missing and not reason:
        reason = f"{_tensors(len(missing))} missing, first {missing[0]}"
    elif unknown and not reason:
        reason = f"{_tensors(len(unknown))} not in the model, first {unknown[0]}"
    if reason:
        raise CheckpointError(f"{file}: {reason}{explain_differences(saved, asdict(config))}")
    model.load_state_dict(weights)


class Taken(NamedTuple):
    """Names of tensors after `take_weights`."""

    taken: list[str]
    fresh: list[str]
    """Tensors of the model that were not taken."""

    unused: list[str]
    """Tensors of the file that were not taken."""


def take_weights(model: nn.Module, file: Path, saved: dict[str, Any], config: ExperimentConfig) -> Taken:
    """Copy the tensors that a file and a model share; the others stay as they are.

    Arguments as for `load_weights`; train.init_parts limits which parts of the file are used. Raises
    CheckpointError if there are no such tensors or one has another shape.
    """
    weights, own, parts = read_weights(file), model.state_dict(), config.train.init_parts
    taken = {
        name: x for name, x in weights.items() if name in own and (not parts or name.split(".")[0] in parts)
    }
    reason = _other_shapes(taken, own)
    if not taken:
        reason = f"nothing to begin with: none of {_tensors(len(weights))} is in the model"
    if reason:
        raise CheckpointError(f"{file}: {reason}{explain_differences(saved, asdict(config))}")
    model.load_state_dict(taken, strict=False)
    return Taken(list(taken), [n for n in own if n not in taken], [n for n in weights if n not in taken])


def _other_shapes(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """A description of the tensors whose shape differs between file and model, or ""."""
    names = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if not names:
        return ""
    there, here = (tuple(tensors[names[0]].shape) for tensors in (weights, own))
    return (
        f"{_tensors(len(names))} of another shape, first {names[0]}: {there} in the file, {here} in the model"
    )


def explain_differences(saved: dict[str, Any], now: dict[str, Any]) -> str:
    """`; encoder.dim is 256 in the checkpoint, 384 in the configuration`, or ""."""
    parts = [{part: config[part] for part in MODEL_PARTS if part in config} for config in (saved, now)]
    found = differences(*parts)
    return "".join(
        f"; {p} is {old} in the checkpoint, {new} in the configuration" for p, (old, new) in found.items()
    )


def read_weights(file: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file{_advice(file)}") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a safetensors file: {error}") from None


def average_checkpoints(exp_dir: Path, paths: Sequence[Path]) -> Path:
    """Write the mean of several checkpoints' weights to average.safetensors, which records its sources."""
    if not paths:
        raise CheckpointError(f"{folder_of(exp_dir)}: no checkpoint to average")
    metas = [verify(path) for path in paths]
    for path, meta in zip(paths, metas, strict=True):
        if reason := explain_differences(metas[0]["config"], meta["config"]):
            raise CheckpointError(f"{path}: another model than {paths[0].name}{reason}")
    total: dict[str, Tensor] = {}
    for path in paths:
        weights = read_weights(path / WEIGHTS)
        for name, tensor in weights.items():
            # in double precision, the mean of equal numbers is exact
            total[name] = total.get(name, 0) + tensor.double()
    mean = {name: (tensor / len(paths)).to(weights[name].dtype) for name, tensor in total.items()}
    return write_average(exp_dir, mean, metas[-1], [path.name for path in paths])


def write_average(
    exp_dir: Path, weights: Mapping[str, Tensor], about: dict[str, Any], sources: Sequence[str]
) -> Path:
    """Write average.safetensors. about: as from `describe`; sources: the names of what it is made of."""
    kept = {key: about[key] for key in ("format", "asr", "tokens_sha256", "config")} | {"sources": sources}
    file = exp_dir / AVERAGE
    head = {key: json.dumps(value) for key, value in kept.items()}
    write_file(file, safetensors.torch.save(_contiguous(weights), head))
    return file


def about_weights(file: Path) -> dict[str, Any]:
    """The metadata of average.safetensors: format, asr, tokens_sha256, config, sources."""
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            about = opened.metadata() or {}
        return {key: json.loads(value) for key, value in about.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file{_advice(file)}") from None
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not a safetensors file of this toolkit: {error}") from None


def load_model(
    exp_dir: str | Path, which: str = "average", device: torch.device | str = "cpu"
) -> tuple[HybridModel, Tokenizer, ExperimentConfig]:
    """A trained model in eval mode, its tokenizer and its configuration.

    which: `average`, `latest`, `best`, `ema` (the running average of the latest), the name of a checkpoint,
    or a path to one or to a safetensors file. Raises CheckpointError, ConfigError or TokensError.
    """
    exp_dir = Path(exp_dir)
    config = load_config([exp_dir / "config.yaml"])
    tokenizer = load_tokenizer(exp_dir / "tokens")
    file, about = _find_weights(exp_dir, which)
    check_tokens_hash(file, about, exp_dir / "tokens")
    model = build_model(config.features, config.encoder, config.decoder, config.loss, len(tokenizer.symbols))
    load_weights(model, file, about.get("config", {}), config)
    model.decoder.guide = load_guide(exp_dir, model.decoder) or model.decoder.guide
    return model.to(device).eval(), tokenizer, config


def check_tokens_hash(file: Path, about: dict[str, Any], tokens: Path) -> None:
    """Raises CheckpointError if the weights were trained on other units."""
    if about.get("tokens_sha256", tokens_hash(tokens)) != tokens_hash(tokens):
        raise CheckpointError(
            f"{file}: trained with other units than {tokens}/tokens.txt (its SHA-256 differs)"
        )


def _find_weights(exp_dir: Path, which: str) -> tuple[Path, dict[str, Any]]:
    """The safetensors file that `which` of `load_model` names, and its metadata."""
    path: Path | None = Path(which)
    if which == "average":
        path = exp_dir / AVERAGE
    elif which == "best":
        path = pointed(exp_dir, "best")
    elif which in ("latest", "ema"):
        path = newest_valid(exp_dir, warnings.warn)
    if path is None:
        raise CheckpointError(f"{folder_of(exp_dir)}: no {which} checkpoint; train first")
    if not path.exists() and (folder_of(exp_dir) / which).is_dir():
        path = folder_of(exp_dir) / which
    if not path.is_dir():
        return path, about_weights(path)
    return path / (EMA if which == "ema" else WEIGHTS), verify(path)


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _tensors(count: int) -> str:
    return f"{count:,} tensor{'s' if count > 1 else ''}"


def _advice(file: Path) -> str:
    return f"; make it with `asr average {file.parent}`" if file.name == AVERAGE else ""
