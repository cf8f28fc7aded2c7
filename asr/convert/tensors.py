"""Read the tensors of a checkpoint file without running any code: weights_only pickles and safetensors."""

import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from warnings import catch_warnings, simplefilter

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from asr.errors import CheckpointError


class Plain:
    """A stand-in for objects that trainers save beside tensors; it only holds values."""

    def __init__(self, *values: Any) -> None:
        self.values = values


HARMLESS = ("argparse.Namespace", "pathlib.PosixPath", "pathlib._local.PosixPath")
"""Classes that are read as `Plain`; a Namespace then has its values as attributes."""

READING = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError, OSError, MemoryError),
    *(AttributeError, IndexError, AssertionError, ImportError),
)
"""What torch.load raises for files that are damaged or not checkpoints at all."""

HALVES = (torch.float16, torch.bfloat16)
FULL = (torch.float32, torch.float64)


def read_checkpoint(path: Path) -> Any:
    """The content of a torch.save or safetensors file. CheckpointError for code, damage and other formats.

    Nothing in the file is executed: its pickle may only refer to tensors and plain types.
    """
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: not safetensors, or not all: {error}; download it again"
            ) from None
    is_zip = _is_stored_zip(path)
    try:
        with torch.serialization.safe_globals([(Plain, name) for name in HARMLESS]), catch_warnings():
            simplefilter("ignore")  # problems with a file are reported in one line, or not at all
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except READING as error:
        raise CheckpointError(f"{path}: {_explain(path, str(error))}") from None


def _is_stored_zip(path: Path) -> bool:
    """Whether it is a zip by torch, whose members are never compressed, so it holds no more than its size."""
    try:
        with zipfile.ZipFile(path) as opened:
            problem = _zip_problem(opened, path.stat().st_size)
    except (OSError, zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError):
        return False
    if problem:
        raise CheckpointError(f"{path}: {problem}")
    return True


def _zip_problem(opened: zipfile.ZipFile, size: int) -> str:
    """What is wrong with a zip of so many bytes; empty if nothing is."""
    members = opened.infolist()
    if any("/code/" in x.filename for x in members):
        return "a TorchScript program, expected tensors; convert the checkpoint that it was made from"
    if squeezed := [x.filename for x in members if x.compress_type != zipfile.ZIP_STORED]:
        return f"{squeezed[0]} in it is compressed, which torch never does; refused"
    if sum(x.file_size for x in members) > size:
        return "its members overlap, which those of torch never do; refused"
    if any(x.CRC for x in members) and (damaged := opened.testzip()):  # torch can leave out all of them
        return f"{damaged} in it is damaged; download it again"
    return ""


def _explain(path: Path, error: str) -> str:
    if code := re.search(r"(?:GLOBAL|global|type|class) ([\w.]+\.[\w.]+)", error):
        return f"refused: it holds {code[1]}, which is code; expected tensors and plain values only"
    start = first_bytes(path)
    if other := no_download(start):
        return other
    if start.startswith(b"PK"):
        return "damaged, or only a part of it; download it again"
    return "not a checkpoint that torch.save wrote, or only a part of one; download it again"


def first_bytes(path: Path) -> bytes:
    """The beginning of a file, to tell what it is; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(64)
    except OSError:
        return b""


def no_download(start: bytes) -> str:
    """What a file is that was fetched in place of the one that was wanted; empty if that is unclear."""
    if start.startswith(b"version https://git-lfs"):
        return "a pointer to a file that git lfs has not fetched; run git lfs pull"
    return "a web page; download the file itself" if start.lstrip()[:1] == b"<" else ""


class Tensors(NamedTuple):
    """A state dict, ready to be mapped."""

    weights: dict[str, Tensor]
    """Floating point tensors are in float32."""

    notes: tuple[str, ...]
    """What was changed or left out."""

    others: Mapping[str, Any]
    """The other content of the file."""


def state_dict(found: Any, where: Path, *keys: str, halves: bool = False) -> Tensors:
    """The state dict in what `read_checkpoint` found: below the first key that exists, or all of it.

    halves: whether the family publishes its weights in 16 bits.

    Raises CheckpointError if something in it is not a tensor, or a tensor that a model cannot have, if
    weights were rounded to 16 bits, and if an optimizer state is stored with them.
    """
    notes: list[str] = []
    others: dict[str, Any] = {}
    key = next((k for k in keys if isinstance(found, Mapping) and isinstance(found.get(k), Mapping)), None)
    if key is not None:
        others = {str(name): value for name, value in found.items() if name != key}
        _refuse_training(others, where, key)
        notes += [f"not carried over: {', '.join(sorted(others))}"] * bool(others)
        found = found[key]
    if not isinstance(found, Mapping) or not found:
        kind = type(found).__name__ if not isinstance(found, Mapping) else "nothing"
        raise CheckpointError(f"{where}: {kind} in it, expected tensors by name")
    for problem in _problems(found):
        raise CheckpointError(f"{where}: {problem}")
    if rounded := {name: x for name, x in found.items() if x.dtype in HALVES}:
        kinds = ", ".join(sorted({str(x.dtype).removeprefix("torch.") for x in rounded.values()}))
        if not halves:
            raise CheckpointError(
                f"{where}: {len(rounded)} tensors are {kinds}, {next(iter(rounded))} the first; this family "
                "publishes float32, so the weights were rounded: convert the original"
            )
        notes.append(f"{len(rounded)} tensors were {kinds}, now float32")
    # strip the prefixes that torch.compile and distributed training put before every name
    prefix = next((p for p in ("module.", "_orig_mod.") if all(name.startswith(p) for name in found)), "")
    weights = {
        name.removeprefix(prefix): x.detach().float() if x.is_floating_point() else x.detach()
        for name, x in found.items()
    }
    return Tensors(weights, tuple(notes), others)


def _is_odd(kind: torch.dtype) -> bool:
    """Whether it is complex, or has less than 16 bits."""
    return kind.is_complex or (kind.is_floating_point and kind not in (*HALVES, *FULL))


def _refuse_training(others: Mapping[str, Any], where: Path, key: str) -> None:
    """Reject checkpoints for resuming: they hold the last weights, where often the average is to be used."""
    full = [name for name, value in others.items() if isinstance(value, Mapping | list) and value]
    if states := sorted(name for name in full if "optim" in name):
        raise CheckpointError(
            f"{where}: a checkpoint of training, with {', '.join(states)} beside its weights; convert what "
            f"was published or averaged for use, or write a file of its {key!r} alone"
        )


def _problems(found: Mapping[Any, Any]) -> Iterator[str]:
    for name, x in found.items():
        if not isinstance(name, str) or not isinstance(x, Tensor):
            yield f"{name!r} is {type(x).__name__}, expected tensors by name; name the file of the weights"
        elif not name.isprintable():
            yield f"{name!r}, expected names that can be printed"
        elif x.is_nested or x.is_meta or x.layout != torch.strided or x.is_quantized or _is_odd(x.dtype):
            yield f"{name} is {x.dtype}, {x.layout}, on {x.device}; expected plain floating point numbers"
        elif x.numel() * x.element_size() > x.untyped_storage().nbytes():
            yield f"{name} {tuple(x.shape)} has fewer numbers in the file than its shape says"
        elif x.is_floating_point() and not bool(x.float().isfinite().all()):
            yield f"{name} {tuple(x.shape)} holds what is no finite number; damaged, or its training diverged"
