"""Hub ids: downloaded if the package is installed; one clear error without the package or the network."""

import shutil
import sys
from types import ModuleType

import pytest

from asr.convert.hub import is_hub_id
from asr.convert.origin import read_origin

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for huggingface_hub: hub(answer) installs it and returns the list of its calls."""
    module, calls = ModuleType("huggingface_hub"), []

    def serve(answer):
        def snapshot_download(repo_id, *, revision=None, allow_patterns=None):
            calls.append((repo_id, revision, allow_patterns))
            if isinstance(answer, Exception):
                raise answer
            return str(answer)

        module.snapshot_download = snapshot_download
        monkeypatch.setitem(sys.modules, "huggingface_hub", module)
        return calls

    return serve


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name", True),
        ("owner/some.name-2@main", True),
        ("owner/name@refs/pr/1", True),
        ("name", False),
        ("a/b/c", False),
        ("/owner/name", False),
        ("../name", False),
        ("./name", False),
        ("owner/", False),
    ],
)
def test_what_is_an_id(text, expected, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(text) == expected


def test_a_folder_that_is_here_is_no_id(monkeypatch, tmp_path):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("owner/name")


def test_a_repository_is_fetched_and_its_commit_kept(asr, hub, tiny_source, tmp_path):
    snapshot = tmp_path / "snapshots" / COMMIT
    shutil.copytree(tiny_source, snapshot)
    (snapshot / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    calls = hub(snapshot)
    assert asr("convert", "wenet", "owner/name@v2", "-o", tmp_path / "exp")[0] == 0
    (name, revision, patterns), *others = calls
    assert (name, revision, others) == ("owner/name", "v2", [])
    assert {"*.pt", "README.md"} <= set(patterns)
    origin = read_origin(tmp_path / "exp")
    assert origin
    assert (origin.source, origin.licence) == (f"hub:owner/name@{COMMIT}", "cc-by-4.0")


def test_without_a_network_there_is_one_error(asr, hub, tmp_path):
    hub(ConnectionError("no route to host\nmore"))
    status, _, err = asr("convert", "wenet", "owner/name", "-o", tmp_path / "exp")
    assert status == 2
    assert err == (
        "asr: owner/name: no such folder here, and cannot be fetched from the hub: no route to host; "
        "download it and give its folder\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_the_extra_is_named(asr, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    status, _, err = asr("convert", "wenet", "owner/name", "-o", tmp_path / "exp")
    assert status == 2
    assert err == (
        "asr: owner/name: no such folder here; if it is a name on the hub, pip install 'asr-toolkit[hub]'\n"
    )
    assert list(tmp_path.iterdir()) == []
