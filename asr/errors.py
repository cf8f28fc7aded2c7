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
