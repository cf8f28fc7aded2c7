"""A grammar as text (grammar.txt), and sentences drawn from it."""

import random
from pathlib import Path

Rules = dict[str, list[list[str]]]
"""Name -> its ways of being said, each a list of words and names."""


def read_grammar(path: Path) -> Rules:
    rules: Rules = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, colon, ways = line.partition(":")
        if colon and not line.startswith("#"):
            rules.setdefault(name, []).extend(way.split() for way in ways.split("|"))
    return rules


def draw(rules: Rules, rng: random.Random, name: str = "SENTENCE") -> str:
    """One sentence, every choice evenly among its ways."""
    words = rng.choice(rules[name])
    return " ".join(draw(rules, rng, word) if word.isupper() else word for word in words)


def words(rules: Rules) -> set[str]:
    """Everything that can be said."""
    return {word for ways in rules.values() for way in ways for word in way if not word.isupper()}
