"""The options of another toolkit's configuration, each read with its default and its type.

Any option that is neither read nor known to have no effect is rejected: a model that looks like ours but
computes something else must not be converted.
"""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from asr.errors import CheckpointError

LARGEST = 1_000_000
"""A larger size is no plausible size of a model."""

BRIEF = reprlib.Repr()
BRIEF.maxlevel, BRIEF.maxstring, BRIEF.maxother = 2, 60, 60


class Options:
    """A mapping of one configuration file, with the dotted path of its parts for errors."""

    def __init__(self, values: Mapping[str, Any], where: str, path: str = "") -> None:
        self.values = values
        self.where = where
        self.path = path
        self.used: set[str] = set()

    def part(self, *names: str) -> "Options":
        """The first of some parts that exists, or an empty one."""
        for name in names:
            value = self._get(name, None)
            if value is not None:
                if not isinstance(value, Mapping):
                    raise self.wrong(name, value, "options by name")
                return Options(value, self.where, f"{self.path}{name}.")
        return Options({}, self.where, f"{self.path}{names[0]}.")

    def value(self, name: str) -> Any:
        """Any value; null if there is none. The caller checks it."""
        return self._get(name, None)

    def count(self, name: str, default: int, least: int = 1) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
            raise self.wrong(name, value, f"a whole number from {least} to {LARGEST}")
        return value

    def counts(self, name: str, size: int, default: int | None = None) -> list[int]:
        """`size` integers: a list, or as icefall writes them, `4,4,8`; a single one stands for all.

        Without a default, they are required.
        """
        value = self._get(name, default)
        parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
        found: list[Any] = [int(x) if isinstance(x, str) and x.strip().isdigit() else x for x in parts]
        found = found * size if len(found) == 1 else found
        if len(found) != size or not all(type(x) is int and 0 < x <= LARGEST for x in found):
            raise self.wrong(name, value, f"{size} whole numbers")
        return found

    def number(self, name: str, default: float, least: float = 0.0, most: float = 1.0) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise self.wrong(name, value, f"a number from {least:g} to {most:g}")
        return float(value)

    def switch(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: str) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, value, "text")
        return value

    def choice(self, name: str, default: str, known: Sequence[str]) -> Any:
        """One of some words; any other belongs to a model that we do not support."""
        value = self._get(name, default)
        if value not in known:
            raise self.wrong(name, value, f"{' or '.join(known)}, as others cannot be represented")
        return value

    def expect(self, name: str, value: Any) -> None:
        """Reject any value other than the one that we support."""
        found = self._get(name, value)
        if found != value:
            raise self.wrong(name, found, f"{value!r}, as others cannot be represented")

    def one_of(self, name: str, values: Sequence[Any]) -> Any:
        """One of some values, of which the first is the default; null is a value here."""
        self.used.add(name)
        value = self.values.get(name, values[0])
        if value not in values:
            known = " or ".join(map(str, values))
            raise self.wrong(name, value, f"{known}, as others cannot be represented")
        return value

    def only(self, fixed: Mapping[str, Any], without_effect: Sequence[str]) -> None:
        """Reject every option that was not read, except those with a value that we support, and those without
        effect on a trained model."""
        for name, value in fixed.items():
            self.expect(name, value)
        for name, value in self.values.items():
            if name not in self.used and name not in without_effect:
                raise CheckpointError(
                    f"{self.where}: {self.path}{name}: {brief(value)}, an option that is not known here "
                    "and may change what the model computes"
                )

    def _get(self, name: str, default: Any) -> Any:
        self.used.add(name)
        value = self.values.get(name)
        return default if value is None else value

    def wrong(self, name: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {self.path}{name}: {brief(value)}, expected {expected}")


def brief(value: object) -> str:
    """The beginning of a value for a message: what a stranger wrote may be huge in full."""
    return BRIEF.repr(value)
