"""The interface of a streaming search, which takes frames as they arrive and has an answer at any time."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from asr.decode.config import SearchConfig
from asr.decode.scorer import Floats, Hypothesis, Scorer


class OnlineSearch(Protocol):
    """The search for the tokens of one utterance."""

    def advance(self, memory: Any, log_probs: Floats) -> None:
        """Take the next frames: `memory` of all so far (Scorer.grow, Scorer.view), and CTC's log_probs (t, V)
        of the new ones."""
        ...

    def best(self) -> Hypothesis:
        """The text so far."""
        ...

    def finish(self) -> list[Hypothesis]:
        """End the utterance: at most `SearchConfig.nbest` answers, best first."""
        ...


StartSearch = Callable[[Scorer, SearchConfig], OnlineSearch]


def search_online(
    start: StartSearch,
    scorer: Scorer,
    log_probs: Sequence[Floats],
    memory: Any,
    config: SearchConfig,
    chunk: int,
) -> list[list[Hypothesis]]:
    """The answers for whole utterances, fed `chunk` frames at a time, 0 for all at once.

    log_probs (T_n, V) of each utterance of `memory`.
    """
    answers = []
    for n, frames in enumerate(log_probs):
        search = start(scorer, config)
        step = chunk or max(len(frames), 1)
        for first in range(0, len(frames), step):
            end = min(first + step, len(frames))
            search.advance(scorer.view(memory, n, end), frames[first:end])
        answers.append(search.finish() if len(frames) else [Hypothesis((), 0.0)])
    return answers
