"""Parameter names of other families: joined tensors, rows of units, and what does not fit."""

import pytest
import torch
from torch import nn

from asr.convert.names import MADE_UP, Layers, Names, Units, add_biases, arrange_units, load
from asr.errors import CheckpointError
from asr.model.decoder import DecoderConfig, TransformerDecoder

NUM_UNITS, DIM = 7, 8
LAYER = {
    "attention.project.": ("att.q.", "att.k.", "att.v."),
    "attention.out.": ("att.o.",),
    "attention_norm.": ("n1.",),
    "cross_norm.": ("n2.",),
    "cross.query.": ("src.q.",),
    "cross.out.": ("src.o.",),
    "feed_forward.": ("ff.",),
}
NAMES = Names(
    {"decoder.embedding.": "dec.embed.", "decoder.norm.": "dec.norm.", "decoder.out.": "dec.out."},
    {"decoder.": Layers("dec.layers.", LAYER, ("src.k.", "src.v."))},
    computed=r"\.table$",
)


def decoder(num_units: int = NUM_UNITS) -> nn.ModuleDict:
    config = DecoderConfig(dim=DIM, num_layers=2, num_heads=2, ff_dim=12)
    return nn.ModuleDict({"decoder": TransformerDecoder(config, num_units, 5)})


def theirs(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors under the names of the other family."""
    found = {}
    for name, x in model.state_dict().items():
        sources = NAMES.sources(list(model.state_dict()))[name]
        found |= dict(zip(sources, x.chunk(len(sources)), strict=True))
    return found


def test_all_tensors_come_from_theirs():
    wanted, model = decoder(), decoder()
    load(model, theirs(wanted) | {"dec.pe.table": torch.zeros(3)}, NAMES, "a.pt")
    for name, x in wanted.state_dict().items():
        assert torch.equal(x, model.state_dict()[name]), name


def test_keys_of_all_layers_stand_before_the_values():
    sources = NAMES.sources(list(decoder().state_dict()))["decoder.cross.weight"]
    assert sources == [f"dec.layers.{i}.src.{x}.weight" for x in "kv" for i in range(2)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop("dec.layers.1.att.k.bias"),
            r"dec\.layers\.1\.att\.k\.bias is missing for dec.*24",
        ),
        (
            lambda w: w.update(extra=torch.zeros(2, 3)),
            r"a\.pt: 1 tensors .* extra \(2, 3\) is unused",
        ),
        (
            lambda w: w.update({"dec.norm.weight": torch.zeros(9)}),
            r"dec\.norm\.weight \(9,\) does not fit decoder\.norm\.weight \(8,\)",
        ),
        (
            lambda w: w.update({"dec.out.bias": torch.zeros(9)}),
            r"dec\.out\.bias \(9,\) does not fit decoder\.out\.bias \(7,\)",
        ),
        (
            lambda w: w.update({"dec.out.bias": torch.zeros(7, dtype=torch.int8)}),
            r"dec\.out\.bias \(7,\) of int8 does not fit decoder\.out\.bias \(7,\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    weights = theirs(decoder())
    change(weights)
    with pytest.raises(CheckpointError, match=message):
        load(decoder(), weights, NAMES, "a.pt")


@pytest.mark.parametrize("count", [5, 6, 8])
def test_units_are_as_many_as_there_are_rows(count):
    units = arrange_units(count, sos=1, eos=2)  # two units are added: 5 rows would become 7
    with pytest.raises(CheckpointError, match=r"dec\.out\.bias \(7,\) does not fit decoder\.out\.bias"):
        load(decoder(len(units.inputs)), theirs(decoder()), NAMES, "a.pt", units)


def test_one_unit_begins_and_ends_a_text():
    assert arrange_units(6, sos=4, eos=4, blank=0, unk=2) == Units([0, 4, 2, 1, 3, 5], [0, 4, 2, 1, 3, 5])


def test_what_begins_a_text_may_also_be_a_unit_of_it():
    units = arrange_units(7, sos=3, eos=5, blank=0, unk=1)
    assert units == Units([0, 3, 1, 2, 3, 4, 6], [0, 5, 1, 2, 3, 4, 6])
    assert sorted(units.outputs) == list(range(7))


def test_units_that_are_not_there_are_made_up():
    assert arrange_units(3, sos=2, eos=1) == Units([MADE_UP, 2, MADE_UP, 0, 2], [MADE_UP, 1, MADE_UP, 0, 2])


def test_texts_are_as_probable_whatever_the_units_are_called():
    """Rows move with their units; added units change nothing and are never emitted."""
    wanted = decoder().eval()
    units = arrange_units(NUM_UNITS, sos=4, eos=2)
    model = decoder(len(units.inputs)).eval()
    load(model, theirs(wanted), NAMES, "a.pt", units)
    y, y_lens = torch.randn(1, 4, 5), torch.tensor([4])
    text = [4, 0, 6, 6, 4, 5]
    ours = [1, *(units.outputs.index(x) for x in text[1:])]
    before, after = (
        x["decoder"](torch.tensor([tokens]), *x["decoder"].memory(y), y_lens).logits.log_softmax(-1)
        for x, tokens in ((wanted, text), (model, ours))
    )
    real = [i for i, x in enumerate(units.outputs) if x != MADE_UP]
    torch.testing.assert_close(after[..., real], before[..., [units.outputs[i] for i in real]])
    made_up = [i for i in range(len(units.outputs)) if i not in real]
    assert len(made_up) == 2
    assert (after[..., made_up] < -1e3).all()


def test_biases_that_are_not_there_are_zeros():
    weights = {
        "a.key.weight": torch.ones(3, 2),
        "b.key.weight": torch.ones(4, 2),
        "b.key.bias": torch.ones(4),
    }
    found = add_biases(weights | {"a.query.weight": torch.ones(3, 2)}, r"\.key")
    assert found.keys() - weights.keys() == {"a.key.bias", "a.query.weight"}
    assert torch.equal(found["a.key.bias"], torch.zeros(3))
    assert torch.equal(found["b.key.bias"], torch.ones(4))
