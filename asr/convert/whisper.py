"""Public Whisper checkpoints: a dict of `dims` and `model_state_dict` (arXiv:2212.04356).

A folder with such a file, for example small.pt, and with the ranks of its units: multilingual.tiktoken, or
gpt2.tiktoken for English-only models such as small.en.pt. Or a folder in the hub's format
(asr/convert/whisper_hub.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asr.byte_tokens import read_ranks
from asr.config import ExperimentConfig, TrainConfig
from asr.convert.converted import Converted, Tokens, decoder_alone, fresh_model, parts_to_load
from asr.convert.names import MADE_UP, Layers, Names, Units, add_biases, count_layers, load
from asr.convert.options import Options
from asr.convert.source import Source
from asr.convert.whisper_decoder import DECODER, decoder_config, decoder_tensors
from asr.convert.whisper_hub import hub_alignment_heads, hub_dims, hub_pieces, hub_weights, is_of_hub
from asr.errors import CheckpointError
from asr.features import FbankConfig
from asr.model.whisper import WhisperConfig, sinusoid_table
from asr.whisper_tokens import LANGUAGES, whisper_symbols

FILES = ("*.pt", "*.tiktoken", "model.safetensors", "config.json", "generation_config.json", "vocab.json")
"""Files to fetch from a hub."""

MARK = r"^(encoder\.blocks\.\d+\.attn\.query|(model\.)?decoder\.layers\.\d+\.encoder_attn_layer_norm)\."
"""A tensor that no other family has."""

DIMS = (
    *("n_mels", "n_audio_ctx", "n_audio_state", "n_audio_head", "n_audio_layer"),
    *("n_vocab", "n_text_ctx", "n_text_state", "n_text_head", "n_text_layer"),
)

POSITIONS = "encoder.positional_embedding"

ENCODER = Names(
    heads={
        "encoder.front.0.": "encoder.conv1.",
        "encoder.front.1.": "encoder.conv2.",
        "encoder.norm.": "encoder.ln_post.",
    },
    layers={
        "encoder.": Layers(
            "encoder.blocks.",
            {
                "attention_norm.": ("attn_ln.",),
                "attention.project.": ("attn.query.", "attn.key.", "attn.value."),
                "attention.out.": ("attn.out.",),
                "feed_forward.0.": ("mlp_ln.",),
                "feed_forward.1.": ("mlp.0.",),
                "feed_forward.4.": ("mlp.2.",),
            },
        )
    },
    computed=f"^{POSITIONS}$",
)

NAMES = Names({**ENCODER.heads, **DECODER.heads}, {**ENCODER.layers, **DECODER.layers}, ENCODER.computed)

SHARDS = "model.safetensors.index.json"

FRAME_S = 0.01
"""Frame shift of the features."""

NUM_TIMES = 1501
NUM_MARKS = 8
"""Units that are neither pieces nor languages nor timestamps: asr/whisper_tokens.py."""

ENGLISH_ONLY = 51864
"""Units of the English-only models, which have one piece fewer than the others."""


def read(source: Source) -> Converted:
    """Read a Whisper checkpoint. Raises CheckpointError or TokensError for what is not supported."""
    if not (source.main or source.maybe("model.safetensors")) and (index := source.maybe(SHARDS)):
        raise CheckpointError(f"{index}: weights in several files; save them as one model.safetensors")
    file = source.weights_file("model.pt", "*.pt", "model.safetensors", "*.safetensors")
    found = source.tensors(file, "model_state_dict", halves=True)
    heads: list[list[int]] = []
    if is_of_hub(found.weights):
        heads = hub_alignment_heads(source)
        weights, dims = hub_weights(found.weights, str(file)), hub_dims(source, found.weights)
        check_shapes(dims, weights, str(file))
        symbols, num_ranks = name_units(dims, hub_pieces(source), source.label)
    else:
        weights, dims = found.weights, read_dims(found.others.get("dims"), found.weights, str(file))
        symbols, num_ranks = our_units(dims, find_ranks(source, dims["n_vocab"]))
    config = ExperimentConfig(
        features=features_config(dims),
        encoder=encoder_config(dims),
        decoder=replace(decoder_config(dims), alignment_heads=heads),
        train=TrainConfig(cmvn=False),
        **decoder_alone(),
    )
    model = fresh_model(config, len(symbols), weights, str(file))
    units = whisper_units(dims["n_vocab"], num_ranks + 1, num_ranks)
    load(parts_to_load(model), tensors(weights, str(file)), NAMES, str(file), units)
    notes = [note for note in found.notes if note != "not carried over: dims"]
    asked = "mode whisper finds the language out; --search language=en, task=translate, timestamps=true"
    return Converted(config, Tokens(symbols), model, (*notes, asked))


def find_ranks(source: Source, num_units: int) -> Path:
    """The file with the ranks of so many units, of which a folder may have both, as OpenAI's has."""
    names = ["multilingual.tiktoken", "gpt2.tiktoken"]
    return source.file(*(names[::-1] if num_units == ENGLISH_ONLY else names), "*.tiktoken")


