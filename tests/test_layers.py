"""The architecture is tested too: who may import whom, what needs no torch, how large things may grow.

Each check is a function from the root of a tree to the violations in it, `file:line: what`, so that the last
tests can plant a violation of each kind in a tree of their own: a check that never fails is worth nothing.
"""

import ast
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from recipes.cli import EXTRAS, VERBS

REPO = Path(__file__).parents[1]

TRAINING = {"asr.data", "asr.features", "asr.model", "asr.losses", "asr.optim"}

ANYBODYS = {"asr", "asr.errors", "asr.context"}  # the version, errors a user can fix, what attention may see

MAY_IMPORT = {  # layer: what it may import of this repository, besides itself and ANYBODYS
    "asr": set(),
    "asr.errors": set(),
    "asr.context": set(),
    "asr.containers": set(),
    "asr.audio": {"asr.containers"},
    "asr.microphone": {"asr.audio"},
    "asr.virtual_microphone": {"asr.audio"},
    "asr.pieces": set(),
    "asr.tokens": {"asr.pieces", "asr.byte_tokens"},
    "asr.byte_tokens": {"asr.tokens"},
    "asr.whisper_tokens": {"asr.tokens", "asr.byte_tokens"},
    "asr.wer": set(),
    "asr.latency": {"asr.wer"},
    "asr.features": set(),
    "asr.whisper_features": {"asr.features"},
    "asr.nemo_features": {"asr.features", "asr.whisper_features"},
    "asr.losses": set(),
    "asr.scaled_adam": set(),
    "asr.optim": {"asr.scaled_adam"},
    "asr.model": {"asr.features", "asr.whisper_features", "asr.nemo_features", "asr.losses", "asr.decode"},
    "asr.data": {"asr.audio", "asr.tokens"},
    "asr.decode": set(),
    "asr.config": TRAINING,
    "asr.convert": {"asr.model", "asr.features", "asr.losses", "asr.config"}
    | {"asr.tokens", "asr.pieces", "asr.byte_tokens", "asr.whisper_tokens"},
    "asr.train": TRAINING | {"asr.config", "asr.decode", "asr.wer", "asr.tokens"},
    "asr.runtime": {"asr.decode", "asr.audio", "asr.tokens"},
    "asr.serve": {"asr.runtime", "asr.audio", "asr.containers"},
    "export": {"asr.*"},
    "recipes": {"asr.*", "export"},
    "egs": {"asr.*", "export", "recipes"},
    "tools": {"asr.*", "export", "recipes"},
}
TORCH_FREE = {"asr", "asr.decode", "asr.runtime", "asr.serve"} | {
    f"asr.{name}"
    for name in (
        "errors",
        "context",
        "containers",
        "audio",
        "microphone",
        "virtual_microphone",
        "pieces",
        "tokens",
        "byte_tokens",
        "whisper_tokens",
        "wer",
        "latency",
    )
}
OWN_EXTRAS = {"asr.microphone": {"sounddevice"}, "asr.serve": {"starlette", "uvicorn", "websockets"}}
NOT_IN_THE_LIBRARY = {"argparse", "typer", "click", "rich"}
OURS = {"asr", "recipes", "export", "egs", "tools", "tests"}
UNSAFE_FOR_A_REASON = {
    # a pipe in a Kaldi wav.scp is a shell command by definition; refused unless the user allows pipes
    ("asr/data/importers.py", "subprocess.run"),
}
NOT_CODE = {"data", "exp", "download", "__pycache__"}  # below egs/<corpus>/


# ---- reading the tree


def python_files(root: Path, *folders: str) -> Iterator[Path]:
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            if not (folder == "egs" and NOT_CODE & set(path.relative_to(root).parts)):
                yield path


