"""Loads `kernel.c`, which the build compiled beside it; where it did not, torch computes the same in more passes.

What it returns depends on the machine, as torch's own results do: each function is there for several instruction sets,
and the one that torch itself uses here is taken. So a run that is resumed on the same machine goes on bit for bit.
"""

import ctypes
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MOST_COMPONENTS = 64  # of `kernel.c`
LIBRARY = Path(__file__).with_name(f"kernel.{sysconfig.get_platform()}.so")
_INSTRUCTIONS = {"AVX512": "avx512", "AVX2": "avx2"}

_PLAIN = (Tensor, torch.nn.Parameter)  # tensors with memory of their own

_pointer, _count, _number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def _function(name: str, returns: Any, arguments: list[Any]) -> Callable[..., Any] | None:
    """A function of the library for the instruction set that torch uses, or None where there is no library."""
    try:
        library = ctypes.CDLL(str(LIBRARY))
        function = library[f"{name}_{_INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), 'default')}"]
    except (OSError, AttributeError):
        return None
    function.restype, function.argtypes = returns, arguments
    return function


_mixture_rows = _function("mixture_rows", ctypes.c_int, [_count] * 3 + [_pointer] * 8 + [_number] * 2 + [_pointer] * 5)
_shifted_rows = _function("shifted_rows", None, [_count] * 2 + [_pointer] * 4 + [_number] + [_pointer] * 3)


def is_loaded() -> bool:
    """Whether the compiled kernel is there."""
    return _mixture_rows is not None


def takes(*tensors: Tensor) -> bool:
    """Whether the kernel is there and computes with such tensors: of float32, on a CPU, and not being traced."""
    if _mixture_rows is None or torch.compiler.is_compiling():
        return False
    return all(t.dtype == torch.float32 and t.is_cpu and type(t) in _PLAIN for t in tensors)


def mixture_rows(
    log_weights: Tensor,
    means: Tensor,
    log_scales: Tensor,
    location: Tensor,
    target: Tensor,
    labels: Tensor | None,
    scales: Tensor | None,
    weights: Tensor | None,
    location_weight: float,
    share: float,
) -> tuple[Tensor, ...] | None:
    """Losses (B,) of a mixture head and their gradients; see `trainer.losses.density`.

    Args:
        log_weights: (B, K), K at most `MOST_COMPONENTS`.
        means: (B, K).
        log_scales: (B, K).
        location: (B,).
        target: (B,) labels.
        labels: (M,) candidates, the labels among them, or None for the likelihood.
        scales: (B,) factors of the rows, or None for the mixtures' standard deviations.
        weights: (B,) further factors, or None for 1.
        location_weight: Of the squared error of the location.
        share: Multiplies the gradients.

    Returns:
        Losses (B,), and gradients by the first four arguments, in their shapes. None if any is not finite.
    """
    assert _mixture_rows is not None
    given = [None if t is None else t.detach().contiguous() for t in (target, labels, scales, weights)]
    parts = [t.detach().contiguous() for t in (log_weights, means, log_scales, location)]
    outputs = torch.empty_like(parts[3]), *(torch.empty_like(part) for part in parts)
    finite = _mixture_rows(
        *means.shape,
        0 if labels is None else len(labels),
        *(None if t is None else t.data_ptr() for t in (*parts, *given)),
        location_weight,
        share,
        *(t.data_ptr() for t in outputs),
    )
    return outputs if finite else None


def shifted_rows(
    reference: Tensor, mirror: Tensor, mirror_rest: Tensor, labels: Tensor, power: float
) -> tuple[Tensor, ...]:
    """Log sum, mean of t and mean of q, (B,) each; see `trainer.losses.dense_softmax`.

    Args:
        reference: (B,) a candidate near each prediction.
        mirror: (B,) reference - 2 prediction, rounded.
        mirror_rest: (B,) what that left out.
        labels: (M,) candidates.
        power: -log2(e) / 2 sigma^2.
    """
    assert _shifted_rows is not None
    given = [t.contiguous() for t in (reference, mirror, mirror_rest, labels)]
    outputs = tuple(torch.empty_like(given[0]) for _ in range(3))
    _shifted_rows(len(reference), len(labels), *(t.data_ptr() for t in given), power, *(t.data_ptr() for t in outputs))
    return outputs
