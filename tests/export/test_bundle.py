from pathlib import Path
from typing import Any

import onnx
import pytest

from asr.errors import BundleError
from asr.features import FbankConfig
from asr.losses import LossConfig
from asr.model.build import EncoderConfig, build_model
from asr.model.conformer import ConformerConfig
from asr.model.decoder import DecoderConfig
from asr.model.fast_conformer import FastConformerConfig
from asr.model.hybrid import HybridModel
from asr.model.masks import ChunkConfig
from asr.model.zipformer import ZipformerConfig
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
    with pytest.raises(BundleError, match=r"has no model\.json"):
        check_out(tmp_path / "mine")
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match=r"has no model\.json"):
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


SIZES: dict[str, Any] = {"dim": 8, "num_layers": 1, "num_heads": 2, "ff_dim": 8}
STACK = ("dims", "unmasked_dims", "num_heads", "query_dims", "value_dims", "position_head_dims", "ff_dims")


def conformer(**chunk: Any) -> EncoderConfig:
    return ConformerConfig(**SIZES, subsampling_channels=4, chunk=ChunkConfig(**chunk))


def fast_conformer(**chunk: Any) -> EncoderConfig:
    return FastConformerConfig(**SIZES, subsampling_channels=4, chunk=ChunkConfig(**chunk))


def zipformer(rate: int, **chunk: Any) -> EncoderConfig:
    sizes: dict[str, Any] = {name: [4, 4] for name in STACK}
    sizes |= {"rates": [1, rate], "depths": [1, 1], "kernel_sizes": [3, 3]}
    return ZipformerConfig(**sizes, position_dim=8, causal=True, chunk=ChunkConfig(**chunk))


@pytest.mark.parametrize(
    ("encoder", "choices", "default", "left"),
    [
        (conformer(), (160, 320, 640, 960), 640, 4),
        (conformer(max_chunk=9), (160, 320), 320, 4),
        (conformer(max_chunk=3), (120,), 120, 4),
        (conformer(chunks=[3, 5, 0]), (120, 200), 200, 4),
        (conformer(chunks=[0], max_chunk=9), (160, 320), 320, 4),
        (conformer(chunks=[3, 5], dynamic=False), (160, 320, 640, 960), 640, 4),
        (fast_conformer(contexts=[[70, 13], [70, 6], [70, 1], [70, 0]]), (80, 160, 560, 1120), 560, 10),
        (fast_conformer(contexts=[[-1, 19], [-1, 9]]), (800, 1600), 800, 4),
        (fast_conformer(max_chunk=8), (160, 320, 640), 640, 4),
        (zipformer(2, chunks=[8, 16, 32, 0], left_frames=[32, -1]), (320, 640, 1280), 640, 4),
        (zipformer(8, chunks=[4, 20]), (160, 800), 160, 4),
        (zipformer(8, chunks=[20]), (800,), 800, 4),
    ],
)
def test_chunks_are_those_of_training(
    tmp_path: Path, encoder: EncoderConfig, choices: tuple[int, ...], default: int, left: int
):
    (tmp_path / "tokens.txt").write_text("<blk> 0\n<sos/eos> 1\n<unk> 2\n")
    decoder = DecoderConfig(**SIZES)
    model = build_model(FbankConfig(), encoder, decoder, LossConfig(), 22)
    info = describe(model, tmp_path, "cpu-fp32", Origin("x", "one"))
    assert info.stream.chunk_choices_ms == choices
    assert (info.stream.chunk_ms, info.stream.left_chunks) == (default, left)
    assert all(info.chunk_frames(ms) for ms in choices)
