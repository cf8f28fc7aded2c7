import pytest
import torch
from torch import tensor

from asr.errors import ConfigError
from asr.model.conformer import Conformer, ConformerConfig, ConformerState


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("subsampling", [4, 8])
@pytest.mark.parametrize("num_frames", [1, 3, 4, 5, 8, 9, 31])
def test_there_is_an_encoder_frame_for_every_begun_group(tiny_encoder, subsampling, num_frames):
    encoder = tiny_encoder(subsampling=subsampling)
    y, y_lens, _ = encoder(torch.randn(1, num_frames, 16), tensor([num_frames]))
    assert y.shape == (1, -(-num_frames // subsampling), 24)
    assert y_lens.tolist() == [y.shape[1]]


@pytest.mark.parametrize("context", [(0, -1, 0), (3, -1, 0), (3, 1, 0), (3, 1, 2)])
def test_an_utterance_is_the_same_alone_and_in_a_batch(tiny_encoder, context):
    encoder = tiny_encoder()
    x, x_lens = torch.randn(3, 90, 16) * 3, tensor([90, 33, 1])
    y, y_lens, _ = encoder(x, x_lens, None, *context)
    for i, (n, t) in enumerate(zip(x_lens, y_lens, strict=True)):
        alone, _, _ = encoder(x[i : i + 1, :n], x_lens[i : i + 1], None, *context)
        close(y[i : i + 1, :t], alone)
        assert (y[i, t:] == 0).all()


def test_chunk_zero_is_a_chunk_longer_than_the_utterance(tiny_encoder):
    encoder = tiny_encoder()
    x, x_lens = torch.randn(2, 50, 16), tensor([50, 40])
    close(encoder(x, x_lens, None, 0)[0], encoder(x, x_lens, None, 10_000)[0], atol=0)


def test_the_context_may_be_given_as_tensors(tiny_encoder):
    encoder = tiny_encoder()
    x, x_lens = torch.randn(1, 50, 16), tensor([50])
    given = encoder(x, x_lens, None, tensor(2), tensor(1), tensor(1))[0]
    close(given, encoder(x, x_lens, None, 2, 1, 1)[0], atol=0)


def test_checkpointed_activations_give_the_same_gradients(tiny_encoder):
    plain, checkpointed = tiny_encoder(), tiny_encoder(checkpoint_activations=True)
    checkpointed.load_state_dict(plain.state_dict())
    x, x_lens = torch.randn(2, 40, 16), tensor([40, 30])
    for encoder, expected_runs in ((plain, 1), (checkpointed, 2)):
        runs = []
        encoder.layers[0].register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        torch.manual_seed(1)  # dropout
        encoder.train()(x, x_lens, None, 2, 1)[0].square().sum().backward()
        assert len(runs) == expected_runs
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        close(a.grad, b.grad)


def test_training_differs_from_evaluation_by_dropout_alone(tiny_encoder):
    encoder = tiny_encoder(dropout=0.0)
    x, x_lens = torch.randn(2, 40, 16), tensor([40, 30])
    expected = encoder(x, x_lens)[0]
    close(encoder.train()(x, x_lens)[0], expected, atol=0)
    dropping = tiny_encoder(dropout=0.5).train()
    assert not torch.equal(dropping(x, x_lens)[0], dropping(x, x_lens)[0])


def test_widening_makes_room_that_nobody_attends_to(tiny_encoder):
    encoder = tiny_encoder()
    x, x_lens = torch.randn(1, 16, 16), tensor([16])
    _, _, state = encoder(x, x_lens, encoder.init_state(1, 4), 4)
    wide = state.widen(5)
    assert wide.keys.shape[3] == wide.values.shape[3] == 9
    close(encoder(x, x_lens, wide, 4)[0], encoder(x, x_lens, state, 4)[0])


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"encoder\.dim: 30 channels do not divide into 4 heads"):
        Conformer(ConformerConfig(dim=30, num_heads=4), 80)


class _Call(torch.nn.Module):
    """The encoder as an exporter sees it: tensors in, tensors out."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x, x_lens, chunk, left, right, state):
        y, y_lens, state = self.encoder(x, x_lens, ConformerState(*state), chunk, left, right)
        return y, y_lens, state.tensors()


def test_a_trace_serves_other_batches_lengths_and_widths(tiny_encoder):
    encoder = tiny_encoder(num_layers=1)
    n, t, w, r = (torch.export.Dim(name) for name in "ntwr")
    state = encoder.init_state(2, 12, 4).tensors()
    args = torch.randn(2, 32, 16), tensor([32, 20]), tensor(4), tensor(2), tensor(1), state
    kept, held_back = {0: n, 3: w}, ({0: n, 2: r}, {0: n, 3: r})
    state_shapes = {0: n}, kept, kept, *held_back, {0: n}, {0: n}
    traced = torch.export.export(
        _Call(encoder), args, dynamic_shapes=({0: n, 1: 4 * t}, {0: n}, None, None, None, state_shapes)
    ).module(check_guards=False)

    for context, lens in (((3, 2, 0), [48, 0, 13]), ((3, 2, 2), [48, 48, 48]), ((3, 2, 2), [24, 20, 3])):
        x, x_lens, delay = torch.randn(3, 48, 16), tensor(lens), context[2] * 3
        _, _, state = encoder(x, tensor([48] * 3), encoder.init_state(3, 6 + delay, delay), *context)
        y, y_lens, tensors = traced(x, x_lens, *map(tensor, context), state.tensors())
        expected, expected_lens, expected_state = encoder(x, x_lens, state, *context)
        close(y, expected)
        assert torch.equal(y_lens, expected_lens)
        for a, b in zip(tensors, expected_state.tensors(), strict=True):
            close(a, b)
