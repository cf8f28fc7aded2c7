"""From manifests to batches: reads audio, tokenises, pads; unreadable utterances are skipped and listed.

The training process draws batches of cuts and hands each, with its position, to the next worker process,
which reads the audio. Nothing depends on the number of workers, and epochs follow without a pause.
"""

from __future__ import annotations

import itertools
import json
import random
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.dataset.sampling.dynamic import DynamicCutSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from asr.data.alignment import token_ends
from asr.data.augment import AugmentConfig, Augmenter
from asr.data.cuts import balance_texts, count_cuts, cut_path, cut_text, join_cuts, open_cuts, read_cut
from asr.data.sampler import Sampler
from asr.errors import AsrError, AudioError, ConfigError, ManifestError, TrainingError

if TYPE_CHECKING:
    from asr.tokens import Tokenizer

FREE_SKIPS = 10
"""This many bad utterances per epoch are tolerated beyond max_skipped, so that one among the first few does
not stop a run. An epoch that ends with more than half of it bad always does, however small it is."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    train: list[str] = field(default_factory=list)
    """Manifests to train on; the utterances of several are interleaved."""

    valid: list[str] = field(default_factory=list)
    """Manifests to validate on."""

    tokens: str = ""
    """Tokenizer folder."""

    max_batch_s: float = 300.0
    """Seconds of audio in a batch on one device, padding included. Lower it if memory runs out."""

    max_utterance_s: float = 30.0
    """Longer utterances are left out of training."""

    min_utterance_s: float = 0.1
    """Shorter utterances are left out of training."""

    first_max_s: list[float] = field(default_factory=list)
    """max_utterance_s for each of the first epochs, for example [1.5, 1.5, 3]: starting with short utterances
    speeds up training on a small corpus. [] is off."""

    num_buckets: int = 30
    """Maximal number of duration buckets; more means less padding and less random batches. A corpus of few
    batches gets fewer."""

    num_workers: int = 2
    """Processes per rank that read audio; 0 reads in the training process."""

    max_skipped: float = 0.01
    """Share of an epoch's utterances that may be unreadable, beyond the first ten."""

    text_power: float = 1.0
    """Repeat utterances of rare texts, so that a text with n utterances occurs in proportion to n^text_power:
    0 makes all texts equally frequent, 1 is off. For single-word corpora; like join_words, it reads the
    manifests into memory."""

    join_words: list[int] = field(default_factory=list)
    """Fewest and most utterances of a speaker to join into one, drawn anew in each epoch, for example [1, 8];
    [] is off. Reads the manifests into memory: for small corpora of short utterances."""

    join_pause_s: list[float] = field(default_factory=lambda: [0.1, 0.4])
    """Shortest and longest pause between joined utterances, in seconds."""

    seed: int = 0
    """Seed of the order of the data and of its augmentation."""

    def __post_init__(self) -> None:
        if self.max_batch_s < self.max_utterance_s:
            raise ConfigError(
                f"max_batch_s {self.max_batch_s} is less than max_utterance_s {self.max_utterance_s}; "
                "a batch must hold at least one utterance"
            )
        if self.num_workers < 0:
            raise ConfigError(f"num_workers is {self.num_workers}; expected 0 or more")
        if not 0 <= self.text_power <= 1:
            raise ConfigError(f"text_power is {self.text_power}; expected a number between 0 and 1")
        for name in ("join_words", "join_pause_s"):
            bounds = getattr(self, name)
            if bounds and (len(bounds) != 2 or bounds[0] > bounds[1] or bounds[0] < 0):
                raise ConfigError(f"{name} is {bounds}; expected the minimum and the maximum")


@dataclass(frozen=True)
class Skip:
    """An utterance that could not be read."""

    id: str
    path: str
    error: str


@dataclass(frozen=True)
class Batch:
    """A batch of utterances, and the position in the data after it.

    samples (N, S) float32 in [-1, 1], sample_lens (N,), tokens (N, U) padded with 0, token_lens (N,).
    token_ends_s (N, U) float32 padded with 0: when each token ends, in seconds from the start of the samples,
    never decreasing; (N, 0) if the manifests have no alignments (asr/data/alignment.py).
    A batch none of whose utterances could be read `is_empty`: it has no ids, and a second of silence without
    tokens, so that the rank can still run its model and synchronise gradients, with a loss of zero.
    """

    samples: Tensor
    sample_lens: Tensor
    tokens: Tensor
    token_lens: Tensor
    token_ends_s: Tensor
    ids: list[str]
    texts: list[str]
    position: dict[str, int]
    skipped: tuple[Skip, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        """How a worker sends it: a tensor costs a dozen messages, which pays off only for the samples."""
        small = self.sample_lens, self.tokens, self.token_lens, self.token_ends_s
        arrays = [tensor.numpy() for tensor in small]
        return _unpack, (self.samples, arrays, self.ids, self.texts, self.position, self.skipped)

    @property
    def is_empty(self) -> bool:
        return not self.ids

    @property
    def padding(self) -> float:
        """The share of padding in the samples."""
        return 1 - int(self.sample_lens.sum()) / max(1, self.samples.numel())

    def to(self, device: torch.device | str) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Called by torch's DataLoader, for asynchronous copies to a GPU."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            samples=change(self.samples),
            sample_lens=change(self.sample_lens),
            tokens=change(self.tokens),
            token_lens=change(self.token_lens),
            token_ends_s=change(self.token_ends_s),
        )


