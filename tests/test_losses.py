import itertools
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, tensor

from asr.errors import ConfigError
from asr.losses import (
    LossConfig,
    consistency_loss,
    ctc_feasible,
    ctc_loss,
    label_smoothed_cross_entropy,
    transducer_loss,
)


@pytest.fixture(scope="module")
def exact(golden_folder):
    with np.load(golden_folder("ctc_rnnt") / "io.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected.to(actual.dtype), **tolerance)


def _ctc(exact: dict[str, Tensor], prefix: str, x_lens: Tensor) -> None:
    """Losses equal the sum over all paths; without any path, 0 instead of infinity."""
    logits = exact[f"{prefix}.logits"].requires_grad_()
    tokens, token_lens = exact[f"{prefix}.targets"].clamp(min=0), exact[f"{prefix}.target_lens"]
    loss = ctc_loss(logits.log_softmax(-1), x_lens, tokens, token_lens)
    expected = exact[f"{prefix}.loss"]
    close(loss, expected.where(expected.isfinite(), 0.0), rtol=1e-5, atol=1e-6)
    assert torch.equal(ctc_feasible(x_lens, tokens, token_lens), expected.isfinite())
    loss.sum().backward()
    if f"{prefix}.grad_logits" in exact:
        close(logits.grad, exact[f"{prefix}.grad_logits"], rtol=0, atol=1e-5)


def test_ctc_losses_and_gradients_equal_the_enumeration(exact):
    n, length, _ = exact["ctc.logits"].shape
    _ctc(exact, "ctc", torch.full((n,), length))


def test_ctc_losses_of_a_padded_batch_equal_the_enumeration(exact):
    _ctc(exact, "ctc_batch", exact["ctc_batch.input_lens"])


def _collapse(path: tuple[int, ...]) -> list[int]:
    return [token for token, _ in itertools.groupby(path) if token]


@pytest.mark.parametrize("tokens", [[1, 2], [1, 1], [2], []])
def test_ctc_loss_is_the_sum_over_all_paths(tokens):
    log_probs = torch.randn(1, 5, 3).log_softmax(-1)
    paths = [p for p in itertools.product(range(3), repeat=5) if _collapse(p) == tokens]
    total = torch.stack([log_probs[0, range(5), p].sum() for p in paths]).logsumexp(0)
    padded = tensor([[*tokens, 0, 0]])
    close(ctc_loss(log_probs, tensor([5]), padded, tensor([len(tokens)])), -total[None])


@pytest.mark.parametrize("tokens", [[1, 2, 3], [1, 1, 2], [2, 2, 2], [1]])
def test_feasible_means_a_path_exists(tokens):
    needed = len(tokens) + sum(a == b for a, b in itertools.pairwise(tokens))
    padded = tensor([[*tokens, 0, 0, 0]] * 2)
    lens = tensor([needed - 1, needed])
    assert ctc_feasible(lens, padded, tensor([len(tokens)] * 2)).tolist() == [False, True]


def test_a_batch_without_a_token_is_feasible():
    assert ctc_feasible(tensor([0, 3]), torch.zeros(2, 0, dtype=torch.int64), tensor([0, 0])).all()


def test_no_frames_and_no_tokens_are_no_loss():
    log_probs = torch.randn(2, 3, 4, requires_grad=True)
    loss = ctc_loss(log_probs.log_softmax(-1), tensor([0, 3]), tensor([[1], [0]]), tensor([1, 0]))
    loss.sum().backward()
    assert loss[0] == 0
    assert loss[1] > 0
    assert log_probs.grad.isfinite().all()
    assert not log_probs.grad[0].any()


def test_cross_entropy_is_torchs_summed_over_each_utterance():
    logits, targets = torch.randn(2, 4, 6), torch.randint(6, (2, 4))
    loss = label_smoothed_cross_entropy(logits.log_softmax(-1), targets, tensor([4, 2]), 0.1)
    for i, n in enumerate((4, 2)):
        expected = torch.nn.functional.cross_entropy(
            logits[i, :n], targets[i, :n], reduction="sum", label_smoothing=0.1
        )
        close(loss[i], expected)


def test_transducer_losses_and_gradients_equal_the_enumeration(exact):
    cases = [name for name in exact if re.fullmatch(r"rnnt\d+\.logits", name)]
    assert cases
    for name in (case.removesuffix(".logits") for case in cases):
        logits = exact[f"{name}.logits"][None].requires_grad_()
        tokens = exact[f"{name}.labels"][None]
        x_lens, token_lens = (tensor([n]) for n in (logits.shape[1], tokens.shape[1]))
        loss = transducer_loss(logits, x_lens, tokens, token_lens, blank=int(exact[f"{name}.blank"]))
        close(loss, exact[f"{name}.loss"][None], rtol=1e-5, atol=1e-6)
        loss.sum().backward()
        close(logits.grad[0], exact[f"{name}.grad_logits"], rtol=0, atol=1e-5)


def test_transducer_losses_of_a_padded_batch_are_those_of_its_utterances():
    logits, tokens = torch.randn(2, 5, 4, 6), torch.randint(1, 6, (2, 3))
    x_lens, token_lens = tensor([5, 3]), tensor([3, 1])
    both = transducer_loss(logits, x_lens, tokens, token_lens)
    alone = transducer_loss(logits[1:, :3, :2], x_lens[1:], tokens[1:, :1], token_lens[1:])
    close(both[1:], alone)


@pytest.mark.parametrize("name", ["icefall_zipformer2", "icefall_zipformer2_causal"])
def test_consistency_is_that_of_the_reference(golden_folder, name):
    folder = golden_folder(name)
    weights = load_file(folder / "weights.safetensors")
    with np.load(folder / "io.npz") as arrays:
        found = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    lens = found["full.encoder_out_lens"]
    rows = [found[f"tokens{i}"] for i in range(len(lens))]
    y = torch.cat([found["full.encoder_out"], found["cr_ctc.encoder_out_view2"]])
    weight, bias = weights["ctc_output.1.weight"], weights["ctc_output.1.bias"]
    log_probs = torch.nn.functional.linear(y, weight, bias).log_softmax(-1)
    loss = consistency_loss(log_probs, lens.repeat(2)).sum()
    close(loss, found["cr_ctc.cr_loss_sum"], rtol=1e-4, atol=1e-5)
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).repeat(2, 1)
    token_lens = tensor([len(row) for row in rows] * 2)
    loss = ctc_loss(log_probs, lens.repeat(2), tokens, token_lens).sum()
    close(loss, found["cr_ctc.ctc_loss_sum"], rtol=1e-4, atol=1e-5)


