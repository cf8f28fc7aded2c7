"""Checkpoints from the Hugging Face hub, where the extra `hub` is installed and a network is there."""

import re
from collections.abc import Sequence
from pathlib import Path

from asr.errors import CheckpointError

ID = re.compile(r"(?P<name>[\w][\w.-]*/[\w][\w.-]*)(@(?P<revision>[\w./-]+))?")
CARDS = ("README.md", "LICENSE*")
"""Where a licence is stated."""


def is_hub_id(source: str) -> bool:
    """Whether it is `owner/name` or `owner/name@revision`, and nothing of that path is here."""
    return bool(ID.fullmatch(source)) and not Path(source).exists()


def fetch(source: str, patterns: Sequence[str]) -> tuple[Path, str]:
    """Download the files of a repository that match into the cache of huggingface_hub.

    Returns their folder, and the id with the commit that they are of. Raises CheckpointError where that
    fails, as it does without the package.
    """
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise CheckpointError(
            f"{source}: no such folder here; if it is a name on the hub, pip install 'asr-toolkit[hub]'"
        ) from None
    found = ID.fullmatch(source)
    assert found
    name, revision = found["name"], found["revision"]
    nested = [path for pattern in (*patterns, *CARDS) for path in (pattern, f"*/{pattern}")]
    try:
        folder = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=nested))
    except Exception as error:  # of the network, of the hub, of the disk: the package has dozens of kinds
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{source}: no such folder here, and not fetched from the hub: {reason[0]}; download it "
            "and give its folder"
        ) from None
    return folder, f"hub:{name}@{folder.name}"
