"""Calls `fused_rows` where Triton is: it comes with torch for CUDA. Elsewhere torch computes the same in many steps."""

import functools
import importlib.util
import math
import warnings
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

MOST_COMPONENTS: Final = 64
FEW_ROWS: Final = 1 << 14  # so few that each program must have less, or most of the device idles
PAIRS: Final = 1024  # that a program holds at a time

_PLAIN = (Tensor, torch.nn.Parameter)  # tensors with memory of their own


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels are there and compute with such tensors: of float32, on CUDA, and not being traced."""
    if not all(t.is_cuda and t.dtype == torch.float32 and type(t) in _PLAIN for t in tensors):
        return False
    return not torch.compiler.is_compiling() and _kernels() is not None


@functools.cache
def _kernels() -> Any:
    """`trainer.losses.fused_rows`, tried out; None where it cannot be used."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        from trainer.losses import fused_rows

        one = torch.ones(1, device="cuda")
        _balanced_rows(fused_rows, one, one, one, one)
    except Exception as error:  # whatever a compiler says, there is another way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"losses on CUDA are computed by torch, slower: Triton says {reason!r}", stacklevel=2)
        return None
    return fused_rows


class BalancedRows(NamedTuple):
    """What `balanced_rows` gives of B rows; 0 where a row does not count."""

    loss: Tensor  # (B,) float32
    by_pred: Tensor  # (B,) float32, its derivative by the prediction
    by_sigma: Tensor  # (B,) float64, by sigma
    spread: Tensor  # (B,) float64, the candidates' variance under the softmax
    counts: Tensor  # (B,) bool


def balanced_rows(pred: Tensor, target: Tensor, labels: Tensor, sigma: Tensor) -> BalancedRows:
    """Balanced MSE of each row, with its gradients; see `trainer.losses.bmc`.

    Args:
        pred: (B,) predictions; a row that is not finite does not count.
        target: (B,) labels, each among the candidates.
        labels: (M,) candidates; those that are not finite are none.
        sigma: 0-dim, above 0.
    """
    return _balanced_rows(_kernels(), pred, target, labels, sigma)


def _balanced_rows(kernels: Any, pred: Tensor, target: Tensor, labels: Tensor, sigma: Tensor) -> BalancedRows:
    given = [t.contiguous() for t in (pred, target, labels, sigma)]
    count = len(pred)
    out, wide = (torch.empty(2, count, dtype=d, device=pred.device) for d in (torch.float32, torch.float64))
    counts = torch.empty(count, dtype=torch.bool, device=pred.device)
    found = BalancedRows(out[0], out[1], wide[0], wide[1], counts)
    rows = 2 if count < FEW_ROWS else 16
    tiles = {"tile_rows": rows, "tile_columns": PAIRS // rows}
    with torch.cuda.device_of(pred):  # type: ignore[no-untyped-call]
        kernels.balanced_rows[(-(-count // rows),)](*given, out, *wide, counts, count, len(labels), **tiles)
    return found


def mixture_rows(
    log_weights: Tensor,
    means: Tensor,
    log_scales: Tensor,
    location: Tensor,
    target: Tensor,
    labels: Tensor | None,
    label_log_weights: Tensor | None,
    variances: Tensor | None,
    scales: Tensor | None,
    factors: Tensor | None,
    memory_rows: int,
    memory_weight: float,
    location_weight: float,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Losses of a mixture head and their gradients; see `trainer.losses.density`.

    Args:
        log_weights: (B, K), K at most `MOST_COMPONENTS`.
        means: (B, K).
        log_scales: (B, K).
        location: (B,).
        target: (B,) labels.
        labels: (M,) candidates, the labels among them, or None for the likelihood; those not finite are none.
        label_log_weights: (M,), -inf for what is no candidate; None for 0.
        variances: (memory_rows,) of the Gaussians that the last candidates stand for; None for 0.
        scales: (B,) factors of the rows; None for the mixtures' standard deviations.
        factors: (B,) further factors; None for 1.
        memory_rows: How many candidates, at the end, count `memory_weight` times.
        memory_weight: See there.
        location_weight: Of the squared error of the location.

    Returns:
        Losses (B,), a bool (B,) for the rows that count (the others have 0), and gradients by the first four arguments.
    """
    return _mixture_rows(
        _kernels(),
        (log_weights, means, log_scales, location, target),
        (labels, label_log_weights, variances, scales, factors),
        memory_rows,
        (math.log(memory_weight), location_weight),
    )


def _mixture_rows(
    kernels: Any,
    rows: tuple[Tensor, ...],
    others: tuple[Tensor | None, ...],
    memory_rows: int,
    numbers: tuple[float, float],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    rows = tuple(t.detach().contiguous() for t in rows)
    target, labels = rows[-1], others[0]
    candidates = 0 if labels is None else len(labels)
    count, components = rows[0].shape
    width = 1 << (components - 1).bit_length()
    out = target.new_empty(2, count)
    counts = torch.empty_like(target, dtype=torch.bool)
    by_components = target.new_empty(3, count, components)
    with torch.cuda.device_of(target):  # type: ignore[no-untyped-call]
        kernels.mixture_rows[(count,)](
            *rows,
            *(target if t is None else t.contiguous() for t in others),
            out,
            counts,
            by_components,
            count,
            components,
            candidates,
            candidates - memory_rows,
            *numbers,
            is_likelihood=labels is None,
            has_log_weights=others[1] is not None,
            has_variances=others[2] is not None,
            has_scales=others[3] is not None,
            has_factors=others[4] is not None,
            tile_components=width,
            tile_columns=max(16, PAIRS // width),
        )
    loss, by_location = out.unbind(0)
    return loss, counts, [*by_components.unbind(0), by_location]
