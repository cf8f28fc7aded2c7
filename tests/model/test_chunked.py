"""The chunked decoder in limiting cases with a known equivalent, and step by step."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, tensor

from asr.config import load_config
from asr.decode.config import SearchConfig
from asr.decode.modes import decode
from asr.errors import ConfigError
from asr.features import FbankConfig
from asr.losses import LossConfig, transducer_loss
from asr.model.build import build_model
from asr.model.chunked import ChunkedConfig, ChunkedDecoder, insert_borders
from asr.model.conformer import ConformerConfig
from asr.model.decoder import SOS_EOS
from asr.model.torch_scorer import TorchScorer

EITHER = pytest.mark.parametrize("hears_eoc", [True, False])


def chunked_config(**changes: object) -> ChunkedConfig:
    sizes = {"dim": 16, "num_layers": 2, "num_heads": 2, "ff_dim": 32}
    return ChunkedConfig(**sizes | changes)  # type: ignore[arg-type]


def chunked_decoder(step: int, window: int, left: int = 0, **changes: object) -> ChunkedDecoder:
    frames = {"step_frames": step, "window_frames": window, "left_frames": left}
    decoder = ChunkedDecoder(chunked_config(**frames, **changes), 11, memory_dim=24).eval()
    with torch.no_grad():  # peaked enough for what it attends to to matter
        decoder.out.weight.mul_(4)
    return decoder


def close(actual: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def walk(tokens: list[int], ends: list[int], num_frames: int, step: int) -> list[int]:
    """Labels and EOCs in the order of the frames."""
    symbols = []
    for t in range(num_frames):
        if t > 0 and t % step == 0:
            symbols.append(SOS_EOS)
        symbols += [token for token, end in zip(tokens, ends, strict=True) if end - 1 == t]
    return symbols + [SOS_EOS] * (num_frames > 0)


def random_alignment(num_frames: list[int], token_lens: list[int]) -> tuple[Tensor, Tensor]:
    """Tokens and ends (N, U), padded with 0."""
    shape = len(token_lens), max(token_lens)
    tokens, ends = torch.zeros(2, *shape, dtype=torch.int64)
    for n, (frames, count) in enumerate(zip(num_frames, token_lens, strict=True)):
        tokens[n, :count] = torch.randint(2, 11, (count,))
        ends[n, :count] = torch.randint(1, max(frames, 1) + 1, (count,)).sort().values
    return tokens, ends


# ---- what it learns


@pytest.mark.parametrize("step", [1, 2, 3, 4, 7, 100])
def test_ends_of_chunks_are_inserted_and_taken_out_again(step):
    num_frames, token_lens = [13, 12, 1, 5, 30, 8], [5, 9, 3, 0, 2, 1]
    for _ in range(20):
        tokens, ends = random_alignment(num_frames, token_lens)
        lens = tensor(token_lens)
        found = insert_borders(tokens, lens, ends, tensor(num_frames), step, -(-30 // step))
        for n, (frames, count) in enumerate(zip(num_frames, token_lens, strict=True)):
            text, end = tokens[n, :count].tolist(), ends[n, :count].tolist()
            symbols = found.symbols[n, : found.lens[n]].tolist()
            assert symbols == walk(text, end, frames, step)
            assert [x for x in symbols if x != SOS_EOS] == text
            assert symbols.count(SOS_EOS) == -(-frames // step) == found.lens[n] - count
            assert symbols[-1] == SOS_EOS
            assert not found.symbols[n, found.lens[n] :].any()
            is_label = [x != SOS_EOS for x in symbols]
            chunks, before = (x[n, : found.lens[n]].tolist() for x in (found.chunks, found.num_labels))
            assert before == [sum(is_label[:s]) for s in range(len(symbols))]
            assert chunks == [s - b for s, b in enumerate(before)]
            assert [c for c, x in zip(chunks, is_label, strict=True) if x] == [(e - 1) // step for e in end]


def test_labels_at_a_border_belong_to_the_chunk_of_their_last_frame():
    ends = tensor([[4, 4, 5, 8, 9]])
    found = insert_borders(tensor([[5, 6, 7, 8, 9]]), tensor([5]), ends, tensor([9]), 4, 3)
    assert found.symbols.tolist() == [[5, 6, 1, 7, 8, 1, 9, 1]]


def test_ends_are_brought_into_the_utterance_and_into_order():
    tokens, lens, frames = tensor([[5, 6, 7, 8]]), tensor([4]), tensor([6])
    found = insert_borders(tokens, lens, tensor([[-3, 5, 2, 99]]), frames, 2, 3)
    expected = insert_borders(tokens, lens, tensor([[1, 5, 5, 6]]), frames, 2, 3)
    assert found.symbols.tolist() == expected.symbols.tolist() == [[5, 1, 1, 6, 7, 8, 1]]


@EITHER
@pytest.mark.parametrize("step", [6, 100])
def test_one_chunk_of_everything_is_the_plain_decoder(tiny_decoder, step, hears_eoc):
    """With eos as EOC; the parameters have the same names and can be reused."""
    decoder = chunked_decoder(step, step, hears_eoc=hears_eoc)
    decoder.load_state_dict(tiny_decoder.state_dict())
    y, y_lens = torch.randn(3, 6, 24), tensor([6, 4, 1])
    tokens, ends = random_alignment([6, 4, 1], [4, 2, 0])
    lens = tensor([4, 2, 0])
    for smoothing in (0.0, 0.1):
        expected = tiny_decoder.loss(y, y_lens, tokens, lens, ends, smoothing)
        close(decoder.loss(y, y_lens, tokens, lens, ends, smoothing), expected, atol=2e-6)


@pytest.mark.parametrize(("num_frames", "count"), [(1, 0), (1, 3), (5, 0), (4, 3), (3, 5)])
def test_chunks_of_one_frame_are_a_transducer(num_frames, count):
    """Without EOC in the history and with one layer, whose state does not depend on audio; all alignments."""
    decoder = chunked_decoder(1, 1, num_layers=1, hears_eoc=False)
    y, tokens = torch.randn(1, num_frames, 24), torch.randint(2, 11, (1, count))
    y_lens, lens = tensor([num_frames]), tensor([count])
    ends = list(itertools.combinations_with_replacement(range(1, num_frames + 1), count))
    paths = torch.cat([decoder.loss(y, y_lens, tokens, lens, tensor([end]).long(), 0.0) for end in ends])

    inputs = torch.cat([tensor([[SOS_EOS]]), tokens], dim=1)
    memories = [decoder.memory(y[:, t : t + 1]) for t in range(num_frames)]
    logits = torch.stack([decoder(inputs, *memory, tensor([1])).logits for memory in memories], dim=1)
    expected = transducer_loss(logits, y_lens, tokens, lens, blank=SOS_EOS)
    close(-torch.logsumexp(-paths, 0, keepdim=True), expected)


@EITHER
@pytest.mark.parametrize(("step", "window", "left"), [(3, 3, 0), (3, 5, 2), (1, 2, 0), (4, 9, 0)])
def test_stepping_equals_teacher_forcing(step, window, left, hears_eoc):
    """Symbol by symbol, given only the frames of the window; several labels in a chunk, or none."""
    decoder = chunked_decoder(step, window, left, hears_eoc=hears_eoc)
    y = torch.randn(1, 11, 24)
    for count in (0, 1, 6):
        tokens, ends = random_alignment([11], [count])
        symbols = walk(tokens[0].tolist(), ends[0].tolist(), 11, step)
        state, last, chunk, total = None, SOS_EOS, 0, 0.0
        for symbol in symbols:
            first, end = decoder.chunking.span(chunk, 11)
            memory = decoder.memory(y[:, first:end])
            logits, _, following = decoder(tensor([[last]]), *memory, tensor([end - first]), state)
            total -= logits[0, 0].log_softmax(-1)[symbol]
            chunk += symbol == SOS_EOS
            if hears_eoc or symbol != SOS_EOS:
                state, last = following, symbol
        loss = decoder.loss(y, tensor([11]), tokens, tensor([count]), ends, 0.0)
        close(loss / len(symbols), total[None] / len(symbols))


@EITHER
def test_padding_changes_nothing(hears_eoc):
    decoder = chunked_decoder(3, 5, 1, hears_eoc=hears_eoc)
    num_frames, token_lens = [13, 4, 9, 1, 0], [3, 5, 0, 2, 0]
    y = torch.randn(5, 13, 24)
    tokens, ends = random_alignment(num_frames, token_lens)
    together = decoder.loss(y, tensor(num_frames), tokens, tensor(token_lens), ends, 0.1)
    for n, (t, u) in enumerate(zip(num_frames, token_lens, strict=True)):
        row = slice(n, n + 1)
        alone = decoder.loss(y[row, :t], tensor([t]), tokens[row, :u], tensor([u]), ends[row, :u], 0.1)
        close(together[row], alone)
    assert together[4] == 0  # no frame, no chunk, no label


@EITHER
def test_every_parameter_is_taught(hears_eoc):
    decoder = chunked_decoder(3, 5, 1, hears_eoc=hears_eoc)
    tokens, ends = random_alignment([13, 1], [5, 0])
    loss = decoder.loss(torch.randn(2, 13, 24), tensor([13, 0]), tokens, tensor([5, 0]), ends, 0.1)
    loss.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in decoder.parameters())


# ---- what it emits


def model(**changes: object):
    encoder = ConformerConfig(
        dim=24, num_layers=1, num_heads=2, ff_dim=32, kernel_size=5, subsampling_channels=4
    )
    return build_model(FbankConfig(num_bins=16), encoder, chunked_config(**changes), LossConfig(), 11).eval()


@EITHER
def test_what_is_found_has_the_score_of_teacher_forcing(hears_eoc):
    """For the labels in the chunks where they were found; in pieces as in one go."""
    chunked = model(step_frames=5, window_frames=7, left_frames=2, hears_eoc=hears_eoc)
    with torch.no_grad():
        chunked.decoder.out.weight.mul_(12)  # so that EOC is not always the best symbol
    scorer, config = TorchScorer(chunked, "cpu"), SearchConfig(beam=5, nbest=5, max_labels_per_chunk=3)
    samples = [np.random.default_rng(n).normal(0, 0.1, n).astype(np.float32) for n in (16000, 9000)]
    _, memory = scorer.encode(samples)
    answers = decode(scorer, "chunked", samples, config)
    assert sum(len(nbest) for nbest in answers) == 10
    for n, nbest in enumerate(answers):
        for x in nbest:
            tokens = tensor([x.tokens], dtype=torch.int64)
            ends = tensor([x.frames], dtype=torch.int64) + 1
            lens, row = tensor([len(x.tokens)]), slice(n, n + 1)
            with torch.no_grad():
                loss = chunked.decoder.loss(memory.y[row], memory.y_lens[row], tokens, lens, ends, 0.0)
            assert x.score == pytest.approx(-loss.item(), abs=1e-4)
    assert any(len(nbest[0].tokens) > 2 for nbest in answers)


# ---- what is refused


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"step_frames": 0}, "step_frames is 0, expected at least 1"),
        ({"step_frames": 9, "window_frames": 8}, "window_frames is 8, expected at least step_frames, 9"),
        ({"left_frames": -1}, "left_frames is -1, expected at least 0"),
        ({"reverse_layers": 1}, "reverse_layers is 1, expected 0"),
    ],
)
def test_chunks_that_cannot_be_are_refused(tmp_path, wrong, message):
    with pytest.raises(ConfigError, match=message):
        ChunkedConfig(**wrong)
    with pytest.raises(ConfigError, match=f"decoder: {message}"):
        load_config([], ["decoder.type=chunked", *(f"decoder.{name}={x}" for name, x in wrong.items())])


def test_a_batch_without_times_is_refused():
    decoder = chunked_decoder(4, 4)
    y, lens = torch.randn(1, 8, 24), tensor([8])
    none = torch.zeros(1, 0, dtype=torch.int64)
    with pytest.raises(ConfigError, match="run asr align"):
        decoder.loss(y, lens, tensor([[5]]), tensor([1]), none, 0.1)
    assert decoder.loss(y, lens, none, tensor([0]), none, 0.1) > 0  # silence needs no alignment
