"""Unpack archives (tar, .nemo) file by file: no member may lie, or point, outside the target folder."""

import shutil
import tarfile
from pathlib import Path, PurePosixPath

from asr.errors import CheckpointError

MAX_BYTES = 64 * 2**30
"""An archive that would unpack to more is rejected: the largest public models are below 10 GB."""

MAX_MEMBERS = 10_000


def unpack(archive: Path, folder: Path) -> None:
    """Write the regular files of a tar archive, compressed or not, below a new folder.

    All members are checked before the first is read. Raises CheckpointError for one that is neither file nor
    folder, lies elsewhere or occurs twice, for sizes beyond any model or the free disk space, and if the
    archive is incomplete.
    """
    try:
        with tarfile.open(archive) as opened:
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
    except (tarfile.TarError, EOFError) as error:
        raise CheckpointError(
            f"{archive}: incomplete archive: {str(error) or 'it ends too early'}; download it again"
        ) from None
    except OSError as error:  # gzip and bz2 raise it, too
        raise CheckpointError(f"{archive}: cannot be unpacked: {error.strerror or error}") from None


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
