"""The set-up script, with a fake interpreter that only records its arguments."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]

FAKE_PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
case "$*" in
  *version_info*) [ "$VERSION" != 3.9.2 ] ;;
  *ensurepip*) [ "$VERSION" != no-venv ] ;;
  -V) echo "Python $VERSION" ;;
  "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python && cp "$0" .venv/bin/asr ;;
  *"pip install"*) [ ! -e offline ] ;;
esac
"""


class Checkout:
    def __init__(self, path: Path) -> None:
        self.path, self.calls = path, path / "calls"
        (path / "tools").mkdir(parents=True)
        for name in ("setup.cfg", "pyproject.toml", "requirements.lock", "tools/setup_venv.sh"):
            shutil.copy(REPO / name, path / name)
        (path / "python").write_text(FAKE_PYTHON)
        (path / "python").chmod(0o755)

    def setup(self, version: str = "3.11.7") -> tuple[int, str, int]:
        """Exit status, standard error, and how often pip was called."""
        self.calls.write_text("")
        env = os.environ | {"PYTHON": str(self.path / "python"), "CALLS": str(self.calls), "VERSION": version}
        script = self.path / "tools" / "setup_venv.sh"
        done = subprocess.run(["bash", script], env=env, capture_output=True, text=True, cwd="/")
        return done.returncode, done.stderr, self.calls.read_text().count("pip install")


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path / "with space")


def test_it_installs_once(checkout):
    status, err, installs = checkout.setup()
    assert (status, installs) == (0, 1)
    assert "requirements.lock" in err
    assert "-c requirements.lock -e .[dev]" in checkout.calls.read_text()
    assert checkout.setup() == (0, "", 0)
    os.utime(checkout.path / "setup.cfg")
    assert checkout.setup() == (0, "", 0), "touching a file changes nothing"


@pytest.mark.parametrize("name", ["setup.cfg", "requirements.lock"])
def test_it_installs_again_when_the_dependencies_change(checkout, name):
    checkout.setup()
    with (checkout.path / name).open("a") as file:
        file.write("# changed\n")
    assert checkout.setup()[::2] == (0, 1)


def test_it_installs_again_where_the_folder_was_moved(checkout):
    checkout.setup()
    moved = checkout.path.rename(checkout.path.with_name("moved"))
    checkout.path, checkout.calls = moved, moved / "calls"
    assert checkout.setup()[::2] == (0, 1)


def test_it_makes_the_environment_anew_when_its_interpreter_is_gone(checkout):
    checkout.setup()
    (checkout.path / ".venv/bin/python").unlink()
    assert checkout.setup()[::2] == (0, 1)


def test_a_failed_installation_is_not_taken_for_done(checkout):
    (checkout.path / "offline").touch()
    status, err, _ = checkout.setup()
    assert status != 0
    assert "pip could not install everything" in err
    (checkout.path / "offline").unlink()
    assert checkout.setup()[::2] == (0, 1)


@pytest.mark.parametrize(
    ("version", "words"), [("3.9.2", "Python 3.9.2 is too old"), ("no-venv", "no venv module")]
)
def test_an_unfit_interpreter_is_named(checkout, version, words):
    status, err, installs = checkout.setup(version)
    assert (status, installs) == (1, 0)
    assert words in err
    assert not (checkout.path / ".venv").exists()