def _unpack(samples: Tensor, arrays: Sequence[np.ndarray], *rest: Any) -> Batch:
    sample_lens, tokens, token_lens, token_ends_s = map(torch.from_numpy, arrays)
    return Batch(samples, sample_lens, tokens, token_lens, token_ends_s, *rest)


@dataclass
class Reader:
    """Cuts -> Batch. Without an `augmenter`, as for validation, the cuts stay as they are."""

    tokenizer: Tokenizer
    sample_rate: int
    augmenter: Augmenter | None = None

    def batch(self, cuts: list[Cut], position: dict[str, int]) -> Batch:
        read, skipped = [], []
        for cut in cuts:
            try:
                read.append((cut, self._samples(cut, position.get("epoch", 0))))
            except AudioError as error:
                skipped.append(Skip(cut.id, cut_path(cut), str(error)))
        texts = [cut_text(cut) for cut, _ in read]
        samples, sample_lens = _pad([torch.from_numpy(s) for _, s in read] or [torch.zeros(self.sample_rate)])
        rows = [self.tokenizer.encode(text) for text in texts]
        tokens, token_lens = _pad([torch.tensor(row).long() for row in rows or [[]]])
        units = [[self.tokenizer.symbols[token] for token in row] for row in rows]
        ends = token_ends([cut for cut, _ in read], units)
        token_ends_s, _ = _pad([torch.tensor(row, dtype=torch.float32) for row in ends or [[]]])
        ids = [cut.id for cut, _ in read]
        tensors = samples, sample_lens, tokens, token_lens, token_ends_s
        return Batch(*tensors, ids, texts, position, tuple(skipped))

    def _samples(self, cut: Cut, epoch: int) -> np.ndarray:
        changed = self.augmenter.surroundings(cut, epoch) if self.augmenter else cut
        try:
            return read_cut(changed)[: cut.num_samples]
        except AudioError:
            if changed is cut:
                raise
            return read_cut(cut)  # silence has no signal-to-noise ratio; a bad file fails again


def _pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """N rows of any lengths -> (N, longest) padded with 0, (N,) lengths."""
    lens = torch.tensor([len(row) for row in rows])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lens


