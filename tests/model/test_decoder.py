import pytest
import torch
from torch import tensor

from asr.errors import ConfigError
from asr.model.decoder import DecoderConfig, Guide, TransformerDecoder, Window, reverse
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
    whole = tiny_decoder(TOKENS, *memory, Y_LENS).logits
    parts, state = [], None
    for tokens in TOKENS.split(steps, dim=1):
        logits, _, state = tiny_decoder(tokens, *memory, Y_LENS, state)
        parts.append(logits)
    close(torch.cat(parts, dim=1), whole)


def test_every_field_of_the_state_matters(tiny_decoder, y):
    memory = tiny_decoder.memory(y)
    state = tiny_decoder(TOKENS, *memory, Y_LENS).state
    expected = tiny_decoder(TOKENS, *memory, Y_LENS, state).logits
    for name in ("keys", "values"):
        zeroed = type(state)(**{**vars(state), name: torch.zeros_like(getattr(state, name))})
        assert (tiny_decoder(TOKENS, *memory, Y_LENS, zeroed)[0] - expected).abs().max() > 1e-3


def test_hypotheses_join_split_and_reorder(tiny_decoder, y):
    keys, values = tiny_decoder.memory(y)
    state = tiny_decoder(TOKENS, keys, values, Y_LENS).state
    expected = tiny_decoder(TOKENS, keys, values, Y_LENS, state).logits
    index = tensor([1, 0, 1])
    chosen = tiny_decoder(
        TOKENS[index], keys[index], values[index], Y_LENS[index], select(state, index)
    ).logits
    close(chosen, expected[index])
    close(tiny_decoder(TOKENS, keys, values, Y_LENS, join(split(state)))[0], expected, atol=0)


def test_what_is_behind_the_end_of_the_memory_does_not_matter(tiny_decoder, y):
    whole = tiny_decoder(TOKENS, *tiny_decoder.memory(y), Y_LENS).logits
    alone = tiny_decoder(TOKENS[1:], *tiny_decoder.memory(y[1:, :4]), Y_LENS[1:]).logits
    close(whole[1:], alone)
    y[0, 0] += 1
    assert (tiny_decoder(TOKENS, *tiny_decoder.memory(y), Y_LENS)[0] - whole)[0].abs().max() > 1e-3


def test_what_follows_a_token_does_not_matter_to_it(tiny_decoder, y):
    memory = tiny_decoder.memory(y)
    whole = tiny_decoder(TOKENS, *memory, Y_LENS).logits
    changed = TOKENS.clone()
    changed[:, 3:] = 10
    close(tiny_decoder(changed, *memory, Y_LENS)[0][:, :3], whole[:, :3], atol=0)


def test_without_memory_the_decoder_is_a_language_model(tiny_decoder, y):
    padded = tiny_decoder(TOKENS, *tiny_decoder.memory(y), tensor([6, 0])).logits
    nothing = tiny_decoder(TOKENS[1:], *tiny_decoder.memory(y[1:, :0]), tensor([0])).logits
    assert padded.isfinite().all()
    close(padded[1:], nothing)


def test_the_memory_is_a_row_of_each_layer(tiny_decoder, y):
    keys, values = tiny_decoder.memory(y)
    assert keys.shape == values.shape == (2, 2, 2, 6, 8)


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"decoder\.dim: 30 channels do not divide into 4 heads"):
        TransformerDecoder(DecoderConfig(dim=30, num_heads=4), 10, memory_dim=8)


def test_a_window_of_everything_changes_nothing(tiny_decoder, y):
    memory = tiny_decoder.memory(y)
    everything = Window(torch.zeros(2, 1, dtype=torch.int64), Y_LENS[:, None])
    whole = tiny_decoder(TOKENS, *memory, Y_LENS).logits
    close(tiny_decoder(TOKENS, *memory, Y_LENS, window=everything).logits, whole, atol=0)


def test_each_token_hears_its_window_alone(tiny_decoder, y):
    """Teacher forcing with windows equals steps that are given nothing but the frames of each window."""
    start, end = tensor([[0, 2, 2, 0, 3], [1, 0, 2, 2, 3]]), tensor([[2, 5, 3, 6, 3], [4, 4, 3, 4, 4]])
    whole = tiny_decoder(TOKENS, *tiny_decoder.memory(y), Y_LENS, window=Window(start, end)).logits
    for n in range(2):
        state = None
        for u in range(5):
            part = y[n : n + 1, start[n, u] : end[n, u]]
            lens = tensor([part.shape[1]])
            logits, _, state = tiny_decoder(
                TOKENS[n : n + 1, u : u + 1], *tiny_decoder.memory(part), lens, state
            )
            close(logits[:, 0], whole[n : n + 1, u])


def test_the_attention_of_the_guide_is_what_the_values_are_weighted_with(tiny_decoder, y):
    memory = tiny_decoder.memory(y)
    window = Window(tensor([[0, 1, 2, 3, 6], [0, 0, 0, 0, 0]]), tensor([[6, 5, 4, 4, 6], [4, 4, 4, 4, 4]]))
    for guide in (Guide(0, (1,)), Guide(1, (0, 1))):
        attention = tiny_decoder(TOKENS, *memory, Y_LENS, window=window, guide=guide).attention
        assert attention.shape == (2, 5, 6)
        sums = attention.sum(-1)
        close(sums[0], tensor([1.0, 1, 1, 1, 0]))  # the last one hears nothing
        close(sums[1], torch.ones(5))
        close(attention[0, 1, [0, 5]], torch.zeros(2), atol=0)
    cross = tiny_decoder.layers[0].cross
    x, mask = torch.randn(2, 3, 16), torch.rand(2, 1, 3, 6) > 0.3
    keys, values = (part[:, 0] for part in memory)
    weighted = cross.out((cross.weights(x, keys, mask) @ values).transpose(1, 2).flatten(2))
    close(cross(x, keys, values, mask), weighted)


def test_reversing_leaves_padding_where_it_is():
    tokens = tensor([[5, 6, 7, 0], [8, 9, 0, 0], [0, 0, 0, 0]])
    expected = [[7, 6, 5, 0], [9, 8, 0, 0], [0, 0, 0, 0]]
    assert reverse(tokens, tensor([3, 2, 0])).tolist() == expected


def test_a_token_sees_so_many_before_it(y):
    config = DecoderConfig(dim=16, num_layers=1, num_heads=2, ff_dim=32, left_tokens=2)
    decoder = TransformerDecoder(config, 11, memory_dim=24).eval()
    memory = decoder.memory(y)
    whole = decoder(TOKENS, *memory, Y_LENS).logits
    changed = TOKENS.clone()
    changed[:, 1] = 10
    found = decoder(changed, *memory, Y_LENS).logits
    close(found[:, 4], whole[:, 4], atol=0)
    assert (found[:, 3] - whole[:, 3]).abs().max() > 1e-4
    parts, state = [], None
    for tokens in TOKENS.split(1, dim=1):
        logits, _, state = decoder(tokens, *memory, Y_LENS, state)
        parts.append(logits)
    close(torch.cat(parts, dim=1), whole)