def our_units(dims: Mapping[str, int], ranks_file: Path) -> tuple[list[str], int]:
    """Our symbols, and how many of them are pieces."""
    return name_units(dims, read_ranks(ranks_file), str(ranks_file))


def name_units(dims: Mapping[str, int], ranks: Sequence[bytes], where: str) -> tuple[list[str], int]:
    """Like `our_units`; the units that are not pieces are languages, marks and timestamps."""
    num_times = dims["n_audio_ctx"] + 1
    languages = dims["n_vocab"] - len(ranks) - NUM_MARKS - num_times
    is_other = num_times == NUM_TIMES and len(ranks) != num_pieces(dims["n_vocab"])
    if is_other or not 0 < languages <= len(LANGUAGES):
        raise CheckpointError(
            f"{where}: {len(ranks)} units do not fit the {dims['n_vocab']} of the "
            "checkpoint; it is from another model"
        )
    only_english = dims["n_vocab"] == ENGLISH_ONLY
    return whisper_symbols(ranks, languages, num_times, only_english), len(ranks)


def read_dims(found: Any, weights: Mapping[str, Tensor], where: str) -> dict[str, int]:
    """The sizes of a checkpoint; CheckpointError if missing, invalid, or not those of its tensors."""
    if not isinstance(found, Mapping) or not set(DIMS) <= set(found):
        raise CheckpointError(
            f"{where}: no dims in it; expected OpenAI's own file, as other toolkits rename its tensors"
        )
    options = Options(found, where, "dims.")
    dims = {name: options.count(name, 0) for name in DIMS}
    check_shapes(dims, weights, where)
    return dims


def check_shapes(dims: Mapping[str, int], weights: Mapping[str, Tensor], where: str) -> None:
    """Raise CheckpointError if the sizes of a checkpoint are not those of its tensors."""
    shapes = {
        "encoder.conv1.weight": (dims["n_audio_state"], dims["n_mels"], 3),
        POSITIONS: (dims["n_audio_ctx"], dims["n_audio_state"]),
        "decoder.token_embedding.weight": (dims["n_vocab"], dims["n_text_state"]),
        "decoder.positional_embedding": (dims["n_text_ctx"], dims["n_text_state"]),
    }
    for name, shape in shapes.items():
        if name not in weights or tuple(weights[name].shape) != shape:
            raise CheckpointError(f"{where}: dims say that {name} is {shape}, the checkpoint does not")
    for part, key in (("encoder", "n_audio_layer"), ("decoder", "n_text_layer")):
        if (count := count_layers(weights, f"{part}.blocks.")) != dims[key]:
            raise CheckpointError(f"{where}: {count} layers of the {part}, dims say {dims[key]}")


def encoder_config(dims: Mapping[str, Any]) -> WhisperConfig:
    """Our encoder configuration, from the `dims` of a checkpoint."""
    return WhisperConfig(
        dim=dims["n_audio_state"],
        num_layers=dims["n_audio_layer"],
        num_heads=dims["n_audio_head"],
        ff_dim=4 * dims["n_audio_state"],
        window=dims["n_audio_ctx"],
    )


def features_config(dims: Mapping[str, Any]) -> FbankConfig:
    """Our feature configuration, from the `dims` of a checkpoint."""
    return FbankConfig(
        type="whisper",
        num_bins=dims["n_mels"],
        low_freq_hz=0.0,
        high_freq_hz=0.0,
        window_s=2 * dims["n_audio_ctx"] * FRAME_S,
    )


def encoder_tensors(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that ENCODER expects: keys with a bias."""
    return add_biases(weights, r"^encoder\.blocks\.\d+\.attn\.key")


def tensors(weights: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors that NAMES expects; CheckpointError if the encoder's positions differ from ours."""
    found = weights[POSITIONS]
    if not found.is_meta and not torch.allclose(found.float(), sinusoid_table(*found.shape), atol=1e-3):
        raise CheckpointError(
            f"{where}: {POSITIONS} are not the sinusoids of Whisper, and cannot be represented"
        )
    return decoder_tensors(encoder_tensors(weights))


def whisper_units(count: int, start: int, end: int) -> Units:
    """Our units among `count` of theirs.  start: of the transcript; end: of the text.

    The start keeps a unit of its own, as only decoding keeps it out of an answer; the end, which is never an
    input, has none.
    """
    rest = [i for i in range(count) if i != end]
    return Units([MADE_UP, start, MADE_UP, *rest], [MADE_UP, end, MADE_UP, *rest])


def num_languages(num_units: int) -> int:
    """The number of languages of a published model: 99, or 100 from large-v3 on."""
    return 99 if num_units <= ENGLISH_ONLY + 1 else num_units - (ENGLISH_ONLY + 1) + 99


def num_pieces(num_units: int) -> int:
    """The units of a published model that are neither languages nor marks nor timestamps."""
    return num_units - num_languages(num_units) - NUM_MARKS - NUM_TIMES
