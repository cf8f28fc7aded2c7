"""Unpack archives (tar, .nemo) file by file: no member may lie, or point, outside the target folder."""

import lzma
import shutil
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Self

from asr.convert.tensors import first_bytes, no_download
from asr.errors import CheckpointError

MAX_BYTES = 64 * 2**30
"""An archive that would unpack to more is rejected: the largest public models are below 10 GB."""

MAX_MEMBERS = 10_000

MAX_HEADER = 2**20
"""Bytes of a member's extended header, such as a long name."""

TAIL = 2**20


class Member(tarfile.TarInfo):
    """A member whose extended headers, which tarfile reads as a whole, have a bounded size."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        found = super().frombuf(buf, encoding, errors)
        if found.size > MAX_HEADER and not (found.isreg() or found.isdir()):
            raise ValueError(f"a header of {found.size:,} bytes, at most {MAX_HEADER:,} are read")
        return found


def unpack(archive: Path, folder: Path) -> None:
    """Write the regular files of a tar archive, compressed or not, below a new folder.

    All members are checked before the first is read. Raises CheckpointError for one that is neither file nor
    folder, lies elsewhere or occurs twice, for sizes beyond any model or the free disk space, and if the
    archive is incomplete.
    """
    try:
        with tarfile.open(archive, tarinfo=Member) as opened:
            found = _checked(opened, archive, shutil.disk_usage(folder.parent).free)
            folder.mkdir()
            for path, member in found.items():
                file = opened.extractfile(member)
                assert file is not None
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                with file, target.open("xb") as out:
                    shutil.copyfileobj(file, out)
                if target.stat().st_size != member.size:
                    raise tarfile.ReadError(f"{path} ends too early")
            _check_end(opened)
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise CheckpointError(f"{archive}: {_explain(archive, str(error))}") from None
    except ValueError as error:
        raise CheckpointError(f"{archive}: {error}; refused, nothing is unpacked") from None
    except OSError as error:  # gzip and bz2 raise it, too
        if not error.strerror:
            raise CheckpointError(f"{archive}: {_explain(archive, str(error))}") from None
        raise CheckpointError(f"{archive}: cannot be unpacked: {error.strerror.lower()}") from None


def _explain(archive: Path, error: str) -> str:
    reason = "it ends too early" if not error else "not a tar archive" if "\n" in error else error
    return no_download(first_bytes(archive)) or f"incomplete archive: {reason}; download it again"


def _check_end(opened: tarfile.TarFile) -> None:
    """Read what follows the last member, as decompressors compare their checksum only at the very end."""
    assert opened.fileobj is not None
    for _ in range(MAX_MEMBERS):
        if not opened.fileobj.read(TAIL):
            return
    raise tarfile.ReadError("too much after its last member")


def _checked(opened: tarfile.TarFile, archive: Path, free: int) -> dict[str, tarfile.TarInfo]:
    """Path -> file, for an archive that holds only files and folders."""
    found: dict[str, tarfile.TarInfo] = {}
    size = 0
    for number, member in enumerate(opened, 1):
        path = PurePosixPath(member.name)
        problem = ""
        if not (member.isreg() or member.isdir()):
            problem = "is a link or a device, expected files and folders only"
        elif path.is_absolute() or ".." in path.parts or "\\" in member.name or "\0" in member.name:
            problem = "lies outside the archive"
        elif member.isreg() and not path.parts:
            problem = "is a file without a name"
        elif str(path) in found:
            problem = "is there twice"
        elif (size := size + member.size) > min(MAX_BYTES, free):
            problem = f"is too large: {size:,} bytes so far, at most {min(MAX_BYTES, free):,} are unpacked"
        elif number > MAX_MEMBERS:
            problem = f"is one too many, at most {MAX_MEMBERS:,} are read"
        if problem:
            raise CheckpointError(f"{archive}: {member.name!r} {problem}; refused, nothing is unpacked")
        if member.isreg():
            found[str(path)] = member
    return found
