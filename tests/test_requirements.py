"""requirements.lock: exact versions from the default registry, of everything that `.[dev]` installs."""

import configparser
import re
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).parents[1]
LOCK = (REPO / "requirements.lock").read_text().splitlines()
VERSIONS = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in LOCK}


def declared() -> list[Requirement]:
    """The base requirements and those of every extra."""
    config = configparser.ConfigParser()
    config.read(REPO / "setup.cfg")
    texts = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    return [Requirement(line) for text in texts for line in text.splitlines() if line]


def installed_with(requirements: list[Requirement]) -> set[str]:
    """The names of everything that pip installs on this machine for some requirements."""
    found, todo = set(), [(r, extra) for r in requirements for extra in (r.extras or {""})]
    while todo:
        requirement, extra = todo.pop()
        if (key := (canonicalize_name(requirement.name), extra)) in found:
            continue
        found.add(key)
        try:
            below = [Requirement(text) for text in requires(requirement.name) or ()]
        except PackageNotFoundError:
            continue
        needed = [r for r in below if not r.marker or r.marker.evaluate({"extra": extra})]
        todo += [(r, e) for r in needed for e in (r.extras | {""})]
    return {name for name, _ in found} - {"asr-toolkit"}


def test_every_line_is_one_exact_public_version():
    assert [line for line in LOCK if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line)] == []
    assert sorted(VERSIONS) == list(VERSIONS), "in order, each once"
    assert len(VERSIONS) == len(LOCK)


def test_every_declared_requirement_is_locked_within_its_range():
    ours = [r for r in declared() if r.name != "asr-toolkit"]
    assert {r.name for r in ours if canonicalize_name(r.name) not in VERSIONS} == set()
    assert [str(r) for r in ours if VERSIONS[canonicalize_name(r.name)] not in r.specifier] == []


def test_nothing_is_installed_unlocked():
    assert installed_with(declared()) - set(VERSIONS) == set()
