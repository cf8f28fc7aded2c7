"""The decoder commits text during speech: partial texts only grow, whatever the pieces."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from asr.decode.config import SearchConfig
from asr.decode.scorer import Floats
from asr.decode.words import word_starts
from asr.model.hybrid import HybridModel
from asr.model.torch_scorer import TorchScorer
from asr.runtime import Bundle, EndpointConfig, Event, Stream, StreamConfig

MODES = ["alignatt", "edatt", "triggered"]
SEARCH = SearchConfig(beam=3, ctc_weight=0.9, margin_frames=2, recent_share=0.3, trigger_frames=4)
NO_ENDPOINTS = EndpointConfig(trailing_s=1e6, silence_s=1e6, max_s=1e6)


def run(bundle: Bundle, samples: Floats, config: StreamConfig, size: int) -> list[Event]:
    stream, events = Stream(bundle, config), []
    for start in range(0, len(samples), size):
        events += stream.accept(samples[start : start + size])
    return events + stream.finish()


@pytest.mark.parametrize("target", ["float32", "int8"])
@pytest.mark.parametrize("mode", MODES)
def test_partial_texts_only_grow_into_the_final_one(
    request: pytest.FixtureRequest, sound: Floats, mode: str, target: str
):
    bundle = request.getfixturevalue(target)
    sound = sound[:45000]
    config = StreamConfig(mode=mode, chunk_ms=320, search=SEARCH, endpoint=NO_ENDPOINTS)
    events = run(bundle, sound, config, 5000)
    assert [event.final for event in events] == [False] * (len(events) - 1) + [True]
    assert len(events) > 1 or mode == "edatt"  # attention of random weights is never on so few frames
    for event, following in itertools.pairwise(events):
        assert following.text.startswith(event.text)
        assert " ".join(word.word for word in following.words) == following.text
    assert run(bundle, sound, config, 1601) == events


@pytest.mark.parametrize("mode", MODES)
def test_utterances_follow_each_other_and_each_only_grows(float32: Bundle, sound: Floats, mode: str):
    short = EndpointConfig(trailing_s=0.2, silence_s=0.4, max_s=2.0)
    config = StreamConfig(mode=mode, chunk_ms=160, search=SEARCH, endpoint=short)
    events = run(float32, np.concatenate((sound[:40000], sound[50000:])), config, 8000)
    assert sum(event.final for event in events) > 2
    shown = ""
    for event in events:
        assert event.text.startswith(shown)
        shown = "" if event.final else event.text


@pytest.mark.parametrize("mode", ["alignatt", "triggered"])
def test_a_larger_look_ahead_writes_no_earlier_on_the_whole(float32: Bundle, sound: Floats, mode: str):
    """By the number of letters shown, summed over all chunks."""
    sums = []
    for search in (SEARCH, replace(SEARCH, margin_frames=1000, recent_share=0.0, trigger_frames=1000)):
        config = StreamConfig(mode=mode, chunk_ms=320, search=search, endpoint=NO_ENDPOINTS)
        events = run(float32, sound[:45000], config, 5120)
        sums.append(sum(len(event.text) for event in events if not event.final))
    assert sums[0] > sums[1] == 0


def test_a_bundle_knows_where_words_begin(float32: Bundle):
    tokenizer = float32.tokenizer
    marked = [symbol.startswith("▁") for symbol in tokenizer.symbols]
    assert float32.word_starts.tolist() == marked == word_starts(tokenizer.words, len(marked)).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_hundred_real_utterances_in_streams(
    writes_as_torch, tiny_model: HybridModel, float32: Bundle, mode: str
):
    scorer = TorchScorer(tiny_model, "cpu", float32.word_starts)
    writes_as_torch(scorer, float32, mode, SEARCH)
