import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from asr.context import Context
from asr.errors import AsrError, BundleError, TokensError
from asr.runtime.bundle import GRAPHS, Bundle, hash_file
from asr.runtime.info import FORMAT, Field, read_info
from asr.runtime.onnx_scorer import OnnxScorer


@pytest.fixture
def copy(tiny_bundles: Path, tmp_path: Path) -> Path:
    """A copy of a bundle that tests may damage."""
    return Path(shutil.copytree(tiny_bundles / "cpu-fp32", tmp_path / "bundle"))


def edit(folder: Path, **values: object) -> None:
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def list_again(folder: Path, name: str) -> None:
    """Write the hash of a changed file to model.json."""
    info = read_info(folder)
    dataclasses.replace(info, files=info.files | {name: hash_file(folder / name)}).write(folder)


def message(folder: Path, kind: type[AsrError] = BundleError) -> str:
    with pytest.raises(kind) as caught:
        OnnxScorer(Bundle.load(folder)).encode([np.zeros(4000, np.float32)])
    return str(caught.value)


def test_model_json_says_what_a_runtime_needs(tiny_bundles: Path):
    info = read_info(tiny_bundles / "cpu-int8")
    assert (info.format, info.target, info.licence) == (FORMAT, "cpu-int8", "Apache-2.0")
    assert info.frame_s == pytest.approx(0.04)
    layer = {"keys": (2, "W", 16), "values": (2, "W", 16), "conv": (1, 14, 32)}
    layer |= {"pending": ("R", 32), "queries": (2, "R", 16)}
    layers = {f"{name}.{i}": shape for i in range(2) for name, shape in layer.items()}
    assert {f.name: f.shape for f in info.encoder_state} == {"frames": (3, 80), "offset": ()} | layers
    assert {f.name for f in info.encoder_state if f.dtype != "float32"} == {"offset"}
    assert info.streaming.left_chunks > 0
    assert (info.streaming.look_ahead_layers, info.streaming.max_look_ahead) == (2, 1)
    assert (info.overlap_frames, info.streaming.chunk_unit, info.streaming.flush_frames) == (0, 1, 0)
    assert info.streaming.chunk_ms in info.streaming.chunk_choices_ms
    assert set(info.files) == {f"{x}.onnx" for x in (*GRAPHS, "reverse")} | {"tokens.txt"}


@pytest.mark.parametrize("name", ["encoder.onnx", "memory.onnx", "decoder.onnx"])
def test_one_flipped_bit_is_refused(copy: Path, name: str):
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    assert name in (text := message(copy))
    assert "SHA-256" in text
    assert "export again" in text


def test_an_experiment_stands_for_its_bundle(copy: Path):
    assert Bundle.load(copy.parent).folder == copy
    (copy / "model.json").unlink()
    assert f"{copy.parent}: no model.json in it" in message(copy.parent)


@pytest.mark.parametrize("size", [0, 100])
def test_a_file_cut_off_is_refused(copy: Path, size: int):
    with (copy / "encoder.onnx").open("r+b") as file:
        file.truncate(size)
    assert f"has {size} bytes" in message(copy)


@pytest.mark.parametrize("name", ["encoder.onnx", "memory.onnx", "decoder.onnx", "model.json"])
def test_a_missing_file_is_named(copy: Path, name: str):
    (copy / name).unlink()
    assert name in message(copy)


def test_a_folder_that_is_not_there(tmp_path: Path):
    assert "no such folder" in message(tmp_path / "nothing")


def test_a_newer_format_is_refused_whatever_else_it_holds(copy: Path):
    edit(copy, format=FORMAT + 1, something_new=[1])
    said = f"{copy}: model.json says format {FORMAT + 1}, this version reads {FORMAT}; export again or update"
    assert message(copy) == said


def test_an_older_format_is_refused_before_its_fields_are_read(copy: Path):
    edit(copy, format=FORMAT - 1, something_old=[1])
    said = f"{copy}: model.json says format {FORMAT - 1}, this version reads {FORMAT}; export again"
    assert message(copy) == said


@pytest.mark.parametrize(
    ("text", "expected"),
    [("{", "not JSON"), ("[]", "no format number"), (f'{{"format": {FORMAT}}}', "version"), ("", "not JSON")],
)
def test_a_model_json_that_is_none(copy: Path, text: str, expected: str):
    (copy / "model.json").write_text(text)
    assert expected in message(copy)


def test_an_unknown_field_is_named(copy: Path):
    edit(copy, chunk_msec=3)
    assert "chunk_msec" in message(copy)


def with_first_state(info: dict, **values: object) -> dict:
    first, *rest = info["encoder_state"]
    return {"encoder_state": [first | values, *rest]}


