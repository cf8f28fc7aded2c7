import numpy as np
import pytest

from asr.decode import trie
from asr.decode.trie import read_order, text_order, tries

EOS = 1


def texts(seed: int, count: int) -> list[list[int]]:
    """Texts of up to five of three units, so that many begin alike and some are equal."""
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 5, rng.integers(6)).tolist() for _ in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_a_tree_has_a_node_for_every_beginning_and_knows_its_descendants(seed: int):
    given = texts(seed, 9)
    numbers = [0, 2, 3, 4, 5, 8]
    (tree,) = tries(given, numbers, EOS)
    assert len(tree.tokens) == len({tuple(given[b][:i]) for b in numbers for i in range(len(given[b]) + 1)})
    above: dict[int, set[int]] = {}
    paths = dict(tree.split(np.array(tree.nodes)))
    targets = dict(tree.split(np.array(tree.targets)))
    assert sorted(paths) == numbers
    for number, path in paths.items():
        assert [tree.tokens[node] for node in path] == [EOS, *given[number]]
        assert targets[number].tolist() == [*given[number], EOS]
        for i, node in enumerate(path.tolist()):
            assert above.setdefault(node, set(path[: i + 1].tolist())) == set(path[: i + 1].tolist())
    for i in range(len(tree.tokens)):
        assert above[i] == {j for j in range(i + 1) if i < tree.ends[j]}


def test_large_lists_are_cut_into_several_trees(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trie, "MOST", 8)
    given = [*texts(0, 12), [2] * 20]
    found = tries(given, range(len(given)), EOS)
    assert len(found) > 2
    assert all(len(tree.tokens) <= 8 or len(list(tree.split(np.array(tree.nodes)))) == 1 for tree in found)
    numbers = [number for tree in found for number, _ in tree.split(np.array(tree.nodes))]
    assert sorted(numbers) == list(range(len(given)))


def test_no_texts_need_no_tree():
    assert tries([], [], EOS) == []


@pytest.mark.parametrize(("reverse", "prompt"), [(False, ()), (False, (7, 8)), (True, ())])
def test_scores_come_back_in_the_order_of_the_text(reverse: bool, prompt: tuple[int, ...]):
    given = [[2, 3, 4], []]
    read = read_order(given, reverse, prompt)
    scores = [np.array([*x, EOS], np.float32) for x in read]
    assert [x.tolist() for x in text_order(scores, reverse, len(prompt))] == [[2, 3, 4, EOS], [EOS]]
