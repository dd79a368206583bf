"""The losses by the names a configuration uses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from torch import Tensor

from trainer.losses.bmc import bmc_loss
from trainer.losses.bni import bni_loss
from trainer.losses.classification import cross_entropy_loss, focal_loss, logit_adjusted_loss
from trainer.losses.density import density_bmc_loss, density_nll_loss
from trainer.losses.gai import gai_loss
from trainer.losses.influence_balanced import influence_balanced_loss
from trainer.losses.plain import huber_loss, l1_loss, mse_loss


@dataclass(frozen=True)
class LossEntry:
    """A loss and what a learner must know to call it.

    Attributes:
        function: The loss of a gaussian head (regression) or of logits (classification).
        task: What the label is.
        balanced: Whether what it learns is free of the stream's own label prior.
        density_function: The loss of a mixture head, where there is one.
    """

    function: Callable[..., Tensor] | None
    task: Literal["regression", "classification"]
    balanced: bool
    density_function: Callable[..., Tensor] | None = None


LOSSES: Mapping[str, LossEntry] = MappingProxyType(
    {
        "bmc": LossEntry(bmc_loss, "regression", True, density_bmc_loss),
        "nll": LossEntry(None, "regression", False, density_nll_loss),
        "gai": LossEntry(gai_loss, "regression", True),
        "bni": LossEntry(bni_loss, "regression", True),
        "mse": LossEntry(mse_loss, "regression", False),
        "l1": LossEntry(l1_loss, "regression", False),
        "huber": LossEntry(huber_loss, "regression", False),
        "cross_entropy": LossEntry(cross_entropy_loss, "classification", False),
        "logit_adjusted": LossEntry(logit_adjusted_loss, "classification", True),
        "influence_balanced": LossEntry(influence_balanced_loss, "classification", True),
        "focal": LossEntry(focal_loss, "classification", False),
        "class_balanced": LossEntry(cross_entropy_loss, "classification", True),
    }
)


def loss_named(name: str) -> LossEntry:
    """The loss of that name.

    Raises:
        ValueError: There is none; the message lists those there are.
    """
    if name not in LOSSES:
        raise ValueError(f"there is no loss {name!r}; there are {', '.join(LOSSES)}")
    return LOSSES[name]
