"""The probabilities of classes under any label prior.

Logits carry a prior q(k) that the loss gave them: softmax(scale logits) ~ p(x|k) q(k). Logit adjustment leaves it
uniform, cross-entropy learns the stream's own p(k), class weights w(k) tilt that to w(k) p(k), each at scale 1; for
other losses see `trainer.class_calibration`. Dividing by q and multiplying with the prior that is asked for gives the
answer at any balance b, from the stream's own prior (0) to all classes alike (1):

    p_b(k|x) = softmax(scale logits - log q + (1 - b) log p)

Source: Menon et al., "Long-tail Learning via Logit Adjustment", ICLR 2021 (arXiv 2007.07314), whose two forms are b = 1
of a model trained by logit adjustment and of one trained by cross-entropy.
"""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClassPriors:
    """What must be known beside the logits.

    Attributes:
        log_stream: (C,) log of each class's share of the stream, floored.
        log_learned: (C,) log of the prior that the logits carry, up to a constant.
        scale: 0-dim, of the logits.
        seen: (C,) bool, whether the class was ever seen; others are never answered.
    """

    log_stream: Tensor
    log_learned: Tensor
    scale: Tensor
    seen: Tensor

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """What `to_tensors` returned.

        Raises:
            KeyError: a tensor is missing.
        """
        return cls(**{field.name: tensors[field.name] for field in fields(cls)})

    def to_tensors(self) -> dict[str, Tensor]:
        """Named tensors, for a safetensors file."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __len__(self) -> int:
        return len(self.log_stream)


def class_log_probabilities(logits: Tensor, priors: ClassPriors, balance: float) -> Tensor:
    """The log of p_b(k|x).

    Args:
        logits: (B, C).
        priors: of the same classes.
        balance: 0 for the stream's own prior, 1 for all classes alike, or between.

    Returns:
        (B, C), in nats; -inf for classes that were never seen.

    Raises:
        ValueError: balance is outside [0, 1].
    """
    if not 0 <= balance <= 1:
        raise ValueError(f"balance must be between 0 (the stream's prior) and 1 (all classes alike), not {balance}")
    adjusted = priors.scale * logits + ((1 - balance) * priors.log_stream - priors.log_learned)
    return torch.log_softmax(adjusted.masked_fill(~priors.seen, -torch.inf), 1)
