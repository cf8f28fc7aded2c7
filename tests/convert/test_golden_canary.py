"""What NeMo's greedy and beam search find with a Canary decoder, with and without a prompt.

Its beam search is ours (unbounded.py), with three exceptions. In a batch it mixes up the first decoder states
of utterances, as `Theirs` does. Pad also ends a text, except as its first token, and eos as the first token
does not: n-best lists whose beam held these are left out. And it divides the scores of a step by the length
penalties of other hypotheses, which is harmless only while none has ended: other lists are left out, too.

After a prompt its greedy search counts positions from 1, whatever the length of the prompt, so after a prompt
of several tokens some positions occur twice; its beam search continues counting, like ours.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn, tensor

from asr.convert import nemo_decoder
from asr.convert.names import Units, arrange_units, load
from asr.decode.config import SearchConfig
from asr.decode.scorer import Hypothesis
from asr.decode.unbounded import unbounded
from asr.features import FbankConfig
from asr.losses import LossConfig
from asr.model.build import build_model
from asr.model.conformer import ConformerConfig
from asr.model.decoder import Order, in_order
from asr.model.hybrid import HybridModel
from asr.model.state import join
from asr.model.torch_scorer import Hypotheses, Memory, TorchScorer

PARTS = ("transf_decoder.", "log_softmax.", "encoder_decoder_proj.")
STARTS = ["bos", "prompt"]


@dataclass
class Canary:
    config: dict
    arrays: dict[str, Tensor]
    model: HybridModel
    units: Units

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]

    @property
    def utterances(self) -> range:
        return range(len(self["x_lens"]))

    def prompt(self, start: str) -> list[int]:
        """In our units, without the start token."""
        return [self.units.outputs.index(x) for x in self.config["prompt"]] if start == "prompt" else []

    def longest(self, start: str) -> int:
        """Largest number of tokens after the prompt in its greedy search; the beam search allows one more."""
        options = self.config["transf_decoder"]
        num_frames = self["encoder_out"].shape[2] + self.config["max_delta"]
        return min(options["max_sequence_length"], num_frames) - 1 - len(self.prompt(start))

    def written(self, tokens: list[int], start: str) -> list[int]:
        """Their tokens between the prompt and eos."""
        first = 1 + len(self.prompt(start))
        assert tokens[:first] == [self.config["bos"], *self.config["prompt"]][:first]
        end = tokens.index(self.config["eos"]) if self.config["eos"] in tokens else len(tokens)
        return tokens[first:end]

    def memory(self, index: int) -> Memory:
        y = self[f"alone{index}.encoder_out"].transpose(1, 2)
        return Memory(*self.model.decoder.memory(y), y, tensor([y.shape[1]]))


@pytest.fixture(scope="module")
def canary(golden_set: Callable) -> Iterator[Canary]:
    golden = golden_set("nemo_canary_aed")
    options = golden.config
    units = arrange_units(options["vocab_size"], options["bos"], options["eos"], blank=options["pad"])
    weights = {name: x for name, x in golden.weights.items() if name.startswith(PARTS)}
    config = nemo_decoder.decoder_config(options["transf_decoder"], "config.json")
    encoder = ConformerConfig(dim=options["encoder"]["d_model"], num_layers=1, num_heads=1)
    model = build_model(FbankConfig(), encoder, config, LossConfig(), len(units.inputs)).eval()
    parts = nn.ModuleDict({"decoder": model.decoder})
    load(parts, nemo_decoder.decoder_tensors(weights), nemo_decoder.DECODER, "golden", units)
    with torch.no_grad():
        yield Canary(options, golden.arrays, model, units)


class Theirs(TorchScorer):
    """A batch of several utterances as processed by their beam search, and what was in its beam.

    When one hypothesis becomes a beam, theirs gives hypothesis b of utterance n the decoder state of
    the start of utterance (n * beam + b) % N.
    """

    def __init__(self, canary: Canary, index: int, beam: int, start: str) -> None:
        super().__init__(canary.model, "cpu")
        self.first = [self.sos_eos, *canary.prompt(start)]
        self.begun = [self._begin(canary.memory(i)).past for i in canary.utterances]
        self.rows = [(index * beam + b) % len(self.begun) for b in range(beam)]
        self.steps: list[set[int]] = []

    def _begin(self, memory: Memory) -> Hypotheses:
        state = super().start(memory, np.array([0]))
        return super().step(state, np.array([self.first]), 1).state

    def step(self, state, tokens, k, window=None):
        first = not self.steps
        self.steps.append(set(tokens.tolist()))
        return super().step(state, np.array([self.first]) if first else tokens, k, window)

    def select(self, state, index):
        found = super().select(state, index)
        return (
            replace(found, past=join([self.begun[r] for r in self.rows])) if len(self.steps) == 1 else found
        )

    @property
    def is_sound(self) -> bool:
        """Whether no text ended with its first token, which theirs ignores, and none had a later pad."""
        first, *later = self.steps[1:]
        return self.sos_eos not in first and 0 not in set().union(*later)

    @property
    def all_grew(self) -> bool:
        return not {0, self.sos_eos} & set().union(*self.steps[1:])


def search(canary: Canary, scorer: TorchScorer, index: int, beam: int, start: str) -> list[Hypothesis]:
    """The n-best list of an utterance."""
    memory, most = canary.memory(index), canary.longest(start) + 1
    num_frames = int(memory.y_lens)
    config = SearchConfig(beam=beam, nbest=beam, max_tokens=most, extra_tokens=max(most - num_frames, 0))
    frames = np.zeros((num_frames, scorer.num_tokens), np.float32)  # there is no CTC
    return unbounded(scorer, [frames], memory, config)[0]


@pytest.mark.parametrize("start", STARTS)
def test_beam_search(canary, start):
    compared = 0
    for beam, penalty in canary.config["beams"]:
        for i in canary.utterances:
            scorer = Theirs(canary, i, beam, start)
            found = search(canary, scorer, i, beam, start)
            if not scorer.is_sound or (penalty and not scorer.all_grew):
                continue
            name = f"beam{beam}_lp{penalty}.{start}"
            theirs = [canary.written(x, start) for x in canary[f"{name}.nbest"][i].tolist()]
            assert [[canary.units.outputs[v] for v in x.tokens] for x in found] == theirs
            np.testing.assert_allclose(
                [x.score for x in found], canary[f"{name}.scores"][i], rtol=0, atol=1e-3
            )
            assert canary.written(canary[f"{name}.best"][i].tolist(), start) == theirs[0]
            compared += 1
    assert compared


def greedy(
    canary: Canary, index: int, first: list[int], count: int, position: Callable[[int], int]
) -> list[int]:
    """Up to `count` of our units after `first`; the input of step s > 0 is at position(s)."""
    decoder, memory = canary.model.decoder, canary.memory(index)
    heard = memory.cross_keys, memory.cross_values, memory.y_lens
    state, tokens, written = None, tensor([first]), []
    for s in range(count):
        order = None
        if state is not None:
            order = Order(tensor([[position(s)]]), in_order(tokens, state.keys.shape[3]).visible)
        logits, _, state = decoder(tokens, *heard, state, order=order)
        written.append(int(logits[0, -1].argmax()))
        if written[-1] == 1:
            break
        tokens = tensor([written[-1:]])
    return written


@pytest.mark.parametrize("start", STARTS)
def test_greedy_search(canary, start):
    first = [1, *canary.prompt(start)]
    for i in canary.utterances:
        found = greedy(canary, i, first, canary.longest(start), lambda s: s)
        expected = canary.written(canary[f"greedy.{start}.ids"][i].tolist(), start)
        assert [canary.units.outputs[v] for v in found if v != 1][: len(expected)] == expected
        ours = greedy(canary, i, first, canary.longest(start), lambda s: s + len(first) - 1)
        (best,) = search(canary, Theirs(canary, i, 1, start), i, 1, start)
        assert list(best.tokens)[: len(ours)] == [x for x in ours if x != 1]
