"""Bad models and bad neighbours in a batch: what test_bundle.py and test_stream.py do not cover."""

import dataclasses
import gc
import json
import shutil
import weakref
from pathlib import Path

import onnx
import pytest

from asr.audio import read, write
from asr.decode.scorer import Floats
from asr.errors import BundleError
from asr.runtime import Bundle, Stream, StreamBatch, StreamConfig
from asr.runtime.bundle import INPUT, hash_file
from asr.runtime.info import read_info
from export.verify import made_sound
from recipes.cli import main

CONFIG = StreamConfig(mode="ctc-greedy", chunk_ms=160)


@pytest.fixture
def copy(tiny_bundles: Path, tmp_path: Path) -> Path:
    """A copy of a bundle that tests may damage."""
    return Path(shutil.copytree(tiny_bundles / "cpu-fp32", tmp_path / "bundle"))


def put(folder: Path, name: str, graph: Path | onnx.ModelProto) -> str:
    """Put a graph in a bundle, with its hash in model.json, and open it: the error."""
    path = folder / f"{name}.onnx"
    if isinstance(graph, Path):
        path.write_bytes(graph.read_bytes())
    else:
        onnx.save(graph, path)
    info = read_info(folder)
    dataclasses.replace(info, files=info.files | {path.name: hash_file(path)}).write(folder)
    with pytest.raises(BundleError) as caught:
        getattr(Bundle.load(folder), name)
    return str(caught.value)


def test_every_graph_is_known_by_its_inputs(tiny_bundles: Path):
    bundle = Bundle.load(tiny_bundles / "cpu-fp32")
    for path in (tiny_bundles / "cpu-fp32").glob("*.onnx"):
        assert set(INPUT[path.stem]) & {x.name for x in getattr(bundle, path.stem).get_inputs()}


def test_a_graph_without_metadata_is_refused(copy: Path):
    graph = onnx.load(copy / "memory.onnx")
    del graph.metadata_props[:]
    assert "memory.onnx: does not say which tokens.txt it belongs to" in put(copy, "memory", graph)


def test_a_foreign_graph_is_refused(copy: Path):
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["z"])
    out = onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [1])
    foreign = onnx.helper.make_model(
        onnx.helper.make_graph([node], "foreign", [value], [out]),
        opset_imports=[onnx.helper.make_opsetid("", 17)],
        ir_version=8,
    )
    assert "(its inputs are x); export again" in put(copy, "encoder", foreign)


@pytest.mark.parametrize(
    ("name", "other"), [("encoder", "decoder"), ("decoder", "encoder"), ("memory", "decoder")]
)
def test_graphs_in_each_others_place_are_refused(copy: Path, tiny_bundles: Path, name: str, other: str):
    said = put(copy, name, tiny_bundles / "cpu-fp32" / f"{other}.onnx")
    assert f"{name}.onnx: is another graph (its inputs are" in said


@pytest.mark.parametrize("sample_rate", [0, -16000])
def test_a_sample_rate_that_is_none_is_refused(copy: Path, sample_rate: int):
    about = json.loads((copy / "model.json").read_text())
    about["features"]["sample_rate"] = sample_rate
    (copy / "model.json").write_text(json.dumps(about))
    with pytest.raises(BundleError, match=rf"features: .*sample_rate is {sample_rate}, expected at least 1"):
        Bundle.load(copy)


def test_sound_is_resampled_to_what_the_model_hears(copy: Path, tmp_path: Path, capsys):
    """A model for 8 kHz, as far as the runtime knows; its frames are then twice as long."""
    about = json.loads((copy / "model.json").read_text())
    about["features"]["sample_rate"] = 8000
    (copy / "model.json").write_text(json.dumps(about))
    write(tmp_path / "a.wav", made_sound(6.0, 16000), 16000)
    stream = Stream(Bundle.load(copy), StreamConfig())
    events = stream.accept(read(tmp_path / "a.wav", 8000)) + stream.finish()
    assert main(["transcribe", str(copy), str(tmp_path / "a.wav"), "--format", "json"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    finals = [event for event in events if event.final]
    assert [event["text"] for event in told] == [event.text for event in finals] != []
    assert 3.0 < told[-1]["end_s"] <= 6.1


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def test_a_thousand_streams_dropped_in_the_middle_leave_nothing(float32: Bundle, sound: Floats):
    batch = StreamBatch(float32, dataclasses.replace(CONFIG, mode="rescore"))
    streams: list[weakref.ref] = []
    sizes = []
    for number in range(1000):
        stream = Stream(float32, CONFIG) if number % 2 else batch.join()
        stream.accept(sound[number : number + 3200])
        streams.append(weakref.ref(stream))
        if number % 200 == 199:
            del stream
            gc.collect()
            sizes.append(resident_mb())
    assert not any(ref() for ref in streams)
    assert sizes[-1] - sizes[1] < 5


def test_a_stream_that_hears_nothing_for_minutes_goes_on_where_it_was(float32: Bundle, sound: Floats):
    """Only samples count as time: meanwhile others of its batch run for minutes."""
    alone = Stream(float32, CONFIG)
    expected = alone.accept(sound[:50000]) + alone.accept(sound[50000:]) + alone.finish()
    batch = StreamBatch(float32, CONFIG)
    idle, busy = batch.join(), batch.join()
    events = batch.accept({idle: sound[:50000], busy: sound[:50000]})[idle]
    for n in range(24):
        blocks = {busy: made_sound(5.0, 16000)}
        if n % 2:
            blocks[idle] = sound[:0]  # a block without samples
        assert idle not in (told := batch.accept(blocks)) or told[idle] == []
    assert busy.duration_s - idle.duration_s == 120.0
    events += batch.accept({idle: sound[50000:]})[idle] + batch.finish([idle])[idle]
    assert [(e.text, e.final, e.start_s) for e in events] == [(e.text, e.final, e.start_s) for e in expected]
