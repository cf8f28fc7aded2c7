import copy

import pytest
import torch
from torch import tensor

from asr.context import Context
from asr.losses import consistency_loss, ctc_loss, label_smoothed_cross_entropy

SAMPLES = torch.randn(3, 12000, generator=torch.Generator().manual_seed(0)) * 0.1
SAMPLE_LENS = tensor([12000, 9000, 4000])
TOKENS = tensor([[4, 5, 6, 6, 2], [7, 7, 7, 0, 0], [3, 0, 0, 0, 0]])
TOKEN_LENS = tensor([5, 3, 1])


@pytest.fixture
def x(tiny_model):
    return tiny_model.features(SAMPLES, SAMPLE_LENS)


def test_the_loss_of_a_batch_is_the_sum_of_its_utterances(tiny_model, x):
    frames, x_lens = x
    context = Context(3, 1)
    batch = tiny_model(frames, x_lens, TOKENS, TOKEN_LENS, context)
    single = [
        tiny_model(frames[i : i + 1, :n], x_lens[i : i + 1], TOKENS[i : i + 1, :u], tensor([u]), context)
        for i, (n, u) in enumerate(zip(x_lens.tolist(), TOKEN_LENS.tolist(), strict=True))
    ]
    for name in ("total", "ctc", "attention"):
        torch.testing.assert_close(getattr(batch, name), sum(getattr(loss, name) for loss in single))
    assert batch.num_tokens == 9 + 3
    torch.testing.assert_close(batch.total, 0.3 * batch.ctc + 0.7 * batch.attention)


def test_the_decoder_is_taught_from_sos_to_eos(tiny_model, x):
    y, y_lens = tiny_model.encode(*x)
    logits = tiny_model.decoder(
        tensor([[1, 7, 7, 7]]), *tiny_model.decoder.memory(y[1:2]), y_lens[1:2]
    ).logits
    expected = label_smoothed_cross_entropy(logits.log_softmax(-1), tensor([[7, 7, 7, 1]]), tensor([4]), 0.1)
    tiny_model.loss.reverse = 0.0
    frames, x_lens = x
    loss = tiny_model(frames[1:2], x_lens[1:2], TOKENS[1:2], TOKEN_LENS[1:2])
    torch.testing.assert_close(loss.attention, expected[0])
    ctc = ctc_loss(tiny_model.ctc_log_probs(y[1:2]), y_lens[1:2], tensor([[7, 7, 7]]), tensor([3]))
    torch.testing.assert_close(loss.ctc, ctc[0])


def test_a_transcript_longer_than_the_audio_teaches_nothing_and_poisons_nothing(tiny_model, x):
    frames, x_lens = x[0][:2].requires_grad_(), tensor([75, 6])  # 19 and 2 encoder frames
    tiny_model(frames, x_lens, tensor([[4, 5, 0], [6, 6, 6]]), tensor([2, 3])).ctc.backward()
    assert all(p.grad.isfinite().all() for p in tiny_model.parameters() if p.grad is not None)
    assert frames.grad[0].any()
    assert not frames.grad[1].any()


def test_an_empty_utterance_and_an_empty_transcript_have_finite_losses(tiny_model, x):
    loss = tiny_model(x[0], tensor([75, 0, 25]), TOKENS, tensor([5, 0, 0]))
    loss.total.backward()
    assert loss.total.isfinite()
    assert all(p.grad.isfinite().all() for p in tiny_model.parameters() if p.grad is not None)


def test_a_batch_without_a_token_has_the_loss_of_a_padded_one(tiny_model, x):
    none = torch.zeros(3, dtype=torch.int64)
    expected = tiny_model(*x, TOKENS, none)
    loss = tiny_model(*x, TOKENS[:, :0], none)
    torch.testing.assert_close(loss.total, expected.total)


def test_every_parameter_is_taught(tiny_model, x):
    tiny_model(*x, TOKENS, TOKEN_LENS).total.backward()
    untaught = [name for name, p in tiny_model.named_parameters() if p.grad is None or not p.grad.any()]
    assert untaught == []


