"""What ranks make together: two real processes, beside one that has all the rows."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from tests.trainer.stream import CLASSES, CPU, as_records, make_schema, make_settings, values
from trainer.batching import Batch, Batcher
from trainer.config import Settings
from trainer.learner import Learner, joint_state
from trainer.ranks import ALONE, Ranks
from trainer.replay import ReplayBuffer, dealt
from trainer.turns import Turns

SIZE, BATCHES = 16, (6, 9)  # rows of a batch, and how many each of the ranks has
FRESH_ALONE: dict[str, Any] = {"step_rows": 2 * SIZE, "replay_steps": 0, "label_memory": 0, "replay_rows": 128}
WHOLE: dict[str, Any] = {"step_rows": 8, "replay_steps": 2, "label_memory": 24, "replay_rows": 128}
CASES: dict[str, dict[str, Any]] = {
    "mixture": {"learner": FRESH_ALONE},
    "gaussian": {"learner": FRESH_ALONE, "model": {"head": "gaussian"}},
    "classes": {**CLASSES, "learner": {**FRESH_ALONE, "loss": "logit_adjusted"}, "model": {"head": "linear"}},
    "replay": {"learner": WHOLE},
    "influence": {**CLASSES, "learner": {**WHOLE, "loss": "influence_balanced", "influence_after": 64},
                  "model": {"head": "linear"}},
}  # fmt: skip


def settings_of(case: str) -> Settings:
    return make_settings(batch={"size": SIZE}, **CASES[case])


def batches_of(settings: Settings, rank: int) -> list[Batch]:
    """A rank's own stream, its classes numbered as it meets them."""
    batcher = Batcher(make_schema(settings), SIZE)
    return list(batcher.add(as_records(values(SIZE * BATCHES[rank], seed=rank), partition=rank)))


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    ranks = Ranks(rank, 2)
    for case in CASES:
        settings = settings_of(case)
        schema = make_schema(settings)
        learner = Learner(settings, schema, CPU, ranks)
        turns = Turns(ranks, schema, held=lambda: False, eager=lambda: False, stop=lambda: False)
        taken: list[tuple[list[float], list[str]]] = []
        for number, turn in enumerate(turns.of(iter(batches_of(settings, rank)))):
            batch = turn.batch
            assert batch is not None
            taken.append((batch.label.tolist(), list(batch.new_classes)))
            learner.step(batch)
            if number == min(BATCHES) - 1:
                torch.save(learner.common_state(), f"{folder}/{case}.{rank}.both")
        torch.save((learner.common_state(), learner.own_state(), learner.samples), f"{folder}/{case}.{rank}")
        Path(f"{folder}/{case}.{rank}.taken").write_text(json.dumps(taken))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    # Forked, as importing torch takes most of a start.
    mp.start_processes(run_rank, args=(str(path),), nprocs=2, start_method="fork")
    return path


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name].nan_to_num(7e7), right[name].nan_to_num(7e7)) for name in left
    )


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_hold_the_same_to_the_last_bit_but_for_their_own_rows(folder: Path, case: str) -> None:
    (common, own, samples), (other, others, other_samples) = (torch.load(folder / f"{case}.{rank}") for rank in (0, 1))
    assert same_bits(common, other)
    assert samples == other_samples == SIZE * sum(BATCHES)
    assert own["replay.seen"] == SIZE * BATCHES[0]
    assert others["replay.seen"] == SIZE * BATCHES[1]
    assert not torch.equal(own["learner.random"], others["learner.random"])


