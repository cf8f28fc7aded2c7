"""The graphs built node by node give the same results as the modules, however they are called."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch

from asr.context import WHOLE, Context
from asr.features import FbankConfig
from asr.losses import LossConfig
from asr.model.build import build_model
from asr.model.conformer import ConformerConfig
from asr.model.decoder import DecoderConfig
from asr.model.hybrid import HybridModel
from asr.model.layers import swoosh_l, swoosh_r
from asr.model.masks import ChunkConfig
from asr.model.zipformer import ZipformerConfig
from export.graph import Graph
from export.onnx import encoder_graph, state_fields
from export.zipformer_layer import SWOOSH_L, SWOOSH_R, Swoosh, swoosh

Model = tuple[HybridModel, onnxruntime.InferenceSession]
Found = dict[str, np.ndarray]

CONFORMER = ConformerConfig(
    dim=24, num_layers=3, num_heads=2, ff_dim=32, kernel_size=5, subsampling=4, subsampling_channels=4
)
ZIPFORMER = ZipformerConfig(
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
ENCODERS = {
    "conformer": CONFORMER,
    "conformer, look-ahead": replace(CONFORMER, chunk=ChunkConfig(max_right=1)),
    "conformer, by 8": replace(CONFORMER, subsampling=8, chunk=ChunkConfig(max_right=2)),
    "zipformer": ZIPFORMER,
    "zipformer, no first rate": replace(
        ZIPFORMER, rates=[2, 4, 2], position_head_dims=[2, 3, 1], kernel_sizes=[3, 9, 7]
    ),
    "zipformer, odd channels": replace(
        ZIPFORMER, dims=[24, 16, 12], num_heads=[1, 1, 2], rates=[1, 1, 2], depths=[1, 2, 1]
    ),
}
TOLERANCE = {"conformer": 2e-5, "zipformer": 1e-4}


def build(
    encoder: ConformerConfig | ZipformerConfig, ctc: float | None = 0.3, num_bins: int = 80
) -> HybridModel:
    """Random weights, none of them zero, so that a wrong factor or sign is noticed."""
    torch.manual_seed(1)
    decoder = DecoderConfig(dim=8, num_layers=1, num_heads=2, ff_dim=8)
    model = build_model(FbankConfig(num_bins=num_bins), encoder, decoder, LossConfig(ctc=ctc), 11).eval()
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        model.cmvn.mean += torch.randn(num_bins)
        model.cmvn.istd *= 0.3
    return model


def opened(model: HybridModel) -> Model:
    return model, onnxruntime.InferenceSession(encoder_graph(model).SerializeToString())


@pytest.fixture(scope="module", params=ENCODERS.values(), ids=ENCODERS.keys())
def pair(request: pytest.FixtureRequest) -> Model:
    return opened(build(request.param))


def windows(model: HybridModel, n: int, num_frames: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_frames)
    size = (num_frames - 1) * model.fbank.shift_samples + model.fbank.frame_samples
    return 0.1 * torch.randn(n, size, generator=generator)


class Ours:
    """Streams through the graph."""

    def __init__(self, model: HybridModel, session: onnxruntime.InferenceSession, n: int, context: Context):
        sizes = {"W": context.width, "R": context.delay}
        self.state = {f.name: np.zeros((n, *f.sizes(sizes)), f.dtype) for f in state_fields(model)}
        self.session = session
        self.names = [x.name for x in session.get_outputs()]
        self.heed(context)

    def heed(self, context: Context) -> None:
        inputs = {x.name for x in self.session.get_inputs()}
        self.context = {k: np.array(value) for k, value in context._asdict().items() if k in inputs}

    def __call__(self, window: torch.Tensor, num_frames: list[int]) -> Found:
        inputs = {"window": window.numpy(), "num_frames": np.array(num_frames)} | self.context | self.state
        found = dict(zip(self.names, self.session.run(None, inputs), strict=True))
        self.state = {name: found.pop(f"next_{name}") for name in self.state}
        return found


class Theirs:
    """Streams through the modules."""

    def __init__(self, model: HybridModel, n: int, context: Context) -> None:
        self.model, self.context = model, context
        self.state = model.encoder.init_state(n, context.width, context.delay)

    def heed(self, context: Context) -> None:
        self.context = context

    @torch.inference_mode()
    def __call__(self, window: torch.Tensor, num_frames: list[int]) -> Found:
        x = self.model.cmvn(self.model.fbank.frames(window))
        y, y_lens, self.state = self.model.encoder(x, torch.tensor(num_frames), self.state, *self.context)
        found = {"y": y.numpy(), "y_lens": y_lens.numpy()}
        return found if self.model.ctc is None else found | {"log_probs": self.model.ctc_log_probs(y).numpy()}


class Both:
    """Both in parallel; their outputs must be equal."""

    def __init__(self, pair: Model, n: int, context: Context) -> None:
        model, session = pair
        self.model, self.n = model, n
        self.ours, self.theirs = Ours(model, session, n, context), Theirs(model, n, context)
        self.tolerance = TOLERANCE[model.encoder.config.type]

    def hear(self, num_frames: int, lens: list[int] | None = None) -> None:
        window = windows(self.model, self.n, num_frames)
        found, expected = (x(window, lens or [num_frames] * self.n) for x in (self.ours, self.theirs))
        np.testing.assert_array_equal(found["y_lens"], expected["y_lens"])
        assert found.keys() == expected.keys()
        for name in found.keys() - {"y_lens"}:
            assert found[name].shape == expected[name].shape
            for a, b, count in zip(found[name], expected[name], found["y_lens"].tolist(), strict=True):
                np.testing.assert_allclose(a[:count], b[:count], atol=self.tolerance, rtol=0)


@pytest.mark.parametrize(
    "context", [WHOLE, Context(2, 1), Context(4, 2), Context(6, -1), Context(64, 2)], ids=str
)
def test_whole_utterances_of_several_lengths(pair: Model, context: Context):
    both = Both(pair, 4, WHOLE)
    both.ours.heed(context)
    both.theirs.heed(context)
    overlap = both.model.encoder.overlap_frames
    both.hear(78 + overlap, [72 + overlap, 40, 1 + overlap // 2, 0])


@pytest.mark.parametrize("chunk", [2, 8])
@pytest.mark.parametrize("left", [0, 3])
def test_streams(pair: Model, chunk: int, left: int):
    encoder = pair[0].encoder
    size, overlap = chunk * encoder.subsampling, encoder.overlap_frames
    for right in {0, encoder.config.chunk.max_right}:
        context = Context(chunk, left, right)
        both = Both(pair, 2, context)
        for number in range(7):
            both.hear(size * (1 + number % 2) + overlap)
        most = size + max(overlap - 1, 0)
        both.hear(most + encoder.flush_frames(context.delay), [most, size - 1])


def test_a_stream_may_run_for_days(pair: Model):
    both = Both(pair, 1, Context(4, 2))
    both.ours.state["offset"] += 3_000_000
    both.theirs.state.offset.add_(3_000_000)
    for _ in range(4):
        both.hear(4 * both.model.encoder.subsampling + both.model.encoder.overlap_frames)


def test_company_changes_nothing(pair: Model):
    model, context = pair[0], Context(4, 2)
    size = 4 * model.encoder.subsampling + model.encoder.overlap_frames
    window = windows(model, 3, size)
    together, alone = Ours(*pair, 3, context), Ours(*pair, 1, context)
    for _ in range(3):
        found, expected = together(window, [size] * 3), alone(window[1:2], [size])
        np.testing.assert_allclose(found["y"][1:2], expected["y"], atol=1e-5)


@pytest.mark.parametrize("encoder", [CONFORMER, ZIPFORMER], ids=lambda x: x.type)
def test_models_without_ctc_and_other_bins(encoder: ConformerConfig | ZipformerConfig):
    both = Both(opened(build(encoder, ctc=None, num_bins=40)), 1, WHOLE)
    assert both.ours.names[:2] == ["y", "y_lens"]
    both.hear(33, [27])


@pytest.mark.parametrize(
    ("kind", "module"), [(SWOOSH_L, swoosh_l), (SWOOSH_R, swoosh_r)], ids=["left", "right"]
)
def test_activations_are_those_of_the_modules_however_far_from_zero(
    kind: Swoosh, module: Callable[[torch.Tensor], torch.Tensor]
):
    graph = Graph("activation")
    graph.output("y", swoosh(graph, graph.input("z", ("N",)), kind), ("N",))
    session = onnxruntime.InferenceSession(graph.model().SerializeToString())
    x = torch.cat([torch.linspace(-20, 20, 4001), torch.tensor([-1e4, -100.0, 60.0, 80.0, 100.0, 1e4])])
    (found,) = session.run(None, {"z": (x - kind.shift).numpy()})
    np.testing.assert_allclose(found, module(x).numpy(), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(
    ("encoder", "layer", "most"),
    [(CONFORMER, "encoder.layers.1", 62), (ZIPFORMER, "encoder.stacks.0.layers.1", 161)],
    ids=["conformer", "zipformer"],
)
def test_it_stays_small(encoder: ConformerConfig | ZipformerConfig, layer: str, most: int):
    """This makes it fast: no layer has operations that only determine sizes."""
    nodes = encoder_graph(build(encoder)).graph.node
    ops = Counter(node.op_type for node in nodes if node.name.startswith((f"{layer}.", f"{layer}/")))
    assert not {"Shape", "Gather", "Expand", "Where", "Range", "Cast", "Softplus"} & set(ops)
    assert 0 < sum(ops.values()) <= most