class _Audio(Dataset[Batch | AsrError]):
    """Runs in the workers: position and cuts -> Batch. Returns errors, as torch would wrap raised ones."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __getitem__(self, drawn: tuple[dict[str, int], list[Cut]]) -> Batch | AsrError:
        position, cuts = drawn
        try:
            return self.reader.batch(cuts, position)
        except AsrError as error:
            return error


class Loader:
    """Batches for training and validation; see `build_loader`."""

    def __init__(
        self,
        config: DataConfig,
        reader: Reader,
        sampler: Sampler,
        skipped_file: Path | None = None,
    ) -> None:
        self.config = config
        self.reader = reader
        self.sampler = sampler
        self.skips = _Skips(config.max_skipped, skipped_file)

    def forever(self, position: dict[str, int] | None = None) -> Iterator[Batch]:
        """The batches of all further epochs, after the batch with that `position`; None is the start.

        Every rank gets the same number of batches per epoch. Raises ManifestError if a line of a manifest or
        too many audio files are bad, TrainingError if a worker process died.
        """
        for batch in self._load(self.reader, self.sampler.forever(position)):
            self.skips.count(batch)
            yield batch

    def validation(self, manifests: list[str] | None = None, limit: int = 0) -> Iterator[Batch]:
        """This rank's batches of the manifests (None: those of the config), longest first, not augmented.

        limit: take this many utterances, evenly spaced; 0 takes all. Ranks may get unequal shares.
        """
        cuts = [cut for path in manifests or self.config.valid for cut in open_cuts(path)]
        if limit and limit < len(cuts):
            cuts = [cuts[i * len(cuts) // limit] for i in range(limit)]
        cuts = sorted((at_rate(cut, self.reader.sample_rate) for cut in cuts), key=lambda cut: -cut.duration)
        # as one rank, since lhotse would repeat an utterance if the last step has too few for all ranks
        batches = DynamicCutSampler(cuts, max_duration=self.config.max_batch_s, rank=0, world_size=1)
        own = itertools.islice(batches, self.sampler.rank, None, self.sampler.world_size)
        yield from self._load(replace(self.reader, augmenter=None), (({}, list(batch)) for batch in own))

    def _load(self, reader: Reader, plan: Iterable[tuple[dict[str, int], list[Cut]]]) -> Iterator[Batch]:
        loader = DataLoader(
            _Audio(reader),
            sampler=plan,
            batch_size=None,
            num_workers=self.config.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # otherwise each start would draw from the global one
            worker_init_fn=_outlive_stop,
        )
        try:
            for batch in loader:
                if isinstance(batch, AsrError):
                    raise batch
                yield batch
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise TrainingError(
                f"a data loading process died ({error}); if memory ran out, lower data.num_workers or "
                "data.max_batch_s; data.num_workers=0 loads in the training process and shows more"
            ) from error


def _outlive_stop(_: int) -> None:
    """SIGTERM often goes to all processes of a job (`timeout`, Slurm, systemd). Training still needs its data
    workers then, to finish the step and save; they end with it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _Skips:
    """Counts read and skipped utterances in each epoch, and lists the skipped ones."""

    def __init__(self, max_share: float, file: Path | None) -> None:
        self.max_share = max_share
        self.file = file
        self.listed: set[str] = set()
        self.epoch = self.seen = self.skipped = 0
        self.last = ""

    def count(self, batch: Batch) -> None:
        """Raises ManifestError if the epoch so far has more bad audio than is allowed."""
        self._list([skip for skip in batch.skipped if skip.id not in self.listed])
        if batch.position["epoch"] != self.epoch:
            self._judge(free=0, max_share=0.5)
            self.epoch, self.seen, self.skipped = batch.position["epoch"], 0, 0
        self.seen += len(batch.ids) + len(batch.skipped)
        self.skipped += len(batch.skipped)
        self._judge(free=FREE_SKIPS, max_share=self.max_share)

    def _judge(self, free: int, max_share: float) -> None:
        if self.skipped > free + max_share * self.seen:
            raise ManifestError(
                f"{self.file or 'data'}: {self.skipped} of {self.seen} utterances of epoch {self.epoch} "
                f"could not be read, last {self.last}; check that the audio is where the manifest says, "
                "or raise data.max_skipped"
            )

    def _list(self, skips: list[Skip]) -> None:
        for skip in skips:
            self.last = f"{skip.id}: {skip.error}"
            self.listed.add(skip.id)
        if self.file and skips:
            with self.file.open("a", encoding="utf-8") as lines:
                for skip in skips:
                    row = {"id": skip.id, "path": skip.path, "error": skip.error}
                    lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def build_loader(
    config: DataConfig,
    augment: AugmentConfig,
    tokenizer: Tokenizer,
    sample_rate: int = 16000,
    rank: int = 0,
    world_size: int = 1,
    skipped_file: Path | None = None,
) -> Loader:
    """The data of one rank. Raises ManifestError or ConfigError if a manifest is missing or invalid."""
    augmenter = Augmenter(augment, sample_rate, config.seed)
    cuts = TrainingCuts(config, augmenter, sample_rate)
    longest_s = config.max_utterance_s / min(augment.speed, default=1.0)
    sampler = Sampler(cuts, config.max_batch_s, longest_s, config.num_buckets, config.seed, rank, world_size)
    return Loader(config, Reader(tokenizer, sample_rate, augmenter), sampler, skipped_file)


class TrainingCuts:
    """The cuts of an epoch, interleaved, filtered, balanced, joined and speed-perturbed, in an order that
    depends only on the seed and the epoch."""

    def __init__(self, config: DataConfig, augmenter: Augmenter, sample_rate: int) -> None:
        self.config = config
        self.augmenter = augmenter
        self.sample_rate = sample_rate
        sets = [open_cuts(path) for path in config.train]
        if not sets:
            raise ConfigError("data.train is empty; expected at least one manifest")
        weights = [count_cuts(path) for path in config.train]
        self.source: Iterable[Cut] = (
            CutSet.mux(*sets, weights=weights, seed=config.seed) if len(sets) > 1 else sets[0]
        )
        if config.text_power < 1 or config.join_words:  # these read all of it in each epoch
            self.source = list(self.source)

    def __call__(self, epoch: int) -> Iterator[Cut]:
        config = self.config
        longest_s = dict(enumerate(config.first_max_s)).get(epoch, config.max_utterance_s)
        fit = (cut for cut in self.source if config.min_utterance_s <= cut.duration <= longest_s)
        cuts: Iterable[Cut] = (at_rate(cut, self.sample_rate) for cut in fit)
        if config.text_power < 1:
            cuts = balance_texts(cuts, random.Random(f"balance {config.seed} {epoch}"), config.text_power)
        if config.join_words:
            rng = random.Random(f"join {config.seed} {epoch}")
            cuts = join_cuts(cuts, rng, config.join_words, config.join_pause_s, longest_s)
        return (self.augmenter.speed(cut, epoch) for cut in cuts)


def at_rate(cut: Cut, sample_rate: int) -> Cut:
    return cut if cut.sampling_rate == sample_rate else cut.resample(sample_rate)