# With a mixture the labels of other ranks weigh as a sample of all replay buffers does.
@pytest.mark.parametrize("case", ["gaussian", "classes"])
def test_two_ranks_learn_what_one_does_from_the_rows_of_both(folder: Path, case: str) -> None:
    settings = settings_of(case)
    learner = Learner(settings, make_schema(settings), CPU)
    taken = [json.loads((folder / f"{case}.{rank}.taken").read_text()) for rank in (0, 1)]
    for turn in range(min(BATCHES)):
        both = [replace(batches_of(settings, rank)[turn], label=np.array(taken[rank][turn][0])) for rank in (0, 1)]
        learner.step(
            replace(
                both[0],
                **{
                    name: np.concatenate([getattr(batch, name) for batch in both])
                    for name in ("numeric", "categorical", "label", "time_s")
                },
                new_classes=tuple(taken[0][turn][1]),
            )
        )
    alone, together = learner.common_state(), torch.load(folder / f"{case}.0.both")
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        torch.testing.assert_close(together[name].float(), value.float(), rtol=2e-3, atol=2e-4, msg=name)


def test_classes_get_one_number_on_all_ranks(folder: Path) -> None:
    settings = settings_of("classes")
    taken = [json.loads((folder / f"classes.{rank}.taken").read_text()) for rank in (0, 1)]
    new = [[names for _, names in of] for of in taken]
    assert new[0] == new[1]
    names = [name for turn in new[0] for name in turn]
    there = {str(json.loads(value)["grade"]) for rank in (0, 1) for value in values(SIZE * BATCHES[rank], seed=rank)}
    assert sorted(names) == sorted(there)
    for rank in (0, 1):
        own: list[str] = []
        for batch, (labels, _) in zip(batches_of(settings, rank), taken[rank], strict=False):
            own += batch.new_classes
            assert [names[int(label)] for label in labels] == [own[int(label)] for label in batch.label]


def test_a_batch_of_nothing_but_rejected_records_has_its_turn() -> None:
    settings = settings_of("mixture")
    schema = make_schema(settings)
    batcher = Batcher(schema, SIZE)
    assert not list(batcher.add(as_records([b"no JSON", b"neither"])))
    batch = batcher.flush()
    turns = Turns(ALONE, schema, held=lambda: False, eager=lambda: False, stop=lambda: False)
    assert len(batch) == 0
    (turn,) = turns.of(iter([batch]))
    assert turn.batch is batch
    assert len(batch.rejected) == 2


def held(rows: range, capacity: int) -> dict[str, Tensor]:
    buffer = ReplayBuffer(capacity, 1, 1, CPU)
    for row in rows:
        one = torch.full((1, 1), float(row))
        buffer.add(one, one.long(), one[0].double())
    return buffer.state_dict()


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (3, 2)])
def test_rows_of_other_ranks_are_dealt_the_oldest_first(before: int, after: int) -> None:
    states = [held(range(100 * rank, 100 * rank + 11), 8) for rank in range(before)]  # each has lost three
    parts = [dealt(states, Ranks(number, after)) for number in range(after)]
    found = [set(map(int, part["label"])) for part in parts]
    assert sum(map(len, found)) == len(set().union(*found))
    newest = {100 * rank + n for rank in range(before) for n in range(3, 11)}
    assert set().union(*found) <= newest
    assert sum(map(len, found)) == min(8 * before, 8 * after)
    for part in parts:
        ages = [int(label) % 100 for label in part["label"]]
        assert ages == sorted(ages)
        assert torch.equal(part["numeric"][:, 0].double(), part["label"])
        buffer = ReplayBuffer(8, 1, 1, CPU)
        buffer.load_state_dict(part)
        assert len(buffer) == len(part["label"]) == int(part["seen"])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_state_of_two_ranks_is_taken_over_by_more_or_fewer(folder: Path, count: int) -> None:
    (common, own, _), (_, others, _) = (torch.load(folder / f"replay.{rank}") for rank in (0, 1))
    settings = settings_of("replay")
    held = 0
    for number in range(count):
        ranks = ALONE if count == 1 else Ranks(number, count)
        learner = Learner(settings, make_schema(settings), CPU, ranks)
        learner.load_state_dict(joint_state(common, [own, others]))
        assert same_bits(learner.common_state(), common)
        held += len(learner.replay)
        if count == 2:
            assert same_bits(learner.own_state(), (own, others)[number])
    there = len(own["replay.label"]) + len(others["replay.label"])
    assert held == min(there, count * 128)