def test_features_and_losses_stay_float32_in_bf16(tiny_model, x):
    exact = tiny_model(*x, TOKENS, TOKEN_LENS)
    with torch.autocast("cpu", torch.bfloat16):
        frames, x_lens = tiny_model.features(SAMPLES, SAMPLE_LENS)
        loss = tiny_model(frames, x_lens, TOKENS, TOKEN_LENS)
    torch.testing.assert_close(frames, x[0], rtol=0, atol=0)
    assert loss.total.dtype == torch.float32
    assert loss.total != exact.total
    torch.testing.assert_close(loss.total, exact.total, rtol=0.02, atol=0)


def test_features_are_normalised_by_the_model(tiny_model, x):
    tiny_model.cmvn.mean.fill_(2.0)
    tiny_model.cmvn.istd.fill_(0.5)
    torch.testing.assert_close(tiny_model.features(SAMPLES, SAMPLE_LENS)[0], (x[0] - 2) / 2)
    assert {"cmvn.mean", "cmvn.istd"} < set(tiny_model.state_dict())


def test_a_few_steps_teach_a_batch(tiny_model, x):
    optimizer = torch.optim.AdamW(tiny_model.parameters(), lr=5e-3)
    losses = []
    for _ in range(40):
        loss = tiny_model(*x, TOKENS, TOKEN_LENS, Context(4))
        optimizer.zero_grad()
        (loss.total / loss.num_tokens).backward()
        optimizer.step()
        losses.append(loss.total.item())
    assert losses[-1] < 0.3 * losses[0]


def test_the_second_decoder_learns_from_right_to_left(tiny_model, x):
    """With the weights of the first one, it has that one's loss for mirrored tokens, padded at the end."""
    tiny_model.reverse_decoder = copy.deepcopy(tiny_model.decoder)
    losses = {}
    for share in (0.0, 0.3, 1.0):
        tiny_model.loss.reverse = share
        losses[share] = tiny_model(*x, TOKENS, TOKEN_LENS).attention
    tiny_model.loss.reverse = 0.0
    mirrored = tensor([[2, 6, 6, 5, 4], [7, 7, 7, 0, 0], [3, 0, 0, 0, 0]])
    torch.testing.assert_close(losses[1.0], tiny_model(*x, mirrored, TOKEN_LENS).attention)
    torch.testing.assert_close(losses[0.3], 0.7 * losses[0.0] + 0.3 * losses[1.0])
    assert abs(losses[1.0] - losses[0.0]) > 1e-3


def test_the_losses_of_two_views_are_their_mean_and_how_far_they_are_from_each_other(tiny_model, x):
    frames, x_lens = x
    other = frames * (torch.arange(frames.shape[1])[:, None] % 20 > 5)
    twice = (torch.cat([frames, other]), x_lens.repeat(2), TOKENS.repeat(2, 1), TOKEN_LENS.repeat(2))
    tiny_model.loss.consistency = 0.2
    both = tiny_model(*twice, views=2)
    tiny_model.loss.consistency = 0.0
    first, second = tiny_model(*x, TOKENS, TOKEN_LENS), tiny_model(other, x_lens, TOKENS, TOKEN_LENS)
    for name in ("ctc", "attention", "num_tokens"):
        torch.testing.assert_close(
            getattr(both, name), (getattr(first, name) + getattr(second, name)) / 2, check_dtype=False
        )
    y, y_lens = tiny_model.encode(*twice[:2])
    apart = consistency_loss(tiny_model.ctc_log_probs(y), y_lens).sum() / 2
    assert apart > 0.1
    torch.testing.assert_close(both.total, (first.total + second.total) / 2 + 0.2 * apart)


def test_times_become_the_frames_behind_them(tiny_model):
    """A token that ends with frame 2, at 0.12 s, ends before frame 3, despite float32 rounding."""
    times = tensor([0.0, 0.001, 0.04, 0.0401, 0.12, 0.36, 3.0, 12.0])
    assert tiny_model.frames_behind(times).tolist() == [0, 1, 1, 2, 3, 9, 75, 300]
