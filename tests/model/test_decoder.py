import numpy as np
import pytest
import torch
from torch import nn, tensor
from torch.export import Dim

from asr.decode.trie import tries
from asr.errors import ConfigError
from asr.model.attention import sinusoids
from asr.model.decoder import (
    SOS_EOS,
    DecoderConfig,
    DecoderState,
    Guide,
    Order,
    TransformerDecoder,
    Window,
    in_tree,
    reverse,
)
from asr.model.state import join, select, split

TOKENS = tensor([[1, 4, 5, 6, 7], [1, 9, 9, 2, 3]])
Y_LENS = tensor([6, 4])


FAMILIES = [
    {},
    {"positions": "sinusoid", "activation": "relu"},  # WeNet
    {"positions": "sinusoid", "activation": "relu", "embedding_norm": True},  # Canary
    {"positions": "sinusoid", "attention_dim": 24, "final_norm": False},  # icefall
    {"positions": "sinusoid", "activation": "gelu"},  # FireRedASR
    {"positions": "learnt", "num_positions": 10, "activation": "gelu"},  # Whisper
    {"attention_dim": 8, "embedding_norm": True, "final_norm": False},  # nobody's
]


def family(**options) -> TransformerDecoder:
    sizes = {"dim": 16, "num_layers": 2, "num_heads": 2, "ff_dim": 32}
    return TransformerDecoder(DecoderConfig(**sizes | options), 11, memory_dim=24).eval()


@pytest.fixture
def y():
    return torch.randn(2, 6, 24)


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("steps", [[1, 1, 1, 1, 1], [2, 3], [1, 4]])
@pytest.mark.parametrize("options", FAMILIES)
def test_stepping_equals_teacher_forcing(y, options, steps):
    decoder = family(**options)
    memory = decoder.memory(y)
    whole = decoder(TOKENS, *memory, Y_LENS).logits
    parts, state = [], None
    for tokens in TOKENS.split(steps, dim=1):
        logits, _, state = decoder(tokens, *memory, Y_LENS, state)
        parts.append(logits)
    close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("options", FAMILIES)
