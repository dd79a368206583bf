"""The label density follows the stream's labels, whatever they look like, and reads the same after a restart."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.label_density import LabelDensity, LabelGrid

LABELS = (
    st.floats(-1e9, 1e9, allow_nan=False)
    | st.integers(-3, 3).map(float)
    | st.floats(-1e-6, 1e-6)
    | st.floats(-1e-300, 1e-300)
)


def observed(labels: Tensor, batch: int = 256, **options: float) -> LabelDensity:
    density = LabelDensity(**options)
    for part in labels.split(batch):
        density.observe(part)
    return density


def normal(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_sound(grid: LabelGrid, labels: Tensor) -> None:
    """What holds of every grid that is not empty."""
    assert len(grid.edges) == len(grid) + 1
    assert (grid.widths > 0).all()
    assert grid.edges[0] <= labels.min()
    assert grid.edges[-1] >= labels.max()
    for values in (grid.log_density, grid.log_mask, grid.log_weights):
        assert values.shape == (len(grid),)
        assert values.isfinite().all()
    assert float(mass_of(grid).sum()) == pytest.approx(1, abs=1e-5)
    assert grid.log_mask.max() <= 0
    assert grid.log_weights.max() <= math.log(20) + 1e-6
    assert float((mass_of(grid) * grid.log_weights.double().exp()).sum()) == pytest.approx(1, abs=1e-3)


def mass_of(grid: LabelGrid) -> Tensor:
    return grid.log_density.double().exp() * grid.widths


def mean_of(grid: LabelGrid) -> float:
    return float(mass_of(grid) @ grid.centres)


def cells_between(grid: LabelGrid, low: float, high: float) -> int:
    return int(((grid.centres > low) & (grid.centres < high)).sum())


def test_no_label_gives_an_empty_grid_on_which_every_weight_is_one() -> None:
    density = LabelDensity()
    density.observe(torch.empty(0))
    grid = density.grid()
    assert len(grid) == 0
    assert torch.equal(grid.log_weight(torch.tensor([1.0, -2.0])), torch.zeros(2))


def test_the_density_of_normal_labels_is_the_normal_density() -> None:
    grid = observed(5 + 2 * normal(60_000)).grid()
    z = (grid.centres - 5) / 2
    expected = torch.exp(-0.5 * z**2) / (2 * math.sqrt(2 * math.pi))
    bulk = z.abs() < 2
    assert int(bulk.sum()) > 50
    torch.testing.assert_close(grid.log_density[bulk].double().exp(), expected[bulk], rtol=0.08, atol=0)


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([3.0]),
        torch.tensor([0.0]),
        torch.tensor([-1e9]),
        torch.full((1000,), 7.0),
        1e-320 * normal(1000),
        torch.arange(1000) % 5,
        -torch.exp(2 * normal(3000)),
        torch.cat([torch.zeros(5000), torch.exp(normal(500))]),
        torch.cat([normal(3000), torch.tensor([1e6])]),
        1.7e9 + normal(3000),
        normal(3000).float(),
        torch.tan(math.pi * (torch.rand(5000, generator=torch.Generator().manual_seed(1)) - 0.5)),
    ],
    ids=[
        "one",
        "zero",
        "one far",
        "equal",
        "denormal",
        "ties",
        "negative",
        "zero-inflated",
        "outlier",
        "offset",
        "float32",
        "cauchy",
    ],
)
def test_labels_of_every_kind_give_a_sound_grid(labels: Tensor) -> None:
    check_sound(observed(labels).grid(), labels)


@given(st.lists(st.lists(LABELS, min_size=1, max_size=12), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_any_batches_of_finite_labels_give_a_sound_grid(batches: list[list[float]]) -> None:
    density = LabelDensity()
    for batch in batches:
        density.observe(torch.tensor(batch, dtype=torch.float64))
    check_sound(density.grid(), torch.tensor([label for batch in batches for label in batch], dtype=torch.float64))


@pytest.mark.parametrize("position", [0, 100, 2999])
def test_one_label_a_million_sd_away_leaves_the_bulk_its_resolution(position: int) -> None:
    labels = normal(3000)
    labels[position] = 1e6
    grid = observed(labels).grid()
    assert cells_between(grid, -1, 1) > 30
    assert float(mass_of(grid)[grid.centres.abs() < 1].sum()) == pytest.approx(0.683, abs=0.03)


def test_an_outlier_in_the_very_first_batch_of_one_does_not_last() -> None:
    labels = torch.cat([torch.tensor([1e6]), normal(1500)])
    assert cells_between(observed(labels, batch=1).grid(), -1, 1) > 30


def test_zero_inflated_labels_keep_the_scale_of_the_others() -> None:
    """The quantiles of the middle all tie at zero; the axis must not zoom in on the tie."""
    labels = torch.zeros(20_000, dtype=torch.float64)
    labels[::8] = 100 + 10 * normal(2500)
    density = observed(labels)
    assert float(density.axis[1]) > 1
    assert float(mass_of(density.grid())[density.grid().centres > 50].sum()) == pytest.approx(0.125, abs=0.01)


@pytest.mark.parametrize("factor", [100.0, 0.01])
def test_a_scale_that_changes_a_hundredfold_is_followed(factor: float) -> None:
    labels = torch.cat([normal(4000), factor * normal(20_000, seed=1)])
    grid = observed(labels, window_labels=4000).grid()
    check_sound(grid, factor * normal(20_000, seed=1))
    assert cells_between(grid, -factor, factor) > 30
    assert float(mass_of(grid)[grid.centres.abs() < factor].sum()) == pytest.approx(0.683, abs=0.05)


def test_a_range_that_grows_at_every_batch_keeps_all_labels_counted() -> None:
    labels = torch.arange(20_000, dtype=torch.float64)
    density = observed(labels, window_labels=1e12)
    assert float(density.counts.sum()) == pytest.approx(20_000, rel=1e-6)
    assert mean_of(density.grid()) == pytest.approx(10_000, rel=0.01)


def test_moving_counts_to_another_axis_conserves_them_and_where_they_are() -> None:
    density = observed(normal(20_000), window_labels=1e12)
    before, axis = density.grid(), density.axis.clone()
    density.observe(torch.tensor([-500.0, 1000.0]))
    assert not torch.equal(density.axis, axis)
    after = density.grid()
    assert float(density.counts.sum()) == pytest.approx(20_002, rel=1e-7)
    for label in (-1.5, -0.5, 0.0, 0.7, 2.0):
        mass = [float(mass_of(grid)[grid.edges[1:] <= label].sum()) for grid in (before, after)]
        assert mass[0] == pytest.approx(mass[1], abs=0.02)


def test_many_moves_do_not_blur() -> None:
    def tallest(grid: LabelGrid) -> float:
        return float(grid.log_density.exp().max())

    labels = torch.cat([normal(2000), torch.full((2000,), 0.25)])
    growth = 10 * 1.7 ** torch.arange(30, dtype=torch.float64)  # each beyond the margin that the last one left
    moved = observed(torch.cat([labels, growth]), window_labels=1e12, batch=1000)
    for label in growth:
        axis = moved.axis.clone()
        moved.observe(-label[None])
        assert not torch.equal(moved.axis, axis)
    at_once = observed(torch.cat([labels, growth, -growth]), window_labels=1e12, batch=10_000)
    assert tallest(moved.grid()) == pytest.approx(tallest(at_once.grid()), rel=0.1)


def test_old_labels_fade() -> None:
    density = observed(torch.cat([normal(4000), 50 + normal(8000)]), window_labels=1000)
    assert float(density.counts.sum()) == pytest.approx(1000, rel=0.2)
    assert mean_of(density.grid()) == pytest.approx(50, abs=0.2)


def test_the_range_forgets_an_extreme_label_in_the_end() -> None:
    density = observed(torch.cat([normal(300), torch.tensor([1e6]), normal(20_000, seed=1)]), window_labels=1000)
    assert density.grid().edges[-1] < 100


def test_batches_of_any_size_count_alike() -> None:
    labels = normal(8192)
    one, other = (observed(labels, batch=batch, window_labels=1e12) for batch in (64, 1024))
    assert mean_of(one.grid()) == pytest.approx(mean_of(other.grid()), abs=1e-3)
    assert float(one.counts.sum()) == pytest.approx(float(other.counts.sum()))


def test_asking_for_the_grid_changes_no_state() -> None:
    density = observed(normal(1000))
    before = {name: value.clone() for name, value in density.state_dict().items()}
    density.grid()
    assert all(torch.equal(value, before[name]) for name, value in density.state_dict().items())


def test_a_restored_density_goes_on_bit_for_bit() -> None:
    labels = torch.exp(normal(9000))
    whole, first = observed(labels), observed(labels[:5120])
    second = LabelDensity()
    second.load_state_dict(first.state_dict())
    for part in labels[5120:].split(256):
        second.observe(part)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in whole.state_dict().items())
    assert all(
        torch.equal(value, second.grid().to_tensors()[name]) for name, value in whole.grid().to_tensors().items()
    )


def test_a_grid_survives_being_stored_as_tensors() -> None:
    grid = observed(normal(500)).grid()
    again = LabelGrid.from_tensors({name: value.clone() for name, value in grid.to_tensors().items()})
    assert all(torch.equal(value, again.to_tensors()[name]) for name, value in grid.to_tensors().items())
    assert torch.equal(again.centres, grid.centres)
    assert len(LabelGrid.from_tensors(LabelGrid.empty().to_tensors())) == 0
    with pytest.raises(KeyError):
        LabelGrid.from_tensors({"edges": grid.edges})


def test_weights_are_the_capped_fourth_root_of_rarity() -> None:
    grid = observed(torch.cat([torch.exp(normal(60_000)), torch.tensor([1e7])])).grid()
    free = grid.log_weights < math.log(20) - 1e-4
    constant = (grid.log_weights + 0.25 * grid.log_density)[free]
    torch.testing.assert_close(constant, constant.mean().expand_as(constant), rtol=0, atol=1e-4)
    assert 0 < int((~free).sum()) < len(grid)
    torch.testing.assert_close(grid.log_weight(grid.centres), grid.log_weights)
    beyond = torch.tensor([-1e12, 1e12])
    torch.testing.assert_close(grid.log_weight(beyond), grid.log_weights[[0, -1]])


def test_the_mask_is_low_only_where_labels_are_few() -> None:
    grid = observed(torch.cat([normal(20_000), torch.tensor([1000.0])])).grid()
    assert grid.log_mask[grid.cell_of(torch.tensor(0.0))] == 0
    assert grid.log_mask[grid.cell_of(torch.tensor(100.0))] == pytest.approx(math.log(1e-4), abs=1e-4)
    lone = float(grid.log_mask[grid.cell_of(torch.tensor(999.0))])
    assert math.log(0.09 / 4) < lone < math.log(0.25 / 4)  # one label, its kernel cut by the end of the range


@pytest.mark.parametrize("label", [0.0, 3.0, -1e9, 1e-9])
@pytest.mark.parametrize("batch", [1, 32, 256])
def test_labels_that_stay_equal_give_a_sound_grid_after_every_batch(label: float, batch: int) -> None:
    density = LabelDensity()
    labels = torch.full((batch,), label, dtype=torch.float64)
    for _ in range(40):
        density.observe(labels)
        check_sound(density.grid(), labels)
