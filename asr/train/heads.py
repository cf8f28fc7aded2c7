"""Finds guiding heads: those whose attention agrees best with the CTC alignment.

For each token of a reference (teacher forcing), the frame with most of a head's attention is compared with
the frames of the token in the best CTC alignment. The last frame is left out, as in the attention-guided
policies (asr/decode/policies.py). Candidates are single heads and, for each layer, the means of its best two,
three, ... heads.

L layers · H heads · U tokens · T encoder frames · C channels
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from asr.decode.align import align
from asr.errors import CheckpointError
from asr.model.decoder import SOS_EOS, Guide, TransformerDecoder
from asr.model.hybrid import HybridModel
from asr.train.storage import write_file

HEADS = "heads.json"
NEAR_FRAMES = 2
"""A token counts as found if the attention peak is this near to it."""


class Heard(NamedTuple):
    """An encoded utterance and the frames of its tokens."""

    y: Tensor
    """(1, T, C)"""
    tokens: Tensor
    """(U,)"""
    start: Tensor
    """First frame of each token (U,)."""
    end: Tensor
    """One past the last frame of each token (U,)."""


class Agreement(NamedTuple):
    """How well a guide finds the tokens."""

    guide: Guide
    distance_frames: float
    """Mean distance to the frames of the token."""
    near: float
    """Share of the tokens found within `NEAR_FRAMES`."""


@torch.inference_mode()
def hear(model: HybridModel, samples: Tensor, tokens: Sequence[int]) -> Heard | None:
    """Encode samples (S,) as a whole and align tokens; None if there are no tokens or too few frames."""
    model.require_ctc("heads")
    x, x_lens = model.features(samples[None], torch.tensor([len(samples)], device=samples.device))
    y, _ = model.encode(x, x_lens)
    found = align(model.ctc_log_probs(y)[0].cpu().numpy(), tokens) if y.shape[1] > 1 else None
    if found is None or not tokens:
        return None
    start, end = (torch.from_numpy(x).to(y.device) for x in (found.start, found.end))
    return Heard(y, torch.tensor(tokens, device=y.device), start, end)


def search(model: HybridModel, utterances: Sequence[Heard]) -> list[Agreement]:
    """All candidates, best first."""
    decoder = model.decoder
    layers, heads = decoder.config.num_layers, decoder.config.num_heads
    single = measure(model, utterances, [Guide(i, (h,)) for i in range(layers) for h in range(heads)])
    means = []
    for i in range(layers):
        order = [x.guide.heads[0] for x in single if x.guide.layer == i]
        means += [Guide(i, tuple(sorted(order[:k]))) for k in range(2, heads + 1)]
    return sorted([*single, *measure(model, utterances, means)], key=_rank)


def measure(model: HybridModel, utterances: Sequence[Heard], guides: Sequence[Guide]) -> list[Agreement]:
    """How well each guide finds the tokens of the utterances, best first."""
    distances = [
        torch.stack([_distance(attention, heard, guide) for guide in guides])
        for heard in utterances
        for attention in [listening(model.decoder, heard)]
        if guides
    ]
    found = []
    for guide, row in zip(guides, torch.cat(distances, 1) if distances else (), strict=True):
        near = (row <= NEAR_FRAMES).double().mean()
        found.append(Agreement(guide, float(row.double().mean()), float(near)))
    return sorted(found, key=_rank)


def _rank(found: Agreement) -> tuple[float, float]:
    return -found.near, found.distance_frames


def _distance(attention: Tensor, heard: Heard, guide: Guide) -> Tensor:
    """Frames between the attention peak of each token and the nearest of its frames (U,)."""
    place = attention[guide.layer, list(guide.heads)].mean(0)[:, :-1].argmax(-1)
    return torch.clamp(torch.maximum(heard.start - place, place - heard.end + 1), min=0)


@torch.inference_mode()
def listening(decoder: TransformerDecoder, heard: Heard) -> Tensor:
    """The attention of every layer and head for each token of an utterance (L, H, U, T)."""
    tokens = torch.cat([heard.tokens.new_tensor([SOS_EOS]), heard.tokens[:-1]])[None]
    y_lens = torch.tensor([heard.y.shape[1]], device=heard.y.device)
    with _overheard(decoder) as weights:
        decoder(tokens, *decoder.memory(heard.y), y_lens)
    return torch.cat(weights)


@contextmanager
def _overheard(decoder: TransformerDecoder) -> Iterator[list[Tensor]]:
    """Collect the cross-attention of all layers in one call, (1, H, U, T) each."""
    weights: list[Tensor] = []

    def keep(module: Any, args: tuple[Tensor, ...]) -> None:
        x, keys, _, mask = args
        weights.append(module.weights(x, keys, mask))

    hooks = [layer.get_submodule("cross").register_forward_pre_hook(keep) for layer in decoder.layers]
    try:
        yield weights
    finally:
        for hook in hooks:
            hook.remove()


def save_guide(exp_dir: Path, found: Agreement, num_tokens: int) -> Path:
    """Write the file that `load_guide` reads, with the figures of the search."""
    figures = {"distance_frames": found.distance_frames, "near": found.near, "tokens": num_tokens}
    about = {"layer": found.guide.layer, "heads": list(found.guide.heads), "figures": figures}
    write_file(exp_dir / HEADS, json.dumps(about, indent=2).encode() + b"\n")
    return exp_dir / HEADS


def load_guide(exp_dir: Path, decoder: TransformerDecoder) -> Guide | None:
    """The guide that `asr heads` chose, None if it was not run. Raises CheckpointError if the file cannot be
    read or belongs to another decoder."""
    file = exp_dir / HEADS
    if not file.exists():
        return None
    advice = "remove the file, then run asr heads again"
    try:
        about = json.loads(file.read_bytes())
        layer, heads = about["layer"], tuple(about["heads"])
    except OSError as error:
        raise CheckpointError(f"{file}: {(error.strerror or str(error)).lower()}") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{file}: not a layer and its heads; {advice}") from None
    config = decoder.config
    if not _is_index(layer, config.num_layers):
        raise CheckpointError(f"{file}: layer is {layer}, the decoder has {config.num_layers}; {advice}")
    if not heads or not all(_is_index(head, config.num_heads) for head in heads):
        raise CheckpointError(
            f"{file}: heads are {list(heads)}, expected some of the decoder's {config.num_heads}, from 0 on; "
            f"{advice}"
        )
    return Guide(layer, heads)


def _is_index(value: object, size: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < size
