"""The head that counts words: its loss, what it leaves unchanged, and whether it detects truncation."""

from dataclasses import asdict

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, tensor

from asr.config import load_config, save_config
from asr.decode.policies import ends_with_a_word
from asr.errors import ConfigError
from asr.features import FbankConfig
from asr.losses import LossConfig
from asr.model.build import build_model
from asr.model.conformer import ConformerConfig
from asr.model.decoder import DecoderConfig
from asr.model.fire import Fire
from asr.model.hybrid import HybridModel
from asr.model.torch_scorer import TorchScorer
from export.onnx import export, export_graphs, fire_trace
from export.quantize import quantize

STARTS = tensor([0, 0, 0, 1, 1, 0, 0], dtype=torch.bool)
TOKENS = tensor([[3, 5, 6, 4, 3], [5, 6, 3, 0, 0], [5, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
TOKEN_LENS = tensor([5, 3, 1, 0])
WORDS = tensor([3.0, 2.0, 1.0, 0.0])


def model_of(quantity: float = 0.0, seed: int = 1, **encoder: object) -> HybridModel:
    torch.manual_seed(seed)
    sizes = {"dim": 16, "num_layers": 1, "num_heads": 2, "ff_dim": 16, "subsampling_channels": 4}
    config = ConformerConfig(**sizes | encoder)  # type: ignore[arg-type]
    decoder = DecoderConfig(dim=16, num_layers=1, num_heads=2, ff_dim=16)
    model = build_model(FbankConfig(num_bins=16), config, decoder, LossConfig(quantity=quantity), len(STARTS))
    if model.fire is not None:
        model.fire.word_starts = STARTS
    return model.eval()


def fire_of(dim: int, seed: int = 0) -> Fire:
    fire = Fire(dim)
    fire.word_starts = STARTS
    torch.manual_seed(seed)
    torch.nn.init.normal_(fire.weight)
    return fire


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, 60, 16, generator=generator)
    return {"x": x, "x_lens": tensor([60, 44, 20, 12]), "tokens": TOKENS, "token_lens": TOKEN_LENS}


ENDS = tensor([[2, 4, 7, 9, 14], [3, 6, 9, 0, 0], [5, 0, 0, 0, 0], [0, 0, 0, 0, 0]])


def test_a_word_ends_where_the_next_begins_or_the_text_ends():
    expected = [[0, 0, 1, 1, 1], [0, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert fire_of(1).ends_of_words(TOKENS, TOKEN_LENS).int().tolist() == expected
    assert fire_of(1).ends_of_words(TOKENS[:, :0], TOKEN_LENS * 0).shape == (4, 0)


def test_the_loss_is_the_missing_or_surplus_number_of_words():
    """Frames with given weights: y is their logit."""
    fire = Fire(1)
    fire.word_starts = STARTS
    with torch.no_grad():
        fire.weight.fill_(1)
        fire.bias.fill_(0)
    alpha = tensor([[0.5, 0.25, 0.9, 0.1], [0.5, 0.5, 0.75, 0.9], [0.9, 0.9, 0.9, 0.9], [0.3, 0.2, 0.9, 0.9]])
    y, y_lens = alpha.logit()[..., None], tensor([4, 3, 2, 1])
    torch.testing.assert_close(fire(y), alpha)
    no_ends = TOKENS[:, :0]
    whole = tensor([1.25, 0.25, 0.8, 0.3])
    torch.testing.assert_close(fire.loss(y, y_lens, TOKENS, TOKEN_LENS, no_ends), whole)
    fire.eval()  # the first 3, 2, 2 and 1 frames; words that end there: 2, 1, 1 and 0
    ends = tensor([[1, 1, 2, 3, 4], [1, 2, 9, 0, 0], [7, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    prefix = tensor([0.35, 0.0, 0.8, 0.3])
    torch.testing.assert_close(fire.loss(y, y_lens, TOKENS, TOKEN_LENS, ends), (whole + prefix) / 2)


def test_the_gradient_is_that_of_finite_differences():
    fire, y = fire_of(3).double(), torch.randn(4, 9, 3, generator=torch.Generator().manual_seed(1)).double()
    y_lens = tensor([9, 7, 4, 2])

    def loss(weight: Tensor, bias: Tensor) -> Tensor:
        del fire.weight, fire.bias
        fire.weight, fire.bias = weight, bias  # type: ignore[assignment]
        return fire.loss(y, y_lens, TOKENS, TOKEN_LENS, ENDS).sum()

    values = [p.detach().clone().requires_grad_() for p in fire.eval().parameters()]
    assert torch.autograd.gradcheck(loss, values)


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_prefixes_are_whole_chunks_of_every_length(chunk):
    """All weights are one and there are no words: the loss is the mean of the two lengths."""
    fire = Fire(1)
    fire.word_starts = STARTS
    torch.nn.init.constant_(fire.bias, 50.0)
    y_lens = tensor([20, 7, 1, 0]).repeat(200)
    none = torch.zeros(800, dtype=torch.int64)
    torch.manual_seed(0)
    loss = fire.loss(torch.zeros(800, 20, 1), y_lens, none[:, None], none, none[:, None], chunk)
    found = (2 * loss - y_lens).round().long().view(200, 4)
    for lens, longest in zip(found.T.tolist(), (20, 7, 1, 0), strict=True):
        borders = {*range(chunk, longest, chunk), longest} if longest else {0}
        assert set(lens) == borders


def test_no_gradient_reaches_anything_else():
    fired, plain = model_of(0.5), model_of()
    torch.nn.init.normal_(fired.fire.weight)
    for model in (fired, plain):
        model(**batch(), token_ends=ENDS).total.backward()
    assert fired.fire is not None
    assert fired.fire.weight.grad.any()
    assert fired.fire.bias.grad.any()
    grads = {name: p.grad for name, p in fired.named_parameters() if not name.startswith("fire.")}
    for name, p in plain.named_parameters():
        torch.testing.assert_close(grads.pop(name), p.grad, rtol=0, atol=0)
    assert not grads


def test_everything_else_starts_as_without_it():
    plain, fired = model_of().state_dict(), model_of(1.0).state_dict()
    assert set(fired) - set(plain) == {"fire.weight", "fire.bias"}
    assert all(torch.equal(fired[name], plain[name]) for name in plain)
    torch.manual_seed(1)
    model_of()
    expected = torch.rand(1)
    model_of(1.0)
    assert torch.rand(1) == expected


def test_the_total_has_it_with_its_weight_and_without_it_is_what_it_was():
    plain, fired = (model_of(weight)(**batch(), token_ends=ENDS) for weight in (0.0, 0.5))
    assert plain.quantity == 0
    assert torch.equal(plain.total, 0.3 * plain.ctc + 0.7 * plain.attention)
    torch.testing.assert_close(fired.total, plain.total + 0.5 * fired.quantity, rtol=0, atol=0)
    model = model_of(0.5)
    y, y_lens = model.encode(batch()["x"], batch()["x_lens"])
    expected = model.fire.loss(y, y_lens, TOKENS, TOKEN_LENS, ENDS).sum()
    torch.testing.assert_close(fired.quantity, expected)
    whole = model(**batch())
    torch.testing.assert_close(
        whole.quantity, model.fire.loss(y, y_lens, TOKENS, TOKEN_LENS, ENDS[:, :0]).sum()
    )
    assert whole.quantity != fired.quantity


def test_weights_stay_float32_in_bf16():
    fire, y = fire_of(16), torch.randn(2, 9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = fire(y)
    torch.testing.assert_close(found, fire(y), rtol=0, atol=0)


def test_a_quantity_below_zero_is_refused():
    with pytest.raises(ConfigError, match="quantity is -1"):
        LossConfig(quantity=-1)
    with pytest.raises(ConfigError, match="quantity is nan"):
        LossConfig(quantity=float("nan"))


def test_the_configuration_says_so(tmp_path):
    config = load_config([], ["loss.quantity=0.25"])
    save_config(config, tmp_path / "config.yaml")
    again = load_config([tmp_path / "config.yaml"])
    assert again.loss.quantity == 0.25
    assert asdict(again) == asdict(config)
    assert load_config([]).loss.quantity == 0


def speech(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy encoder output (N, 60, 6) of one-token words of 5 to 9 frames, each with a bump at its end; how
    many words (N,) and their ends (N, U)."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(count, 60, 6, generator=generator) * 0.3
    lengths = torch.randint(5, 10, (count, 12), generator=generator)
    ends = lengths.cumsum(1)
    for shift, height in ((-2, 1.5), (-1, 4.0)):
        for n, row in enumerate(ends.tolist()):
            y[n, [end + shift for end in row if end <= 60], 2] += height
    return y, (ends <= 60).sum(1), ends


def test_a_trained_head_finds_truncated_ends():
    y, counts, ends = speech(64, 1)
    torch.manual_seed(0)
    fire = Fire(6).train()
    fire.word_starts = STARTS
    optimizer = torch.optim.AdamW(fire.parameters(), lr=0.2, betas=(0.95, 0.98), weight_decay=0.0)
    y_lens, tokens = torch.full((64,), 60), torch.full(ends.shape, 3)
    for _ in range(100):
        loss = fire.loss(y, y_lens, tokens, counts, ends).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    y, counts, ends = speech(30, 2)
    alpha = fire.eval()(y).detach().numpy()
    right: dict[bool, list[bool]] = {True: [], False: []}
    for row, count, borders in zip(alpha, counts.tolist(), ends.tolist(), strict=True):
        for word in range(1, count):
            right[True].append(ends_with_a_word(row[: borders[word]]))
            for cut in range(borders[word - 1] + 2, borders[word] - 2):
                right[False].append(not ends_with_a_word(row[:cut]))
    assert np.mean(right[True]) > 0.8
    assert np.mean(right[False]) > 0.9


@pytest.mark.parametrize("quantity", [0.0, 1.0])
def test_the_graph_is_there_where_the_head_is(monkeypatch, quantity):
    monkeypatch.setattr("export.onnx.export", lambda trace, name: trace.outputs)
    monkeypatch.setattr("export.onnx.with_best", lambda outputs: outputs)
    graphs = export_graphs(model_of(quantity))
    assert graphs.get("fire") == (["alpha"] if quantity else None)


def test_the_scorer_and_the_graphs_say_the_same():
    model = model_of(1.0)
    assert model.fire is not None
    with torch.no_grad():
        model.fire.weight.normal_()
    scorer = TorchScorer(model, "cpu", STARTS.numpy())
    assert scorer.has_fire
    assert not TorchScorer(model_of(), "cpu").has_fire
    _, memory = scorer.encode(
        [np.random.default_rng(0).normal(size=n).astype(np.float32) for n in (9000, 5000)]
    )
    graph = export(fire_trace(model.fire), "fire")
    graphs = [graph, quantize(graph)]
    for utterance, num_frames in ((0, 12), (1, 5), (1, 1)):
        view = scorer.view(memory, utterance, num_frames)
        heard = memory.y[utterance : utterance + 1, :num_frames].numpy()
        expected = model.fire(torch.from_numpy(heard))[0].detach().numpy()
        np.testing.assert_array_equal(scorer.fire(view), expected)
        assert expected.shape == (num_frames,)
        for each in graphs:
            session = ort.InferenceSession(each.SerializeToString(), providers=["CPUExecutionProvider"])
            (found,) = session.run(["alpha"], {"y": heard})
            np.testing.assert_allclose(found[0], expected, atol=1e-6)
