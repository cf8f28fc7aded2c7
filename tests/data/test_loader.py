"""Batches do not depend on workers and resume where they stopped; bad audio is reported and never hangs."""

import itertools
import json
import os
import pickle
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from asr.data.augment import AugmentConfig
from asr.data.cuts import open_cuts, read_cut, save_cuts
from asr.data.importers import from_tsv
from asr.data.loader import Batch, DataConfig, Loader, build_loader
from asr.errors import ConfigError, ManifestError, TrainingError
from asr.tokens import Tokenizer

from .conftest import Corpus

DURATIONS = [0.2 + 0.03 * (n * 7 % 40) for n in range(60)]
PLAIN = AugmentConfig(speed=[])


class Setup:
    def __init__(self, corpus: Corpus, tokenizer: Tokenizer) -> None:
        self.manifest = corpus(DURATIONS)
        self.tokenizer = tokenizer

    def loader(self, augment: AugmentConfig = PLAIN, rank: int = 0, world: int = 1, **data: Any) -> Loader:
        fields = {"train": [str(self.manifest)], "max_batch_s": 4.0, "max_utterance_s": 4.0, "num_workers": 0}
        config = DataConfig(**fields | data)
        skipped = self.manifest.with_name("skipped.jsonl")
        return build_loader(config, augment, self.tokenizer, 16000, rank, world, skipped)

    def damage(self, numbers: range) -> None:
        for number in numbers:
            (self.manifest.parent / "train" / f"{number}.wav").write_bytes(b"RIFF")

    def skipped(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in self.manifest.with_name("skipped.jsonl").open()]


@pytest.fixture
def setup(corpus: Corpus, tokenizer: Tokenizer) -> Setup:
    return Setup(corpus, tokenizer)


def take(loader: Loader, count: int, position: dict[str, int] | None = None) -> list[Batch]:
    return list(itertools.islice(loader.forever(position), count))


def epoch(loader: Loader, number: int = 0) -> list[Batch]:
    start = {"epoch": number, "batch": 0, "world_size": loader.sampler.world_size}
    return list(itertools.takewhile(lambda batch: batch.position["epoch"] == number, loader.forever(start)))


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert [batch.ids for batch in left] == [batch.ids for batch in right]
    assert [batch.position for batch in left] == [batch.position for batch in right]
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.samples, b.samples)
        assert torch.equal(a.tokens, b.tokens)


def test_a_batch_is_the_audio_and_the_text_of_its_cuts(setup: Setup) -> None:
    cuts = {cut.id: cut for cut in open_cuts(setup.manifest)}
    batches = epoch(setup.loader())
    assert sorted(name for batch in batches for name in batch.ids) == sorted(cuts)
    for batch in batches:
        assert batch.samples.dtype == torch.float32
        assert batch.samples.shape[1] == batch.sample_lens.max()
        for row, name in enumerate(batch.ids):
            samples = read_cut(cuts[name])
            np.testing.assert_array_equal(batch.samples[row, : batch.sample_lens[row]], samples)
            assert not batch.samples[row, len(samples) :].any()
            tokens = batch.tokens[row, : batch.token_lens[row]].tolist()
            assert setup.tokenizer.decode(tokens) == batch.texts[row] == cuts[name].supervisions[0].text


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [3, 26])  # in the middle of an epoch, and of the next
def test_going_on_is_as_if_never_stopped(setup: Setup, corpus: Corpus, num_workers: int, stop: int) -> None:
    noisy = AugmentConfig(noise=str(corpus([3.0], "noise")), noise_prob=0.7)
    options = {"num_workers": num_workers, "join_words": [1, 3]}
    whole = take(setup.loader(noisy, **options), 30)
    assert whole[-1].position["epoch"] > 0
    rest = take(setup.loader(noisy, **options), 30 - stop, whole[stop - 1].position)
    assert_same(rest, whole[stop:])


def test_workers_change_nothing(setup: Setup) -> None:
    noisy = AugmentConfig(noise=str(setup.manifest), noise_prob=1.0)
    assert_same(take(setup.loader(noisy, num_workers=0), 15), take(setup.loader(noisy, num_workers=2), 15))


def test_a_batch_is_sent_with_one_tensor_in_shared_memory(setup: Setup) -> None:
    batch = take(setup.loader(), 1)[0]
    rebuild, parts = batch.__reduce__()
    assert [part.shape for part in parts if isinstance(part, torch.Tensor)] == [batch.samples.shape]
    again = pickle.loads(pickle.dumps(batch))
    assert_same([again], [batch])
    assert torch.equal(again.sample_lens, batch.sample_lens)
    assert torch.equal(again.token_lens, batch.token_lens)
    assert (again.texts, again.skipped, rebuild.__module__) == (batch.texts, (), "asr.data.loader")


