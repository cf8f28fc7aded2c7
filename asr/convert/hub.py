"""Checkpoints from the Hugging Face hub, which needs the extra `hub` and a network."""

import re
from collections.abc import Sequence
from pathlib import Path

from asr.errors import CheckpointError

ID = re.compile(r"(?P<name>[\w][\w.-]*/[\w][\w.-]*)(@(?P<revision>[\w./-]+))?")
CARDS = ("README.md", "LICENSE*")
"""Files that may state the licence."""


def is_hub_id(source: str) -> bool:
    """Whether it is `owner/name` or `owner/name@revision`, and no local path."""
    return bool(ID.fullmatch(source)) and not Path(source).exists()


def fetch(source: str, patterns: Sequence[str]) -> tuple[Path, str]:
    """Download the matching files of a repository into the cache of huggingface_hub.

    Returns their folder, and the id with the commit that they belong to. Raises CheckpointError if that
    fails, or if the package is not installed.
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
    except Exception as error:  # network, hub or disk: the package raises dozens of types
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{source}: no such folder here, and cannot be fetched from the hub: {reason[0]}; download it "
            "and give its folder"
        ) from None
    return folder, f"hub:{name}@{folder.name}"
