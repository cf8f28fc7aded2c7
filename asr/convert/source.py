"""The location of a public checkpoint: a folder, one file with others beside it, or an archive."""

import hashlib
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asr.config import parse_yaml
from asr.convert.archive import unpack
from asr.convert.tensors import Tensors, read_checkpoint, state_dict
from asr.errors import AsrError, CheckpointError

ARCHIVES = (".nemo", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")

MAX_TEXT = 64 * 2**20
"""Configurations, units and statistics above this are rejected: the largest in use are below 10 MB."""


@dataclass
class Source:
    """The files of one checkpoint, read by name; keeps track of those that were used."""

    folder: Path
    label: str
    """Its name for the user and the hub."""

    main: Path | None = None
    """The weights file, if it was named."""

    archive: Path | None = None
    """The archive that the folder was unpacked from."""

    used: list[Path] = field(default_factory=list)

    def weights_file(self, *names: str) -> Path:
        """The file that was named, or the first of some names that exists."""
        return self._use(self.main) if self.main else self.file(*names)

    def file(self, *names: str) -> Path:
        """The first of some names that exists; CheckpointError if none does."""
        if path := self.maybe(*names):
            return path
        expected = f"{'' if len(names) == 1 else 'one of '}{', '.join(names)}"
        if self.main:
            raise CheckpointError(
                f"{self.label}: incomplete, expected {expected} beside it; or name a folder that holds both"
            )
        raise CheckpointError(f"{self.label}: incomplete, expected {expected} in it")

    def maybe(self, *names: str) -> Path | None:
        """The first of some names (or patterns) that exists, in the folder or below it.

        Files in the folder itself come first. CheckpointError if several match.
        """
        for name in names:
            for found in (sorted(self.folder.glob(name)), sorted(self.folder.rglob(name))):
                files = [path for path in found if path.is_file()]
                if len(files) > 1:
                    shown = ", ".join(str(path.relative_to(self.folder)) for path in files[:5])
                    raise CheckpointError(
                        f"{self.label}: {len(files)} files {name}: {shown}; name the weights, or move the "
                        "others away"
                    )
                if files:
                    return self._use(files[0])
        return None

    def text(self, path: Path) -> str:
        data = self.data(path)
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise CheckpointError(f"{path}: not UTF-8 text") from None

    def data(self, path: Path) -> bytes:
        try:
            if (size := path.stat().st_size) > MAX_TEXT:
                raise CheckpointError(f"{path}: {size:,} bytes, at most {MAX_TEXT:,} are read")
            return path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path}: {(error.strerror or str(error)).lower()}") from None

    def yaml(self, path: Path) -> dict[str, Any]:
        found = parse_yaml(self.text(path), str(path), references=True)
        if not isinstance(found, dict):
            raise CheckpointError(f"{path}: {type(found).__name__}, expected options by name")
        return found

    def tensors(self, path: Path, *keys: str, halves: bool = False) -> Tensors:
        """The state dict of a file, read by asr/convert/tensors.py."""
        return state_dict(read_checkpoint(path), path, *keys, halves=halves)

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every file that was used, or of the archive."""
        files = {path.relative_to(self.folder).as_posix(): path for path in self.used}
        if self.archive:
            files = {self.archive.name: self.archive}
        found = {}
        for name, path in files.items():
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
        return found

    def licence(self) -> str:
        """The licence stated in the header of the model card README.md, which stands beside the weights or
        the archive, or at the top of the archive; "" if none."""
        beside = self.archive.parent if self.archive else self.folder
        cards = [beside / "README.md", self.folder / "README.md", *sorted(self.folder.glob("*/README.md"))]
        for card in cards:
            try:
                text = self.text(card) if card.is_file() else ""
                _, opening, rest = text.replace("\r\n", "\n").partition("---\n")
                head = rest.partition("\n---")[0]
                found = parse_yaml(head, str(card), references=True) if opening else None
            except AsrError:  # a card that nobody can read states nothing
                continue
            stated = found.get("license") if isinstance(found, dict) and text.startswith("---") else None
            if isinstance(stated, str) and stated.isprintable():
                return stated
        return ""

    def _use(self, path: Path) -> Path:
        self.used.append(path)
        return path


def open_source(path: Path, scratch: Path, label: str = "") -> Source:
    """The source at a local path; an archive is unpacked into the existing folder `scratch`.

    label: what to call it, by default its path. Raises CheckpointError if there is nothing.
    """
    label = label or str(path)
    if path.is_dir():
        inside = sorted(path.glob("*.nemo"))
        if len(inside) > 1:
            shown = ", ".join(x.name for x in inside[:5])
            raise CheckpointError(f"{label}: {len(inside)} archives in it: {shown}; name one")
        if not inside:
            return Source(path, label)
        path = inside[0]
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file or folder")
    if _is_archive(path):
        unpack(path, scratch / "archive")
        return Source(scratch / "archive", label, archive=path)
    return Source(path.parent, label, path)


def _is_archive(path: Path) -> bool:
    """By its name, so that damage is reported as such, or by its content. model.pth.tar is neither."""
    try:
        return path.name.endswith(ARCHIVES) or tarfile.is_tarfile(path)
    except (OSError, EOFError):
        return False
