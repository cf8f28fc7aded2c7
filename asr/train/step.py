"""A training step: its gradient does not depend on how the batch is split over ranks and accumulation steps.

The loss of a step is the sum over all utterances of all ranks, divided by their number of tokens. Every rank
knows that number before it starts and divides by it; the averaging of DistributedDataParallel over ranks is
undone.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from asr.config import ExperimentConfig
from asr.context import Context
from asr.data.augment import SpecAugment
from asr.data.loader import Batch
from asr.errors import TrainingError
from asr.model.hybrid import HybridModel
from asr.model.masks import draw_context
from asr.train import distributed


@dataclass(frozen=True)
class Shared:
    """What all ranks know about a step before it starts."""

    num_tokens: int
    """Tokens in all batches of the step, including one sos/eos per utterance."""

    num_frames: int
    """Encoder frames of the longest utterance."""

    audio_s: float
    cpu_s: float
    stop: bool
    """Whether any rank was asked to stop."""


def agree(model: HybridModel, batches: Sequence[Batch], cpu_s: float, stop: bool) -> Shared:
    """Exchange what the ranks need to know about each other, in one message."""
    num_frames = max(int(model.fbank.num_frames(batch.sample_lens).max()) for batch in batches)
    audio_s = sum(int(batch.sample_lens.sum()) for batch in batches) / model.fbank.config.sample_rate
    own = [sum(map(num_targets, batches)), num_frames, audio_s, cpu_s, stop]
    rows = distributed.gather(torch.tensor(own, dtype=torch.float64))
    num_tokens, _, audio_s, cpu_s, _ = rows.sum(0).tolist()
    _, num_frames, _, _, stop = rows.amax(0).tolist()
    subsampling = model.encoder.subsampling
    return Shared(int(num_tokens), -int(-num_frames // subsampling), audio_s, cpu_s, bool(stop))


def num_targets(batch: Batch) -> int:
    """Tokens and one sos/eos per utterance, as in Loss.num_tokens; 0 if no utterance could be read."""
    return 0 if batch.is_empty else int(batch.token_lens.sum()) + len(batch.ids)


def context_of_step(config: ExperimentConfig, step: int, num_frames: int) -> Context:
    """The attention context of a step: the same on all ranks and after a resume."""
    generator = torch.Generator().manual_seed(config.train.seed * 1_000_003 + step)
    return draw_context(num_frames, generator, config.encoder.chunk)


def parallel(model: HybridModel, device: torch.device) -> nn.Module:
    """The model; with several ranks, wrapped in DistributedDataParallel, with rank 0's parameters on all."""
    if distributed.world_size() == 1:
        return model
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(
        model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
    )


@dataclass
class Backward:
    """Computes gradients. `model` is `parallel(plain)`."""

    plain: HybridModel
    model: nn.Module
    spec_augment: SpecAugment
    device: torch.device
    bf16: bool

    def __call__(self, batches: Sequence[Batch], shared: Shared, context: Context) -> Tensor:
        """Add the gradients of a step's batches. Returns this rank's sums (3,): total, ctc, attention."""
        sums = torch.zeros(3, device=self.device)
        scale = distributed.world_size() / max(1, shared.num_tokens)
        for number, batch in enumerate(batches, 1):
            with out_of_memory(batch), self._synchronised(number == len(batches)):
                losses = self._losses(batch.to(self.device), context)
                (losses[0] * scale).backward()
            sums += losses.detach()
        return sums

    def _losses(self, batch: Batch, context: Context) -> Tensor:
        views = self.plain.loss.views
        x, x_lens = self.plain.features(batch.samples, batch.sample_lens)
        ends = self.plain.frames_behind(batch.token_ends_s)
        x, x_lens, tokens, token_lens, ends = (
            _repeat(part, views) for part in (x, x_lens, batch.tokens, batch.token_lens, ends)
        )
        x = self.spec_augment(x, x_lens)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.model(x, x_lens, tokens, token_lens, context, ends, views)
        # an empty batch still takes part, as other ranks wait for it, but contributes nothing
        return torch.stack([loss.total, loss.ctc, loss.attention]) * (not batch.is_empty)

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Synchronise gradients between ranks only once per step, with its last batch."""
        if last or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()


def _repeat(x: Tensor, times: int) -> Tensor:
    """The batch, repeated `times` times along its first dimension."""
    return x if times == 1 else torch.cat([x] * times)


@contextlib.contextmanager
def out_of_memory(batch: Batch) -> Iterator[None]:
    """Turn an out-of-memory error into one that names the batch and the remedy."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        n, samples = batch.samples.shape
        raise TrainingError(
            f"out of memory: {n} utterances of up to {samples:,} samples and {batch.tokens.shape[1]} tokens, "
            f"first {batch.ids[:3]}; lower data.max_batch_s and raise optim.accumulate by as much, or set "
            "encoder.checkpoint_activations=true"
        ) from error
