"""The ranks of one training job: processes that read some of the partitions each, and learn one model together.

`torchrun --nproc-per-node N -m trainer --config FILE` starts them. What every rank must know is exchanged; what follows
from it each computes for itself, in the same order from the same numbers, so that all hold the same state. A process
that runs alone is the one rank of its job: nothing is exchanged, and nothing is copied.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # public, and missing in its __all__
from torch.distributed.rendezvous import rendezvous

from trainer.errors import RankLost

GATHERED_FLOATS: Final = 1 << 20  # up to which it is the waiting that takes time: all-gather waits half as often
TIMEOUT: Final = timedelta(minutes=10)  # for a rank that hangs; the end of one is noticed at once


class Ranks:
    """One rank, and the way to the others: each method is called by all of them, in the same order.

    Args:
        number: of this rank, from 0.
        count: of all ranks.
        group: they talk in, None for the default one.
        device: of small messages.

    Attributes:
        saving: the same ranks on a way of its own, for another thread.
    """

    def __init__(self, number: int = 0, count: int = 1, group: dist.ProcessGroup | None = None) -> None:
        self.number = number
        self.count = count
        self._group = group
        self.saving = self

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.count == 1

    def owns(self, partition: int) -> bool:
        """Whether this rank reads a partition."""
        return partition % self.count == self.number

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Of each flag, whether a rank has it set."""
        if self.alone:
            return flags
        found = torch.tensor(flags, dtype=torch.uint8)
        with _others_are_there():
            dist.all_reduce(found, dist.ReduceOp.MAX, self._group)
        return tuple(map(bool, found.tolist()))

    def numbers(self, *own: int) -> list[list[int]]:
        """The numbers that each rank has, by rank."""
        if self.alone:
            return [list(own)]
        return [part.tolist() for part in self._gather(torch.tensor(own, dtype=torch.int64))]

    def rows(self, own: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows of all ranks, those of rank 0 first.

        Args:
            own: (B, ...), B = counts[number]; all else of the shape is the same on every rank.
            counts: rows of each rank.
        """
        if self.alone:
            return own
        padded = own.new_zeros(max(counts), *own.shape[1:])
        padded[: len(own)] = own
        return torch.cat([part[:count] for part, count in zip(self._gather(padded), counts, strict=True)])

    def rows_beside(self, own: Tensor, counts: Sequence[int], beside: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`rows`, and by rank what else each brings, in one exchange.

        Args:
            own: as in `rows`.
            counts: rows of each rank.
            beside: of the same dtype as `own`, and of the same shape on every rank.
        """
        if self.alone:
            return own, [beside]
        padded = own.new_zeros(max(counts), *own.shape[1:])
        padded[: len(own)] = own
        size = padded.numel()
        parts = self._gather(torch.cat([padded.flatten(), beside.flatten()]))
        rows = [part[:size].view_as(padded)[:count] for part, count in zip(parts, counts, strict=True)]
        return torch.cat(rows), [part[size:].view_as(beside) for part in parts]

    def sum_(self, *tensors: Tensor) -> None:
        """Makes each tensor the sum over all ranks, in one exchange."""
        if self.alone:
            return
        flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
        if flat.device.type == "cpu" and flat.numel() * self.count <= GATHERED_FLOATS:
            flat = functools.reduce(Tensor.add_, self._gather(flat))  # in the order of the ranks, so alike on all
        else:
            with _others_are_there():
                dist.all_reduce(flat, group=self._group)
        for tensor, total in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def texts(self, own: bytes) -> list[bytes]:
        """What each rank has to say, by rank."""
        if self.alone:
            return [own]
        sizes = [size for (size,) in self.numbers(len(own))]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(own)] = torch.frombuffer(bytearray(own or b"\0"), dtype=torch.uint8)[: len(own)]
        return [part[:size].numpy().tobytes() for part, size in zip(self._gather(padded), sizes, strict=True)]

    def told(self, said: bytes) -> bytes:
        """What rank 0 says."""
        if self.alone:
            return said
        size = torch.tensor([len(said)])
        with _others_are_there():
            dist.broadcast(size, 0, self._group)
            text = torch.zeros(int(size), dtype=torch.uint8)
            if self.number == 0:
                text.copy_(torch.frombuffer(bytearray(said or b"\0"), dtype=torch.uint8)[: len(said)])
            dist.broadcast(text, 0, self._group)
        return text.numpy().tobytes()

    def _gather(self, own: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(own) for _ in range(self.count)]
        with _others_are_there():
            dist.all_gather(parts, own, self._group)
        return parts


ALONE: Final = Ranks()


def local_rank() -> int:
    """The number of this process among the ranks of its machine; 0 outside of torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that torchrun started, once all of them are there; elsewhere this process alone.

    Messages are on the CPU, by gloo; what lies on a CUDA device is exchanged there, by nccl.

    Raises:
        RankLost: not all came.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield ALONE
        return
    with _others_are_there():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        store, number, count = next(rendezvous("env://", timeout=TIMEOUT))
        # torchrun keeps the store when it starts ranks again, and with it the addresses of those that are gone.
        store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=TIMEOUT)
        ranks = Ranks(number, count)
        ranks.saving = Ranks(ranks.number, ranks.count, dist.new_group(backend="gloo", timeout=TIMEOUT))
    try:
        yield ranks
    finally:
        with suppress(RuntimeError):  # the others may be gone
            dist.destroy_process_group()


@contextmanager
def _others_are_there() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise RankLost(
            f"another rank of this job ended or does not answer ({reason}): its own log says why; what was learned is "
            "safe up to the last snapshot, and torchrun starts all ranks again as often as --max-restarts allows"
        ) from error