def test_two_ranks_share_out_an_epoch(setup: Setup) -> None:
    first, second = (epoch(setup.loader(rank=rank, world=2)) for rank in range(2))
    assert len(first) == len(second)
    names = [name for batch in first + second for name in batch.ids]
    assert sorted(names) == sorted(cut.id for cut in open_cuts(setup.manifest))


def test_several_manifests_are_interleaved_and_each_read_whole(setup: Setup, corpus: Corpus) -> None:
    other = corpus([0.5] * 30, "other")
    names = [
        name for batch in epoch(setup.loader(train=[str(setup.manifest), str(other)])) for name in batch.ids
    ]
    assert len(names) == len(set(names)) == 90
    assert {name[:5] for name in names[:30]} == {"train", "other"}


def test_utterances_outside_the_bounds_are_left_out(setup: Setup) -> None:
    batches = epoch(setup.loader(min_utterance_s=0.5, max_utterance_s=1.0))
    lens = torch.cat([batch.sample_lens for batch in batches])
    assert len(lens) == sum(0.5 <= round(seconds, 4) <= 1.0 for seconds in DURATIONS)


def test_other_rates_are_resampled(corpus: Corpus, setup: Setup) -> None:
    (batch,) = epoch(setup.loader(train=[str(corpus([0.5, 0.5], "low", sample_rate=8000))]))
    assert batch.sample_lens.tolist() == [8000, 8000]


def test_joined_utterances_are_drawn_anew_each_epoch_from_all_words(setup: Setup) -> None:
    loader = setup.loader(join_words=[1, 4])
    texts = [[text for batch in epoch(loader, number) for text in batch.texts] for number in (0, 1)]
    words = sorted(f"word {number}" for number in range(60))
    for some in texts:
        assert sorted("word" + part.rstrip() for text in some for part in text.split("word")[1:]) == words
        assert len(some) < 40
    assert sorted(texts[0]) != sorted(texts[1])


def test_all_texts_may_be_heard_equally_often(setup: Setup) -> None:
    cuts = list(open_cuts(setup.manifest))
    for cut in cuts[1:]:
        cut.supervisions[0].text = "word 1"
    save_cuts(cuts, setup.manifest)
    texts = [text for batch in epoch(setup.loader(text_power=0.0)) for text in batch.texts]
    assert sorted(texts) == ["word 0"] * 59 + ["word 1"] * 59


@pytest.mark.parametrize("joined", [{}, {"join_words": [1, 4]}])
def test_first_epochs_have_short_utterances_only(setup: Setup, joined: dict[str, list[int]]) -> None:
    loader = setup.loader(first_max_s=[0.5, 0.9], **joined)
    longest_s = [max(int(batch.sample_lens.max()) for batch in epoch(loader, n)) / 16000 for n in range(3)]
    assert longest_s[0] <= 0.5 < longest_s[1] <= 0.9 < longest_s[2]


def test_bad_audio_is_skipped_counted_and_listed_once(setup: Setup) -> None:
    setup.damage(range(3))
    loader = setup.loader()
    batches = [batch for number in (0, 1) for batch in epoch(loader, number)]
    read = [name for batch in batches for name in batch.ids]
    assert len(read) == 2 * 57
    assert sum(len(batch.skipped) for batch in batches) == 6
    assert sorted(row["id"] for row in setup.skipped()) == ["train0", "train1", "train2"]
    assert setup.skipped()[0]["path"].endswith(".wav")
    assert "Error" in setup.skipped()[0]["error"]


def test_a_batch_that_lost_everything_is_empty_on_its_rank_and_the_others_go_on(setup: Setup) -> None:
    setup.damage(range(4))
    ranks = [
        epoch(setup.loader(rank=rank, world=2, max_batch_s=1.5, max_utterance_s=1.5)) for rank in range(2)
    ]
    assert len(ranks[0]) == len(ranks[1])
    empty = [batch for batch in ranks[0] + ranks[1] if batch.is_empty]
    assert empty
    for batch in empty:
        assert batch.samples.shape == (1, 16000)
        assert batch.tokens.shape == (1, 0)
        assert batch.texts == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_much_bad_audio_stops_the_run(setup: Setup, num_workers: int) -> None:
    setup.damage(range(40))
    with pytest.raises(
        ManifestError, match=r"1\d of \d+ utterances of epoch 0 could not be read.*max_skipped"
    ):
        epoch(setup.loader(num_workers=num_workers))


def test_a_tiny_corpus_of_which_most_is_bad_stops_at_the_end_of_its_epoch(
    setup: Setup, corpus: Corpus
) -> None:
    path = corpus([0.3] * 5, "tiny")
    for number in range(4):
        (path.parent / "tiny" / f"{number}.wav").unlink()
    with pytest.raises(ManifestError, match="4 of 5 utterances of epoch 0"):
        take(setup.loader(train=[str(path)]), 10)


