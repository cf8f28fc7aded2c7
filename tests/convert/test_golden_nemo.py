"""NeMo's outputs: its encoder offline, with limited context, in chunks and as a stream, and its CTC head.

Sizes and options are those of the config.json beside the arrays. Padding is not compared.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn, tensor

from asr.context import WHOLE, Context
from asr.convert.names import MADE_UP, arrange_units, load
from asr.convert.nemo import NEMO, encoder_config
from asr.errors import CheckpointError
from asr.model.build import ENCODERS
from asr.model.fast_conformer import FastConformer
from asr.model.masks import cache_aware

PARTS = ("encoder.", "decoder.")
"""Prefixes of tensor names: all but those of Canary's decoder."""
TINY = {"d_model": 8, "n_layers": 1, "subsampling": "dw_striding"}


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@dataclass
class Golden:
    config: dict
    arrays: dict[str, Tensor]
    weights: dict[str, Tensor]

    @property
    def limits(self) -> list[int]:
        """Left context and look-ahead; of a model for several, theirs takes the first."""
        sizes = self.config["encoder"]["att_context_size"]
        return sizes[0] if isinstance(sizes[0], list) else sizes

    def encoder(self, **changes: object) -> FastConformer:
        """Their encoder, with changed options that no tensor depends on."""
        config = replace(encoder_config(self.config["encoder"], "config.json"), **changes)
        model = nn.ModuleDict({"encoder": FastConformer(config, self.config["encoder"]["feat_in"])})
        ours = {x: v for x, v in self.weights.items() if x.startswith("encoder.")}
        load(model, ours, NEMO, "weights.safetensors")
        return model.eval()["encoder"]  # type: ignore[return-value]

    def assert_encodes(self, encoder: FastConformer, name: str, context: Context = WHOLE) -> None:
        """The batch, and each utterance alone."""
        x, x_lens = self.arrays["x"].transpose(1, 2), self.arrays["x_lens"]
        y, y_lens, _ = encoder(x, x_lens, None, *context)
        expected = self.arrays[f"{name}encoder_out"].transpose(1, 2)
        assert torch.equal(y_lens, self.arrays[f"{name}encoder_out_lens"])
        for i, n in enumerate(y_lens.tolist()):
            close(y[i, :n], expected[i, :n])
            if (alone := f"{name}alone{i}.encoder_out") in self.arrays:
                one, _, _ = encoder(x[i : i + 1, : x_lens[i]], x_lens[i : i + 1], None, *context)
                close(one.transpose(1, 2), self.arrays[alone])


def read(folder: Path) -> Golden:
    with np.load(folder / "io.npz") as arrays:
        found = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    config = json.loads((folder / "config.json").read_text())
    return Golden(config, found, load_file(folder / "weights.safetensors"))


