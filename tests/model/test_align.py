"""The best CTC path: equals the reference vectors and the version without torch, in any batch."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from asr.context import WHOLE, Context
from asr.decode.align import align
from asr.errors import ConfigError
from asr.features import FbankConfig
from asr.losses import LossConfig, ctc_feasible
from asr.model.align import Aligner, forced_alignment
from asr.model.build import build_model
from asr.model.conformer import ConformerConfig
from asr.model.segmental import SegmentalConfig

FRAME_S = 0.04


def test_alignment_equals_the_reference(golden_folder):
    with np.load(golden_folder("ctc_rnnt") / "io.npz") as arrays:
        vectors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    cases = sorted(name.removesuffix(".path") for name in vectors if name.endswith(".path"))
    assert cases
    for case in cases:
        log_probs, tokens = vectors[f"{case}.log_probs"][None], vectors[f"{case}.targets"][None]
        lens = torch.tensor([log_probs.shape[1]]), torch.tensor([tokens.shape[1]])
        start, end, score = forced_alignment(log_probs, lens[0], tokens, lens[1])
        assert torch.equal(start[0], vectors[f"{case}.span_start"])
        assert torch.equal(end[0], vectors[f"{case}.span_end"])
        torch.testing.assert_close(score[0], vectors[f"{case}.span_score"], rtol=0, atol=1e-5)


def test_a_padded_batch_equals_the_search_without_torch_of_each():
    y_lens = torch.tensor([30, 9, 7, 5, 4, 12, 0])
    tokens = [[1, 2, 3, 3, 1], [2] * 5, [4, 4, 1], [1, 2, 3, 4, 1], [], [1, 2, 1, 2, 1, 2], []]
    log_probs = (3 * torch.randn(len(tokens), 30, 5)).log_softmax(-1)
    token_lens = torch.tensor([len(row) for row in tokens])
    padded = pad_sequence([torch.tensor(row).long() for row in tokens], batch_first=True)
    start, end, score = forced_alignment(log_probs, y_lens, padded, token_lens)
    for n, row in enumerate(tokens):
        expected = align(log_probs[n, : y_lens[n]].numpy(), row)
        assert start[n, : len(row)].tolist() == expected.start.tolist()
        assert end[n, : len(row)].tolist() == expected.end.tolist()
        spans = zip(expected.start, expected.end, strict=True)
        means = [expected.log_probs[first:last].mean() for first, last in spans]
        np.testing.assert_allclose(score[n, : len(row)], means, atol=1e-5)
        assert not start[n, len(row) :].any()
        assert not end[n, len(row) :].any()


def test_too_few_frames_have_no_alignment_and_leave_the_others_theirs():
    log_probs = torch.randn(2, 4, 3).log_softmax(-1)
    tokens = torch.tensor([[1, 1, 1], [1, 2, 1]])
    y_lens, token_lens = torch.tensor([4, 4]), torch.tensor([3, 3])
    assert ctc_feasible(y_lens, tokens, token_lens).tolist() == [False, True]
    _, end, _ = forced_alignment(log_probs, y_lens, tokens, token_lens)
    assert end[0].tolist() == [0, 0, 0]
    assert end[1].tolist() == align(log_probs[1].numpy(), [1, 2, 1]).end.tolist()


def waveforms() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.normal(0, 0.1, size).astype(np.float32) for size in (16000, 9000, 12345, 300)]


def test_an_utterance_is_aligned_alike_alone_and_in_a_batch(tiny_model):
    aligner, samples = Aligner(tiny_model, "cpu"), waveforms()
    tokens = [[4, 5, 6], [7, 7], [8, 4, 5], []]
    together = aligner(samples, tokens)
    for x, row, spans in zip(samples, tokens, together, strict=True):
        (alone,) = aligner([x], [row])
        assert len(spans) == len(row)
        assert [span[:2] for span in spans] == [span[:2] for span in alone]
        assert all(0 <= span.start_s < span.end_s <= len(x) / 16000 for span in spans)
        assert all(a.end_s <= b.start_s for a, b in itertools.pairwise(spans))


def test_times_are_those_of_the_frames_and_end_with_the_audio(tiny_model):
    aligner, samples = Aligner(tiny_model, "cpu"), waveforms()[2]
    log_probs = tiny_model.ctc_log_probs(
        tiny_model.encode(*tiny_model.features(torch.from_numpy(samples)[None], torch.tensor([12345])))[0]
    )[0].detach()
    many = [4, 5] * (len(log_probs) // 2)  # so that the last token has the last frame, which is incomplete
    for tokens in ([4, 5, 6, 6], many):
        expected = align(log_probs.numpy(), tokens)
        (spans,) = aligner([samples], [tokens])
        np.testing.assert_allclose([span.start_s for span in spans], expected.start * FRAME_S)
        ends = np.minimum(expected.end * FRAME_S, 12345 / 16000)
        np.testing.assert_allclose([span.end_s for span in spans], ends)
    assert expected.end[-1] * FRAME_S > 12345 / 16000


def test_too_short_audio_has_no_alignment(tiny_model):
    aligner = Aligner(tiny_model, "cpu")
    short, fits = aligner([waveforms()[3], waveforms()[0]], [[4, 5], [4, 5]])
    assert short is None
    assert len(fits) == 2


def test_chunks_are_heard_as_a_stream_hears_them(tiny_model):
    tokens = [[4, 5, 6, 7] * 4]
    whole, chunks = (Aligner(tiny_model, "cpu", x)(waveforms()[:1], tokens) for x in (WHOLE, Context(2)))
    assert [span.score for span in chunks[0]] != [span.score for span in whole[0]]


@pytest.fixture
def segmental_model():
    sizes = {"dim": 16, "num_layers": 1, "num_heads": 2, "ff_dim": 16}
    encoder = ConformerConfig(**sizes, kernel_size=5, subsampling_channels=4)
    return build_model(FbankConfig(num_bins=16), encoder, SegmentalConfig(**sizes), LossConfig(), 11).eval()


def test_a_segmental_decoder_moves_the_ends_to_where_it_finds_them_likelier(segmental_model):
    samples, tokens = waveforms(), [[4, 5, 6], [7, 7], [8, 4, 5], []]
    by_ctc = Aligner(segmental_model, "cpu")(samples, tokens)
    by_segments = Aligner(segmental_model, "cpu", segments=True)(samples, tokens)

    @torch.no_grad()
    def loss_of(row, spans, x):
        y, y_lens = segmental_model.encode(
            *segmental_model.features(torch.from_numpy(x)[None], torch.tensor([len(x)]))
        )
        ends = segmental_model.frames_behind(torch.tensor([[span.end_s for span in spans]]))
        args = torch.tensor([row]), torch.tensor([len(row)]), ends
        return float(segmental_model.decoder.loss(y, y_lens, *args, 0.0)[0])

    for x, row, before, after in zip(samples[:3], tokens, by_ctc, by_segments, strict=False):
        assert len(after) == len(row)
        assert loss_of(row, after, x) < loss_of(row, before, x)
        assert [span.start_s for span in after] == [0.0, *(span.end_s for span in after[:-1])]
        assert all(span.score < 0 for span in after)
        (alone,) = Aligner(segmental_model, "cpu", segments=True)([x], [row])
        assert [span[:2] for span in alone] == [span[:2] for span in after]
    assert by_segments[3] == []


def test_segments_need_a_path_too(segmental_model):
    aligner = Aligner(segmental_model, "cpu", segments=True)
    assert aligner([waveforms()[3]], [[4, 5]]) == [None]
    assert aligner([waveforms()[3]], [[]]) == [[]]


def test_only_a_segmental_decoder_knows_segments(tiny_model):
    with pytest.raises(ConfigError, match="decoder is of type transformer, expected segmental"):
        Aligner(tiny_model, "cpu", segments=True)


@pytest.mark.gpu
def test_alignments_on_a_gpu_are_those_of_a_cpu():
    log_probs = (3 * torch.randn(3, 40, 6)).log_softmax(-1)
    tokens, lens = torch.tensor([[1, 2, 2], [3, 4, 0], [5, 1, 2]]), torch.tensor([3, 2, 3])
    y_lens = torch.tensor([40, 12, 4])
    on_cpu = forced_alignment(log_probs, y_lens, tokens, lens)
    on_gpu = forced_alignment(*(x.cuda() for x in (log_probs, y_lens, tokens, lens)))
    for a, b in zip(on_cpu, on_gpu, strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=0, atol=1e-5)