def test_every_field_of_the_state_matters(y, options):
    decoder = family(**options)
    memory = decoder.memory(y)
    state = decoder(TOKENS, *memory, Y_LENS).state
    expected = decoder(TOKENS, *memory, Y_LENS, state).logits
    for name in ("keys", "values"):
        zeroed = type(state)(**{**vars(state), name: torch.zeros_like(getattr(state, name))})
        assert (decoder(TOKENS, *memory, Y_LENS, zeroed)[0] - expected).abs().max() > 1e-4


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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"attention_dim": 15},
            r"decoder\.attention_dim: 15 channels .* 2 heads of even size",
        ),
        ({"attention_dim": -4}, r"decoder\.attention_dim: -4 channels do not divide"),
        ({"dim": 15, "attention_dim": 16}, r"decoder\.dim: 15 channels do not divide"),
        ({"positions": "learnt", "num_positions": 0}, r"decoder\.num_positions: 0, expected at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        family(**wrong)


@pytest.mark.parametrize("options", FAMILIES)
def test_every_option_matters(y, options):
    """With the same parameters, as far as they exist, another value of the option changes the output."""
    decoder = family(**options)
    weights = decoder.state_dict()
    for name in options:
        other = family(**{key: value for key, value in options.items() if key != name})
        sizes = {key: x.shape for key, x in other.state_dict().items()}
        same = {key: x for key, x in weights.items() if sizes.get(key) == x.shape}
        other.load_state_dict(same, strict=False)
        said, others = (x(TOKENS, *x.memory(y), Y_LENS).logits for x in (decoder, other))
        if name != "num_positions":
            assert (said - others).abs().max() > 1e-3, name


def test_the_norm_of_the_embedding_is_that_of_what_is_not_scaled():
    """Also where an embedding is so small that the epsilon of the norm matters."""
    decoder = family(positions="sinusoid", embedding_norm=True)
    with torch.no_grad():
        decoder.embedding.weight *= 1e-2
        found = []
        decoder.embedding_norm.register_forward_hook(lambda *x: found.append(x[2]))
        decoder(TOKENS, *decoder.memory(torch.randn(2, 6, 24)), Y_LENS)
        x = decoder.embedding(TOKENS) + sinusoids(torch.arange(5)[None], 16) / 4
        close(found[0], torch.nn.functional.layer_norm(x, (16,)))


def test_a_text_longer_than_the_table_of_positions_is_refused(y):
    decoder = family(positions="learnt", num_positions=5)
    memory = decoder.memory(y)
    state = decoder(TOKENS, *memory, Y_LENS).state
    with pytest.raises(ConfigError, match=r"num_positions: 5 .* has 6 tokens.* max_tokens at most 4"):
        decoder(TOKENS[:, :1], *memory, Y_LENS, state)
    order = Order(tensor([[0, 1, 2, 3, 5]] * 2), torch.ones(2, 5, 5, dtype=torch.bool).tril())
    with pytest.raises(ConfigError, match="has 6 tokens"):
        decoder(TOKENS, *memory, Y_LENS, order=order)


class Graph(nn.Module):
    """Only tensors as inputs and outputs, as in a graph."""

    def __init__(self, decoder: TransformerDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, tokens, cross_keys, cross_values, y_lens, keys, values):
        state = DecoderState(keys, values)
        said = self.decoder(tokens, cross_keys, cross_values, y_lens, state, guide=self.decoder.guide)
        return said.logits, said.attention, *said.state.tensors()


@pytest.mark.parametrize(
    "options",
    [
        {"positions": "learnt", "num_positions": 10},
        {"positions": "sinusoid", "attention_dim": 24, "embedding_norm": True, "final_norm": False},
    ],
)
def test_a_traced_decoder_says_the_same(y, options):
    decoder = family(num_layers=1, **options)
    b, u, t, past = (Dim(name) for name in ("B", "U", "T", "P"))
    memory = decoder.memory(y)
    state = decoder(TOKENS[:, :3], *memory, Y_LENS).state
    rows = ({0: b, 3: t}, {0: b, 3: t}, {0: b}, {0: b, 3: past}, {0: b, 3: past})
    inputs = tuple(x.contiguous() for x in (TOKENS[:, :2], *memory, Y_LENS, *state.tensors()))
    traced = torch.export.export(
        Graph(decoder),
        inputs,
        dynamic_shapes=({0: b, 1: u}, *rows),
    ).module()
    heard = decoder.memory(torch.randn(3, 9, 24))
    y_lens = tensor([9, 5, 2])
    tokens = torch.randint(11, (3, 5))
    for state in (decoder.init_state(3), decoder(tokens, *heard, y_lens).state):
        for a, b in zip(
            traced(tokens, *heard, y_lens, *state.tensors()),
            Graph(decoder)(tokens, *heard, y_lens, *state.tensors()),
            strict=True,
        ):
            close(a, b)


def test_a_window_of_everything_changes_nothing(tiny_decoder, y):
    memory = tiny_decoder.memory(y)
    everything = Window(torch.zeros(2, 1, dtype=torch.int64), Y_LENS[:, None])
    whole = tiny_decoder(TOKENS, *memory, Y_LENS).logits
    close(tiny_decoder(TOKENS, *memory, Y_LENS, window=everything).logits, whole, atol=0)


def test_each_token_hears_its_window_alone(tiny_decoder, y):
    """Teacher forcing with windows equals steps that are given only the frames of each window."""
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
        close(sums[0], tensor([1.0, 1, 1, 1, 0]))  # the last one attends to nothing
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


@pytest.mark.parametrize("positions", ["rotary", "sinusoid", "learnt"])
@pytest.mark.parametrize("left_tokens", [-1, 2])
@pytest.mark.parametrize("width", [0, 2])
def test_a_tree_gives_what_each_of_its_texts_gives(y, positions, left_tokens, width):
    decoder = family(positions=positions, left_tokens=left_tokens)
    memory, lens = [x[:1] for x in decoder.memory(y)], Y_LENS[:1]
    state = decoder(TOKENS[:1, :width], *memory, lens).state if width else None
    texts = [[3, 4, 5], [3, 4, 6, 7], [3, 8], [], [3, 4, 5]]
    (tree,) = tries(texts, range(len(texts)), SOS_EOS)
    order = in_tree(tensor([tree.ends]), width, left_tokens)
    found = decoder(tensor([tree.tokens]), *memory, lens, state, order=order).logits[0]
    for number, nodes in tree.split(np.array(tree.nodes)):
        alone = decoder(tensor([[SOS_EOS, *texts[number]]]), *memory, lens, state).logits[0]
        close(found[nodes], alone)
    assert len(tree.tokens) == 7
