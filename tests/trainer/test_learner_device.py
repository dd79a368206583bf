"""The learner beside the device it learns on: it never waits for it, and learns there what it learns on a CPU.

Torch's meta device has shapes and no numbers: whatever would read a number off it, or mix it with the host, raises.
"""

import pytest
import torch

from tests.trainer.stream import CPU, make_batches, make_learner
from tests.trainer.test_learner import VARIANTS, settings_of
from tests.trainer.waiting import nothing_is_copied_to_meta, nothing_waits_for_cuda
from trainer.learner import Learner

ROWS = 12 * 32
ROWS_WITHOUT_NUMBERS = 3 * 32  # meta is slow
RATE_ON_DEVICE = "a higher rate after drift"  # Adam without a fused kernel, as on meta, reads it
ON_CUDA = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def learned(variant: str, device: torch.device) -> Learner:
    settings = settings_of(variant)
    learner = make_learner(settings, device)
    for batch in make_batches(settings, ROWS):
        learner.step(batch)
    return learner


@pytest.mark.parametrize("variant", sorted(VARIANTS.keys() - {RATE_ON_DEVICE}))
def test_a_step_asks_the_device_nothing(variant: str) -> None:
    settings = settings_of(variant)
    learner = make_learner(settings, torch.device("meta"))
    with nothing_is_copied_to_meta():
        for batch in make_batches(settings, ROWS_WITHOUT_NUMBERS):
            learner.step(batch)
    assert learner.samples == ROWS_WITHOUT_NUMBERS


@pytest.mark.parametrize("variant", [pytest.param(name, marks=ON_CUDA) for name in sorted(VARIANTS)])
def test_on_cuda_a_step_does_not_wait(variant: str) -> None:
    settings = settings_of(variant)
    learner = make_learner(settings, torch.device("cuda"))
    batches = make_batches(settings, ROWS)
    learner.step(batches[0])
    with nothing_waits_for_cuda():
        for batch in batches[1:]:
            learner.step(batch)
    assert learner.read().nonfinite_steps == 0


@pytest.mark.parametrize("variant", [pytest.param(name, marks=ON_CUDA) for name in sorted(VARIANTS)])
def test_on_cuda_it_learns_what_it_learns_on_a_cpu(variant: str) -> None:
    cpu, cuda = (learned(variant, torch.device(name)) for name in ("cpu", "cuda"))
    here, there = cpu.read(), cuda.read()
    assert (cuda.samples, cuda.steps, there.nonfinite_steps) == (cpu.samples, cpu.steps, 0)
    assert there.train_loss == pytest.approx(here.train_loss, rel=0.05)
    errors = "mae" if "mae" in here.metrics["whole"]["0"] else "accuracy"
    assert there.metrics["whole"]["0"][errors] == pytest.approx(here.metrics["whole"]["0"][errors], rel=0.05)


@pytest.mark.parametrize("variant", [pytest.param(name, marks=ON_CUDA) for name in sorted(VARIANTS)])
def test_a_state_goes_from_cuda_to_a_cpu_and_back(variant: str) -> None:
    there = learned(variant, torch.device("cuda"))
    state = there.state_dict()
    here = make_learner(settings_of(variant), CPU)
    here.load_state_dict(state)
    again = make_learner(settings_of(variant), torch.device("cuda"))
    again.load_state_dict(here.state_dict())
    for name, value in again.state_dict().items():
        assert torch.equal(value.nan_to_num(7e7), state[name].nan_to_num(7e7)), name
    more = make_batches(settings_of(variant), 64, seed=1)
    for learner in (here, again):
        for batch in more:
            learner.step(batch)
        assert learner.read().nonfinite_steps == 0
