"""The buffer of recent rows that replay steps and the label memory are both drawn from."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.ranks import Ranks

COLUMNS: Final = ("numeric", "categorical", "label")


class ReplayBuffer:
    """A ring of the newest rows, on the model's device; positions are kept on the host, so drawing waits for nothing.

    Attributes:
        numeric: (N, F) float32, NaN where missing.
        categorical: (N, C) int64.
        label: (N,) float64, label units: they are standardised when used, as the scaling moves.
        seen: rows ever added; row number s lies in slot s % N.
    """

    def __init__(self, rows: int, columns: int, categories: int, device: torch.device) -> None:
        self.numeric = torch.zeros(rows, columns, dtype=torch.float32, device=device)
        self.categorical = torch.zeros(rows, categories, dtype=torch.int64, device=device)
        self.label = torch.zeros(rows, dtype=torch.float64, device=device)
        self.seen = 0

    def __len__(self) -> int:
        return min(self.seen, len(self.label))

    def add(self, numeric: Tensor, categorical: Tensor, label: Tensor) -> NDArray[np.int64]:
        """Adds rows (B, F), (B, C), (B,), the oldest giving way.

        Returns:
            The slots (B,) they lie in, row by row. Where B exceeds N only the last N rows keep theirs.
        """
        capacity = len(self.label)
        slots = (self.seen + np.arange(len(label))) % capacity
        kept = slice(max(0, len(label) - capacity), None)
        index = torch.from_numpy(slots[kept]).to(self.label.device, non_blocking=True)
        self.numeric[index] = numeric[kept]
        self.categorical[index] = categorical[kept]
        self.label[index] = label[kept]
        self.seen += len(label)
        return slots

    def draw(self, sizes: Sequence[int], random: np.random.Generator) -> list[NDArray[np.int64]]:
        """Several sets of slots of rows held, in random order: each of distinct ones, as many as asked for or held.

        They are dealt from one shuffled deck for as long as it lasts, as shuffling is what costs time.
        """
        held, draws, deck = len(self), [], np.empty(0, np.int64)
        for number, wanted in enumerate(sizes):
            size = min(wanted, held)
            if len(deck) < size:
                deck = random.choice(held, min(held, sum(sizes[number:])), replace=False)
            drawn, deck = deck[:size], deck[size:]
            draws.append(drawn)
        return draws

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the rows held and the number ever seen."""
        held = len(self)
        state = {name: getattr(self, name)[:held].clone() for name in COLUMNS}
        return {**state, "seen": torch.tensor(self.seen, dtype=torch.int64)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state_dict` gave."""
        for name in COLUMNS:
            getattr(self, name)[: len(state[name])] = state[name].to(self.label.device)
        self.seen = int(state["seen"])


def dealt(before: Sequence[dict[str, Tensor]], ranks: Ranks) -> dict[str, Tensor]:
    """This rank's share of the rows that other ranks held, so that none is lost that there is room for.

    Args:
        before: `ReplayBuffer.state_dict` of each rank that there was.
        ranks: those there are now.

    Returns:
        A state of as many rows as one of those had at most; old and new ones as they were mixed.
    """
    rows = {name: torch.cat([_by_age(state, name) for state in before]) for name in COLUMNS}
    age = torch.cat([torch.arange(len(state["label"]) - 1, -1, -1) for state in before])
    oldest_first = age.argsort(descending=True, stable=True)[ranks.number :: ranks.count]
    most = max(len(state["label"]) for state in before)
    kept = oldest_first[-most:] if most else oldest_first
    return {**{name: values[kept] for name, values in rows.items()}, "seen": torch.tensor(len(kept))}


def _by_age(state: dict[str, Tensor], name: str) -> Tensor:
    """The rows of a ring, the oldest first."""
    values = state[name]
    return values.roll(-(int(state["seen"]) % max(1, len(values))), 0) if int(state["seen"]) > len(values) else values
