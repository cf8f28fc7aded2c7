"""The texts of one utterance as a tree, in which those that begin alike share the nodes of their beginning.

A decoder that reads a tree, where each token sees only its ancestors, computes every shared beginning once;
what it says of a text is the same. N-best lists keep about half of their tokens, or fewer
(tools/bench_decoder.py).
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from asr.decode.scorer import Floats

MOST = 512
"""Nodes of a tree of several texts: bounds the memory of what the decoder predicts after each of them."""


class Trie:
    """A tree of U tokens, depth first: the descendants of a token directly follow it."""

    def __init__(self, sos_eos: int) -> None:
        """sos_eos: the root, and what follows every text."""
        self.tokens = [sos_eos]
        """U of them."""
        self.ends = [1]
        """Where the descendants of each token end."""
        self.nodes: list[int] = []
        """The nodes of all texts, one text after another, from the root to the last token."""
        self.targets: list[int] = []
        """What follows there in the text."""
        self._sizes: dict[int, int] = {}
        self._latest: tuple[list[int], Sequence[int]] = [0], ()

    def add(self, number: int, text: Sequence[int]) -> None:
        """Add a text, which must not be less than the one before it."""
        path, before = self._latest
        shared = _num_shared(before, text)
        path = [*path[: shared + 1], *range(len(self.tokens), len(self.tokens) + len(text) - shared)]
        self.tokens += text[shared:]
        self.ends += [0] * (len(text) - shared)
        for node in path:
            self.ends[node] = len(self.tokens)
        self.nodes += path
        self.targets += [*text, self.tokens[0]]
        self._sizes[number] = len(path)
        self._latest = path, text

    def split(self, values: Floats) -> Iterator[tuple[int, Floats]]:
        """Values for all `nodes` -> the number and the values of each text."""
        ends = np.cumsum(list(self._sizes.values()))
        return zip(self._sizes, np.split(values, ends[:-1]), strict=True)


def tries(texts: Sequence[Sequence[int]], numbers: Iterable[int], sos_eos: int) -> list[Trie]:
    """The texts with these numbers in one tree, or in as many as it takes."""
    found: list[Trie] = []
    for number in sorted(numbers, key=lambda number: tuple(texts[number])):
        if not found or len(found[-1].tokens) + len(texts[number]) > MOST:
            found.append(Trie(sos_eos))
        found[-1].add(number, texts[number])
    return found


def read_order(texts: Sequence[Sequence[int]], reverse: bool, prompt: Sequence[int]) -> list[list[int]]:
    """Texts as a decoder reads them: after a prompt, or from right to left."""
    return [list(x[::-1]) if reverse else [*prompt, *x] for x in texts]


def text_order(scores: Sequence[Floats], reverse: bool, num_before: int) -> list[Floats]:
    """Scores of texts in the order they were read, eos last -> in that of the texts, without the prompt."""
    return [np.append(x[-2::-1], x[-1]) if reverse else x[num_before:] for x in scores]


def _num_shared(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