def test_equal_views_are_consistent():
    log_probs = torch.randn(2, 5, 4).log_softmax(-1).repeat(2, 1, 1)
    assert consistency_loss(log_probs, tensor([5, 3, 5, 3])).abs().max() < 1e-6


def test_consistency_is_the_divergence_of_the_frames_that_are_there():
    log_probs = torch.randn(4, 5, 3).log_softmax(-1)
    loss = consistency_loss(log_probs, tensor([5, 2, 5, 2]))
    for n, length in enumerate((5, 2)):
        p, q = log_probs[n, :length], log_probs[n + 2, :length]
        close(loss[n], (p.exp() * (p - q)).sum() + (q.exp() * (q - p)).sum())


def test_each_view_learns_from_the_other_which_does_not_move():
    """The gradient equals finite differences with the targets held fixed."""
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    lens = tensor([3, 3])
    consistency_loss(logits.log_softmax(-1), lens).sum().backward()
    fixed = logits.detach().log_softmax(-1).flip(0)

    def learnt(logits: Tensor) -> Tensor:
        return (fixed.exp() * (fixed - logits.log_softmax(-1))).sum()

    for index in itertools.product(range(2), range(3), range(4)):
        shift = torch.zeros_like(logits).detach()
        shift[index] = 1e-6
        slope = (learnt(logits + shift) - learnt(logits - shift)) / 2e-6
        close(logits.grad[index], slope.detach(), rtol=1e-6, atol=1e-8)


def test_consistency_without_ctc_is_refused():
    assert LossConfig(consistency=0.06).views == 2
    assert LossConfig().views == 1
    with pytest.raises(ConfigError, match=r"consistency is 0.1 and ctc is 0.0; .* give ctc a weight"):
        LossConfig(consistency=0.1, ctc=0.0)
    with pytest.raises(ConfigError, match=r"consistency is -1; expected 0 or more"):
        LossConfig(consistency=-1)
