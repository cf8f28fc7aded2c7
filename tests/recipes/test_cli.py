"""The command line: every verb has its help, and every kind of exit its status."""

import errno
import io
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated

import pytest
import typer

from asr.errors import AudioError
from recipes import cli

REPO = Path(__file__).parents[2]


@pytest.fixture
def verb(monkeypatch):
    """A function that registers a function as the verb `knead`, in a module of its own."""

    def register(function):
        module = ModuleType("recipes.knead")
        module.knead = function
        monkeypatch.setitem(sys.modules, "recipes.knead", module)
        monkeypatch.setitem(cli.VERBS, "knead", "a verb of this test")

    return register


def raises(error):
    def knead() -> None:
        raise error

    return knead


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_verb_explains_itself_with_an_example(name, capsys):
    assert cli.main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^\s*Example", out, re.MULTILINE)
    assert re.search(rf"^\s*.*\basr {name}\b", out.split("Example", 1)[1], re.MULTILINE), (
        "the example calls it"
    )


def test_help_lists_the_verbs_in_order(capsys):
    assert cli.main(["--help"]) == 0
    rows = re.findall(r"^  (\w+) +\w", capsys.readouterr().out, re.MULTILINE)
    assert rows == list(cli.VERBS)


def test_help_imports_no_verb():
    loaded = python("import sys; from recipes import cli; cli.main(['--help']); print(*sys.modules)").split()
    assert not {f"recipes.{name}" for name in cli.VERBS} & set(loaded)
    assert not {"torch", "numpy", "lhotse", "onnxruntime", "pydantic"} & set(loaded)


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"asr \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "usage: asr VERB"),
        (["trian"], "no such verb: trian; did you mean train?"),
        (["--versoin"], "no such option: --versoin; did you mean --version?"),
        (["knead", "--dough", "1"], "asr: knead: no such option: --dough; did you mean --dough-g?"),
        (["knead", "--dough-g", "much"], "asr: knead: invalid value for '--dough-g'"),
        (["knead", "a", "b"], "asr: knead: got unexpected extra argument"),
        (["knead"], "asr: knead: missing argument"),
    ],
)
def test_a_wrong_call_says_what_and_exits_2(verb, capsys, argv, words):
    def knead(what: str, dough_g: Annotated[int, typer.Option(help="Dough, in grams.")] = 500) -> None:
        pass

    verb(knead)
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert not captured.out
    assert not argv or captured.err.count("\n") == 1


def test_a_user_error_is_one_line_on_standard_error(verb, capsys):
    verb(raises(AudioError("a.wav: no such file")))
    assert cli.main(["knead"]) == 2
    assert capsys.readouterr() == ("", "asr: a.wav: no such file\n")


@pytest.mark.parametrize("how", ["option", "environment"])
def test_debug_shows_where_a_user_error_came_from(verb, capsys, monkeypatch, how):
    verb(raises(AudioError("a.wav: no such file")))
    if how == "environment":
        monkeypatch.setenv("ASR_DEBUG", "1")
    assert cli.main(["--debug", "knead"] if how == "option" else ["knead"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(verb, capsys):
    verb(raises(ZeroDivisionError("of flour")))
    assert cli.main(["knead"]) == 1
    assert "Traceback" in (err := capsys.readouterr().err)
    assert "ZeroDivisionError: of flour" in err


def test_a_missing_module_of_ours_is_a_bug(monkeypatch, capsys):
    monkeypatch.setitem(cli.VERBS, "knead", "a verb without a module")
    assert cli.main(["knead"]) == 1
    assert "recipes.knead" in capsys.readouterr().err


def test_a_missing_extra_says_how_to_install_it(verb, capsys):
    verb(raises(ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn")))
    assert cli.main(["knead"]) == 2
    assert capsys.readouterr().err == "asr: torch is not installed; pip install 'asr-toolkit[train]'\n"


def test_interrupt_and_the_verbs_own_status(verb, capsys):
    verb(raises(KeyboardInterrupt()))
    assert cli.main(["knead"]) == 130
    assert capsys.readouterr().err == "asr: interrupted\n"
    verb(raises(typer.Exit(3)))
    assert cli.main(["knead"]) == 3


def test_examples_keep_their_lines(verb, capsys):
    def knead() -> None:
        """Knead the dough.

        Example:
          asr knead --long
          asr knead --short [5]
        """

    verb(knead)
    assert cli.main(["knead", "--help"]) == 0
    assert re.search(r"Example:\n +asr knead --long\n +asr knead --short \[5\]\n", capsys.readouterr().out)


def test_a_closed_pipe_ends_quietly():
    program = (
        "import sys, types\n"
        "from recipes import cli\n"
        "def knead(): print('dough\\n' * 100_000)\n"
        "sys.modules['recipes.knead'] = types.SimpleNamespace(knead=knead)\n"
        "cli.VERBS['knead'] = ''\n"
        "sys.exit(cli.main(['knead']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"dough\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


def python(program: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_are_like_dev_null(closed):
    command = f'"{sys.executable}" -m recipes.cli --version {closed}'
    done = subprocess.run(["bash", "-c", command], cwd=REPO, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_file_name_that_is_not_utf8_can_be_printed(verb, monkeypatch):
    def knead() -> None:
        print("caf\udce9.wav")

    verb(knead)
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main(["knead"]) == 0
    assert out.buffer.getvalue() == b"caf\\udce9.wav\n"


@pytest.mark.parametrize("named", [True, False])
def test_a_full_disk_is_one_line(verb, capsys, named):
    verb(raises(OSError(errno.ENOSPC, "No space left on device", *(["x.txt"] if named else []))))
    assert cli.main(["knead"]) == 2
    name = "x.txt" if named else "output"
    assert capsys.readouterr().err == f"asr: {name}: no space left on device\n"
