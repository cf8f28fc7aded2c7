"""A .nemo archive, packed or unpacked, as an experiment of this toolkit.

It holds model_config.yaml, model_weights.ckpt, and the SentencePiece models of its units. Supported are Fast
Conformers with a CTC head (also of hybrid models, whose transducer is left out), and with the decoder of
Canary.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from asr.config import ExperimentConfig, TrainConfig
from asr.convert import nemo_decoder
from asr.convert.converted import Converted, Tokens, ctc_alone, decoder_alone, fresh_model, parts_to_load
from asr.convert.names import MADE_UP, Names, Units, arrange_units, count_layers, load, num_rows
from asr.convert.nemo import ENCODER, NEMO, encoder_config, features_config
from asr.convert.options import Options
from asr.convert.source import Source
from asr.convert.units import find_unit, maybe_unit, our_symbols, tell_apart
from asr.errors import CheckpointError
from asr.pieces import open_pieces

FILES = ("*.nemo",)
"""Files to fetch from a hub."""

MARK = r"^encoder\.pre_encode\.conv\."
"""A tensor that no other family has."""

DECODER = "transf_decoder."
TRANSDUCER = r"^(decoder\.prediction|joint)\."

PROMPTS = {
    "canary": ["<|en|>", "<|transcribe|>", "<|en|>", "<|pnc|>"],
    "canary2": [
        *("<|startoftranscript|>", "<|emo:undefined|>", "<|en|>", "<|en|>", "<|pnc|>", "<|noitn|>"),
        *("<|notimestamp|>", "<|nodiarize|>"),
    ],
}
"""What each of their prompt formats puts after the first unit, for English speech with punctuation."""

STARTS = {"canary": "<|startoftranscript|>", "canary2": "<|startofcontext|>"}
ENDS = ("<|endoftext|>", "</s>")


def read(source: Source) -> Converted:
    """Read a NeMo checkpoint. Raises CheckpointError for what our model does not support."""
    file = source.weights_file("model_weights.ckpt", "*.ckpt")
    path = source.file("model_config.yaml")
    options = resolved(source.yaml(path), str(path))
    found = source.tensors(file, "state_dict")
    weights, where = found.weights, str(file)
    config = _config(options, weights, str(path))
    theirs, pieces = _units(source, options, str(path))
    if has_decoder(weights):
        units, prompt = _of_decoder(theirs, weights, options, where)
        config.decoder.prompt = prompt
        names, weights = _decoder_names(), nemo_decoder.decoder_tensors(weights)
    else:
        head = _ctc_head(weights, where)
        units = _of_ctc(theirs, num_rows(weights, f"{head}weight"), where)
        others = rf"{NEMO.computed}|{TRANSDUCER}" if head.startswith("ctc_") else NEMO.computed
        names = replace(NEMO, heads={**NEMO.heads, "ctc.": head}, computed=others)
    symbols = our_symbols(theirs, units, str(path))
    model = fresh_model(config, len(symbols), weights, where)
    load(parts_to_load(model), weights, names, where, units)
    left = [f"{x} {tuple(v.shape)}" for x, v in found.weights.items() if re.match(TRANSDUCER, x)]
    notes = [*found.notes] + [f"the transducer is left out: {', '.join(left)}"] * bool(left)
    if config.decoder.prompt:
        notes.append(f"the decoder is asked for {' '.join(config.decoder.prompt)}, see config.yaml")
    return Converted(config, Tokens(symbols, pieces), model, tuple(notes))


def has_decoder(weights: Mapping[str, Tensor]) -> bool:
    return any(name.startswith(DECODER) for name in weights)


def resolved(options: dict[str, Any], where: str) -> dict[str, Any]:
    """The options with `${a.b}`, and `${model.a.b}`, replaced by what they point to."""

    done: dict[int, Any] = {}  # what YAML refers to many times is resolved once

    def resolve(value: Any, depth: int) -> Any:
        if depth > 20:
            raise CheckpointError(f"{where}: nested too deeply, or ${{...}} in a circle")
        if isinstance(value, dict | list) and id(value) not in done:
            items = value.items() if isinstance(value, dict) else enumerate(value)
            found = {key: resolve(x, depth + 1) for key, x in items}
            done[id(value)] = found if isinstance(value, dict) else list(found.values())
        if id(value) in done:
            return done[id(value)]
        match = re.fullmatch(r"\$\{(?:model\.)?([\w.]+)\}", value) if isinstance(value, str) else None
        if not match:
            return value
        target: Any = options
        for key in match[1].split("."):
            target = target.get(key) if isinstance(target, dict) else None
        return resolve(target, depth + 1)

    return resolve(options, 0)


def _config(options: Mapping[str, Any], weights: Mapping[str, Tensor], where: str) -> ExperimentConfig:
    read = Options(options, where)
    encoder = encoder_config(read.part("encoder").values, where)
    features = features_config(read.part("preprocessor").values, where)
    parts, layers = ctc_alone(), (0, 0)
    if has_decoder(weights):
        decoder = nemo_decoder.decoder_config(read.part("transf_decoder").values, where)
        parts = {**decoder_alone(), "decoder": decoder}
        layers = (decoder.num_layers, count_layers(weights, f"{DECODER}_decoder.layers."))
    both = [(encoder.num_layers, count_layers(weights, "encoder.layers.")), layers]
    channels = num_rows(weights, "encoder.layers.0.norm_out.weight")
    if any(said != counted for said, counted in both) or channels != encoder.dim:
        raise CheckpointError(
            f"{where}: layers and channels are not those of the weights: {both}, and {channels} channels"
        )
    return ExperimentConfig(features=features, encoder=encoder, train=TrainConfig(cmvn=False), **parts)


def _units(source: Source, options: Mapping[str, Any], where: str) -> tuple[list[str], bytes | None]:
    """Their units in their order, and the SentencePiece model if a single one makes all of them."""
    tokenizer = options.get("tokenizer")
    if not isinstance(tokenizer, Mapping):
        section = options.get("decoder")
        listed = section.get("vocabulary") if isinstance(section, Mapping) else None
        if not isinstance(listed, list) or not all(isinstance(x, str) for x in listed):
            raise CheckpointError(f"{where}: neither tokenizer nor decoder.vocabulary; its units are unknown")
        return list(listed), None
    parts = list(tokenizer["langs"].values()) if isinstance(tokenizer.get("langs"), Mapping) else [tokenizer]
    theirs: list[str] = []
    for part in parts:
        named = part.get("model_path") if isinstance(part, Mapping) else None
        if not isinstance(named, str) or not Path(named.removeprefix("nemo:")).name:
            raise CheckpointError(f"{where}: tokenizer: no model_path of a SentencePiece model")
        file = source.file(
            Path(named.removeprefix("nemo:")).name, *(["*tokenizer.model"] if len(parts) == 1 else [])
        )
        model = source.data(file)
        theirs += open_pieces(model, str(file))[1]
    return (theirs, model) if len(parts) == 1 else (tell_apart(theirs), None)


def _ctc_head(weights: Mapping[str, Tensor], where: str) -> str:
    for head in ("ctc_decoder.decoder_layers.0.", "decoder.decoder_layers.0."):
        if f"{head}weight" in weights:
            return head
    raise CheckpointError(
        f"{where}: no CTC head and no Transformer decoder; a transducer alone cannot be represented"
    )


def _of_ctc(theirs: list[str], rows: int, where: str) -> Units:
    """Our units for CTC: their blank is the last unit, and there is no sos/eos."""
    if rows != len(theirs) + 1:
        raise CheckpointError(f"{where}: {rows} units with blank, its tokenizer has {len(theirs)}")
    units = arrange_units(rows, MADE_UP, MADE_UP, rows - 1, maybe_unit(theirs, "<unk>"))
    theirs.append("<blank>")
    return units


def _of_decoder(
    theirs: list[str], weights: Mapping[str, Tensor], options: Mapping[str, Any], where: str
) -> tuple[Units, list[str]]:
    """Our units, and the prompt. Rows after the last unit are kept as `<unused-1>` and so on."""
    rows = num_rows(weights, "log_softmax.mlp.layer0.weight")
    if not len(theirs) <= rows < len(theirs) + 64:
        raise CheckpointError(
            f"{where}: {rows} units, its tokenizer has {len(theirs)}; it is from another model"
        )
    theirs += [f"<unused-{i}>" for i in range(1, rows - len(theirs) + 1)]
    kind = Options(options, where).choice("prompt_format", "canary", list(PROMPTS))
    start, end = find_unit(theirs, where, STARTS[kind]), find_unit(theirs, where, *ENDS)
    units = arrange_units(rows, start, end, maybe_unit(theirs, "<pad>"), maybe_unit(theirs, "<unk>"))
    return units, [x for x in PROMPTS[kind] if find_unit(theirs, where, x) >= 0]


def _decoder_names() -> Names:
    other = nemo_decoder.DECODER
    computed = f"{NEMO.computed}|{other.computed}"
    return Names({**ENCODER, **other.heads}, {**NEMO.layers, **other.layers}, computed)
