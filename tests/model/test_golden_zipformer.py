"""The Zipformer against icefall's outputs: modules, whole utterances, masked chunks, and streams.

Sizes and options are those of the config.json beside the arrays. In the reference padding affects the
shorter utterances of a batch, so ours are compared with its output for each utterance alone.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn, tensor

from asr.config import load_config
from asr.convert.icefall import all_names, icefall_names
from asr.convert.names import Units, load
from asr.errors import CheckpointError
from asr.model.layers import BiasNorm, swoosh_l, swoosh_r
from asr.model.zipformer import Zipformer, ZipformerConfig
from asr.model.zipformer_convolution import ChunkConvolution, Edges
from asr.model.zipformer_front import SIDE
from asr.model.zipformer_layer import compact_positions
from asr.model.zipformer_stack import Downsample

CONF = Path(__file__).parents[2] / "recipes" / "conf"
SETS = ["icefall_zipformer2", "icefall_zipformer2_causal"]
OPTIONS = {  # ours: theirs
    "dims": "encoder_dim",
    "unmasked_dims": "encoder_unmasked_dim",
    "rates": "downsampling_factor",
    "depths": "num_encoder_layers",
    "num_heads": "num_heads",
    "query_dims": "query_head_dim",
    "value_dims": "value_head_dim",
    "position_head_dims": "pos_head_dim",
    "position_dim": "pos_dim",
    "ff_dims": "feedforward_dim",
    "kernel_sizes": "cnn_module_kernel",
    "causal": "causal",
}
LAYER = {  # theirs: ours
    "feed_forward1": "feed_forward_1",
    "nonlin_attention": "nonlinear",
    "self_attn1": "attention_1",
    "conv_module1": "convolution_1",
    "feed_forward2": "feed_forward_2",
    "bypass_mid": "bypass_middle",
    "self_attn2": "attention_2",
    "conv_module2": "convolution_2",
    "feed_forward3": "feed_forward_3",
    "norm": "norm",
    "bypass": "bypass",
}
EMBED = {  # theirs: ours
    "embed_conv0": "convolutions.0",
    "embed_conv4": "convolutions.1",
    "embed_conv7": "convolutions.2",
    "embed_convnext": "mix",
    "embed_linear": "out",
    "embed_out_norm": "norm",
}


class Model(nn.Module):
    """The parts that HybridModel has of it."""

    def __init__(self, options: dict) -> None:
        super().__init__()
        config = ZipformerConfig(**{ours: options[theirs] for ours, theirs in OPTIONS.items()})
        self.encoder = Zipformer(config, options["feature_dim"])
        self.ctc = nn.Linear(config.dim, options["vocab_size"])


@dataclass
class Golden:
    config: dict
    arrays: dict[str, Tensor]
    model: Model

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]

    @property
    def utterances(self) -> range:
        return range(len(self["x_lens"]))

    def x(self, index: int) -> tuple[Tensor, Tensor]:
        """One utterance without padding."""
        n = int(self["x_lens"][index])
        return self["x"][index : index + 1, :n], tensor([n])

    def contexts(self, kind: str) -> list[tuple[int, int, str]]:
        """Our chunk and left context, in frames twice as long, and the prefix of their array names.

        Theirs masks whole chunks, at least one, but a stream attends to all that it caches.
        """
        return [
            (
                chunk // 2,
                -(-left // chunk) if kind == "stream" else max(left // chunk, 1) if left >= 0 else -1,
                f"{kind}.chunk{chunk}_left{left}",
            )
            for chunk, left in self.config["streams"]
        ]


def load_icefall(model: nn.Module, weights: dict, where: str, units: Units | None = None) -> None:
    load(model, weights, all_names(list(model.state_dict())), where, units)


def close(actual: Tensor, expected: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def read(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    with np.load(folder / "io.npz") as arrays:
        found = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    return json.loads((folder / "config.json").read_text()), found


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=SETS)
def icefall(golden: Path, request: pytest.FixtureRequest) -> Golden:
    config, arrays = read(golden / request.param)
    model = Model(config).eval()
    load_icefall(model, load_file(golden / request.param / "weights.safetensors"), request.param)
    return Golden(config, arrays, model)


# ---- whole utterances


def check(icefall: Golden, chunk: int, left: int, name: str) -> None:
    encoder = icefall.model.encoder
    y, y_lens, _ = encoder(icefall["x"], icefall["x_lens"], None, chunk, left)
    assert torch.equal(y_lens, icefall[f"{name}.encoder_out_lens"])
    for i, n in enumerate(y_lens.tolist()):
        alone, _, _ = encoder(*icefall.x(i), None, chunk, left)
        expected = icefall[f"{name}.alone{i}.encoder_out"]
        close(alone, expected)
        close(y[i : i + 1, :n], expected)
        log_probs = icefall.model.ctc(alone).log_softmax(-1)
        close(log_probs, icefall[f"{name}.alone{i}.ctc_log_probs"])
        if n == y.shape[1]:  # no padding in the reference's batch either
            close(y[i], icefall[f"{name}.encoder_out"][i])
            close(log_probs[0], icefall[f"{name}.ctc_log_probs"][i])


def test_whole_utterances_alone_and_in_a_batch(icefall):
    check(icefall, 0, -1, "full")


def test_masked_chunks(icefall):
    for chunk, left, name in icefall.contexts("mask"):
        check(icefall, chunk, left, name)


def test_ctc_log_probabilities(icefall):
    found = icefall.model.ctc(icefall["full.encoder_out"]).log_softmax(-1)
    close(found, icefall["full.ctc_log_probs"])


def test_the_front(icefall):
    front = icefall.model.encoder.front
    for i in icefall.utterances:
        x, x_lens = icefall.x(i)
        x = nn.functional.pad(x, (0, 0, 0, icefall.model.encoder.flush_frames(0)))
        y, y_lens, _ = front(x, x_lens, front.init_frames(1), None)
        assert y_lens == icefall["embed.out_lens"][i]
        end = int(y_lens) - (SIDE if y_lens < icefall["embed.out"].shape[1] else 0)  # there it sees padding
        close(y[0, :end], icefall["embed.out"][i, :end])


# ---- modules


def hook(module: nn.Module, seen: dict[str, Tensor], name: str, inputs: tuple[str, ...] = ()) -> None:
    """Keep the output of a module, and its named inputs."""

    def keep(_: nn.Module, args: tuple, output: object) -> None:
        seen[name] = output[0] if isinstance(output, tuple) else output
        seen.update((key, value) for key, value in zip(inputs, args, strict=False) if key)

    module.register_forward_hook(keep)


def test_the_modules(golden):
    checked = 0
    for name in SETS:
        if not (golden / name).is_dir():
            continue
        options, arrays = read(golden / name)
        if not options["sub_layer"]:
            continue
        model = Model(options).eval()
        load_icefall(model, load_file(golden / name / "weights.safetensors"), name)
        checked += check_modules(Golden(options, arrays, model))
    if not checked:
        pytest.skip("no set says what the modules of a layer do")


def check_modules(icefall: Golden) -> int:
    number, layer_number = icefall.config["sub_layer"]
    encoder, seen = icefall.model.encoder, {}
    stack = encoder.stacks[number]
    layer = stack.layers[layer_number]
    for theirs, ours in EMBED.items():
        hook(encoder.front.get_submodule(ours), seen, theirs)
    for theirs, ours in LAYER.items():
        hook(layer.get_submodule(ours), seen, theirs, ("norm_in",) if ours == "norm" else ())
    hook(layer.weights, seen, "self_attn_weights")
    hook(layer, seen, "layer_out", ("layer_in", "", "sight"))
    if stack.downsample is not None:
        hook(stack.downsample, seen, "downsample")
        hook(stack.bypass, seen, "out_combiner", ("", "upsample"))
    for i, other in enumerate(encoder.stacks):
        hook(other, seen, f"stack{i}_out", ("stack_in",) if i == number else ())
    with torch.enable_grad():  # so that nothing is computed in pieces, which hooks would see one by one
        encoder(*icefall.x(int(icefall["sub.utterance_index"])))
    length = len(icefall["sub.layer_in"])
    checked = 0
    for key in [x.removeprefix("sub.") for x in icefall.arrays if x.startswith("sub.")]:
        if key in ("utterance_index", "pos_emb"):
            continue
        expected = icefall[f"sub.{key}"]
        close(as_theirs(key, seen[key], expected), expected)
        checked += 1
    positions, width = seen["sight"].positions, len(seen["sight"].positions) // 2
    close(positions[width - length : width + length - 1], icefall["sub.pos_emb"][0])
    return checked


def as_theirs(key: str, x: Tensor, expected: Tensor) -> Tensor:
    """Without the frames that only we have: after the end, or because they kept the first ones."""
    if key.startswith("embed_"):
        return x[:, :, : expected.shape[2]] if x.dim() == 4 else x[:, : expected.shape[1]]
    x = x.transpose(0, 1)
    if key == "self_attn_weights":
        return x[:, :, : expected.shape[2], : expected.shape[3]]
    return x[: len(expected)]


# ---- streams


def test_chunk_by_chunk_with_caches(icefall):
    widths = [left // 2 for _, left in icefall.config["streams"]]
    for width, (chunk, left, name) in zip(widths, icefall.contexts("stream"), strict=True):
        for i in icefall.utterances:
            x, _ = icefall.x(i)
            check_stream(icefall, x, chunk, left, width, f"{name}.alone{i}")
        check_stream(icefall, icefall["x"], chunk, left, width, f"{name}.batch")


def check_stream(icefall: Golden, x: Tensor, chunk: int, left: int, width: int, name: str) -> None:
    """The reference streams on into silence, log(1e-10), until all frames have come out."""
    encoder = icefall.model.encoder
    step, count = chunk * encoder.subsampling, int(icefall[f"{name}.num_chunks"])
    length = count * step + encoder.overlap_frames
    x = nn.functional.pad(x, (0, 0, 0, length - x.shape[1]), value=math.log(1e-10))
    state, parts = encoder.init_state(len(x), width), []
    for number in range(count):
        part = x[:, number * step : (number + 1) * step + encoder.overlap_frames]
        y, _, state = encoder(part, tensor([part.shape[1]] * len(x)), state, chunk, left)
        parts.append(y)
        if f"{name}.after{number}.state0" in icefall.arrays:
            check_state(icefall, state, f"{name}.after{number}.state")
    y = torch.cat(parts, dim=1)
    close(y, icefall[f"{name}.encoder_out"])
    close(icefall.model.ctc(y).log_softmax(-1), icefall[f"{name}.ctc_log_probs"])


def check_state(icefall: Golden, state, name: str) -> None:
    encoder, number = icefall.model.encoder, 0
    for stack, pasts in zip(
        encoder.stacks, encoder.layout.unpack(state.memory, state.convolutions), strict=True
    ):
        for layer, past in zip(stack.layers, pasts, strict=True):
            keys, hidden, *values = past.memory.split(layer.memory_dims, dim=-1)
            ours = [keys.transpose(0, 1), hidden[None], *(x.transpose(0, 1) for x in values)]
            for x in [*ours, *past.convolutions.unbind(1)]:
                close(x, icefall[f"{name}{number}"])
                number += 1
    close(state.frames, icefall[f"{name}{number}"])
    assert torch.equal(2 * state.offset, icefall[f"{name}{number + 1}"].long())
    assert f"{name}{number + 2}" not in icefall.arrays


def test_streams_equal_the_masked_reference_to_the_end(icefall):
    """The reference's own streams do not, since they attend to the padding at the end."""
    encoder = icefall.model.encoder
    for chunk, left, name in icefall.contexts("mask"):
        step = chunk * encoder.subsampling
        x = nn.functional.pad(icefall["x"], (0, 0, 0, step + encoder.overlap_frames), value=9.0)
        state, parts = encoder.init_state(len(x), left * chunk), []
        for start in range(0, icefall["x"].shape[1], step):
            part = x[:, start : start + step + encoder.overlap_frames]
            lens = (icefall["x_lens"] - start).clamp(0, part.shape[1])
            y, _, state = encoder(part, lens, state, chunk, left)
            parts.append(y)
        y = torch.cat(parts, dim=1)
        for i in icefall.utterances:
            expected = icefall[f"{name}.alone{i}.encoder_out"]
            close(y[i : i + 1, : expected.shape[1]], expected)


