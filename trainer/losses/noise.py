"""The noise's standard deviation sigma of Balanced MSE: fixed, learned, or a share of the running residual."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainer.losses.rows import finite_rows

SigmaMode = Literal["fixed", "learned", "adaptive"]
SigmaUnit = Literal["label_sd", "label"]

# In label standard deviations: above the noise predictions leave the label range, far below it the loss is plain MSE.
SIGMA_BOUNDS = (0.05, 1.0)


class NoiseSigma(nn.Module):
    """Sigma in label standard deviations; part of a snapshot through its `state_dict`.

    Modes:
        fixed: stays what it is: the same share of a label standard deviation, or, with `unit="label"`, the same number
            in the unit of the labels. Bounds do not apply to what the user set.
        learned: a parameter (`sigma`) to give its own learning rate; moved by `bmc_loss`, inside the bounds.
        adaptive: `share` times the root of the fading mean square of the residuals given to `observe`, inside the
            bounds. For Balanced MSE keep the share well below 1: at 1 sigma feeds back on itself and runs away.

    Args:
        mode: One of the three.
        initial: The first value, in label standard deviations, or in label units with `unit="label"` (then call
            `rescale(1 / sd)` once the standard deviation is known).
        unit: Which of the two a fixed sigma is constant in.
        bounds: Lowest and highest value of a learned or adaptive sigma, in label standard deviations.
        share: Adaptive only, sigma beside the running residual, above 0 and at most 1.
        decay: Adaptive only, how much of the running mean square one call of `observe` keeps, in [0, 1).

    Raises:
        ValueError: A value outside its range, or an unknown mode or unit.
    """

    sigma: Tensor
    mean_square: Tensor

    def __init__(
        self,
        mode: SigmaMode = "learned",
        initial: float = 0.3,
        *,
        unit: SigmaUnit = "label_sd",
        bounds: tuple[float, float] = SIGMA_BOUNDS,
        share: float = 0.5,
        decay: float = 0.99,
    ) -> None:
        super().__init__()
        if mode not in ("fixed", "learned", "adaptive"):
            raise ValueError(f"sigma mode {mode!r} is not fixed, learned or adaptive")
        if unit not in ("label_sd", "label"):
            raise ValueError(f"sigma unit {unit!r} is not label_sd or label")
        if not initial > 0:
            raise ValueError(f"sigma {initial} is not above 0")
        if not 0 < bounds[0] < bounds[1]:
            raise ValueError(f"sigma bounds {bounds} are not ascending and above 0")
        if not 0 < share <= 1 or not 0 <= decay < 1:
            raise ValueError(f"share {share} must lie in (0, 1] and decay {decay} in [0, 1)")
        self.mode, self.unit, self.bounds, self.share, self.decay = mode, unit, bounds, share, decay
        if mode == "learned":
            self.sigma = nn.Parameter(torch.tensor(float(initial)))
        else:
            self.register_buffer("sigma", torch.tensor(float(initial)))
        if mode == "adaptive":
            self.register_buffer("mean_square", torch.tensor((initial / share) ** 2))

    def value(self) -> Tensor:
        """Sigma in label standard deviations, 0-dim; with a gradient when learned."""
        if self.mode == "fixed":
            return self.sigma
        bounded: Tensor = _Bounded.apply(self.sigma, *self.bounds)  # type: ignore[no-untyped-call]
        return bounded

    @torch.no_grad()
    def observe(self, residuals: Tensor) -> None:
        """Take in a batch's residuals (B,), in label standard deviations; only an adaptive sigma moves.

        Residuals that are not finite are left out, and a batch of none changes nothing. Nothing waits for the host.
        """
        if self.mode != "adaptive":
            return
        keep = finite_rows(residuals)
        count = keep.sum()
        square = torch.where(keep, residuals, 0).square().sum() / count.clamp(min=1)
        kept = torch.where(count > 0, self.decay, 1.0)
        self.mean_square.mul_(kept).add_((1 - kept) * square)
        self.sigma.copy_(self.share * self.mean_square.sqrt())

    @torch.no_grad()
    def rescale(self, ratio: Tensor | float) -> None:
        """Follow a change of the label's standard deviation, so that sigma in label units stays what it was.

        A fixed sigma given in label standard deviations does not move: it is that share of whatever they are.

        Args:
            ratio: The old label standard deviation over the new one, 0-dim.
        """
        if self.mode == "fixed" and self.unit == "label_sd":
            return
        self.sigma.mul_(ratio)
        if self.mode == "adaptive":
            self.mean_square.mul_(ratio**2)


class _Bounded(torch.autograd.Function):
    """Clamp; outside the bounds only a gradient that leads back passes, so a parameter is never stuck there."""

    @staticmethod
    def forward(ctx: Any, sigma: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(sigma)
        ctx.bounds = low, high
        return sigma.clamp(low, high)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (sigma,), (low, high) = ctx.saved_tensors, ctx.bounds
        leads_out = ((sigma <= low) & (grad > 0)) | ((sigma >= high) & (grad < 0))
        return torch.where(leads_out, 0, grad), None, None
