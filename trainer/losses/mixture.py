"""A mixture of Gaussians for each row, the form in which heads answer and the losses of densities are computed."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.losses import kernel

LOG_SQRT_2_PI = 0.5 * math.log(2 * math.pi)


class Mixture(NamedTuple):
    """K Gaussians a row, in label standard deviations.

    Attributes:
        log_weights: (B, K) log pi, normalised over K.
        means: (B, K).
        log_scales: (B, K) log of the standard deviations.
        location: (B,) what the means are offsets from.
    """

    log_weights: Tensor
    means: Tensor
    log_scales: Tensor
    location: Tensor

    def spread(self) -> Tensor:
        """The mixture's own standard deviation (B,), without a gradient."""
        with torch.no_grad():
            weights = self.log_weights.exp()
            mean = (weights * self.means).sum(1, keepdim=True)
            gap = self.means - mean
            return torch.addcmul((2 * self.log_scales).exp_(), gap, gap).mul_(weights).sum(1).sqrt_()


def mixture_log_density(mixture: Mixture, labels: Tensor) -> Tensor:
    """Log density log h(y_j | x_i) of labels (M,): (B, M); differentiated by autograd, in O(B M K) memory."""
    z = (labels - mixture.means[:, :, None]) * torch.exp(-mixture.log_scales)[:, :, None]
    constant = mixture.log_weights - mixture.log_scales - LOG_SQRT_2_PI
    return torch.logsumexp(constant[:, :, None] - 0.5 * z.square(), 1)


def mixture_of_outputs(outputs: Tensor, components: int, scale_bounds: tuple[float, float]) -> Mixture:
    """The mixture that the outputs of a linear layer stand for, differentiable.

    Source: Bishop, "Mixture Density Networks", Aston University NCRG/94/004, 1994; here the means are offsets from one
    location.

    Args:
        outputs: (B, 3 K + 1) logits of the weights, offsets, logs of the scales, and the location.
        components: K.
        scale_bounds: Lowest and highest scale; outside of them a scale has no gradient.
    """
    low, high = math.log(scale_bounds[0]), math.log(scale_bounds[1])
    if kernel.takes(outputs):
        return Mixture(*_Parts.apply(outputs, components, low, high))  # type: ignore[no-untyped-call]
    logits, offsets, log_scales, location = torch.split(outputs, [*[components] * 3, 1], dim=1)
    return Mixture(logits.log_softmax(1), location + offsets, log_scales.clamp(low, high), location.squeeze(1))


class _Parts(torch.autograd.Function):
    """`mixture_of_outputs` by the kernel: one call each way instead of a dozen."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, components: int, low: float, high: float) -> tuple[Tensor, ...]:
        outputs = outputs.contiguous()
        parts = kernel.mixture_parts(outputs, components, low, high)
        ctx.save_for_backward(outputs, parts[0])
        ctx.bounds = low, high
        return parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *by_parts: Tensor) -> tuple[Tensor | None, ...]:
        outputs, log_weights = ctx.saved_tensors
        return kernel.mixture_outputs(outputs, log_weights, *ctx.bounds, *by_parts), None, None, None
