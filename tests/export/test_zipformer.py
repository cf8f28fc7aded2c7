"""The graph that is written by hand says what the modules of a Zipformer say, whatever is called how."""

from collections import Counter
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch

from asr.context import WHOLE, Context
from asr.features import FbankConfig
from asr.losses import LossConfig
from asr.model.build import build_model
from asr.model.decoder import DecoderConfig
from asr.model.hybrid import HybridModel
from asr.model.layers import swoosh_l, swoosh_r
from asr.model.masks import ChunkConfig
from asr.model.zipformer import ZipformerConfig
from export.graph import Graph
from export.zipformer import zipformer_fields, zipformer_graph
from export.zipformer_layer import SWOOSH_L, SWOOSH_R, Swoosh, swoosh

OVERLAP = 13

CONFIG = ZipformerConfig(
    dims=[16, 24, 20],
    unmasked_dims=[8, 8, 8],
    rates=[1, 4, 2],
    depths=[2, 1, 1],
    num_heads=[2, 3, 2],
    query_dims=[8, 4, 8],
    value_dims=[8, 6, 4],
    position_head_dims=[2, 3, 2],
    position_dim=8,
    ff_dims=[16, 16, 16],
    kernel_sizes=[7, 3, 5],
    causal=True,
    chunk=ChunkConfig(chunks=[2, 0]),
)
CONFIGS = {
    "all rates": CONFIG,
    "no first rate": replace(CONFIG, rates=[2, 4, 2], position_head_dims=[2, 3, 1], kernel_sizes=[3, 9, 7]),
    "odd channels": replace(
        CONFIG, dims=[24, 16, 12], num_heads=[1, 1, 2], rates=[1, 1, 2], depths=[1, 2, 1]
    ),
}


def zipformer(config: ZipformerConfig, ctc: float | None = 0.3, num_bins: int = 80) -> HybridModel:
    """Random weights, and none of them what a factor or a sign would not change."""
    torch.manual_seed(1)
    decoder = DecoderConfig(dim=8, num_layers=1, num_heads=2, ff_dim=8)
    model = build_model(FbankConfig(num_bins=num_bins), config, decoder, LossConfig(ctc=ctc), 11).eval()
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        model.cmvn.mean += torch.randn(num_bins)
        model.cmvn.istd *= 0.3
    return model


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS.keys())
def pair(request: pytest.FixtureRequest) -> tuple[HybridModel, onnxruntime.InferenceSession]:
    model = zipformer(request.param)
    return model, onnxruntime.InferenceSession(zipformer_graph(model).SerializeToString())


def windows(model: HybridModel, n: int, num_frames: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_frames)
    fbank = model.fbank
    size = (num_frames - 1) * fbank.shift_samples + fbank.frame_samples
    return 0.1 * torch.randn(n, size, generator=generator)


class Ours:
    """Streams through the graph."""

    def __init__(self, model: HybridModel, session: onnxruntime.InferenceSession, n: int, context: Context):
        fields = zipformer_fields(model.encoder)  # type: ignore[arg-type]
        self.state = {f.name: np.zeros((n, *f.sizes({"W": context.width})), f.dtype) for f in fields}
        self.session = session
        self.names = [x.name for x in session.get_outputs()]
        self.context = {name: np.array(getattr(context, name)) for name in ("chunk", "left")}

    def __call__(self, window: torch.Tensor, num_frames: list[int]) -> dict[str, np.ndarray]:
        inputs = {"window": window.numpy(), "num_frames": np.array(num_frames)} | self.context | self.state
        found = dict(zip(self.names, self.session.run(None, inputs), strict=True))
        self.state = {name: found.pop(f"next_{name}") for name in self.state}
        return found


class Theirs:
    """The same of the modules."""

    def __init__(self, model: HybridModel, n: int, context: Context) -> None:
        self.model, self.context = model, context
        self.state = model.encoder.init_state(n, context.width)

    @torch.inference_mode()
    def __call__(self, window: torch.Tensor, num_frames: list[int]) -> dict[str, np.ndarray]:
        x = self.model.cmvn(self.model.fbank.frames(window))
        y, y_lens, self.state = self.model.encoder(x, torch.tensor(num_frames), self.state, *self.context)
        return {"y": y.numpy(), "log_probs": self.model.ctc_log_probs(y).numpy(), "y_lens": y_lens.numpy()}


