from pathlib import Path

import onnx
import pytest

from asr.errors import BundleError
from asr.model.hybrid import HybridModel
from asr.runtime import Bundle
from export.bundle import Origin, check_out, describe, write_bundle


@pytest.fixture
def graphs(tiny_bundles: Path) -> dict[str, onnx.ModelProto]:
    folder = tiny_bundles / "cpu-fp32"
    return {path.stem: onnx.load(path) for path in folder.glob("*.onnx")}


def test_a_bundle_takes_the_place_of_an_older_one_and_leaves_nothing_behind(
    tiny_model: HybridModel, tiny_bundles: Path, graphs: dict[str, onnx.ModelProto], tmp_path: Path
):
    out = tmp_path / "new" / "bundle"
    for licence in ("one", "two"):
        check_out(out)
        write_bundle(
            graphs, describe(tiny_model, tiny_bundles, "cpu-fp32", Origin("x", licence)), tiny_bundles, out
        )
        assert Bundle.load(out).info.licence == licence
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]


def test_a_folder_that_is_no_bundle_is_left_alone(tmp_path: Path):
    (tmp_path / "mine").mkdir()
    check_out(tmp_path / "mine")
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(BundleError, match="not a bundle"):
        check_out(tmp_path / "mine")
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="not a bundle"):
        check_out(tmp_path / "file")
    with pytest.raises(BundleError, match="file"):
        check_out(tmp_path / "file" / "below" / "bundle")


def test_an_error_leaves_the_older_bundle(
    tiny_model: HybridModel, tiny_bundles: Path, graphs: dict[str, onnx.ModelProto], tmp_path: Path
):
    info = describe(tiny_model, tiny_bundles, "cpu-fp32", Origin("x", "one"))
    write_bundle(graphs, info, tiny_bundles, tmp_path / "bundle")
    broken = {**graphs, "decoder": None}
    with pytest.raises(AttributeError):
        write_bundle(broken, info, tiny_bundles, tmp_path / "bundle")  # type: ignore[arg-type]
    assert Bundle.load(tmp_path / "bundle").info.licence == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
