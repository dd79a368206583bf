"""The classes of a stream: their names by number, listed beforehand or discovered in the order of the records.

A label is a JSON scalar; its text names the class, so 1, 1.0 and "1" are one. Inside Tailstream a class is its number,
so that batches, the replay buffer and the networks treat it as they do a label that is a number.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from trainer.errors import RecordError

LONGEST_NAME: Final = 256  # characters: names are part of every snapshot


class ClassNames:
    """Names in the order of their numbers; grows as records bring new ones, unless they were listed.

    Args:
        listed: the names, none to discover them.
        most: how many may be discovered.
        field: the label's path, for messages.
    """

    def __init__(self, listed: Sequence[str], most: int, field: str) -> None:
        self._listed = bool(listed)
        self._most = most
        self._field = field
        self._numbers: dict[str, int] = {}
        self.restore(listed)

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._numbers))

    def restore(self, names: Iterable[str]) -> None:
        """Goes on from these names, as a snapshot has them; those of records that it does not cover are forgotten."""
        self._numbers = {name: number for number, name in enumerate(names)}
        self._new: list[str] = []

    def take_new(self) -> tuple[str, ...]:
        """The names added since the last call, in the order of their numbers."""
        new, self._new = tuple(self._new), []
        return new

    def number(self, name: str) -> int:
        """The number of a class, a new one where it may be added.

        Raises:
            RecordError: with reason `unknown_class` or `too_many_classes`, or `wrong_type` for a name too long to keep.
        """
        number = self._numbers.get(name)
        if number is not None:
            return number
        if len(name) > LONGEST_NAME:
            raise RecordError(
                "wrong_type",
                f"the label {self._field!r} has {len(name)} characters, and a class at most {LONGEST_NAME}",
                self._field,
            )
        if self._listed:
            raise RecordError(
                "unknown_class",
                f"the label {self._field!r} is {name!r}, which schema.classes does not list",
                self._field,
            )
        if len(self._numbers) >= self._most:
            raise RecordError(
                "too_many_classes",
                f"the label {self._field!r} is {name!r}, a new class, and there are {self._most} already: "
                "raise schema.max_classes, or see whether this field is a class at all",
                self._field,
            )
        number = self._numbers[name] = len(self._numbers)
        self._new.append(name)
        return number
