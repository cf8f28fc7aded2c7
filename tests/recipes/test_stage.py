"""A run.sh that sources `recipes/stage.sh`: which stages run, and how its variables become options."""

import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]

RUN = """#!/usr/bin/env bash
# A corpus of nothing. Results: none.
#   ./run.sh --corpus DIR    everything
set -euo pipefail
cd "$(dirname "$0")"

corpus=download/nothing
num_epochs=3
model=small
stage=0 stop_stage=99
. ../../recipes/stage.sh

if stage 0 "Prepare"; then echo "prepare $corpus"; fi
if stage 1 "Train"; then echo "train $num_epochs"; fi
if stage 2 "Score"; then
  false
  echo "not reached"
fi
if stage 3 "Export"; then echo "export $model_config"; fi
"""


@pytest.fixture(params=["plain", "with space"])
def run(tmp_path, request):
    root = tmp_path / request.param
    (root / "recipes").mkdir(parents=True)
    (root / "egs" / "nothing").mkdir(parents=True)
    shutil.copy(REPO / "recipes" / "stage.sh", root / "recipes")
    (root / "egs" / "nothing" / "run.sh").write_text(RUN)
    (root / "egs" / "nothing" / "conf").mkdir()
    (root / "egs" / "nothing" / "conf" / "own.yaml").touch()

    def call(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "egs/nothing/run.sh", *args], cwd=root, capture_output=True, text=True, check=False
        )

    return call


def test_stages_run_in_order_and_stop_at_the_first_failure(run):
    done = run()
    assert done.stdout == "prepare download/nothing\ntrain 3\n"
    assert done.returncode == 1
    assert "== stage 0, Prepare\n-- stage 0, Prepare: done after 0 min" in done.stderr
    assert "-- stage 2, Score: failed after 0 min" in done.stderr


@pytest.mark.parametrize(
    ("args", "out"),
    [
        (("--stage", "1", "--stop-stage", "1"), "train 3\n"),
        (("--stage=3",), "export ../../recipes/conf/small.yaml\n"),
        (("--stage=3", "--model", "own"), "export conf/own.yaml\n"),
        (("--stage", "1", "--stop-stage", "1", "--num-epochs", "7"), "train 7\n"),
        (("--stop-stage", "0", "--corpus", "/a b/$HOME/*"), "prepare /a b/$HOME/*\n"),
        (("--stop-stage", "0", "--corpus=a=b"), "prepare a=b\n"),
        (("--stop-stage", "0", "--corpus", ""), "prepare \n"),
    ],
)
def test_every_variable_is_an_option(run, args, out):
    done = run(*args)
    assert (done.returncode, done.stdout) == (0, out)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ("--stag", "1"),
            "no such option: --stag; options: --corpus --model --num-epochs --stage --stop-stage\n",
        ),
        (("--PATH", "x"), "no such option: --PATH"),
        (("--.*", "x"), "no such option: --.*"),
        (("1",), "not an option: 1"),
        (("--corpus",), "--corpus needs a value"),
        (("--stage", "one"), "not numbers"),
    ],
)
def test_what_is_no_option_stops_before_any_stage(run, args, words):
    done = run(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr


def test_help_prints_the_head_of_the_script_and_the_defaults(run):
    done = run("--help")
    assert done.returncode == 0
    assert done.stdout.startswith(
        "A corpus of nothing. Results: none.\n  ./run.sh --corpus DIR    everything\n"
    )
    assert "  --num-epochs 3\n" in done.stdout
    assert "set -euo" not in done.stdout
