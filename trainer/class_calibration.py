"""Which prior and which scale logits carry, found from the stream where theory does not say.

Focal and influence-balanced losses weigh rows by what the model makes of them, so neither the prior in their logits nor
the scale of them is known. Both are read off the predictions that were made before their rows were learned: of all
answers softmax(scale logits + tilt log p), p the classes' shares, the one with the best log score is the answer at the
stream's own prior. It is a logistic regression on two numbers a row, followed by damped Newton steps.
"""

from typing import Final

import torch
from torch import Tensor, nn

RATE: Final = 0.2  # of a Newton step, for a batch of WINDOW_ROWS; smaller ones take smaller steps
WINDOW_ROWS: Final = 256.0
RIDGE: Final = 1e-3  # of the information, so that what the rows do not tell stays as it is
BOUNDS: Final = ((0.1, 10.0), (-1.0, 2.0))  # of scale and tilt


class LogitCalibration(nn.Module):
    """Scale and tilt, fitted as rows come; nothing waits for the host.

    Attributes:
        fitted: (2,) float64 buffer, scale and tilt; 1 and 0 are those of cross-entropy.
        information: (2, 2) float64 buffer, fading mean of the rows' information about them.
    """

    fitted: Tensor
    information: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fitted", torch.tensor([1.0, 0.0], dtype=torch.float64))
        self.register_buffer("information", torch.zeros(2, 2, dtype=torch.float64))

    @torch.no_grad()
    def observe(self, logits: Tensor, log_prior: Tensor, seen: Tensor, target: Tensor) -> None:
        """Takes in rows that were predicted and not yet learned from.

        Args:
            logits: (B, C).
            log_prior: (C,) log of each class's share.
            seen: (C,) bool, the classes that can be answered.
            target: (B,) int64 classes; rows of others than these are left out.
        """
        inputs = torch.stack([logits.double(), log_prior.double().expand_as(logits)], 2)  # (B, C, 2)
        known = target < logits.shape[1]
        known &= seen[torch.where(known, target, 0)] & logits.isfinite().all(1)
        inputs = torch.where(known[:, None, None], inputs, 0.0)
        p = torch.softmax((inputs @ self.fitted).masked_fill(~seen, -torch.inf), 1)[:, :, None]
        mean = (p * inputs).sum(1)  # (B, 2)
        own = inputs.gather(1, torch.where(known, target, 0)[:, None, None].expand(-1, 1, 2))[:, 0]
        rows = known.sum().clamp(min=1)
        gradient = (own - mean).sum(0) / rows
        centred = inputs - mean[:, None]
        information = (p * centred).flatten(0, 1).T @ centred.flatten(0, 1) / rows
        share = min(1.0, len(target) / WINDOW_ROWS)
        fresh = self.information.sum() == 0
        self.information.copy_(torch.where(fresh, information, self.information.lerp(information, RATE * share)))
        damped = self.information + RIDGE * torch.eye(2, dtype=torch.float64, device=logits.device)
        step = _solved(damped, gradient) * (RATE * share)
        moved = self.fitted + torch.where(step.isfinite(), step, 0.0)
        self.fitted.copy_(torch.stack([moved[i].clamp(*bounds) for i, bounds in enumerate(BOUNDS)]))


def _solved(matrix: Tensor, vector: Tensor) -> Tensor:
    """The solution of a symmetric 2 x 2 system, by Cramer's rule."""
    a, b, d = matrix[0, 0], matrix[0, 1], matrix[1, 1]
    adjugate = torch.stack([torch.stack([d, -b]), torch.stack([-b, a])])
    return adjugate @ vector / (a * d - b * b)
