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
    library = opened(path, "tilted_answers")
    if library is not None:
        library.tilted_answers.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_void_p] * 14
        library.tilted_answers.restype = None
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