# ---- what training needs


@pytest.fixture(scope="module")
def training(golden: Path) -> tuple[dict, dict[str, Tensor]]:
    return read(golden / "icefall_zipformer2_training")


def test_bias_norm_and_its_gradients(training):
    _, arrays = training
    norm = BiasNorm(len(arrays["biasnorm.bias"])).eval()
    norm.load_state_dict({name: arrays[f"biasnorm.{name}"] for name in ("bias", "log_scale")})
    x = arrays["biasnorm.x"].clone().requires_grad_()
    with torch.enable_grad():
        y = norm(x)
        y.backward(arrays["biasnorm.grad_out"])
    expected = {"y": y, "grad_x": x.grad, "grad_bias": norm.bias.grad, "grad_log_scale": norm.log_scale.grad}
    for name, found in expected.items():
        torch.testing.assert_close(found.detach(), arrays[f"biasnorm.{name}"], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("name", "swoosh"), [("swoosh_l", swoosh_l), ("swoosh_r", swoosh_r)])
def test_activations_and_their_derivatives(training, name, swoosh):
    _, arrays = training
    x = arrays["swoosh.x"].clone().requires_grad_()
    with torch.enable_grad():
        y = swoosh(x)
        (derivative,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y.detach(), arrays[f"{name}.y"], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(derivative, arrays[f"{name}.deriv"], atol=1e-6, rtol=1e-4)


def test_the_chunked_convolution(training):
    config, arrays = training
    options = config["chunkconv"]
    kernel_size = options["kernel_size"]
    convolution = ChunkConvolution(options["channels"], kernel_size)
    names = {"past": "causal_conv", "within": "chunkwise_conv"}
    weights = {
        f"{ours}.{x}": arrays[f"chunkconv.param.{name}.{x}"]
        for ours, name in names.items()
        for x in ("weight", "bias")
    }
    weights = {name: x[:, :, None] if x.dim() == 3 else x for name, x in weights.items()}
    convolution.load_state_dict(weights | {"edges": arrays["chunkconv.param.chunkwise_conv_scale"]})
    x = arrays["chunkconv.x"]
    n, _, length = x.shape
    seen = nn.functional.pad(x, (kernel_size // 2, 0))
    for theirs in options["chunk_sizes"]:
        for chunk in (max(theirs, 0), tensor(max(theirs, 0))):
            edges = Edges.at(torch.zeros(n, dtype=torch.int64), tensor([length] * n), length, chunk)
            torch.testing.assert_close(
                convolution(seen, edges), arrays[f"chunkconv.out.chunk{theirs}"], atol=1e-6, rtol=1e-4
            )


def test_the_table_of_positions(training):
    _, arrays = training
    for name, table in arrays.items():
        if name.startswith("rel_pos."):
            length, _, rest = name.removeprefix("rel_pos.T").partition("_")  # T9, T5_left4, T300_head
            length, width = int(length), int(rest.removeprefix("left")) if rest.startswith("left") else 0
            ours = compact_positions(1 - width - length, length - 1, table.shape[2])
            torch.testing.assert_close(ours[: table.shape[1]], table[0], atol=1e-5, rtol=1e-4)


def test_downsampling(training):
    _, arrays = training
    x, scores = arrays["downsample.x"].transpose(0, 1), arrays["downsample.bias"]
    downsample = Downsample(len(scores))
    downsample.load_state_dict({"scores": scores})
    lens = tensor([x.shape[1]] * len(x))
    y = downsample(nn.functional.pad(x, (0, 0, 0, -x.shape[1] % len(scores)), value=9.0), lens)
    torch.testing.assert_close(y.transpose(0, 1), arrays["downsample.y"], atol=1e-6, rtol=1e-4)


# ---- full sizes


def published(golden: Path) -> dict[str, dict]:
    """What is known of each model of full size, by name."""
    file = golden / "checkpoint_tables" / "config.json"
    if not file.exists():
        pytest.skip(f"{file} is not there")
    return {x["name"]: x for x in json.loads(file.read_text()) if x["name"].startswith("icefall_")}


def test_names_and_shapes_of_public_checkpoints(golden):
    for name, public in published(golden).items():
        check_names(public, golden / "checkpoint_tables" / f"{name}.tsv")


def check_names(public: dict, table: Path) -> None:
    with torch.device("meta"):
        model = Model(public["options"])
    rows = [row.split("\t") for row in table.read_text().splitlines()[1:]]
    theirs = {x: [] if shape == "scalar" else list(map(int, shape.split("x"))) for x, shape, _ in rows}
    theirs = {
        x: shape
        for x, shape in theirs.items()
        if not re.match(all_names(list(model.state_dict())).computed, x)
    }
    ours = {x: list(tensor_.shape) for x, tensor_ in model.state_dict().items()}
    names = icefall_names(list(ours))
    assert set(names) == set(ours)
    assert sorted(names.values()) == sorted(theirs)
    for x, y in names.items():
        assert [n for n in ours[x] if n > 1] == [n for n in theirs[y] if n > 1], (x, y)
    assert sum(p.numel() for p in model.parameters()) == public["params_ctc_only"]


@pytest.mark.parametrize(
    ("name", "size"),
    [("s", "S"), ("m", "M"), ("l", "L"), ("m-streaming", "M_causal"), ("s-streaming", "S")],
)
def test_configurations_are_those_of_public_models(golden, name, size):
    found, public = load_config([CONF / f"zipformer-{name}.yaml"]).encoder, published(golden)
    if f"icefall_zipformer_{size}" not in public:
        pytest.skip(f"the set has no {size}")
    options = public[f"icefall_zipformer_{size}"]["options"]
    expected = {ours: options[theirs] for ours, theirs in OPTIONS.items()}
    expected["causal"] = name.endswith("streaming")
    assert {ours: getattr(found, ours) for ours in OPTIONS} == expected


def test_checkpoints_that_do_not_fit(golden_folder):
    folder = golden_folder(SETS[0])
    options, _ = read(folder)
    weights, model = load_file(folder / "weights.safetensors"), Model(options)
    with pytest.raises(
        CheckpointError, match=r"^a\.pt: 1 tensors do not fit: encoder\.other \(1,\) is unused$"
    ):
        load_icefall(model, weights | {"encoder.other": torch.zeros(1)}, "a.pt")
    name, ours = "encoder.downsample_output.bias", r"encoder\.downsample"
    value = weights.pop(name)
    with pytest.raises(CheckpointError, match=rf"{name} is missing for {ours}\.scores"):
        load_icefall(model, weights, "a.pt")
    wrong = {name: torch.zeros(len(value) + 1)}
    with pytest.raises(CheckpointError, match=rf"{name} \(\d+,\) does not fit {ours}"):
        load_icefall(model, weights | wrong, "a.pt")


def test_units_in_another_order(golden_folder):
    folder = golden_folder(SETS[0])
    options, _ = read(folder)
    weights, model = load_file(folder / "weights.safetensors"), Model(options)
    order = list(reversed(range(options["vocab_size"])))
    load_icefall(model, weights, "a.pt", Units(order, order))
    assert torch.equal(model.ctc.weight, weights["ctc_output.1.weight"].flip(0))
