import pytest
import torch
from torch import tensor

from asr.errors import ConfigError
from asr.model.decoder import DecoderConfig, TransformerDecoder
from asr.model.state import join, select, split

TOKENS = tensor([[1, 4, 5, 6, 7], [1, 9, 9, 2, 3]])
Y_LENS = tensor([6, 4])


@pytest.fixture
def y():
    return torch.randn(2, 6, 24)


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("steps", [[1, 1, 1, 1, 1], [2, 3], [1, 4]])
def test_stepping_equals_teacher_forcing(tiny_decoder, y, steps):
    memory = tiny_decoder.memory(y)
    whole, _ = tiny_decoder(TOKENS, *memory, Y_LENS)
    parts, state = [], None
    for tokens in TOKENS.split(steps, dim=1):
        logits, state = tiny_decoder(tokens, *memory, Y_LENS, state)
        parts.append(logits)
    close(torch.cat(parts, dim=1), whole)


def test_every_field_of_the_state_matters(tiny_decoder, y):
    memory = tiny_decoder.memory(y)
    _, state = tiny_decoder(TOKENS, *memory, Y_LENS)
    expected, _ = tiny_decoder(TOKENS, *memory, Y_LENS, state)
    for name in ("keys", "values"):
        zeroed = type(state)(**{**vars(state), name: torch.zeros_like(getattr(state, name))})
        assert (tiny_decoder(TOKENS, *memory, Y_LENS, zeroed)[0] - expected).abs().max() > 1e-3


def test_hypotheses_join_split_and_reorder(tiny_decoder, y):
    keys, values = tiny_decoder.memory(y)
    _, state = tiny_decoder(TOKENS, keys, values, Y_LENS)
    expected, _ = tiny_decoder(TOKENS, keys, values, Y_LENS, state)
    index = tensor([1, 0, 1])
    chosen, _ = tiny_decoder(TOKENS[index], keys[index], values[index], Y_LENS[index], select(state, index))
    close(chosen, expected[index])
    close(tiny_decoder(TOKENS, keys, values, Y_LENS, join(split(state)))[0], expected, atol=0)


def test_what_is_behind_the_end_of_the_memory_does_not_matter(tiny_decoder, y):
    whole, _ = tiny_decoder(TOKENS, *tiny_decoder.memory(y), Y_LENS)
    alone, _ = tiny_decoder(TOKENS[1:], *tiny_decoder.memory(y[1:, :4]), Y_LENS[1:])
    close(whole[1:], alone)
    y[0, 0] += 1
    assert (tiny_decoder(TOKENS, *tiny_decoder.memory(y), Y_LENS)[0] - whole)[0].abs().max() > 1e-3


def test_what_follows_a_token_does_not_matter_to_it(tiny_decoder, y):
    memory = tiny_decoder.memory(y)
    whole, _ = tiny_decoder(TOKENS, *memory, Y_LENS)
    changed = TOKENS.clone()
    changed[:, 3:] = 10
    close(tiny_decoder(changed, *memory, Y_LENS)[0][:, :3], whole[:, :3], atol=0)


def test_without_memory_the_decoder_is_a_language_model(tiny_decoder, y):
    padded, _ = tiny_decoder(TOKENS, *tiny_decoder.memory(y), tensor([6, 0]))
    nothing, _ = tiny_decoder(TOKENS[1:], *tiny_decoder.memory(y[1:, :0]), tensor([0]))
    assert padded.isfinite().all()
    close(padded[1:], nothing)


def test_the_memory_is_a_row_of_each_layer(tiny_decoder, y):
    keys, values = tiny_decoder.memory(y)
    assert keys.shape == values.shape == (2, 2, 2, 6, 8)


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"decoder\.dim: 30 channels do not divide into 4 heads"):
        TransformerDecoder(DecoderConfig(dim=30, num_heads=4), 10, memory_dim=8)