def test_silence_takes_no_noise_but_is_no_reason_to_skip(setup: Setup, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "silence.wav", np.zeros(8000), 16000)
    table = tmp_path / "t.tsv"
    table.write_text("utt_id\taudio\ttext\nsilence\tsilence.wav\tx\n")
    save_cuts(from_tsv(table, []), tmp_path / "silence.jsonl.gz")
    noisy = AugmentConfig(speed=[], noise=str(setup.manifest), noise_prob=1.0)
    (batch,) = epoch(setup.loader(noisy, train=[str(tmp_path / "silence.jsonl.gz")]))
    assert batch.ids == ["silence"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_wrong_line_keeps_its_one_line_of_error_through_a_worker(setup: Setup, num_workers: int) -> None:
    path = setup.manifest.with_name("bad.jsonl")
    path.write_text("{broken\n")
    with pytest.raises(ManifestError, match=r"^\S*bad.jsonl:1: not a lhotse cut [^\n]*$"):
        take(setup.loader(train=[str(path)], num_workers=num_workers), 1)


class Deadly:
    """A tokenizer that kills the process that uses it."""

    def encode(self, text: str) -> list[int]:
        os.kill(os.getpid(), signal.SIGKILL)
        return []


def test_a_dead_worker_is_an_error_that_says_what_to_do(setup: Setup) -> None:
    loader = setup.loader(num_workers=1)
    loader.reader.tokenizer = Deadly()  # type: ignore[assignment]
    with pytest.raises(TrainingError, match=r"loading process died .*data.num_workers"):
        take(loader, 1)


def test_loading_leaves_torchs_generator_alone(setup: Setup) -> None:
    before = torch.get_rng_state()
    take(setup.loader(num_workers=2), 3)
    list(setup.loader(num_workers=1).validation([str(setup.manifest)]))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_validation_is_every_utterance_as_it_is(setup: Setup, num_workers: int) -> None:
    noisy = AugmentConfig(noise=str(setup.manifest), noise_prob=1.0)
    loader = setup.loader(noisy, num_workers=num_workers)
    batches = list(loader.validation([str(setup.manifest)]))
    cuts = {cut.id: cut for cut in open_cuts(setup.manifest)}
    assert sorted(name for batch in batches for name in batch.ids) == sorted(cuts)
    lens = [int(batch.sample_lens.max()) for batch in batches]
    assert lens == sorted(lens, reverse=True)
    first = batches[0]
    np.testing.assert_array_equal(first.samples[0, : first.sample_lens[0]], read_cut(cuts[first.ids[0]]))


def test_validation_on_ranks_and_with_a_limit(setup: Setup) -> None:
    def names(rank: int, world: int, limit: int) -> set[str]:
        batches = setup.loader(rank=rank, world=world, valid=[str(setup.manifest)]).validation(limit=limit)
        return {name for batch in batches for name in batch.ids}

    assert len(names(0, 1, 0)) == 60
    assert len(names(0, 1, 7)) == 7
    assert names(0, 2, 0) | names(1, 2, 0) == names(0, 1, 0)
    assert not names(0, 2, 0) & names(1, 2, 0)


def test_padding_of_a_batch_is_its_share_of_the_samples() -> None:
    lens = torch.tensor([10, 5])
    tensors = torch.zeros(2, 10), lens, torch.zeros(2, 1), torch.tensor([1, 1]), torch.zeros(2, 0)
    batch = Batch(*tensors, ["a", "b"], ["", ""], {})
    assert batch.padding == pytest.approx(0.25)
    assert batch.to("cpu").ids == ["a", "b"]


def test_little_of_a_batch_of_real_speech_is_padding(
    speech_data: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    table = speech_data / "librispeech_mini" / "transcripts.tsv"
    save_cuts(from_tsv(table, [], split="train"), tmp_path / "mini.jsonl.gz")
    config = DataConfig(train=[str(tmp_path / "mini.jsonl.gz")], max_batch_s=60.0)
    sampler = build_loader(config, AugmentConfig(), tokenizer).sampler
    padded = spoken = 0.0
    for batch in sampler.epoch(0):
        padded += len(batch) * max(cut.duration for cut in batch)
        spoken += sum(cut.duration for cut in batch)
    assert spoken >= 0.9 * padded


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_batch_s": 10.0}, "max_batch_s 10.0 is less than max_utterance_s"),
        ({"text_power": 1.5}, "text_power is"),
        ({"join_words": [3]}, "join_words is"),
        ({"join_pause_s": [0.4, 0.1]}, "join_pause_s is"),
    ],
)
def test_numbers_without_meaning_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(**wrong)


def test_no_manifest_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"data\.train is empty"):
        build_loader(DataConfig(), PLAIN, tokenizer)
