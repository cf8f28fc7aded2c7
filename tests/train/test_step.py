"""The gradient of a step does not depend on how its batch is distributed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from asr.data.augment import SpecAugment
from asr.data.loader import Batch
from asr.model.hybrid import HybridModel
from asr.train import distributed
from asr.train.learner import Learner
from asr.train.step import Backward, agree, context_of_step, parallel

QUIET = (
    "encoder.dropout=0.0",
    "decoder.dropout=0.0",
    "augment.spec_augment.num_time_masks=0",
    "augment.spec_augment.num_freq_masks=0",
)
LENS = [16000, 9000, 12000, 5000]
TOKENS = [[3, 4, 5], [4], [5, 5], [3]]


def batch_of(rows: list[int]) -> Batch:
    """The given rows of four utterances of noise."""
    noise = torch.randn(4, 16000, generator=torch.Generator().manual_seed(1)) * 0.1
    lens = torch.tensor([LENS[row] for row in rows])
    samples = noise[rows, : lens.max()].clone()
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(TOKENS[row]) for row in rows], batch_first=True)
    token_lens = torch.tensor([len(TOKENS[row]) for row in rows])
    ids = [f"u{row}" for row in rows]
    no_ends = torch.zeros(len(rows), 0)
    return Batch(samples, lens, tokens, token_lens, no_ends, ids, ids, {"epoch": 0, "batch": 1})


def empty() -> Batch:
    batch = batch_of([0])
    return replace(batch, tokens=torch.zeros(1, 0).long(), token_lens=torch.tensor([0]), ids=[], texts=[])


def gradients(lab: Any, batches: list[Batch], *options: str) -> tuple[Tensor, Tensor]:
    """(all gradients of a step, its loss per token), on this rank."""
    config = lab.config(*QUIET, *options)
    torch.manual_seed(3)
    device = torch.device("cpu")
    model: HybridModel = Learner.fresh(config, 6, device).model.train()
    augment = SpecAugment(config.augment.spec_augment)
    backward = Backward(model, parallel(model, device), augment, device, bf16=False)
    shared = agree(model, batches, cpu_s=1.0, stop=distributed.rank() == 1)
    losses = backward(batches, shared, context_of_step(config, 5, shared.num_frames))
    total = distributed.gather(losses).sum(0)[0] / shared.num_tokens
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), total


@pytest.mark.parametrize("parts", [[[0, 1], [2, 3]], [[0], [1, 2, 3]], [[3], [2], [1], [0]]])
def test_accumulation_equals_a_large_batch(lab: Any, parts: list[list[int]]) -> None:
    whole, loss = gradients(lab, [batch_of([0, 1, 2, 3])])
    split, split_loss = gradients(lab, [batch_of(part) for part in parts])
    assert whole.abs().max() > 0.01
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(split_loss, loss, rtol=1e-5, atol=1e-5)


def test_a_consistent_step_without_masks_is_an_ordinary_one(lab: Any) -> None:
    """Without masks both views, and their losses, are the same; with masks they differ."""
    ordinary, loss = gradients(lab, [batch_of([0, 1, 2, 3])])
    twice, twice_loss = gradients(lab, [batch_of([0, 1]), batch_of([2, 3])], "loss.consistency=0.1")
    torch.testing.assert_close(twice, ordinary, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(twice_loss, loss, rtol=1e-5, atol=1e-5)
    masks = ("augment.spec_augment.num_freq_masks=2", "augment.spec_augment.max_freq_bins=60")
    masked, masked_loss = gradients(lab, [batch_of([0, 1])], *masks, "loss.consistency=100.0")
    _, less = gradients(lab, [batch_of([0, 1])], *masks, "loss.consistency=1e-9")
    assert masked_loss > less + 0.01
    assert masked.isfinite().all()


DEALS: dict[str, tuple[list[Any], list[Any]]] = {
    "unequal": ([[0, 1, 2]], [[3]]),
    "accumulated": ([[0], [1]], [[2], [3]]),
    "empty": ([[0]], [None]),
}


def save_gradients(lab: Any, folder: Path) -> None:
    rank = distributed.rank()
    with distributed.group(torch.device("cpu"), 60):
        for name, deal in DEALS.items():
            batches = [batch_of(rows) if rows else empty() for rows in deal[rank]]
            torch.save(gradients(lab, batches), folder / f"{name}{rank}.pt")


def test_two_ranks_equal_one(lab: Any, children: Any, tmp_path: Path) -> None:
    """With unequal shares, with accumulation on both, and with one rank that has no data at first."""
    children.ranks(2, save_gradients, lab, tmp_path)
    for name, deal in DEALS.items():
        rows = [row for share in deal for part in share for row in part or []]
        expected, loss = gradients(lab, [batch_of(sorted(rows))])
        for rank in range(2):
            found, found_loss = torch.load(tmp_path / f"{name}{rank}.pt")
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found_loss, loss, rtol=1e-5, atol=1e-5)


def save_what_is_shared(lab: Any, folder: Path) -> None:
    rank = distributed.rank()
    model = Learner.fresh(lab.config(), 6, torch.device("cpu")).model
    with distributed.group(torch.device("cpu"), 60):
        shared = agree(model, [batch_of([0, 1]) if rank else batch_of([3])], cpu_s=2.0, stop=bool(rank))
        torch.save(vars(shared), folder / f"{rank}.pt")
        assert distributed.gather_objects(rank) == [0, 1]


def test_ranks_know_of_each_other(lab: Any, children: Any, tmp_path: Path) -> None:
    children.ranks(2, save_what_is_shared, lab, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second
    # 3 + 1 + 1 tokens and 3 ends; 100 feature frames are 25 encoder frames
    assert first == {"num_tokens": 8, "num_frames": 25, "audio_s": 30000 / 16000, "cpu_s": 4.0, "stop": True}


def test_the_context_is_drawn_from_seed_and_step_alone(lab: Any) -> None:
    config = lab.config()
    first = [context_of_step(config, step, 40) for step in range(50)]
    torch.manual_seed(99)
    assert [context_of_step(config, step, 40) for step in range(50)] == first
    assert len(set(first)) > 10
    config.encoder.chunk.max_right = 2
    assert {context.right for context in (context_of_step(config, step, 40) for step in range(50))} == {
        0,
        1,
        2,
    }
    config.encoder.chunk.max_right = 0
    config.train.seed = 2
    assert [context_of_step(config, step, 40) for step in range(50)] != first
