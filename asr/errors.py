"""Errors that a user can fix. Anything else is a bug and keeps its traceback.

AsrError
  ConfigError      a YAML file, --set or an option is wrong
  ManifestError    a line of a manifest is wrong
  AudioError       an audio file or device cannot be used as asked
    AudioTooLong   it is longer than allowed
  TokensError      a unit inventory is wrong, or does not fit
  CheckpointError  a checkpoint is damaged, or does not fit the model or the configuration
  BundleError      an exported model is incomplete, damaged, or of another version
  TrainingError    training cannot go on
  MissingExtra     an optional dependency is not installed

A message is `where: what is, what was expected; what to do`: lower case after the colon, no full stop.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DISK_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


class AsrError(Exception):
    """The root: `recipes/cli.py` prints one line for it and exits with 2."""


class ConfigError(AsrError):
    pass


class ManifestError(AsrError):
    pass


class AudioError(AsrError):
    pass


class AudioTooLong(AudioError):
    pass


class TokensError(AsrError):
    pass


class CheckpointError(AsrError):
    pass


class BundleError(AsrError):
    pass


class TrainingError(AsrError):
    pass


class MissingExtra(AsrError):
    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; pip install 'asr-toolkit[{extra}]'")


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Name the file of an error that says that the disk is full: the system tells only that it is."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL and error.filename is None:
            error.filename = os.fspath(path)
        raise
