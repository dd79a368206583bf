from collections import deque

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.stream import CPU
from trainer.replay import ReplayBuffer

Row = tuple[float, int, float]


def make(capacity: int) -> ReplayBuffer:
    return ReplayBuffer(capacity, columns=2, categories=1, device=CPU)


def add(buffer: ReplayBuffer, first: int, count: int) -> np.ndarray:
    """Adds rows that know their number."""
    numbers = torch.arange(first, first + count)
    return buffer.add(torch.stack([numbers, -numbers], 1).float(), numbers[:, None], numbers.double() / 8)


def held(buffer: ReplayBuffer) -> list[Row]:
    count = len(buffer)
    columns = buffer.numeric[:count, 0], buffer.categorical[:count, 0], buffer.label[:count]
    return list(zip(*(column.tolist() for column in columns), strict=True))


@given(st.integers(1, 12), st.lists(st.integers(0, 30), max_size=8))
@settings(max_examples=150, deadline=None)
def test_it_holds_the_newest_rows_as_a_bounded_queue_does(capacity: int, sizes: list[int]) -> None:
    buffer, model = make(capacity), deque[Row](maxlen=capacity)
    for size in sizes:
        first = buffer.seen
        slots = add(buffer, first, size)
        model.extend((n, n, n / 8) for n in range(first, first + size))
        assert len(slots) == size
        for slot, number in list(zip(slots, range(first, first + size), strict=True))[-capacity:]:
            assert buffer.label[slot] == number / 8
            assert buffer.numeric[slot].tolist() == [number, -number]
    assert len(buffer) == len(model)
    assert sorted(held(buffer)) == sorted(model)
    assert buffer.seen == sum(sizes)


@given(st.integers(1, 12), st.integers(0, 30), st.lists(st.integers(0, 20), max_size=5), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_what_is_drawn_is_distinct_and_held(capacity: int, rows: int, wanted: list[int], seed: int) -> None:
    buffer = make(capacity)
    add(buffer, 0, rows)
    sets = buffer.draw(wanted, np.random.default_rng(seed))
    assert [len(drawn) for drawn in sets] == [min(size, len(buffer)) for size in wanted]
    for drawn in sets:
        assert len(set(drawn.tolist())) == len(drawn)
        assert all(0 <= slot < len(buffer) for slot in drawn)
    again = buffer.draw(wanted, np.random.default_rng(seed))
    assert [drawn.tolist() for drawn in sets] == [drawn.tolist() for drawn in again]


def test_every_row_is_drawn_about_as_often() -> None:
    buffer, random = make(20), np.random.default_rng(0)
    add(buffer, 0, 50)
    drawn = [slots for _ in range(1000) for slots in buffer.draw([5, 5], random)]
    counts = np.bincount(np.concatenate(drawn), minlength=20)
    assert abs(counts - 500).max() < 5 * np.sqrt(500)


@given(st.integers(1, 12), st.lists(st.integers(1, 9), max_size=6), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_a_restored_buffer_goes_on_as_the_saved_one(capacity: int, sizes: list[int], more: int) -> None:
    buffer, restored = make(capacity), make(capacity)
    for size in sizes:
        add(buffer, buffer.seen, size)
    state = {name: value.clone() for name, value in buffer.state_dict().items()}
    restored.load_state_dict(buffer.state_dict())
    first = buffer.seen
    assert add(buffer, first, more).tolist() == add(restored, first, more).tolist()
    assert held(restored) == held(buffer)
    assert restored.seen == buffer.seen
    third = make(capacity)
    third.load_state_dict(state)  # adding rows has not changed what was saved
    assert third.seen == first
    assert {n for n, *_ in held(third)} == {float(n) for n in range(max(0, first - capacity), first)}


def test_missing_values_and_large_labels_are_kept_as_they_are() -> None:
    buffer = make(2)
    buffer.add(torch.tensor([[float("nan"), 3e38]]), torch.tensor([[2**40]]), torch.tensor([1e9 + 1e-6]).double())
    assert buffer.numeric[0].isnan().tolist() == [True, False]
    assert buffer.categorical[0, 0] == 2**40
    assert buffer.label.dtype == torch.float64