def module_name(root: Path, path: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def module_path(root: Path, name: str) -> Path | None:
    path = root.joinpath(*name.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def layer_of(name: str) -> str:
    """asr.model.conformer -> asr.model; recipes.train -> recipes."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "asr" else parts[0]


def imports(root: Path, path: Path) -> Iterator[tuple[int, str]]:
    """Line and module of every import, also inside functions; `from asr import audio` is asr.audio."""
    package = module_name(root, path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                [*package[: len(package) - node.level + 1], node.module or ""]
                if node.level
                else [node.module]
            )
            base = base.strip(".")
            names = [f"{base}.{alias.name}" for alias in node.names]
            yield from {(node.lineno, name if module_path(root, name) else base) for name in names}


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes())


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


# ---- the checks


def forbidden_imports(root: Path) -> Iterator[str]:
    for path in python_files(root, "asr", "recipes", "export", "egs", "tools"):
        layer = layer_of(module_name(root, path))
        allowed = MAY_IMPORT.get(layer)
        where = path.relative_to(root)
        if allowed is None:
            yield f"{where}:1: {layer} is not in MAY_IMPORT: say what it may import"
            continue
        for line, name in imports(root, path):
            target = layer_of(name)
            if target.split(".")[0] not in OURS or target in {layer} | ANYBODYS | allowed:
                continue
            if not ("asr.*" in allowed and target.startswith("asr.")):
                yield f"{where}:{line}: {layer} may not import {target}"


def torch_in_torch_free_layers(root: Path) -> Iterator[str]:
    for path in python_files(root, "asr"):
        layer = layer_of(module_name(root, path))
        extras = set(EXTRAS) - OWN_EXTRAS.get(layer, set())
        for line, name in imports(root, path):
            if layer in TORCH_FREE and (package := name.split(".")[0]) in extras:
                yield f"{path.relative_to(root)}:{line}: {layer} must stay free of {package}"


def programs_in_the_library(root: Path) -> Iterator[str]:
    """No argument parsing, no print, no YAML outside config.py."""
    for path in python_files(root, "asr"):
        where = path.relative_to(root)
        for line, name in imports(root, path):
            package = name.split(".")[0]
            if package in NOT_IN_THE_LIBRARY or (package == "yaml" and where.as_posix() != "asr/config.py"):
                yield f"{where}:{line}: {package} is for recipes/, not for the library"
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                yield f"{where}:{node.lineno}: the library does not print"


def long_files(root: Path) -> Iterator[str]:
    for path in python_files(root, "asr", "recipes", "export", "egs", "tools", "tests"):
        where, limit = path.relative_to(root), 600 if path.is_relative_to(root / "tests") else 400
        if (lines := len(path.read_text().splitlines())) > limit:
            yield f"{where}:{limit}: {lines} lines, more than {limit}"


def large_functions(root: Path) -> Iterator[str]:
    """Over 60 lines, or over 8 parameters unless it is a verb, whose parameters are options."""
    for path in python_files(root, "asr", "recipes", "export", "egs", "tools", "tests"):
        where = path.relative_to(root)
        for f in functions(parse(path)):
            if (lines := f.end_lineno - f.lineno + 1) > 60:
                yield f"{where}:{f.lineno}: {f.name} has {lines} lines, more than 60"
            args = f.args.posonlyargs + f.args.args + f.args.kwonlyargs
            count = len([a for a in args if a.arg not in ("self", "cls")])
            is_verb = f.name in VERBS and where.as_posix() == f"recipes/{f.name}.py"
            if count > 8 and not is_verb:
                yield f"{where}:{f.lineno}: {f.name} has {count} parameters, more than 8"


def symlinks(root: Path) -> Iterator[str]:
    for folder in sorted(OURS | {"docs", ".ci"}):
        for path in sorted((root / folder).rglob("*")):
            if path.is_symlink() and not (folder == "egs" and NOT_CODE & set(path.relative_to(root).parts)):
                yield f"{path.relative_to(root)}:1: is a symlink"


def large_closure(root: Path, start: str = "recipes.train", limit: int = 12000) -> Iterator[str]:
    """All of our files that training imports, directly or not, must be few enough for one person to read."""
    todo, sizes = [start], {}
    while todo:
        name = todo.pop()
        path = module_path(root, name)
        if path is None or name in sizes:
            continue
        sizes[name] = len(path.read_text().splitlines())
        todo += [target for _, target in imports(root, path)] + [name.rpartition(".")[0]]
    if (total := sum(sizes.values())) >= limit:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
        yield f"{start}: imports {total} lines of ours, {limit} or more; the largest: {', '.join(largest)}"


def unsafe_calls(root: Path) -> Iterator[str]:
    for path in python_files(root, "asr", "recipes", "export", "egs", "tools"):
        where = path.relative_to(root).as_posix()
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Call) and (why := why_unsafe(node)):
                name = ast.unparse(node.func)
                if (where, name) not in UNSAFE_FOR_A_REASON:
                    yield f"{where}:{node.lineno}: {name}: {why}"


def why_unsafe(call: ast.Call) -> str:
    """Why a call might run code from a file, or write where it should not; empty if it cannot."""
    name = ast.unparse(call.func)
    true = {k.arg for k in call.keywords if isinstance(k.value, ast.Constant) and k.value.value is True}
    if name in {"eval", "exec", "os.system", "yaml.load"} or name.endswith(".extractall"):
        return "use what cannot run or overwrite anything"
    if name.split(".")[0] in {"pickle", "dill", "marshal", "joblib", "shelve"} and "dump" not in name:
        return "a pickle runs code when it is read"
    if name == "torch.load" and "weights_only" not in true:
        return "needs weights_only=True"
    if unsafe := {"shell", "allow_pickle"} & true:
        return f"{unsafe.pop()}=True"
    return ""


def odd_runs(root: Path) -> Iterator[str]:
    for path in sorted(root.glob("egs/*/run.sh")):
        text, where = path.read_text(), path.relative_to(root)
        for line in ("set -euo pipefail", 'cd "$(dirname "$0")"', ". ../../recipes/stage.sh"):
            if not re.search(rf"^{re.escape(line)}(\s|$)", text, re.MULTILINE):
                yield f"{where}:1: has no line `{line}`"
        for number, line in enumerate(text.splitlines(), 1):
            if re.match(r"\s*stage \d+ .*(&&|\|\|)", line):
                yield f"{where}:{number}: write `if stage N ...; then`, behind && no command stops the run"


CHECKS = [
    forbidden_imports,
    torch_in_torch_free_layers,
    programs_in_the_library,
    long_files,
    large_functions,
    symlinks,
    large_closure,
    unsafe_calls,
    odd_runs,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_house_is_in_order(check):
    found = list(check(REPO))
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    "name", ["asr.data", "asr.model", "asr.train", "asr.runtime", "asr.config", "recipes.train"]
)
def test_the_checks_read_the_real_tree(name):
    assert module_path(REPO, name) in set(python_files(REPO, "asr", "recipes"))


# ---- a planted violation of each kind

SIXTY_ONE_PASSES = "\n".join(["    pass"] * 61)
PLANTED: list[tuple[Callable[[Path], Iterator[str]], str, str, str]] = [
    (
        forbidden_imports,
        "asr/model/bad.py",
        "\nfrom asr.tokens import x",
        "bad.py:2: asr.model may not import asr.tokens",
    ),
    (
        forbidden_imports,
        "asr/model/bad.py",
        "def f():\n    import asr.data.cuts",
        "bad.py:2: asr.model may not import asr.data",
    ),
    (forbidden_imports, "asr/model/bad.py", "from asr import tokens", "asr.model may not import asr.tokens"),
    (
        forbidden_imports,
        "asr/model/bad.py",
        "from ..tokens import x",
        "asr.model may not import asr.tokens",
    ),
    (forbidden_imports, "asr/model/bad.py", "from .. import tokens", "asr.model may not import asr.tokens"),
    (forbidden_imports, "asr/runtime/bad.py", "import recipes.cli", "asr.runtime may not import recipes"),
    (forbidden_imports, "asr/wer.py", "import asr.audio", "asr.wer may not import asr.audio"),
    (forbidden_imports, "export/bad.py", "import recipes", "export may not import recipes"),
    (forbidden_imports, "recipes/bad.py", "import tools.x", "recipes may not import tools"),
    (forbidden_imports, "asr/other/new.py", "", "asr.other is not in MAY_IMPORT"),
    (
        torch_in_torch_free_layers,
        "asr/runtime/bad.py",
        "import torch",
        "bad.py:1: asr.runtime must stay free of torch",
    ),
    (
        torch_in_torch_free_layers,
        "asr/decode/bad.py",
        "from scipy import fft",
        "asr.decode must stay free of scipy",
    ),
    (programs_in_the_library, "asr/model/bad.py", "print(1)", "does not print"),
    (programs_in_the_library, "asr/model/bad.py", "import argparse", "argparse is for recipes/"),
    (programs_in_the_library, "asr/data/bad.py", "import yaml", "yaml is for recipes/"),
    (long_files, "asr/model/bad.py", "\n" * 401, "401 lines, more than 400"),
    (long_files, "tests/test_bad.py", "\n" * 601, "601 lines, more than 600"),
    (large_functions, "asr/bad.py", f"def f():\n{SIXTY_ONE_PASSES}", "f has 62 lines"),
    (
        large_functions,
        "asr/bad.py",
        "class A:\n    def f(self, a, b, c, d, e, f, g, *, h, i): ...",
        "f has 9 parameters",
    ),
    (
        large_functions,
        "recipes/bad.py",
        "def train(a, b, c, d, e, f, g, h, i): ...",
        "train has 9 parameters",
    ),
    (
        large_closure,
        "recipes/train.py",
        "from asr import features\nimport asr.losses\n",
        "imports 12002 lines",
    ),
    (unsafe_calls, "asr/bad.py", "pickle.load(f)", "pickle.load"),
    (unsafe_calls, "asr/bad.py", "torch.load(f, weights_only=False)", "torch.load"),
    (unsafe_calls, "asr/bad.py", "torch.load(f)", "torch.load"),
    (unsafe_calls, "asr/bad.py", "yaml.load(f)", "yaml.load"),
    (unsafe_calls, "tools/bad.py", "eval(x)", "eval"),
    (unsafe_calls, "egs/made/prepare.py", "exec(x)", "exec"),
    (unsafe_calls, "recipes/bad.py", "subprocess.run(x, shell=True)", "shell=True"),
    (unsafe_calls, "export/bad.py", "np.load(x, allow_pickle=True)", "allow_pickle=True"),
    (unsafe_calls, "asr/bad.py", "tar.extractall(x)", "tar.extractall"),
    (odd_runs, "egs/made/run.sh", "set -euo pipefail\n", "has no line `. ../../recipes/stage.sh`"),
    (odd_runs, "egs/made/run.sh", 'stage 1 "Train" && asr train', "run.sh:1: write `if stage N"),
]


@pytest.mark.parametrize(("check", "path", "text", "expected"), PLANTED)
def test_a_planted_violation_is_found(tmp_path, check, path, text, expected):
    for module in ("asr/decode/ctc.py", "asr/tokens.py", "asr/features.py", "asr/losses.py", path):
        (tmp_path / module).parent.mkdir(parents=True, exist_ok=True)
    for module in ("asr/decode/ctc.py", "asr/tokens.py"):
        (tmp_path / module).touch()
    for module in ("asr/features.py", "asr/losses.py"):
        (tmp_path / module).write_text("x = 0\n" * 6000)
    (tmp_path / path).write_text(text)
    assert [line for line in check(tmp_path) if expected in line]


def test_a_planted_symlink_is_found(tmp_path):
    (tmp_path / "asr").mkdir()
    (tmp_path / "asr" / "same.py").symlink_to("other.py")
    assert list(symlinks(tmp_path)) == ["asr/same.py:1: is a symlink"]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "recipes/train.py",
            "from asr.model import build\nimport export.onnx\nfrom recipes import cli\nprint(1)",
        ),
        ("recipes/train.py", "def train(a, b, c, d, e, f, g, h, i): ..."),
        (
            "asr/runtime/stream.py",
            "import numpy\nfrom asr import __version__\nfrom asr.errors import BundleError",
        ),
        ("asr/model/x.py", "from . import masks\nfrom .masks import f\nimport torch\nmodel.eval()"),
        ("asr/train/x.py", "torch.load(f, weights_only=True)\npickle.dumps(x)"),
        ("asr/config.py", "import yaml\nyaml.safe_load(x)\nfrom asr.data.loader import DataConfig"),
    ],
)
def test_what_is_allowed_is_not_found(tmp_path, path, text):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(text)
    assert [line for check in CHECKS for line in check(tmp_path)] == []
