"""Whisper's outputs, from samples to transcripts: encoder, searches by its rules, languages.

Sizes, special units and options of decoding are those of the config.json beside the arrays.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn, tensor

from asr.convert.names import Units, load
from asr.convert.whisper import (
    ENGLISH_ONLY,
    NAMES,
    encoder_config,
    features_config,
    num_languages,
    tensors,
    whisper_units,
)
from asr.convert.whisper_decoder import decoder_config
from asr.decode.whisper import Specials, WhisperOptions
from asr.decode.whisper_search import detect_language, search_window
from asr.decode.whisper_times import median_filter, warp
from asr.errors import CheckpointError
from asr.losses import LossConfig
from asr.model.build import build_model
from asr.model.decoder import TransformerDecoder
from asr.model.hybrid import HybridModel
from asr.model.torch_scorer import Memory, TorchScorer
from asr.model.whisper import WhisperEncoder, sinusoid_table
from asr.whisper_tokens import LANGUAGES, whisper_symbols

GPT2_PIECES = 50256
"""In English-only models; the others have one more."""

WINDOW_S = 30
"""Fixed in the reference: its time unit is this divided by the number of encoder frames."""

FIRST_TIME_S = 1


def to_ours(theirs: int, end: int) -> int:
    """Our id of one of their units; `end` is their end of text."""
    return 1 if theirs == end else theirs + 3 - (theirs > end)


def to_theirs(ours: int, end: int) -> int:
    """The inverse, for decoder output."""
    assert ours not in (0, 2)
    return end if ours == 1 else ours - 3 + (ours > end + 2)


@dataclass
class Whisper:
    config: dict
    arrays: dict[str, Tensor]
    model: HybridModel
    units: Units
    specials: Specials
    scorer: TorchScorer
    memory: Memory

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]

    @property
    def end(self) -> int:
        return self.config["special"]["eot"]

    @property
    def utterances(self) -> range:
        return range(len(self["mel"]))

    def ours(self, tokens: list[int]) -> tuple[int, ...]:
        return tuple(to_ours(x, self.end) for x in tokens)

    def theirs(self, tokens: tuple[int, ...]) -> list[int]:
        return [to_theirs(x, self.end) for x in tokens]

    def suppressed(self, tokens: str) -> tuple[int, ...] | None:
        """Our ids of a list separated by commas, in which -1 stands for what is not speech."""
        found = [int(x) for x in tokens.split(",") if x]
        not_speech = self.config["special"]["non_speech_tokens"] if -1 in found else []
        return self.ours([*(x for x in found if x >= 0), *not_speech]) if found else None

    def options(self, name: str) -> WhisperOptions:
        """The options of one of the reference's runs."""
        given = dict(self.config["decode"][name])
        frames = self.config["dims"]["n_audio_ctx"]
        first_time_s = given.pop("max_initial_timestamp", FIRST_TIME_S)
        return WhisperOptions(
            language=given.pop("language", "auto"),
            timestamps=not given.pop("without_timestamps", False),
            beam=given.pop("beam_size", 1),
            suppress_space=given.pop("suppress_blank", True),
            suppress=self.suppressed(given.pop("suppress_tokens", "-1")),
            prompt=self.ours(given.pop("prompt", [])),
            prefix=self.ours(given.pop("prefix", [])),
            max_tokens=given.pop("sample_len", None),
            max_first_time=round(first_time_s * frames / WINDOW_S) if first_time_s else None,
            **given,
        )


def specials_of(config: dict) -> Specials:
    found = config["special"]
    ours = {x: to_ours(i, found["eot"]) for x, i in found.items() if isinstance(i, int)}
    return Specials(
        start=ours["sot"],
        languages={code: to_ours(i, found["eot"]) for code, i in found["languages"].items()},
        translate=ours["translate"],
        transcribe=ours["transcribe"],
        start_lm=ours["sot_lm"],
        start_previous=ours["sot_prev"],
        no_speech=ours["no_speech"],
        no_timestamps=ours["no_timestamps"],
        timestamps=ours["timestamp_begin"],
        space=ours["blank"],
    )


@pytest.fixture(scope="module")
def whisper(golden_set):
    golden = golden_set("openai_whisper")
    dims, special = golden.config["dims"], golden.config["special"]
    units = whisper_units(dims["n_vocab"], special["sot"], special["eot"])
    features, encoder, decoder = features_config(dims), encoder_config(dims), decoder_config(dims)
    model = build_model(features, encoder, decoder, LossConfig(), len(units.inputs)).eval()
    load(parts_of(model), tensors(golden.weights, "whisper"), NAMES, "whisper", units)
    with torch.no_grad():
        y, y_lens = model.encode(golden["mel"].transpose(1, 2), torch.full((len(golden["mel"]),), 0))
        memory = Memory(*model.decoder.memory(y), y, y_lens)
        scorer = TorchScorer(model, "cpu")
        yield Whisper(golden.config, golden.arrays, model, units, specials_of(golden.config), scorer, memory)


