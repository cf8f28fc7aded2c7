"""What every test can rely on: one thread, no telemetry, the same random numbers, and reference data."""

import os
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: small tensors are four times faster on one thread
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before onnxruntime
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1"  # servers of tests are on this machine

import numpy as np
import pytest

if TYPE_CHECKING:
    from asr.model.hybrid import HybridModel

REPO = Path(__file__).parents[1]


def pytest_configure(config: pytest.Config) -> None:
    if "not gpu" in config.option.markexpr:  # the everyday tests give the same numbers on every machine
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # lhotse and others draw from the global generator
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Inputs and outputs of reference implementations, one folder each; see CONTRIBUTING.md."""
    return _folder("ASR_GOLDEN", "golden")


@pytest.fixture(scope="session")
def golden_folder(golden: Path) -> Callable[[str], Path]:
    """One of these folders by name; a data set may have only some of them."""

    def find(name: str) -> Path:
        if not (golden / name).is_dir():
            pytest.skip(f"{golden / name} is not there")
        return golden / name

    return find


@pytest.fixture(scope="session")
def speech_data() -> Path:
    """Real speech with transcripts, one folder per corpus."""
    return _folder("ASR_DATA", "data")


@pytest.fixture(scope="session")
def trained_bundle() -> Path:
    """A bundle that transcribes English audiobooks, in upper case like LibriSpeech."""
    return _folder("ASR_BUNDLE", "bundle")


def _folder(variable: str, name: str) -> Path:
    path = Path(os.environ.get(variable) or REPO.parent / "shared" / name)
    if not path.is_dir():
        pytest.skip(f"{path} is not there; set {variable} to the folder")
    return path


TINY_SYMBOLS = ["<blk>", "<sos/eos>", "<unk>", "▁", *"abcdefghijklmnop", "▁the", "ing"]


@pytest.fixture(scope="session")
def tiny_model() -> "HybridModel":
    """Random weights with varied output: CTC emits blank in about half of the frames, and different units."""
    from asr.model.conformer import ConformerConfig
    from asr.model.masks import ChunkConfig

    sizes = {"dim": 32, "num_layers": 2, "num_heads": 2, "ff_dim": 64, "subsampling_channels": 8}
    return _tiny(ConformerConfig(**sizes, chunk=ChunkConfig(max_right=1)))  # type: ignore[arg-type]


@pytest.fixture(
    scope="session",
    params=[
        "wenet-conformer",
        pytest.param("fast-conformer", marks=pytest.mark.slow),
        pytest.param("zipformer", marks=pytest.mark.slow),
    ],
)
def streaming_model(request: pytest.FixtureRequest) -> "HybridModel":
    """As `tiny_model`, with each of the other streaming encoders. Two of them take minutes to export."""
    from asr.model.fast_conformer import FastConformerConfig
    from asr.model.masks import ChunkConfig
    from asr.model.wenet import WenetConformerConfig

    sizes: dict[str, Any] = {"dim": 32, "num_layers": 2, "num_heads": 2, "ff_dim": 64, "kernel_size": 5}
    chunk = ChunkConfig(contexts=[[16, 7], [16, 3], [16, 1]])
    return _tiny(
        {
            "wenet-conformer": lambda: WenetConformerConfig(**sizes),
            "fast-conformer": lambda: FastConformerConfig(**sizes, subsampling_channels=8, chunk=chunk),
            "zipformer": _causal_zipformer,
        }[request.param]()
    )


@pytest.fixture(scope="session")
def zipformer_model() -> "HybridModel":
    """The Zipformer of `streaming_model`, for tests that need only that one."""
    return _tiny(_causal_zipformer())


def _causal_zipformer() -> Any:
    from asr.model.masks import ChunkConfig

    return _zipformer(causal=True, chunk=ChunkConfig(chunks=[4, 16, 0], left_frames=[32, -1]))


def _zipformer(**options: Any) -> Any:
    """Two stacks, the second at half the rate, so that chunks may have any length."""
    from asr.model.zipformer import ZipformerConfig

    names = ("unmasked_dims", "query_dims", "value_dims", "ff_dims")
    sizes = {name: [8, 8] for name in names} | {"dims": [16, 24], "kernel_sizes": [5, 3], "rates": [1, 2]}
    sizes |= {"depths": [1, 1], "num_heads": [2, 2], "position_head_dims": [2, 2]}
    return ZipformerConfig(**sizes, position_dim=8, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def whole_model() -> "HybridModel":
    """A model without CTC: a decoder with a prompt, and an encoder for whole utterances."""
    from asr.model.wenet import WenetConformerConfig

    sizes = {"dim": 32, "num_layers": 1, "num_heads": 2, "ff_dim": 64, "kernel_size": 5, "causal": False}
    return _tiny(WenetConformerConfig(**sizes), ctc=None, prompt=["▁the", "a"])  # type: ignore[arg-type]


def _tiny(encoder: Any, ctc: float | None = 0.3, prompt: Sequence[str] = ()) -> "HybridModel":
    import torch

    from asr.features import FbankConfig
    from asr.losses import LossConfig
    from asr.model.build import build_model
    from asr.model.decoder import DecoderConfig, TransformerDecoder

    with torch.random.fork_rng():
        torch.manual_seed(7)
        decoder = DecoderConfig(dim=32, num_layers=1, num_heads=2, ff_dim=64, prompt=list(prompt))
        model = build_model(FbankConfig(), encoder, decoder, LossConfig(ctc=ctc), len(TINY_SYMBOLS)).eval()
        with torch.no_grad():
            model.cmvn.mean += -6.0
            model.cmvn.istd *= 0.3
            if encoder.type == "zipformer":
                for convolution in model.encoder.front.convolutions:
                    convolution.weight *= 2  # so that audio has more effect than the rounding of biases
            model.decoder.out.bias[1] -= 4 if model.ctc else 0  # so that it does not stop at once
            if not model.ctc:
                model.decoder.out.weight *= 4
                return model
            noise = torch.randn(1, 80_000) * torch.rand(1, 50).repeat_interleave(1600, 1).square()
            y, _ = model.encode(*model.features(noise, torch.tensor([80_000])))
            model.ctc.weight *= 3 / model.ctc(y).std(1).mean()
            model.ctc.bias -= model.ctc(y).mean((0, 1))
            model.ctc.bias[0] += 4
        model.reverse_decoder = TransformerDecoder(decoder, len(TINY_SYMBOLS), encoder.dim).eval()
        decoder.reverse_layers = 1
    return model


@pytest.fixture(scope="session")
def tiny_bundles(tiny_model: "HybridModel", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundles cpu-fp32 and cpu-int8 of `tiny_model`."""
    return _exported_once(tiny_model, "bundles", tmp_path_factory, ["cpu-fp32", "cpu-int8"])


