"""The graph that is written by hand says what the modules say, whatever is called how."""

from collections import Counter

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
from asr.model.masks import ChunkConfig
from export.conformer import conformer_fields, conformer_graph


def conformer(subsampling: int, max_right: int, ctc: float | None = 0.3, num_bins: int = 80) -> HybridModel:
    """Random weights, and none of them what a factor or a sign would not change."""
    torch.manual_seed(subsampling + max_right)
    encoder = ConformerConfig(
        dim=24,
        num_layers=3,
        num_heads=2,
        ff_dim=32,
        kernel_size=5,
        subsampling=subsampling,  # type: ignore[arg-type]
        subsampling_channels=4,
        chunk=ChunkConfig(max_right=max_right),
    )
    decoder = DecoderConfig(dim=8, num_layers=1, num_heads=2, ff_dim=8)
    features = FbankConfig(num_bins=num_bins)
    model = build_model(features, encoder, decoder, LossConfig(ctc=ctc), 11).eval()
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        model.cmvn.mean += torch.randn(num_bins)
        model.cmvn.istd *= 0.3
    return model


@pytest.fixture(scope="module", params=[(4, 0), (4, 1), (8, 2)], ids=["plain", "look-ahead", "by 8"])
def pair(request: pytest.FixtureRequest) -> tuple[HybridModel, onnxruntime.InferenceSession]:
    model = conformer(*request.param)
    return model, onnxruntime.InferenceSession(conformer_graph(model).SerializeToString())


def windows(model: HybridModel, n: int, num_frames: int) -> torch.Tensor:
    fbank = model.fbank
    generator = torch.Generator().manual_seed(num_frames)
    return torch.randn(n, (num_frames - 1) * fbank.shift_samples + fbank.frame_samples, generator=generator)


class Ours:
    """Streams through the graph."""

    def __init__(self, model: HybridModel, session: onnxruntime.InferenceSession, n: int, context: Context):
        sizes = {"W": context.width, "R": context.delay}
        fields = conformer_fields(model.encoder)  # type: ignore[arg-type]
        self.state = {f.name: np.zeros((n, *f.sizes(sizes)), f.dtype) for f in fields}
        self.session = session
        self.names = [x.name for x in session.get_outputs()]
        self.context = {
            name: np.array(value)
            for name, value in context._asdict().items()
            if name in [x.name for x in session.get_inputs()]
        }

    def __call__(self, window: torch.Tensor, num_frames: list[int]) -> dict[str, np.ndarray]:
        inputs = {"window": window.numpy(), "num_frames": np.array(num_frames)} | self.context | self.state
        found = dict(zip(self.names, self.session.run(None, inputs), strict=True))
        self.state = {name: found.pop(f"next_{name}") for name in self.state}
        return found


class Theirs:
    """The same of the modules."""

    def __init__(self, model: HybridModel, n: int, context: Context) -> None:
        self.model, self.context = model, context
        self.state = model.encoder.init_state(n, context.width, context.delay)

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
            np.testing.assert_allclose(ours[:count], other[:count], atol=2e-5, rtol=0)


@pytest.mark.parametrize("context", [WHOLE, Context(3, 1), Context(2, -1), Context(64, 2)], ids=str)
def test_whole_utterances_of_several_lengths(pair, context: Context):
    model, session = pair
    ours, theirs = Ours(model, session, 3, WHOLE), Theirs(model, 3, WHOLE)
    ours.context = {name: np.array(getattr(context, name)) for name in ours.context}
    theirs.context = context
    window = windows(model, 3, 61)
    check(ours(window, [61, 40, 1]), theirs(window, [61, 40, 1]))


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("left", [0, 3])
@pytest.mark.parametrize("looks_ahead", [False, True])
def test_streams(pair, chunk: int, left: int, looks_ahead: bool):
    model, session = pair
    context = Context(chunk, left, model.encoder.config.chunk.max_right if looks_ahead else 0)
    ours, theirs = Ours(model, session, 2, context), Theirs(model, 2, context)
    size = chunk * model.encoder.subsampling
    for number in range(7):
        num_frames = size * (1 + number % 2)
        window = windows(model, 2, num_frames)
        check(ours(window, [num_frames] * 2), theirs(window, [num_frames] * 2))
    last = windows(model, 2, size + model.encoder.flush_frames(context.delay))
    check(ours(last, [size, size - 1]), theirs(last, [size, size - 1]))


def test_a_stream_may_run_for_days(pair):
    model, session = pair
    context, size = Context(4, 2), 4 * model.encoder.subsampling
    ours, theirs = Ours(model, session, 1, context), Theirs(model, 1, context)
    ours.state["offset"] += 3_000_001
    theirs.state.offset.add_(3_000_001)
    for _ in range(4):
        window = windows(model, 1, size)
        check(ours(window, [size]), theirs(window, [size]))


def test_company_changes_nothing(pair):
    model, session = pair
    context = Context(4, 2)
    size = 4 * model.encoder.subsampling
    window = windows(model, 3, size)
    together = Ours(model, session, 3, context)
    alone = Ours(model, session, 1, context)
    for _ in range(3):
        found, expected = together(window, [size] * 3), alone(window[1:2], [size])
        np.testing.assert_allclose(found["y"][1:2], expected["y"], atol=1e-5)


def test_models_without_ctc_and_other_bins():
    model = conformer(4, 0, ctc=None, num_bins=40)
    session = onnxruntime.InferenceSession(conformer_graph(model).SerializeToString())
    assert [x.name for x in session.get_outputs()][:2] == ["y", "y_lens"]
    found = Ours(model, session, 1, WHOLE)(windows(model, 1, 33), [33])
    with torch.inference_mode():
        x = model.cmvn(model.fbank.frames(windows(model, 1, 33)))
        y, _, _ = model.encoder(x, torch.tensor([33]))
    np.testing.assert_allclose(found["y"], y.numpy(), atol=2e-5)


def test_it_stays_small():
    """What makes it fast: no operation that a layer needs to find out about sizes."""
    model = conformer(4, 0)
    nodes = conformer_graph(model).graph.node
    ops = Counter(node.op_type for node in nodes if ".layers.1." in node.name or ".layers.1/" in node.name)
    assert not {"Shape", "Gather", "Expand", "Where", "Range", "Cast"} & set(ops)
    assert sum(ops.values()) <= 62
