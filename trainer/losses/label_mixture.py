"""A Gaussian mixture of the labels of a stream, fitted as they come."""

import math

import torch
from torch import Tensor, nn

from trainer.losses.rows import finite_rows

LEAST_WEIGHT = 1e-3  # a component below it explains next to nothing and starts again
LEAST_SD_SHARE = 1e-3  # of the labels' own standard deviation: a narrower component has collapsed onto ties


class LabelMixture(nn.Module):
    """K Gaussians fitted by stepwise EM with forgetting; buffers only, so that it is part of a snapshot.

    Source: Cappe and Moulines, "On-line expectation-maximization algorithm for latent data models", Journal of the
    Royal Statistical Society B 71, 2009: the sufficient statistics follow the batch's at a rate, the parameters them.

    A component whose weight or width has vanished, or that repeats another, starts again on one of the labels explained
    worst. Nothing waits for the host. The first batch places the components at its quantiles.

    Args:
        components: K, at least 1.
        decay: What one call of `observe` keeps of the statistics, in [0, 1); .99 remembers about 100 batches.

    Raises:
        ValueError: A value outside its range.

    Attributes:
        mass, first, second: (K,) means of the responsibilities, and of them times the label and its square.
        batches: 0-dim int64, how many batches with a finite label were seen.
    """

    mass: Tensor
    first: Tensor
    second: Tensor
    batches: Tensor

    def __init__(self, components: int = 8, decay: float = 0.99) -> None:
        super().__init__()
        if components < 1 or not 0 <= decay < 1:
            raise ValueError(f"components {components} must be at least 1 and decay {decay} in [0, 1)")
        self.decay = decay
        self.register_buffer("mass", torch.full((components,), 1 / components, dtype=torch.float64))
        self.register_buffer("first", torch.zeros(components, dtype=torch.float64))
        self.register_buffer("second", torch.full((components,), 1 / components, dtype=torch.float64))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def parameters_of_mixture(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log weights, means and variances, (K,) each, float64, in the unit of the labels observed."""
        means = self.first / self.mass
        spread = self.second.sum() - self.first.sum().square()
        least = (LEAST_SD_SHARE**2 * spread).clamp(min=1e-12)
        return (self.mass / self.mass.sum()).log(), means, (self.second / self.mass - means.square()).clamp(min=least)

    @torch.no_grad()
    def observe(self, labels: Tensor) -> None:
        """Take in a batch of labels (B,); those that are not finite are left out."""
        keep = finite_rows(labels)
        count = keep.sum()
        share = keep.double() / count.clamp(min=1)
        labels = torch.where(keep, labels, 0).double()
        started = self.batches > 0
        log_weights, means, variances = self.parameters_of_mixture()
        at = self._quantiles(labels, keep)
        means = torch.where(started, means, at)
        mean = (share * labels).sum()
        variance = (share * (labels - mean).square()).sum().clamp(min=1e-12)
        variances = torch.where(started, variances, variance / len(means))

        logits = log_weights - 0.5 * variances.log() - 0.5 * (labels[:, None] - means).square() / variances
        log_density = logits.logsumexp(1)
        weighted = share[:, None] * torch.exp(logits - log_density[:, None])
        batch = weighted.sum(0), (weighted * labels[:, None]).sum(0), (weighted * labels[:, None].square()).sum(0)
        # Early on the average is over what was seen; a batch without a finite label changes nothing.
        rate = torch.clamp(1 / (1 + self.batches.double()), min=1 - self.decay) * (count > 0)
        for statistic, seen in zip((self.mass, self.first, self.second), batch, strict=True):
            statistic.lerp_(seen, rate)
        self.batches += count > 0
        self._restart(labels, torch.where(keep, log_density, torch.inf), variance, count > 0)

    def _quantiles(self, labels: Tensor, keep: Tensor) -> Tensor:
        """K quantiles of the labels that are kept."""
        ascending = torch.where(keep, labels, torch.inf).sort().values
        place = (torch.arange(len(self.mass), device=labels.device) + 0.5) / len(self.mass) * keep.sum()
        return ascending[place.long().clamp(max=len(labels) - 1)].nan_to_num(posinf=0.0)

    def _restart(self, labels: Tensor, log_density: Tensor, variance: Tensor, anything: Tensor) -> None:
        """Put what has degenerated onto the labels explained worst, one each."""
        means = self.first / self.mass
        width = self.second / self.mass - means.square()
        dead = ~(self.mass > LEAST_WEIGHT) | ~(width > LEAST_SD_SHARE**2 * variance)
        # Two components that coincide, as after a batch of ties, would stay one for ever.
        near = (means[:, None] - means).square() < LEAST_SD_SHARE**2 * variance
        alike = (width[:, None] - width).abs() < LEAST_SD_SHARE * width
        dead |= (near & alike).tril(-1).any(1)
        rank = (dead.cumsum(0) - 1).clamp(min=0, max=len(labels) - 1)
        place = labels[log_density.argsort()[rank]]
        mass = torch.full_like(self.mass, 1 / len(self.mass) / 10)
        fresh = mass, mass * place, mass * (place.square() + variance / len(self.mass))
        for statistic, start in zip((self.mass, self.first, self.second), fresh, strict=True):
            statistic.copy_(torch.where(dead & anything, start, statistic))
        total = self.mass.sum()
        for statistic in (self.mass, self.first, self.second):
            statistic /= total

    @torch.no_grad()
    def rescale(self, ratio: Tensor | float, shift: Tensor | float = 0.0) -> None:
        """Follow a change of the label's unit: what was y is now ratio * y + shift."""
        self.second.copy_(ratio**2 * self.second + 2 * ratio * shift * self.first + shift**2 * self.mass)
        self.first.copy_(ratio * self.first + shift * self.mass)

    def log_density(self, labels: Tensor) -> Tensor:
        """Natural log of the fitted density at labels (B,)."""
        log_weights, means, variances = self.parameters_of_mixture()
        squares = (labels.double()[:, None] - means).square() / variances
        return (log_weights - 0.5 * (variances.log() + squares)).logsumexp(1) - 0.5 * math.log(2 * math.pi)
