"""The base install has no torch: everything that runs a bundle must do without the extras."""

import subprocess
import sys
from pathlib import Path

import pytest

from recipes.cli import EXTRAS, VERBS

REPO = Path(__file__).parents[1]

WITHOUT_EXTRAS = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {set(EXTRAS)!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    """Run a program in an interpreter that cannot import what only the extras install."""
    program = WITHOUT_EXTRAS + program
    return subprocess.run(
        [sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, check=False
    )


def modules(*packages: str) -> list[str]:
    paths = [path for package in packages for path in (REPO / package).glob("*.py")]
    return sorted(".".join(path.relative_to(REPO).with_suffix("").parts) for path in paths)


def test_the_interpreter_of_these_tests_has_no_torch():
    assert "No module named 'torch'" in run("import torch").stderr


def test_the_runtime_imports_without_extras():
    names = [
        "asr.audio",
        "asr.tokens",
        "asr.wer",
        "asr.latency",
        "asr.errors",
        *modules("asr/runtime", "asr/decode"),
    ]
    done = run("".join(f"import {name.removesuffix('.__init__')}\n" for name in names))
    assert done.returncode == 0, done.stderr


def test_every_verb_explains_itself_without_extras():
    done = run(f"""
from recipes import cli
for argv in [["--help"], *([verb, "--help"] for verb in {list(VERBS)!r})]:
    assert cli.main(argv) == 0, argv
""")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import asr", {"numpy", "onnxruntime", "typer", "rich", "pydantic", "yaml"}),
        (
            "from recipes import cli; cli.main(['--help'])",
            {"numpy", "onnxruntime", "pydantic", "yaml", "soundfile"},
        ),
        ("from recipes import cli; cli.main(['transcribe', '--help'])", {"onnxruntime", "pydantic"}),
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(statement, unwanted):
    done = run(f"{statement}\nprint('modules', *sys.modules)")
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.rpartition("modules ")[2].split())
    assert "asr" in loaded
    assert not loaded & unwanted
