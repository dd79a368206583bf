"""Loads `kernel.c`, which the build compiled beside it; where it did not, torch computes the same in more passes.

Its rounding depends on the machine, as torch's does: there is a library for each of several instruction sets, and the
one that torch itself uses is taken. So a run that is resumed on the same machine goes on bit for bit.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from trainer.compiled import instructions_of_torch, library_of, opened

MOST_COMPONENTS = 64  # of `kernel.c`

SOURCE = Path(__file__).with_suffix(".c")
_PLAIN = (Tensor, torch.nn.Parameter)  # tensors with memory of their own


def load(path: Path) -> ctypes.CDLL | None:
    """The library at a path, or None if it is not there, or not for this machine."""
    library = opened(path, "mixture_losses")
    if library is None:
        return None
    pointer, count, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    library.mixture_losses.argtypes = [count] * 4 + [pointer] * 9 + [number] * 3 + [pointer] * 6
    library.mixture_losses.restype = ctypes.c_int
    library.mixture_parts.argtypes = [count] * 2 + [pointer] + [number] * 2 + [pointer] * 4
    library.mixture_outputs.argtypes = [count] * 2 + [pointer] + [number] * 2 + [pointer] * 6
    library.shifted_rows.argtypes = [count] * 2 + [pointer] * 4 + [number] + [pointer] * 3
    for function in (library.mixture_parts, library.mixture_outputs, library.shifted_rows):
        function.restype = None
    return library


_library = load(library_of(SOURCE, instructions_of_torch()))


def is_loaded() -> bool:
    """Whether the compiled kernel is there."""
    return _library is not None


def takes(*tensors: Tensor) -> bool:
    """Whether the kernel is there and computes with such tensors: of float32, on a CPU, and not being traced."""
    if _library is None or torch.compiler.is_compiling():
        return False
    return all(t.dtype == torch.float32 and t.is_cpu and type(t) in _PLAIN for t in tensors)


def mixture_rows(
    log_weights: Tensor,
    means: Tensor,
    log_scales: Tensor,
    location: Tensor,
    target: Tensor,
    labels: Tensor | None,
    variances: Tensor | None,
    scales: Tensor | None,
    weights: Tensor | None,
    memory_rows: int,
    memory_weight: float,
    location_weight: float,
    share: float,
) -> tuple[Tensor, ...] | None:
    """Losses of a mixture head and their gradients; see `trainer.losses.density`.

    Args:
        log_weights: (B, K), K at most `MOST_COMPONENTS`.
        means: (B, K).
        log_scales: (B, K).
        location: (B,).
        target: (B,) labels.
        labels: (M,) candidates, the labels among them, or None for the likelihood.
        variances: (memory_rows,) of the Gaussians that the last candidates stand for, or None for 0.
        scales: (B,) factors of the rows, or None for the mixtures' standard deviations.
        weights: (B,) further factors, or None for 1.
        memory_rows: How many candidates, at the end, count `memory_weight` times.
        memory_weight: See there.
        location_weight: Of the squared error of the location.
        share: Multiplies the gradients.

    Returns:
        Losses (B,), their mean (0-dim), and gradients by the first four arguments, in their shapes. None if any of them
        is not finite.
    """
    assert _library is not None
    given = [None if t is None else t.contiguous() for t in (target, labels, variances, scales, weights)]
    parts = [t if t.is_contiguous() else t.detach().contiguous() for t in (log_weights, means, log_scales, location)]
    outputs = torch.empty_like(target), target.new_empty(()), *(torch.empty_like(part) for part in parts)
    finite = _library.mixture_losses(
        *means.shape,
        0 if labels is None else len(labels),
        0 if labels is None else len(labels) - memory_rows,
        *(None if t is None else t.data_ptr() for t in (*parts, *given)),
        memory_weight,
        location_weight,
        share,
        *(t.data_ptr() for t in outputs),
    )
    return outputs if finite else None


def mixture_parts(outputs: Tensor, components: int, low: float, high: float) -> tuple[Tensor, ...]:
    """Log weights, means and log scales (B, K) and location (B,) from a layer's outputs; see `trainer.losses.mixture`.

    Args:
        outputs: (B, 3 K + 1), contiguous.
        components: K.
        low: Lowest log scale.
        high: Highest log scale.
    """
    assert _library is not None
    rows = len(outputs)
    parts = *(outputs.new_empty(rows, components) for _ in range(3)), outputs.new_empty(rows)
    _library.mixture_parts(rows, components, outputs.data_ptr(), low, high, *(part.data_ptr() for part in parts))
    return parts


def mixture_outputs(outputs: Tensor, log_weights: Tensor, low: float, high: float, *by_parts: Tensor) -> Tensor:
    """Gradient by the outputs (B, 3 K + 1) from those by the four parts of `mixture_parts`."""
    assert _library is not None
    by_parts = tuple(part.contiguous() for part in by_parts)
    by_outputs = torch.empty_like(outputs)
    pointers = (t.data_ptr() for t in (log_weights, *by_parts, by_outputs))
    _library.mixture_outputs(*log_weights.shape, outputs.data_ptr(), low, high, *pointers)
    return by_outputs


def shifted_rows(
    reference: Tensor, mirror: Tensor, mirror_rest: Tensor, labels: Tensor, power: float
) -> tuple[Tensor, ...]:
    """Log sum, mean of t and mean of q, (B,) each, float64; see `trainer.losses.dense_softmax`.

    Args:
        reference: (B,) a candidate near each prediction.
        mirror: (B,) reference - 2 prediction, rounded.
        mirror_rest: (B,) what that left out.
        labels: (M,) candidates.
        power: -log2(e) / 2 sigma^2.
    """
    assert _library is not None
    given = [t.contiguous() for t in (reference, mirror, mirror_rest, labels)]
    outputs = tuple(torch.empty_like(given[0], dtype=torch.float64) for _ in range(3))
    pointers = [t.data_ptr() for t in (*given, *outputs)]
    _library.shifted_rows(len(reference), len(labels), *pointers[:4], power, *pointers[4:])
    return outputs