@pytest.fixture(scope="session")
def streaming_bundle(streaming_model: "HybridModel", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `streaming_model` in float32."""
    name = streaming_model.encoder.config.type
    return _exported_once(streaming_model, name, tmp_path_factory, ["cpu-fp32"]) / "cpu-fp32"


@pytest.fixture(scope="session")
def whole_bundle(whole_model: "HybridModel", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `whole_model` in float32."""
    return _exported_once(whole_model, "whole", tmp_path_factory, ["cpu-fp32"]) / "cpu-fp32"


def _exported_once(
    model: "HybridModel", name: str, factory: pytest.TempPathFactory, targets: Sequence[str]
) -> Path:
    """The folder `name` with a bundle for each target, exported once for all workers."""
    import fcntl

    from export.bundle import Origin, describe, write_bundle
    from export.onnx import export_graphs
    from export.targets import TARGETS

    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / targets[-1]).exists():
            _write_tokens(folder)
            graphs = export_graphs(model)
            for target in targets:
                convert = TARGETS[target].convert
                built = {part: convert(graph, ()) if convert else graph for part, graph in graphs.items()}
                info = describe(model, folder, target, Origin("tiny", "Apache-2.0"))
                write_bundle(built, info, folder, folder / target)
    return folder


@pytest.fixture(scope="session")
def tiny_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the units of all these models."""
    return _write_tokens(tmp_path_factory.mktemp("tokens"))


def _write_tokens(folder: Path) -> Path:
    text = "".join(f"{symbol} {i}\n" for i, symbol in enumerate(TINY_SYMBOLS))
    (folder / "tokens.txt").write_text(text, encoding="utf-8")
    return folder


class LoudVoice:
    """Replaces asr.runtime.voice.VoiceActivity: what is loud is speech."""

    window = 512

    def __init__(self, sample_rate: int = 16000) -> None:
        self._rest = np.zeros(0, np.float32)

    def accept(self, samples: np.ndarray) -> list[float]:
        samples = np.concatenate([self._rest, samples])
        whole = len(samples) // 512 * 512
        self._rest = samples[whole:]
        return [0.9 * float(np.abs(x).mean() > 0.01) for x in samples[:whole].reshape(-1, 512)]

    def finish(self) -> list[float]:
        return self.accept(np.zeros(512 - len(self._rest), np.float32)) if len(self._rest) else []


@pytest.fixture(scope="session")
def loud_voice() -> type[LoudVoice]:
    return LoudVoice
