"""How many rows go through a network at once, so that an answer does not depend on which others they are.

Matrix kernels differ by the number of rows, and with them the order of sums and the last bits of an answer. Which
numbers agree depends on the CPU and on the widths of the network, so it is tried out: a few rows alone and in batches,
through the real model, when it is loaded first.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import structlog
import torch
from torch import Tensor, nn

from trainer.model import FeatureScaler

SIZES: Final = (1, 2, 7, 15, 16, 17, 33, 48, 64, 65, 100, 128, 250, 1000, 1024, 4096)  # of the batches that are tried
PROBES: Final = 8  # rows whose answers are compared
SEED: Final = 0

log = structlog.stdlib.get_logger(__name__)

Network = Callable[[Tensor, Tensor], Any]


class Passes(NamedTuple):
    """How rows go through a network.

    Attributes:
        multiple: a batch is filled up to a multiple of so many rows.
        at_once: rows of one call; None for all of the batch.
    """

    multiple: int
    at_once: int | None = None

    def padded(self, rows: int) -> int:
        """How many rows a batch has once it is filled up."""
        return max(1, -(-rows // self.multiple)) * self.multiple

    def run(self, network: Network, numeric: Tensor, categorical: Tensor) -> Any:
        """What a network that gives a tuple of tensors, or one, says of a batch that is filled up."""
        if self.at_once is None:
            return network(numeric, categorical)
        starts = range(0, len(numeric), self.at_once)
        parts = [network(numeric[at : at + self.at_once], categorical[at : at + self.at_once]) for at in starts]
        if isinstance(parts[0], Tensor):
            return torch.cat(parts)
        return type(parts[0])(*map(torch.cat, zip(*parts, strict=True)))


# 16 are the numbers in the widest vector register. From the fastest to the one that cannot fail: each row by itself.
CHOICES: Final = (Passes(16), Passes(64), Passes(256), Passes(64, 64), Passes(16, 16), Passes(16, 1))

_known: dict[tuple[Any, ...], Passes] = {}  # by what kernels are chosen by


def passes_of(model: nn.Module, buckets: tuple[int, ...]) -> Passes:
    """The fastest way by which the rows that were tried had the same outputs in every batch, to the last bit.

    Args:
        model: of frozen statistics and weights, the shapes of which are what it is found out for once in a process.
        buckets: how many each categorical column has.
    """
    shapes = tuple((name, tuple(value.shape)) for name, value in model.state_dict().items())
    key = (type(getattr(model, "body", None)), shapes, torch.get_num_threads())
    if key not in _known:
        numeric, categorical = _probes(model, buckets)
        found = next((of for of in CHOICES if _is_alike(of, model, numeric, categorical)), CHOICES[-1])
        _known[key] = found
        if found == CHOICES[0]:
            log.info("an answer depends on nothing else in its pass", rows_multiple=found.multiple)
        else:
            log.warning(
                "the network's outputs depend on the rows beside: passes are split or filled up more, and are slower",
                rows_multiple=found.multiple,
                rows_at_once=found.at_once or "all",
            )
    return _known[key]


@torch.inference_mode()
def _is_alike(passes: Passes, model: Network, numeric: Tensor, categorical: Tensor) -> bool:
    """Whether the first rows have the same outputs in batches of all sizes, at their beginning and at their end."""

    def outputs(rows: Tensor) -> list[Tensor]:
        index = torch.zeros(passes.padded(len(rows)), dtype=torch.int64)
        index[: len(rows)] = rows
        said = passes.run(model, numeric[index], categorical[index])
        return [part[: len(rows)] for part in ((said,) if isinstance(said, Tensor) else said)]

    alone = [outputs(torch.tensor([row])) for row in range(PROBES)]
    expected = [torch.cat(of) for of in zip(*alone, strict=True)]
    for size in SIZES:
        count = min(PROBES, size)
        others = torch.arange(PROBES, PROBES + size - count)
        first = outputs(torch.cat([torch.arange(count), others]))
        last = outputs(torch.cat([others, torch.arange(count)]))
        for part, at_the_start, at_the_end in zip(expected, first, last, strict=True):
            if not (_same(part[:count], at_the_start[:count]) and _same(part[:count], at_the_end[size - count :])):
                return False
    return True


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


def _probes(model: nn.Module, buckets: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """As many rows as the largest batch has, within what the model was trained on; some values are missing."""
    generator = torch.Generator().manual_seed(SEED)
    scaler = model.features
    assert isinstance(scaler, FeatureScaler)
    rows, columns = SIZES[-1], len(scaler.low)
    low, high = scaler.low.nan_to_num(0.0, 0.0, 0.0), scaler.high.nan_to_num(0.0, 0.0, 0.0)
    numeric = torch.lerp(low, high, torch.rand(rows, columns, generator=generator, dtype=torch.float64)).float()
    numeric[torch.rand(rows, columns, generator=generator) < 0.05] = torch.nan
    categorical = torch.rand(rows, len(buckets), generator=generator).mul(torch.tensor(buckets)).long()
    return numeric, categorical
