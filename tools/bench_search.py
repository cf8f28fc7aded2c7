"""Speed of the CTC prefix beam search: frames per second of processor time.

python tools/bench_search.py
"""

import time

import numpy as np

from asr.decode.ctc import CtcPrefixBeam, advance_all
from asr.decode.scorer import BLANK, Floats

NUM_FRAMES, BEAM, TOKENS_PER_FRAME = 400, 10, 10


def made_log_probs(num_tokens: int, seed: int) -> Floats:
    """As of a trained model: about every third frame a token is likely, elsewhere blank."""
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(NUM_FRAMES, num_tokens))
    spoken = rng.random(NUM_FRAMES) < 0.35
    table[np.arange(NUM_FRAMES), np.where(spoken, rng.integers(2, num_tokens, NUM_FRAMES), BLANK)] += 11
    return (table - np.logaddexp.reduce(table, 1, keepdims=True)).astype(np.float32)


def frames_per_second(num_tokens: int, num_streams: int) -> float:
    """The best of three runs."""
    log_probs = [made_log_probs(num_tokens, seed) for seed in range(num_streams)]
    seconds = []
    for _ in range(3):
        beams = [CtcPrefixBeam(BEAM, TOKENS_PER_FRAME) for _ in log_probs]
        start = time.process_time()
        advance_all(beams, log_probs)
        seconds.append(time.process_time() - start)
    return NUM_FRAMES * num_streams / min(seconds)


if __name__ == "__main__":
    for num_tokens in (500, 5000):
        for num_streams in (1, 8, 32):
            rate = frames_per_second(num_tokens, num_streams)
            print(f"V {num_tokens:5,}  {num_streams:2} streams  {rate:9,.0f} frames/s")
