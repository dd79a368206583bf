"""The labels a row is compared with: its batch's, those of the other ranks, and those of a memory."""

import math
import warnings

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.losses.rows import finite_rows

_warned = set[str]()


def candidate_labels(
    target: Tensor, memory: Tensor | None, memory_log_weights: Tensor | None, *, gather: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Collect the candidates; row i of the batch is candidate i, so its own label is among them exactly once.

    Where `torch.distributed` is initialised, the labels of the other ranks' batches are candidates too, and every rank
    must make the call. Warns once if there is a single candidate, whose loss is 0 whatever the prediction.

    Args:
        target: (B,) or (B, D) labels of the batch.
        memory: (M,), (M, 1) or (M, D) further labels, or None.
        memory_log_weights: (M,) log weights beside the batch's 0; -inf = masked out; None for 0.
        gather: Whether to ask the other ranks; not where the memory has their labels.

    Returns:
        Labels (N,) or (N, D), the batch's first, and log weights (N,), or None if all are 0.

    Raises:
        ValueError: The memory does not hold labels like the batch's, or its weights are not one a label.
    """
    others = labels_of_other_ranks(target) if gather else None
    labels = [target] if others is None else [target, others]
    weights = None
    if memory is not None and len(memory):
        memory = memory.detach() if memory.requires_grad else memory
        memory = memory if memory.dtype == target.dtype else memory.to(target.dtype)
        memory = memory[:, 0] if memory.dim() == 2 and memory.shape[1] == 1 else memory
        if memory.shape[1:] != target.shape[1:]:
            raise ValueError(f"memory {tuple(memory.shape)} does not hold labels like those of {tuple(target.shape)}")
        if memory_log_weights is not None:
            if memory_log_weights.shape != memory.shape[:1]:
                raise ValueError(
                    f"memory_log_weights {tuple(memory_log_weights.shape)}: memory has {len(memory)} labels"
                )
            present = sum(len(part) for part in labels)
            weights = torch.cat([target.new_zeros(present), memory_log_weights.detach().to(target.dtype)])
        labels.append(memory)
    candidates = torch.cat(labels) if len(labels) > 1 else target
    if len(candidates) == 1:
        warn_once("a batch of one row without a label memory: its balanced loss is 0 and teaches nothing")
    return candidates, weights


def mask_candidates(labels: Tensor, log_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mask out the labels that are not finite, on the device.

    Args:
        labels: (N,) or (N, D) candidates.
        log_weights: (N,) or None for 0.

    Returns:
        Labels that are all finite, and log weights (N,) that are -inf where a label is not to be used.
    """
    usable = finite_rows(labels)
    if log_weights is None:
        log_weights = labels.new_zeros(len(labels))
    usable &= log_weights > -torch.inf
    # A label masked out repeats one that is not (the first; 0 if there is none), so that it is never the nearest alone.
    stand_in = labels.index_select(0, usable.to(torch.uint8).argmax().reshape(1)).nan_to_num(0.0, 0.0, 0.0)
    labels = torch.where(usable if labels.dim() == 1 else usable[:, None], labels, stand_in)
    return labels, log_weights.masked_fill(~usable, -torch.inf)


def drop_masked(labels: Tensor, log_weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Drop the candidates masked out, on a CPU only: it waits for the numbers.

    Args:
        labels: (N,) or (N, D) candidates.
        log_weights: (N,), -inf = masked out; or None for 0.

    Returns:
        The labels that are left, and their log weights, None if all are 0.
    """
    if log_weights is None:
        return labels, None
    usable = log_weights > -torch.inf
    labels, log_weights = labels[usable], log_weights[usable]
    return labels, log_weights if bool(log_weights.any()) else None


def all_finite(*tensors: Tensor) -> bool:
    """Whether every value is finite, on a CPU only; may say no where a sum overflows."""
    with torch.no_grad():
        return math.isfinite(sum(float(t.sum()) for t in tensors))


def labels_of_other_ranks(target: Tensor) -> Tensor | None:
    """All-gather the labels of a step, and nothing else.

    Args:
        target: (B,) or (B, D) labels of this rank; B may differ between ranks.

    Returns:
        The labels of the other ranks, NaN (which every loss here masks out) where a rank has fewer rows than another;
        None if there is no other rank.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    rows = torch.tensor(len(target), device=target.device)
    dist.all_reduce(rows, op=dist.ReduceOp.MAX)
    padded = target.new_full((int(rows), *target.shape[1:]), torch.nan)
    padded[: len(target)] = target
    gathered = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, padded)
    return torch.cat([labels for rank, labels in enumerate(gathered) if rank != dist.get_rank()])


def warn_once(message: str) -> None:
    """Warn the first time this message comes up in the process."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=4)
