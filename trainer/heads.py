"""Heads: from a body's features to the density h(y|x), a mixture of Gaussians in label standard deviations.

Both answer with a `Mixture`, so that losses, scores and answers are computed from one form.
"""

import math
from typing import Final

import torch
from torch import Tensor, nn

from trainer.losses import Mixture, NoiseSigma, mixture_of_outputs

WEIGHT_INIT: Final = 0.02  # standard deviation of a head's first weights: it begins near the running mean
SCALE_BOUNDS: Final = (0.02, 2.5)  # of a component, label standard deviations; h(y|x) may be nearly flat in a long tail
FIRST_SCALE: Final = 0.3
FIRST_SPREAD: Final = 0.5  # the components' offsets begin at .3 sinh(-.5 ... .5)
SPREAD_DECAY: Final = 0.99  # a batch, of the running mean standard deviation


class GaussianHead(nn.Module):
    """h(y|x) = N(y; f(x), sigma^2), one sigma for all rows: the form in which Balanced MSE was published.

    Ren et al., "Balanced MSE for Imbalanced Visual Regression" (CVPR 2022), arXiv 2203.16427.
    """

    def __init__(self, in_features: int, noise: NoiseSigma) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, 1)
        nn.init.normal_(self.linear.weight, std=WEIGHT_INIT)
        nn.init.zeros_(self.linear.bias)
        self.noise = noise

    def forward(self, features: Tensor) -> Mixture:
        """Features (B, H) -> a mixture of one: location f(x), scale sigma."""
        location = self.linear(features)
        log_sigma = self.noise.value().detach().log()
        return Mixture(torch.zeros_like(location), location, log_sigma.expand_as(location), location.squeeze(1))

    def sigma(self) -> Tensor:
        """Noise that the head assumes, 0-dim, label standard deviations."""
        return self.noise.value()

    def sigma_parameters(self) -> list[nn.Parameter]:
        """What is learned at the rate of sigma: sigma itself where it is learned."""
        return list(self.noise.parameters())

    def reading(self, mixture: Mixture, target: Tensor) -> Tensor:
        """What `observe` takes of predictions and labels (B,) not yet learned from: their residuals (B,)."""
        return mixture.location - target

    def observe(self, reading: Tensor) -> None:
        """Takes residuals (B,) in; an adaptive sigma follows them."""
        self.noise.observe(reading)

    @torch.no_grad()
    def begin(self, ratio: Tensor) -> None:
        """The first label scaling: nothing was predicted in another, so only what is given in label units moves."""
        if self.noise.unit == "label":
            self.noise.rescale(ratio)

    @torch.no_grad()
    def rescale(self, ratio: Tensor, shift: Tensor) -> None:
        """Keeps the density in label units when the label scaling moves (Pop-Art).

        van Hasselt et al., "Learning values across many orders of magnitude" (NeurIPS 2016), arXiv 1602.07714.

        Args:
            ratio: old standard deviation / new one, 0-dim.
            shift: (old mean - new mean) / new standard deviation, 0-dim.
        """
        self.linear.weight.mul_(ratio)
        self.linear.bias.mul_(ratio).add_(shift)
        self.noise.rescale(ratio)


class MixtureHead(nn.Module):
    """h(y|x) = sum_k pi_k N(y; f + d_k, s_k^2): K Gaussians around one shared location f, all of it depending on x.

    One linear layer gives 3K + 1 numbers a row: logits of the weights, offsets d, logs of the scales s, and f. Sharing
    the location lets it be learned by its squared error while the mixture finds its shape.

    Attributes:
        spread: 0-dim buffer, running mean of the mixtures' standard deviations, label standard deviations.
    """

    spread: Tensor

    def __init__(self, in_features: int, components: int) -> None:
        super().__init__()
        self.components = components
        self.linear = nn.Linear(in_features, 3 * components + 1)
        nn.init.normal_(self.linear.weight, std=WEIGHT_INIT)
        offsets = FIRST_SCALE * torch.linspace(-FIRST_SPREAD, FIRST_SPREAD, components).sinh()
        offsets = offsets if components > 1 else torch.zeros(1)
        scales = torch.full((components,), math.log(FIRST_SCALE))
        with torch.no_grad():
            self.linear.bias.copy_(torch.cat([torch.zeros(components), offsets, scales, torch.zeros(1)]))
        self.register_buffer("spread", torch.tensor(FIRST_SCALE))

    def forward(self, features: Tensor) -> Mixture:
        """Features (B, H) -> a mixture of K Gaussians a row."""
        return mixture_of_outputs(self.linear(features), self.components, SCALE_BOUNDS)

    def sigma(self) -> Tensor:
        """Running mean of the mixtures' standard deviations, 0-dim, label standard deviations."""
        return self.spread

    def sigma_parameters(self) -> list[nn.Parameter]:
        """None: the scales are outputs of the network."""
        return []

    def reading(self, mixture: Mixture, target: Tensor) -> Tensor:
        """What `observe` takes of predictions: the mixtures' standard deviations (B,)."""
        return mixture.spread()

    @torch.no_grad()
    def observe(self, reading: Tensor) -> None:
        """Takes standard deviations (B,) into their running mean."""
        spread = reading.nanmean()
        self.spread.copy_(torch.where(spread.isfinite(), self.spread.lerp(spread, 1 - SPREAD_DECAY), self.spread))

    def begin(self, ratio: Tensor) -> None:
        """The first label scaling: nothing of the head is in label units."""

    @torch.no_grad()
    def rescale(self, ratio: Tensor, shift: Tensor) -> None:
        """Keeps the density in label units when the label scaling moves, as `GaussianHead.rescale` does."""
        k = self.components
        for rows in (slice(k, 2 * k), slice(3 * k, None)):  # offsets and location
            self.linear.weight[rows].mul_(ratio)
            self.linear.bias[rows].mul_(ratio)
        self.linear.bias[2 * k : 3 * k].add_(ratio.log())
        self.linear.bias[3 * k :].add_(shift)
        self.spread.mul_(ratio)


Head = GaussianHead | MixtureHead