def parts_of(model: HybridModel) -> nn.ModuleDict:
    """The modules that a checkpoint has weights for."""
    return nn.ModuleDict({"encoder": model.encoder, "decoder": model.decoder})


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-3)


def test_the_encoder(whisper):
    close(whisper.memory.y, whisper["encoder_out"])
    encoder, x = whisper.model.encoder, whisper["mel"]
    first = whisper["enc.conv1_before_gelu.first_frames"]
    close(encoder.front[0](x)[:, :, : first.shape[2]], first)
    layer, inputs = encoder.layers[0], []
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    encoder(x.transpose(1, 2), torch.zeros(len(x), dtype=torch.int64))
    hook.remove()
    past = torch.zeros(len(x), layer.attention.num_heads, 0, encoder.dim // layer.attention.num_heads)
    heard, _, _ = layer.attention(layer.attention_norm(inputs[0]), past, past, None, None)
    close(heard, whisper["enc.block0.attn_out"])
    close(layer(inputs[0]), whisper["enc.block0.out"])


def test_positions_are_those_of_the_checkpoint(whisper, golden_set):
    weights = golden_set("openai_whisper").weights
    close(sinusoid_table(*whisper.model.encoder.positions.shape), weights["encoder.positional_embedding"])
    other = weights | {"encoder.positional_embedding": weights["encoder.positional_embedding"] + 0.1}
    with pytest.raises(CheckpointError, match=r"a\.pt: encoder.positional_embedding are not the sinusoids"):
        tensors(other, "a.pt")


def test_from_samples_to_logits(whisper):
    size = whisper.model.fbank.window_samples
    rows = [whisper[f"wav{i}"][:size] for i in whisper.utterances]
    lens = tensor([len(row) for row in rows])
    x, x_lens = whisper.model.features(nn.utils.rnn.pad_sequence(rows, batch_first=True), lens)
    y, y_lens = whisper.model.encode(x, x_lens)
    close(y, whisper["encoder_out"])
    decoder, tokens = whisper.model.decoder, whisper["dec.tokens"]
    start = whisper.config["special"]["sot"]
    # the start of the transcript has two input units
    for first in (1, to_ours(start, whisper.end)):
        ours = tensor(
            [[first if x == start else to_ours(x, whisper.end) for x in row] for row in tokens.tolist()]
        )
        logits = decoder(ours, *decoder.memory(y), y_lens).logits
        real = [i for i, x in enumerate(whisper.units.outputs) if x >= 0]
        theirs = torch.empty_like(whisper["dec.logits"])
        theirs[..., [whisper.units.outputs[i] for i in real]] = logits[..., real]
        close(theirs, whisper["dec.logits"])
        made_up = [i for i, x in enumerate(whisper.units.outputs) if x < 0]
        assert logits.softmax(-1)[..., made_up].max() == 0


def test_units_go_both_ways(whisper):
    count = whisper.config["dims"]["n_vocab"]
    ours = whisper.ours(list(range(count)))
    assert sorted(ours) == [1, *range(3, count + 2)]
    assert whisper.theirs(ours) == list(range(count))
    assert [whisper.units.outputs[x] for x in ours] == list(range(count))
    inputs = [whisper.units.inputs[x] for x in ours if x != 1]
    assert inputs == [x for x in range(count) if x != whisper.end]
    assert whisper.units.inputs[1] == whisper.config["special"]["sot"]


def test_the_likeliest_token_each_time(whisper):
    expected = whisper["greedy_raw.tokens"]
    special = whisper.config["special"]
    shown = expected.shape[1] - whisper.config["raw_steps"]
    for i in whisper.utterances:
        before = whisper.ours(expected[i, :shown].tolist())
        assert before[0] == to_ours(special["sot"], whisper.end)
        state = whisper.scorer.start(whisper.memory, np.array([i]))
        tokens, found = np.array([[1, *before[1:]]]), []
        while len(found) < whisper.config["raw_steps"] and 1 not in found:
            step = whisper.scorer.step(state, tokens, 1)
            state, tokens = step.state, step.ids
            found += step.ids[0].tolist()
        assert whisper.theirs(tuple(found)) == expected[i, shown : shown + len(found)].tolist()
        assert (expected[i, shown + len(found) :] == whisper.end).all()


def test_languages(whisper):
    codes = list(whisper.config["special"]["languages"])
    for i in whisper.utterances:
        found = detect_language(whisper.scorer, whisper.memory, i, whisper.specials)
        assert list(found) == codes
        close(tensor(list(found.values())), whisper["detect_language.probs"][i])
        best = max(found, key=found.__getitem__)
        assert whisper.theirs((whisper.specials.languages[best],)) == [whisper["detect_language.tokens"][i]]


def test_transcripts(whisper):
    """Every run of the reference: greedy, beams, patience, penalties, with and without times and prompts."""
    context = whisper.config["dims"]["n_text_ctx"]
    for name in whisper.config["decode"]:
        for i in whisper.utterances:
            options, expected = whisper.options(name), f"decode.{name}.utt{i}"
            found = search_window(whisper.scorer, whisper.memory, i, whisper.specials, options, context)
            assert whisper.theirs(found.tokens) == whisper[f"{expected}.tokens"].tolist(), expected
            assert found.mean_log_prob == pytest.approx(whisper[f"{expected}.avg_logprob"].item(), abs=1e-3)
            assert found.no_speech == pytest.approx(
                whisper[f"{expected}.no_speech_prob"].item(), rel=1e-3, abs=1e-6
            )


def test_every_head_says_where_it_listens(whisper):
    """The reference's attention weights, for all heads of the upper half of the layers and chosen ones."""
    tokens, weights = whisper["dec.tokens"].tolist(), whisper["dec.cross_attention_weights"]
    layers, heads = weights.shape[1:3]
    some = sorted({(0, heads // 2), (0, heads - 1), (layers - 1, 0)})
    asked = [list(x) for x in sorted(some, key=lambda x: -x[0])]  # layers in any order
    chosen = replace(whisper.model.decoder.config, alignment_heads=asked)
    for i in whisper.utterances:
        shown = whisper.ours(tokens[i])
        found = whisper.scorer.listen(whisper.memory, i, shown)
        close(tensor(found), weights[i, layers // 2 :].flatten(0, 1))
        before, whisper.model.decoder.guide = whisper.model.decoder.guide, chosen.guide()
        found = whisper.scorer.listen(whisper.memory, i, shown)
        state = whisper.scorer.start(whisper.memory, np.array([i]))
        step = whisper.scorer.step(state, np.array([shown]), 1)
        whisper.model.decoder.guide = before
        close(tensor(found), torch.stack([weights[i, layer, head] for layer, head in some]))
        close(tensor(step.attention[0]), tensor(found).mean(0)[-1])


def test_paths_and_medians(whisper):
    tokens, frames = warp(whisper["dtw.cost"].double().numpy())
    assert tokens.tolist() == whisper["dtw.text_index"].tolist()
    assert frames.tolist() == whisper["dtw.time_index"].tolist()
    widths = [x for x in whisper.arrays if x.startswith("median.width")]
    assert widths
    for name in widths:
        width = int(name.removeprefix("median.width"))
        np.testing.assert_array_equal(
            median_filter(whisper["median.x"].numpy(), width), whisper[name].numpy()
        )


def test_published_models_have_our_tensors(full_size):
    """Names and shapes for all sizes; there are as many units as symbols."""
    sizes = []
    for model, weights in full_size("whisper"):
        dims = model["options"]
        count, dim = dims["n_vocab"], dims["n_text_state"]
        end = GPT2_PIECES + (count != ENGLISH_ONLY)
        languages = num_languages(count)
        units = whisper_units(count, start=end + 1, end=end)
        with torch.device("meta"):
            encoder = WhisperEncoder(encoder_config(dims), dims["n_mels"])
            decoder = TransformerDecoder(decoder_config(dims), len(units.inputs), encoder.dim)
            parts = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
            load(parts, tensors(weights, model["name"]), NAMES, model["name"], units)
        biases = dims["n_audio_layer"] * dims["n_audio_state"] + 2 * dims["n_text_layer"] * dim
        untied = len(units.inputs) * (dim + 1) + 2 * dim  # blank and unknown, minus the end as an input
        assert sum(p.numel() for p in parts.parameters()) == model["params"] + biases + untied
        symbols = whisper_symbols([b"a"] * end, languages)
        assert len(symbols) == len(units.inputs)
        assert symbols[units.inputs.index(end + 1, 2)] == "<|startoftranscript|>"
        assert symbols[-1] == "<|30.00|>"
        assert set(Specials.of(symbols).languages) == set(LANGUAGES[:languages])
        sizes.append((count, languages))
    assert set(sizes) <= {(51864, 99), (51865, 99), (51866, 100)}