def close(actual: Tensor, expected: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.fixture
def whole(golden_folder: Callable[[str], Path]) -> Golden:
    return read(golden_folder("nemo_fastconformer"))


@pytest.fixture
def streaming(golden_folder: Callable[[str], Path]) -> Golden:
    return read(golden_folder("nemo_fastconformer_streaming"))


def test_the_encoder_at_once(whole: Golden) -> None:
    whole.assert_encodes(whole.encoder(), "rel_pos.")


def test_the_encoder_of_canary(golden_folder: Callable[[str], Path]) -> None:
    canary = read(golden_folder("nemo_canary_aed"))
    canary.assert_encodes(canary.encoder(), "")


def test_the_subsampling_and_every_module_of_a_layer(whole: Golden) -> None:
    encoder = whole.encoder()
    i = int(whole.arrays["layer0.utterance_index"])
    n = whole.arrays["x_lens"][i : i + 1]
    heard: dict[str, Tensor] = {}
    layer = encoder.layers[0]
    modules = {
        "norm_feed_forward1": layer.feed_forward_1[0],
        "feed_forward1": layer.feed_forward_1,
        "norm_self_att": layer.attention_norm,
        "self_attn": layer.attention,
        "norm_conv": layer.convolution.norm,
        "conv": layer.convolution,
        "norm_feed_forward2": layer.feed_forward_2[0],
        "feed_forward2": layer.feed_forward_2,
        "norm_out": layer,
    }
    for name, module in modules.items():
        module.register_forward_hook(
            lambda _, __, y, name=name: heard.update({name: y[0] if isinstance(y, tuple) else y})
        )
    encoder.front.register_forward_hook(lambda _, __, y: heard.update({"front": y}))
    encoder(whole.arrays["x"][i : i + 1, :, : int(n)].transpose(1, 2), n)
    close(heard.pop("front"), whole.arrays["pre_encode.out"])
    for name, y in heard.items():
        close(y, whole.arrays[f"layer0.{name}"])


def test_limited_context_in_blocks_and_with_a_mask(whole: Golden) -> None:
    for left, right in whole.config["limited"]:
        name = f"rel_pos_ctx_{left}_{right}."
        whole.assert_encodes(whole.encoder(), name, Context(1, left, right))
        whole.assert_encodes(whole.encoder(context=[left, right]), name)


def test_local_attention_with_and_without_global_tokens(whole: Golden) -> None:
    for (left, right), num_global in whole.config["local"]:
        encoder = whole.encoder(context=[left, right], global_tokens=num_global)
        whole.assert_encodes(encoder, f"local_{left}_{right}_global{num_global}.")


def test_ctc_with_units_in_our_order(whole: Golden) -> None:
    count = whole.config["vocab_size"] + 1
    units = arrange_units(count, sos=MADE_UP, eos=MADE_UP, blank=count - 1, unk=0)
    head = nn.ModuleDict({"ctc": nn.Linear(whole.config["encoder"]["d_model"], len(units.outputs))})
    ours = {x: v for x, v in whole.weights.items() if x.startswith("decoder.")}
    load(head, ours, NEMO, "weights.safetensors", units)
    y = whole.arrays["rel_pos.encoder_out"].transpose(1, 2)
    log_probs = head["ctc"](y).log_softmax(-1)
    assert (log_probs[..., 1] < -1e3).all()
    for i, n in enumerate(whole.arrays["rel_pos.encoder_out_lens"].tolist()):
        expected = whole.arrays["rel_pos.ctc_log_probs"][i, :n, [count - 1, *range(count - 1)]]
        close(log_probs[i, :n, [0, *range(2, len(units.outputs))]], expected)


def test_chunks_at_once(streaming: Golden) -> None:
    streaming.assert_encodes(streaming.encoder(), "offline.", cache_aware(*streaming.limits))


def test_a_stream_and_its_state_after_every_call(streaming: Golden) -> None:
    """Their first call has fewer feature frames than ours, so states are compared, not calls."""
    encoder, arrays = streaming.encoder(), streaming.arrays
    left, right = streaming.limits
    context = cache_aware(left, right)
    step = context.chunk * encoder.subsampling
    for i, n in enumerate(arrays["x_lens"].tolist()):
        x = nn.functional.pad(arrays["x"][i, :, :n].T[None], (0, 0, 0, encoder.flush_frames(0)))
        state, parts = encoder.init_state(1, left), []
        for number, start in enumerate(range(0, n, step)):
            is_last = start + step >= n
            window = x[:, start:] if is_last else x[:, start : start + step]
            num_frames = tensor([n - start if is_last else step])
            y, y_lens, state = encoder(window, num_frames, state, *context)
            parts.append(y[:, : int(y_lens)])
            if f"stream.alone{i}.step{number}.out" in arrays and not is_last:
                close(y.transpose(1, 2), arrays[f"stream.alone{i}.step{number}.out"])
                conv = arrays[f"stream.alone{i}.step{number}.cache_last_time"].transpose(0, 1)
                close(state.conv, conv)
        close(torch.cat(parts, dim=1).transpose(1, 2), arrays[f"stream.alone{i}.encoder_out"])


def test_every_tensor_of_the_public_models_has_its_place(full_size: Callable) -> None:
    for model, weights in full_size("nemo"):
        options = model["options"]
        parts: dict[str, nn.Module] = {}
        with torch.device("meta"):
            config = encoder_config(options["encoder"], "config.json")
            parts["encoder"] = FastConformer(config, options["encoder"]["feat_in"])
            if not options["decoder"]:
                parts["ctc"] = nn.Linear(config.dim, options["vocab_size"] + 1)
            ours = {x: v for x, v in weights.items() if x.startswith(PARTS)}
            load(nn.ModuleDict(parts), ours, NEMO, model["name"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subsampling": "striding"}, r"encoder\.subsampling: 'striding', expected dw_striding, as"),
        ({"untie_biases": False}, "encoder.untie_biases: False, expected True"),
        ({"global_attn_separate": True}, "encoder.global_attn_separate: True"),
        ({"causal_downsampling": True}, r"causal_downsampling and encoder.conv_context_size disagree"),
    ],
)
def test_what_cannot_be_converted_is_said(change: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"model_config.yaml: .*{message}"):
        encoder_config(TINY | change, "model_config.yaml")


def test_contexts_of_a_streaming_model_are_those_of_training() -> None:
    sizes = [[70, 13], [70, 6], [70, 1], [70, 0]]
    options = TINY | {"causal_downsampling": True, "conv_context_size": "causal"}
    options |= {"att_context_size": sizes, "att_context_style": "chunked_limited"}
    config = encoder_config(options, "model_config.yaml")
    assert config.chunk.contexts == sizes
    assert config.chunk.dynamic
    assert config.context == [-1, -1]
    assert config.type in ENCODERS
