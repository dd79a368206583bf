"""Loads `tilting.c`, which the build compiled beside it; where it did not, torch computes the same in more passes."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from trainer.compiled import instructions_of_torch, library_of, opened

MOST_COMPONENTS = 64  # of `tilting.c`
SOURCE = Path(__file__).with_suffix(".c")


def load(path: Path) -> ctypes.CDLL | None:
    """The library at a path, or None if it is not there, or not for this machine."""
    library = opened(path, "scored_rows")
    if library is not None:
        pointer = ctypes.c_void_p
        library.scored_rows.argtypes = [*[ctypes.c_int64] * 2, *[pointer] * 5, ctypes.c_double, *[pointer] * 3]
        library.tilted_answers.argtypes = [ctypes.c_int64] * 3 + [pointer] * 14
        library.tilted_masses.argtypes = [ctypes.c_int64] * 3 + [pointer] * 10
        for function in (library.scored_rows, library.tilted_answers, library.tilted_masses):
            function.restype = None
    return library


_library = load(library_of(SOURCE, instructions_of_torch()))


def is_loaded() -> bool:
    """Whether the library is there."""
    return _library is not None


def takes(log_tilt: Tensor, *components: Tensor) -> bool:
    """Whether the library is there, and computes with a grid (G,) and components (B, K) like these."""
    return (
        _library is not None
        and log_tilt.is_cpu
        and all(part.is_cpu and part.dtype == torch.float32 for part in components)
        and components[0].shape[1] <= MOST_COMPONENTS
        and not torch.compiler.is_compiling()
    )


def masses(components: tuple[Tensor, Tensor, Tensor], grid: tuple[Tensor, ...]) -> Tensor:
    """Masses of the cells by each row's density, (B, G) float32; see `trainer.predictive`.

    Args:
        components: log weights, means and scales, (B, K) each.
        grid: as for `answers`, but for the raw edges.
    """
    assert _library is not None
    given = [t.contiguous() for t in (*components, *grid)]
    rows, count = components[0].shape
    found = torch.empty(rows, len(grid[1]))
    sums = torch.empty(len(grid[1]) + 2, dtype=torch.float64)
    _library.tilted_masses(rows, count, len(grid[1]), *(t.data_ptr() for t in (*given, sums, found)))
    return found


def takes_masses(mass: Tensor) -> bool:
    """Whether the library is there, and scores labels by masses (B, G) like these."""
    there = _library is not None and mass.is_cpu and mass.dtype == torch.float32
    return there and not torch.compiler.is_compiling()


def scores(mass: Tensor, labels: Tensor, raw_edges: Tensor, factors: Tensor, ends: Tensor, least: float) -> Tensor:
    """Labels scored by the masses of their rows, and answers at two balances.

    Args:
        mass: (B, G) float32, the sum of each row positive.
        labels: (B,) float64, raw units.
        raw_edges: (G + 1,) float64, raw units.
        factors: (G,) float32 in [0, 1], which the masses are multiplied with for the second answer.
        ends: (2,) float32 levels of an interval of the first.
        least: what a share of the masses counts as where it is less.

    Returns:
        (6, B) float64: log density at the label, P(Y <= label), median, lower and upper end, and the second median, NaN
        where too little mass is left for it.
    """
    assert _library is not None
    given = [t.contiguous() for t in (mass, labels, raw_edges, factors, ends)]
    rows, cells = mass.shape
    found = torch.empty(6, rows, dtype=torch.float64)
    work = torch.empty(2 * cells + 2, dtype=torch.float64)
    sums = work.data_ptr()
    pointers = [t.data_ptr() for t in given]
    _library.scored_rows(rows, cells, *pointers, least, sums + 8 * (cells + 2), sums, found.data_ptr())
    return found


def answers(
    components: tuple[Tensor, Tensor, Tensor],
    grid: tuple[Tensor, ...],
    offsets: Tensor | None,
    ends: Tensor | None,
) -> Tensor:
    """Points of rows and, where there are ends, lower and upper ends of intervals.

    Args:
        components: log weights, means and scales, (B, K) each.
        grid: edges (G + 1,), centres, half widths, log tilt and log marginal (G,), float32; raw edges (G + 1,) float64.
        offsets: (G,) float32 of the raw centres from the first raw edge, for means; None for medians.
        ends: (2,) float32 levels, or None.

    Returns:
        (1, B) or (3, B) float64, raw units.
    """
    assert _library is not None
    given = [None if t is None else t.contiguous() for t in (*components, *grid, offsets, ends)]
    rows, count = components[0].shape
    cells = len(grid[1])
    answers = torch.empty(1 if ends is None else 3, rows, dtype=torch.float64)
    work = torch.empty(2 * cells + 2, dtype=torch.float64)
    pointers = [None if t is None else t.data_ptr() for t in given]
    sums = work.data_ptr()
    _library.tilted_answers(rows, count, cells, *pointers, sums + 8 * (cells + 2), sums, answers.data_ptr())
    return answers
