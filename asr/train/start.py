"""Everything before the first step: data, parameters, normalisation, device settings."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asr.config import ExperimentConfig
from asr.data.augment import SpecAugment
from asr.data.loader import Loader, build_loader
from asr.decode.words import word_starts
from asr.errors import ConfigError
from asr.features import Cmvn
from asr.model.hybrid import HybridModel
from asr.tokens import Tokenizer, tokens_hash
from asr.train import distributed
from asr.train.checkpoint import AVERAGE, about_weights, check_tokens_hash, take_weights
from asr.train.learner import Learner
from asr.train.run import Run
from asr.train.step import Backward, parallel


def use_threads(count: int) -> None:
    """Set the number of threads of this process; 0 leaves it to torch, which uses one per core."""
    if count:
        torch.set_num_threads(count)


def open_loader(run: Run) -> Loader:
    """This rank's data; unreadable utterances are listed in skipped.jsonl."""
    config = run.config
    return build_loader(
        config.data,
        config.augment,
        run.tokenizer,
        config.features.sample_rate,
        distributed.rank(),
        distributed.world_size(),
        run.exp_dir / "skipped.jsonl",
    )


def start(run: Run, loader: Loader) -> Learner:
    """A learner restored from the last checkpoint, or a fresh one with its feature normalisation set."""
    config, device = run.config, run.device
    learner = Learner.fresh(config, len(run.tokenizer.symbols), device)
    mark_words(learner.model, run.tokenizer)
    if not run.resume(learner):
        taken = begin_from_another(run, learner.model) if config.train.init else []
        if config.train.cmvn and "cmvn.mean" not in taken:
            normalise(learner.model, loader, config.train.cmvn_utterances)
    if config.train.ema and learner.ema is None:
        learner.start_average()
    learner.model.train()
    run.say(describe_model(learner.model, config, device))
    return learner


def mark_words(model: HybridModel, tokenizer: Tokenizer) -> None:
    """Tell the word-counting head, if there is one, which units start words. Raises ConfigError."""
    if model.fire is None:
        return
    starts = word_starts(tokenizer.words, len(tokenizer.symbols))
    if not starts.any():
        raise ConfigError(
            "loss.quantity: words cannot be counted, as the units of data.tokens do not say where they "
            "begin; set it to 0, or train on other units"
        )
    model.fire.word_starts = torch.from_numpy(starts).to(model.fire.weight.device)


def begin_from_another(run: Run, model: HybridModel) -> list[str]:
    """Load the parameters of train.init and log which. Returns their names; raises CheckpointError."""
    source = Path(run.config.train.init)
    file = source / AVERAGE if source.is_dir() else source
    about = about_weights(file)
    if source.is_dir():
        about.setdefault("tokens_sha256", tokens_hash(source / "tokens"))
    check_tokens_hash(file, about, run.exp_dir / "tokens")
    found = take_weights(model, file, about.get("config", {}), run.config)
    counts = [f"{len(names):,} {what}{_first(names)}" for what, names in found._asdict().items()]
    run.say(f"tensors from {file}: {', '.join(counts)}")
    return found.taken


def _first(names: Sequence[str]) -> str:
    """` (a, b, ...)`"""
    return f" ({', '.join([*names[:2], '...'][: len(names)])})" if names else ""


def normalise(model: HybridModel, loader: Loader, num_utterances: int) -> None:
    """Set the feature mean and variance of all ranks from the first utterances of the first rank."""
    if distributed.is_main():
        model.cmvn.load_state_dict(Cmvn.from_frames(first_frames(model, loader, num_utterances)).state_dict())
    for buffer in model.cmvn.buffers():
        distributed.broadcast(buffer)


def first_frames(model: HybridModel, loader: Loader, count: int) -> Iterator[Tensor]:
    """Log-mel frames (T, F) of the first `count` utterances."""
    device = model.cmvn.mean.device
    for batch in loader.forever():
        x, x_lens = model.fbank(batch.samples.to(device), batch.sample_lens.to(device))
        for frames, length in zip(x[: len(batch.ids)], x_lens.tolist(), strict=False):
            yield frames[:length]
        count -= len(batch.ids)
        if count <= 0:
            return


def build_backward(model: HybridModel, config: ExperimentConfig, device: torch.device) -> Backward:
    if config.train.compile:
        model.compile(dynamic=True)
    spec_augment = SpecAugment(config.augment.spec_augment).train().to(device)
    return Backward(model, parallel(model, device), spec_augment, device, uses_bf16(config, device))


def uses_bf16(config: ExperimentConfig, device: torch.device) -> bool:
    """Whether to compute matrix products in bfloat16; `auto`: if that is faster (tools/bench_train.py)."""
    if config.train.precision != "auto":
        return config.train.precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    has_instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return has_instructions and config.encoder.dim >= 128


def describe_model(model: HybridModel, config: ExperimentConfig, device: torch.device) -> str:
    """`model: conformer, 30.7 M parameters (encoder 22.1 M, decoder 8.4 M, ctc 0.2 M), cpu, fp32`"""
    parts: dict[str, Any] = {
        "encoder": model.encoder,
        "decoder": model.decoder,
        "reverse decoder": model.reverse_decoder,
        "ctc": model.ctc,
    }
    sizes = ", ".join(f"{name} {millions(part)}" for name, part in parts.items() if part)
    precision = "bf16" if uses_bf16(config, device) else "fp32"
    ranks = f", {distributed.world_size()} ranks" if distributed.world_size() > 1 else ""
    return (
        f"model: {config.encoder.type}, {millions(model)} parameters ({sizes}), {device}, {precision}{ranks}"
    )


def millions(module: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M"