IMPOSSIBLE = [
    (lambda info: {"subsampling": 0}, "model.json: subsampling is 0, expected at least 1"),
    (lambda info: {"sos_eos": 22}, "sos_eos is 22, and there are 22 tokens"),
    (lambda info: {"features": info["features"] | {"shift_samples": -1}}, "shift_samples is -1"),
    (lambda info: {"streaming": info["streaming"] | {"chunk_ms": 0}}, "streaming: chunk_ms is 0"),
    (lambda info: with_first_state(info, dtype="float99"), "encoder_state.0: dtype of frames is float99"),
    (lambda info: with_first_state(info, shape=[-3, 80]), "-3 in the shape of frames, expected a size"),
    (lambda info: with_first_state(info, shape=["W**9", 80]), "'W**9' in the shape of frames"),
    (lambda info: with_first_state(info, shape=[10**9, 80]), "encoder.onnx: input frames is ['N', 3, 80]"),
    (lambda info: with_first_state(info, name="other"), "encoder.onnx: frames is an input, which does not"),
    (lambda info: {"encoder_state": []}, "is an input, which does not match model.json; export again"),
    (lambda info: {"streaming": None}, "encoder.onnx: chunk is an input"),
]


@pytest.mark.parametrize(("change", "expected"), IMPOSSIBLE, ids=[x for _, x in IMPOSSIBLE])
def test_what_cannot_be_is_refused_before_anything_is_computed(copy: Path, change, expected: str):
    edit(copy, **change(json.loads((copy / "model.json").read_text())))
    with pytest.raises(BundleError) as caught:
        OnnxScorer(Bundle.load(copy)).init_state(Context(4, 2))
    assert expected in str(caught.value)


def test_a_number_of_threads_is_not_negative(copy: Path):
    with pytest.raises(BundleError, match="threads is -1, expected 1 or more"):
        Bundle.load(copy, threads=-1)


def test_only_files_beside_model_json_are_read(copy: Path):
    listed = json.loads((copy / "model.json").read_text())["files"]
    edit(copy, files=listed | {"../x": {"size": 1, "sha256": ""}})
    assert "beside it" in message(copy)


def test_tokens_of_another_size_do_not_fit(copy: Path):
    with (copy / "tokens.txt").open("a", encoding="utf-8") as file:
        file.write("zz 22\n")
    assert "23 units are not those of the model (expected 22)" in message(copy)


def test_tokens_in_another_order_do_not_fit(copy: Path):
    path = copy / "tokens.txt"
    path.write_text(path.read_text(encoding="utf-8").replace("a 4\nb 5\n", "b 4\na 5\n"), encoding="utf-8")
    assert "in another order" in message(copy)
    (copy / "tokens.txt").write_text("nonsense", encoding="utf-8")
    assert "tokens.txt" in message(copy, TokensError)


def test_graphs_of_another_model_do_not_fit(copy: Path):
    graph = onnx.load(copy / "encoder.onnx")
    onnx.helper.set_model_props(graph, {"tokens_sha256": "0" * 64})
    onnx.save(graph, copy / "encoder.onnx")
    list_again(copy, "encoder.onnx")
    assert "another tokens.txt" in message(copy)


@pytest.mark.parametrize("location", ["weights.bin", "../weights.bin", "/etc/passwd"])
def test_weights_in_another_file_are_refused(copy: Path, location: str):
    graph = onnx.load(copy / "encoder.onnx")
    largest = max(graph.graph.initializer, key=lambda x: len(x.raw_data))
    if location == "weights.bin":
        (copy / location).write_bytes(largest.raw_data)
    size = len(largest.raw_data)
    largest.ClearField("raw_data")
    largest.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": str(size)}.items():
        largest.external_data.add(key=key, value=value)
    (copy / "encoder.onnx").write_bytes(graph.SerializeToString())
    list_again(copy, "encoder.onnx")
    assert "encoder.onnx: onnxruntime" in message(copy)


@pytest.mark.parametrize("data", [b"", b"text", b"\x08\x0a" * 50])
def test_what_is_no_graph_is_refused(copy: Path, data: bytes):
    (copy / "encoder.onnx").write_bytes(data)
    list_again(copy, "encoder.onnx")
    assert "export again" in message(copy)


def test_a_chunk_must_be_whole_frames(float32: Bundle):
    assert float32.info.chunk_frames(640) == 16
    with pytest.raises(BundleError, match=r"a chunk of 650 ms is not a multiple of 40 ms.*pass 640"):
        float32.info.chunk_frames(650)


def test_sizes_of_a_state_may_be_parts_and_multiples():
    field = Field("keys", (2, "W/4", "2*W", "3*R/2", "U"), "float32")
    assert field.sizes({"W": 12, "R": 4, "U": 0}) == [2, 3, 24, 6, 0]


def test_a_bundle_streams_without_torch(tiny_bundles: Path):
    program = f"""
import sys
import numpy as np
from asr.runtime import Bundle, Stream, StreamConfig
stream = Stream(Bundle.load({str(tiny_bundles / "cpu-int8")!r}), StreamConfig(mode="rescore"))
stream.accept(np.random.default_rng(0).normal(0, 0.1, 32000).astype("f"))
stream.finish()
loaded = {{"torch", "onnx", "lhotse", "typer"}} & set(sys.modules)
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", program], check=True)
