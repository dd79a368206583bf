"""A network's weights as one vector, so that an optimiser, a norm and a running average touch one tensor, not twenty.

For networks of the size that streams are learned with, an optimiser step costs more in calls than in arithmetic.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class FlatWeights:
    """One vector behind several parameters: they become views of it, and their gradients views of its gradient.

    Attributes:
        vector: (P,) parameter, all weights one after the other; give this one to the optimiser.
        gradient: (P,) of it.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._shapes = [p.shape for p in parameters]
        self.vector = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in parameters]))
        self.gradient = torch.zeros_like(self.vector, requires_grad=False)
        self.vector.grad = self.gradient
        start = 0
        for parameter in parameters:
            part = slice(start, start + parameter.numel())
            parameter.data = self.vector.detach()[part].view_as(parameter)
            parameter.grad = self.gradient[part].view_as(parameter)
            start = part.stop

    def parts(self, vector: Tensor) -> list[Tensor]:
        """Views of a vector (P,), one of the shape of each parameter: what an optimiser keeps, by parameter."""
        parts = torch.split(vector.detach(), [shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def zero_grad(self) -> None:
        """Makes all gradients 0, in place: backward adds to them."""
        self.gradient.zero_()

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Norm of the gradient, 0-dim."""
        norm: Tensor = torch.linalg.vector_norm(self.gradient)
        return norm

    @torch.no_grad()
    def divide_gradient(self, divisor: Tensor) -> None:
        """Divides the gradient by a number, 0-dim."""
        self.gradient.div_(divisor)

    @torch.no_grad()
    def follow(self, other: "FlatWeights", weight: float) -> None:
        """Moves towards other weights by a share of the way."""
        self.vector.lerp_(other.vector, weight)
