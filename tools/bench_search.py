"""Speed of the CTC prefix beam search, and how many times that of others it is, on one core, in turns.

    python tools/bench_search.py

Frames per second of processor time with a beam of 10 and the 10 likeliest tokens of a frame: ours; the search
as it is usually written, with a dictionary of prefixes (plain); and flashlight-text's decoder without a
lexicon (the extra `bench`; left out if it is not installed). Medians over the rounds of the ratios of
adjacent runs, with the smallest and the largest. Also whether all find the same: the best text of each, and
for the plain one every score.
"""

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import numpy as np

from asr.decode.ctc import CtcPrefixBeam, advance_all
from asr.decode.scorer import BLANK, Floats

NUM_FRAMES, BEAM, TOKENS_PER_FRAME, NUM_STREAMS, ROUNDS = 400, 10, 10, 8, 5

Nbest = list[tuple[tuple[int, ...], float]]


def made_log_probs(num_tokens: int, seed: int) -> Floats:
    """Like those of a trained model: about every third frame a token is likely, elsewhere blank."""
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(NUM_FRAMES, num_tokens))
    spoken = rng.random(NUM_FRAMES) < 0.35
    table[np.arange(NUM_FRAMES), np.where(spoken, rng.integers(2, num_tokens, NUM_FRAMES), BLANK)] += 11
    return (table - np.logaddexp.reduce(table, 1, keepdims=True)).astype(np.float32)


def ours(log_probs: list[Floats]) -> list[Nbest]:
    beams = [CtcPrefixBeam(BEAM, TOKENS_PER_FRAME) for _ in log_probs]
    advance_all(beams, log_probs)
    return [[(x.tokens, x.parts["ctc"]) for x in beam.nbest(BEAM)] for beam in beams]


def plain(log_probs: list[Floats]) -> list[Nbest]:
    return [plain_search(x) for x in log_probs]


def plain_search(log_probs: Floats) -> Nbest:
    """With a dictionary from prefix to the log-probabilities of its paths that end with and without blank."""
    beams: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, -math.inf)}
    for frame in log_probs:
        likeliest = [BLANK, *(1 + np.argpartition(-frame[1:], TOKENS_PER_FRAME)[:TOKENS_PER_FRAME]).tolist()]
        grown: dict[tuple[int, ...], tuple[float, float]] = defaultdict(lambda: (-math.inf, -math.inf))
        for unit in likeliest:
            p = float(frame[unit])
            for prefix, (blank, token) in beams.items():
                if unit == BLANK:
                    old = grown[prefix]
                    grown[prefix] = (log_add(old[0], log_add(blank, token) + p), old[1])
                    continue
                again = bool(prefix) and unit == prefix[-1]
                if again:
                    old = grown[prefix]
                    grown[prefix] = (old[0], log_add(old[1], token + p))
                longer = (*prefix, unit)
                old = grown[longer]
                grown[longer] = (old[0], log_add(old[1], (blank if again else log_add(blank, token)) + p))
        best = sorted(grown.items(), key=lambda x: log_add(*x[1]), reverse=True)
        beams = dict(best[:BEAM])
    return [(prefix, log_add(*parts)) for prefix, parts in beams.items()]


def log_add(a: float, b: float) -> float:
    if a < b:
        a, b = b, a
    return a if b == -math.inf else a + math.log1p(math.exp(b - a))


def flashlight(num_tokens: int) -> Callable[[list[Floats]], list[Nbest]]:
    from flashlight.lib.text.decoder import (
        CriterionType,
        LexiconFreeDecoder,
        LexiconFreeDecoderOptions,
        ZeroLM,
    )

    options = LexiconFreeDecoderOptions(
        beam_size=BEAM, beam_size_token=TOKENS_PER_FRAME, beam_threshold=1e9, lm_weight=0.0, sil_score=0.0,
        log_add=True, criterion_type=CriterionType.CTC,
    )  # fmt: skip
    decoder = LexiconFreeDecoder(options, ZeroLM(), num_tokens, BLANK, [])  # no unit is silence

    def run(log_probs: list[Floats]) -> list[Nbest]:
        found = [decoder.decode(x.ctypes.data, len(x), num_tokens)[:1] for x in log_probs]
        return [[(collapse(x.tokens, num_tokens), x.score) for x in nbest] for nbest in found]

    return run


def collapse(path: list[int], silence: int) -> tuple[int, ...]:
    """The text of a path; its decoder puts silence at both ends."""
    pairs = zip([BLANK, *path], path, strict=False)
    return tuple(b for a, b in pairs if b not in (a, BLANK, silence))


def main() -> None:
    for num_tokens in (500, 5000):
        log_probs = [made_log_probs(num_tokens, seed) for seed in range(NUM_STREAMS)]
        searches: dict[str, Callable[[list[Floats]], list[Nbest]]] = {"ours": ours, "plain": plain}
        try:
            searches["flashlight-text"] = flashlight(num_tokens)
        except ImportError:
            print("flashlight-text is not installed")
        found = {name: search(log_probs) for name, search in searches.items()}
        seconds: dict[str, list[float]] = {name: [] for name in searches}
        for _ in range(ROUNDS):
            for name, search in searches.items():
                start = time.process_time()
                search(log_probs)
                seconds[name].append(time.process_time() - start)
        for name, took in seconds.items():
            ratios = [b / a for a, b in zip(seconds["ours"], took, strict=True)]
            same = sum(a[0][0] == b[0][0] for a, b in zip(found["ours"], found[name], strict=True))
            rate = NUM_FRAMES * NUM_STREAMS / statistics.median(took)
            spread = f"[{min(ratios):.2f}..{max(ratios):.2f}]"
            print(
                f"V {num_tokens:5,}  {name:16} {rate:9,.0f} frames/s  "
                f"ours is {statistics.median(ratios):5.2f} times as fast {spread}  "
                f"best text the same in {same} of {NUM_STREAMS}"
            )
        pairs = [(dict(a), dict(b)) for a, b in zip(found["ours"], found["plain"], strict=True)]
        worst = max(abs(a[text] - b[text]) for a, b in pairs for text in a.keys() & b.keys())
        same = sum(a.keys() == b.keys() for a, b in pairs)
        print(f"V {num_tokens:5,}  n-best as of plain in {same} of {NUM_STREAMS}, scores within {worst:.0e}")


if __name__ == "__main__":
    main()