def check(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    np.testing.assert_array_equal(found["y_lens"], expected["y_lens"])
    for name in ("y", "log_probs"):
        assert found[name].shape == expected[name].shape
        for ours, other, count in zip(found[name], expected[name], found["y_lens"].tolist(), strict=True):
            np.testing.assert_allclose(ours[:count], other[:count], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "context", [WHOLE, Context(2, 1), Context(4, 2), Context(6, -1), Context(64, 2)], ids=str
)
def test_whole_utterances_of_several_lengths(pair, context: Context):
    model, session = pair
    ours, theirs = Ours(model, session, 4, WHOLE), Theirs(model, 4, WHOLE)
    ours.context = {name: np.array(getattr(context, name)) for name in ours.context}
    theirs.context = context
    window = windows(model, 4, 91)
    lens = [85, 40, 9, 0]
    check(ours(window, lens), theirs(window, lens))


@pytest.mark.parametrize("chunk", [2, 8])
@pytest.mark.parametrize("left", [0, 3])
def test_streams(pair, chunk: int, left: int):
    model, session = pair
    context = Context(chunk, left)
    ours, theirs = Ours(model, session, 2, context), Theirs(model, 2, context)
    size = chunk * model.encoder.subsampling
    for number in range(7):
        num_frames = size * (1 + number % 2) + OVERLAP
        window = windows(model, 2, num_frames)
        check(ours(window, [num_frames] * 2), theirs(window, [num_frames] * 2))
    last = windows(model, 2, size + OVERLAP - 1 + model.encoder.flush_frames(0))
    check(ours(last, [size + OVERLAP - 1, 11]), theirs(last, [size + OVERLAP - 1, 11]))


def test_a_stream_may_run_for_days(pair):
    model, session = pair
    context, size = Context(4, 2), 4 * model.encoder.subsampling + OVERLAP
    ours, theirs = Ours(model, session, 1, context), Theirs(model, 1, context)
    ours.state["offset"] += 3_000_000
    theirs.state.offset.add_(3_000_000)
    for _ in range(4):
        window = windows(model, 1, size)
        check(ours(window, [size]), theirs(window, [size]))


def test_company_changes_nothing(pair):
    model, session = pair
    context = Context(4, 2)
    size = 4 * model.encoder.subsampling + OVERLAP
    window = windows(model, 3, size)
    together, alone = Ours(model, session, 3, context), Ours(model, session, 1, context)
    for _ in range(3):
        found, expected = together(window, [size] * 3), alone(window[1:2], [size])
        np.testing.assert_allclose(found["y"][1:2], expected["y"], atol=1e-5)


def test_models_without_ctc_and_other_bins():
    model = zipformer(CONFIG, ctc=None, num_bins=40)
    session = onnxruntime.InferenceSession(zipformer_graph(model).SerializeToString())
    assert [x.name for x in session.get_outputs()][:2] == ["y", "y_lens"]
    window = windows(model, 1, 33)
    found = Ours(model, session, 1, WHOLE)(window, [27])
    with torch.inference_mode():
        x = model.cmvn(model.fbank.frames(window))
        y, _, _ = model.encoder(x, torch.tensor([27]))
    np.testing.assert_allclose(found["y"], y[:, : found["y"].shape[1]].numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "module"), [(SWOOSH_L, swoosh_l), (SWOOSH_R, swoosh_r)], ids=["left", "right"]
)
def test_activations_are_those_of_the_modules_however_far_from_zero(kind: Swoosh, module):
    graph = Graph("activation")
    graph.output("y", swoosh(graph, graph.input("z", ("N",)), kind), ("N",))
    session = onnxruntime.InferenceSession(graph.model().SerializeToString())
    x = torch.cat([torch.linspace(-20, 20, 4001), torch.tensor([-1e4, -100.0, 60.0, 80.0, 100.0, 1e4])])
    (found,) = session.run(None, {"z": (x - kind.shift).numpy()})
    np.testing.assert_allclose(found, module(x).numpy(), atol=2e-6, rtol=2e-6)


def test_it_stays_small():
    """What makes it fast: no operation that a layer needs to find out about sizes."""
    nodes = zipformer_graph(zipformer(CONFIG)).graph.node
    ops = Counter(node.op_type for node in nodes if ".stacks.0.layers.1." in node.name)
    assert not {"Shape", "Gather", "Expand", "Where", "Range", "Cast", "Softplus"} & set(ops)
    assert sum(ops.values()) <= 152
