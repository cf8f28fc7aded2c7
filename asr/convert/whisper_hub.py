"""Whisper checkpoints in the hub's format: model.safetensors, config.json, vocab.json.

Their tensor names differ, and their pieces are written with a letter for each byte, as in GPT-2.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from asr.convert.source import Source
from asr.errors import CheckpointError

RENAMED = (
    (r"^(model\.)?(encoder|decoder)\.", r"\2."),
    (r"\.layers\.", ".blocks."),
    (r"\.self_attn_layer_norm\.", ".attn_ln."),
    (r"\.encoder_attn_layer_norm\.", ".cross_attn_ln."),
    (r"\.final_layer_norm\.", ".mlp_ln."),
    (r"^encoder\.layer_norm\.", "encoder.ln_post."),
    (r"^decoder\.layer_norm\.", "decoder.ln."),
    (r"\.self_attn\.", ".attn."),
    (r"\.encoder_attn\.", ".cross_attn."),
    (r"\.q_proj\.", ".query."),
    (r"\.k_proj\.", ".key."),
    (r"\.v_proj\.", ".value."),
    (r"\.out_proj\.", ".out."),
    (r"\.fc1\.", ".mlp.0."),
    (r"\.fc2\.", ".mlp.2."),
    (r"\.embed_positions\.weight$", ".positional_embedding"),
    (r"\.embed_tokens\.", ".token_embedding."),
)
"""Names on the hub, and those of the reference implementation."""

TIED = "proj_out.weight"
GENERATION = "generation_config.json"

CHANNELS_PER_HEAD = 64
"""The same in all published models."""


def is_of_hub(weights: Mapping[str, Tensor]) -> bool:
    return any(re.search(r"(^|\.)embed_tokens\.weight$", name) for name in weights)


def hub_weights(weights: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors under the names of the reference implementation. CheckpointError if the output layer is
    stored, and is not the embedding."""
    found = {_renamed(name): x for name, x in weights.items() if name != TIED}
    if TIED in weights and not torch.equal(weights[TIED], found["decoder.token_embedding.weight"]):
        raise CheckpointError(f"{where}: {TIED} is not the embedding, as it is in Whisper")
    return found


def hub_dims(source: Source, weights: Mapping[str, Tensor]) -> dict[str, int]:
    """The sizes of a model, from its shapes; the numbers of heads from config.json, or by the usual channels
    per head. CheckpointError if that file is missing, or if the shapes are not those of a Whisper model."""
    options = _json(source, "config.json")
    found = {_renamed(name): x for name, x in weights.items()}
    dims: dict[str, int] = {}
    try:
        for part, name in (("encoder", "audio"), ("decoder", "text")):
            length, dim = found[f"{part}.positional_embedding"].shape
            numbers = {x.split(".")[2] for x in found if x.startswith(f"{part}.blocks.")}
            heads = options.get(f"{part}_attention_heads", dim // CHANNELS_PER_HEAD)
            if type(heads) is not int or heads < 1:
                raise CheckpointError(
                    f"{source.label}: config.json: {part}_attention_heads: {heads!r}, expected a size"
                )
            dims |= {f"n_{name}_ctx": length, f"n_{name}_state": dim}
            dims |= {f"n_{name}_head": heads, f"n_{name}_layer": len(numbers)}
        mels, units = found["encoder.conv1.weight"].shape[1], found["decoder.token_embedding.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{source.label}: not a Whisper model: {error}") from None
    return dims | {"n_mels": mels, "n_vocab": units}


def hub_pieces(source: Source) -> list[bytes]:
    """The UTF-8 pieces in the order of their ranks."""
    letters = {letter: byte for byte, letter in enumerate(byte_letters())}
    found = _json(source, "vocab.json")
    ranks = {i: x for x, i in found.items() if isinstance(i, int) and not re.fullmatch(r"<\|.*\|>", x)}
    try:
        return [bytes(letters[letter] for letter in ranks[i]) for i in range(len(ranks))]
    except KeyError as error:
        raise CheckpointError(
            f"{source.label}: vocab.json: no piece or byte {error}, expected pieces of UTF-8 from 0 on"
        ) from None


def hub_alignment_heads(source: Source) -> list[list[int]]:
    """[layer, head] of the alignment heads in generation_config.json; none if it is missing or has none.
    CheckpointError if they are not pairs."""
    if not source.maybe(GENERATION):
        return []
    found = _json(source, GENERATION).get("alignment_heads") or []
    pairs = found if isinstance(found, list) else [found]
    for pair in pairs:
        if not isinstance(pair, list) or [type(x) for x in pair] != [int, int]:
            raise CheckpointError(
                f"{source.label}: {GENERATION}: alignment_heads has {pair!r}, expected [layer, head]"
            )
    return pairs


def byte_letters() -> list[str]:
    """The letter that stands for each byte: itself if printable, otherwise one from U+0100 on."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [x for x in range(256) if x not in plain]
    return [chr(x) if x in plain else chr(0x100 + others.index(x)) for x in range(256)]


def _renamed(name: str) -> str:
    for theirs, ours in RENAMED:
        name = re.sub(theirs, ours, name)
    return name


def _json(source: Source, name: str) -> dict[str, Any]:
    file = source.file(name)
    try:
        found = json.loads(source.text(file))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: {type(found).__name__}, expected values by name")
    return found
