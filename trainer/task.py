"""What differs between the tasks: the one seam behind which the learner keeps regression and classification.

The learner owns the order of things, the optimiser, the replay buffer, the averaged weights and the readings. A task
owns the networks and all that depends on what a label is: its statistics, the loss, the answer, the metrics.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.batching import Batch

# Labels that a loss is computed from beside a row's own: those of all rows of the step, and of a memory; those of its
# own rank's rows, and of a memory of which each counts as many times as it stands for; or none.
Compared = Literal["all", "memory", "none"]
FORGETTING: Final = 8.0  # times as fast is what is known of the labels forgotten after a drift, where that is asked for


class Network(Protocol):
    """A model as the learner sees it."""

    body: nn.Module

    def parameters(self) -> Iterable[nn.Parameter]:
        """All that is learned."""

    def train(self) -> Any:
        """Switches to training."""


class Predicted(NamedTuple):
    """B rows that were predicted before they were learned from, by one rank."""

    result: Any  # what evaluations read: a task's own form of all answers
    columns: Tensor  # (B, K), a task's own: all that `score` needs of each row


class Tested(NamedTuple):
    """What became of the predictions of B rows, those of all ranks."""

    point: Tensor  # (B,) the answer at balance 0, in the label's numbers
    scores: Tensor  # (2,) float64, mean log scores of the current and the averaged weights, cut below
    error: Tensor  # (B,) of the answer at balance 0, whose rise is drift; any unit


class Noise(NamedTuple):
    """The noise that a model assumes, where it has such a number."""

    sigma: float  # label standard deviations
    label_units: float


class Task(Protocol):
    """Regression or classification. Nothing here waits for the device, but for what says that it reads."""

    @property
    def model(self) -> Network:
        """The network with the current weights."""

    @property
    def averaged(self) -> Network:
        """The same network with averaged weights; running statistics are the model's own."""

    def sigma_parameters(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """What is learned at the rate of sigma, beside its average."""

    def grow(self, batch: Batch) -> bool:
        """Makes room for what a batch brings; says whether parameters of the networks have been replaced.

        A parameter that is replaced begins with what it held, in every dimension, and the rest is 0.
        """

    def predict(self, numeric: Tensor, categorical: Tensor, label: Tensor, averaged_is_better: Tensor) -> Predicted:
        """Predicts rows not yet learned from; changes nothing.

        Their classes may be new to the network, which has room for them already. There may be no rows.

        Args:
            numeric: (B, F) on the device.
            categorical: (B, C) on the device.
            label: (B,) on the device.
            averaged_is_better: 0-dim bool, whether the averaged weights answer.
        """

    def score(self, columns: Tensor, label: Tensor, host_label: NDArray[np.float64]) -> Tested:
        """Takes the errors of predicted rows into the metrics.

        Args:
            columns: (B, K) of `predict`.
            label: (B,) on the device.
            host_label: the same on the host.
        """

    def observe(self, numeric: Tensor, label: Tensor, host_label: NDArray[np.float64], batches: int) -> None:
        """Takes rows into the running statistics; `batches` came before."""

    def forget(self, fast: bool) -> None:
        """Sets how fast what is known of the labels fades: as ever, or `fast` after a drift."""

    def columns(self, numeric: Tensor) -> Tensor:
        """Raw columns (B, F), NaN where missing, as the networks take them in training: (B, 2F)."""

    def targets(self, label: Tensor) -> Tensor:
        """Labels (B,) as `loss` takes them, by the statistics of now."""

    def loss(
        self, columns: Tensor, categorical: Tensor, target: Tensor, memory: Tensor, memory_weight: float
    ) -> tuple[Sequence[Tensor], Tensor]:
        """The network's outputs for B rows, and their loss, 0-dim.

        Args:
            columns: (B, 2F), of `columns`.
            categorical: (B, C) buckets.
            target: (B,), of `targets`.
            memory: (M,), of `targets`: labels of further rows.
            memory_weight: how many rows of the replay buffer each of them stands for.
        """

    @property
    def compared(self) -> Compared:
        """What the other ranks bring to `memory` in `loss`: labels of their rows too, of memories alone, or none."""

    def running(self) -> list[Tensor]:
        """Running means that `loss` keeps: each rank has its own, to be averaged in place."""

    def metrics(self) -> dict[str, Any]:
        """All prequential metrics: by window, then by answer; reads them off the device."""

    def noise(self, averaged: bool) -> Noise | None:
        """The noise assumed by the averaged or the current weights; reads it off the device."""

    def is_healthy(self, errors: dict[str, Any], noise: Noise | None) -> bool:
        """Whether errors of one window at the stream's own prior are finite and not clearly worse than a constant's."""

    def shown(self, labels: list[float]) -> Sequence[float | str]:
        """Labels by their numbers, as people know them."""

    def inference_state(self, averaged: bool) -> dict[str, Tensor]:
        """What predicting needs, with the averaged or the current weights."""

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """All state, by part."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state_dict` gave, each name behind that of its part.

        Raises:
            KeyError, RuntimeError: it is of another model.
        """
