"""What a learned sigma follows: the likelihood, or the moments that it is to match.

With m_i and V_i the candidates' mean and variance under row i's softmax, the derivative of Balanced MSE's cross-entropy
by sigma splits:

    E[q_ij] - q_i = V_i - |y_i - m_i|^2 - 2 (p_i - m_i) . (m_i - y_i)

The last term is 0 on average where the predictions have learned all that they can, as m is then the labels' mean given
the inputs. Until then it ties sigma to them: their scale and sigma trade off along a valley that is nearly flat, and
predictions that know nothing yet drive sigma to the millions, from where it returns late. What is left,

    mean V_i = mean |y_i - m_i|^2,

has the same root: the labels lie as far from the means as the softmax says (an estimating equation by moments, after
Godambe, "An Optimum Property of Regular Maximum Likelihood Estimation", Annals of Mathematical Statistics 31, 1960;
that sigma should move while the means stay is the orthogonality of Cox and Reid, "Parameter Orthogonality and
Approximate Conditional Inference", JRSS B 49, 1987). And as the mean of all labels is an answer that anybody has, what
squared error there is above their variance is not taken for noise.
"""

from typing import Literal

import torch
from torch import Tensor

SigmaGradient = Literal["likelihood", "moments"]


def follows_moments(sigma_gradient: SigmaGradient) -> bool:
    """Whether sigma is to match moments.

    Raises:
        ValueError: The name is neither of the two.
    """
    if sigma_gradient not in ("likelihood", "moments"):
        raise ValueError(f"sigma_gradient {sigma_gradient!r} is not likelihood or moments")
    return sigma_gradient == "moments"


def moment_gap(spread: Tensor, square: Tensor, most: Tensor, keep: Tensor | None = None) -> Tensor:
    """What stands for E[q_ij] - q_i in the derivative by sigma.

    Args:
        spread: (B,) V_i, squared label units.
        square: (B,) |y_i - m_i|^2.
        most: 0-dim, the variance of the labels, which the mean of `square` counts up to.
        keep: (B,) bool, the rows that the mean is taken over; None for all.

    Returns:
        (B,) differences, whose mean is that of the moments.
    """
    mean = square.mean() if keep is None else (square * keep).sum() / keep.sum().clamp(min=1)
    return spread - square * (most / mean.clamp(min=torch.finfo(mean.dtype).tiny)).clamp(max=1.0)


def weighted_variance(labels: Tensor, log_weights: Tensor | None) -> Tensor:
    """Variance of labels (N,) or (N, D), summed over D: 0-dim; log weights (N,), -inf for labels left out."""
    labels = labels[:, None] if labels.dim() == 1 else labels
    weights = labels.new_zeros(len(labels)) if log_weights is None else log_weights
    shares = torch.softmax(weights, 0)[:, None]
    return (shares * (labels - (shares * labels).sum(0)).square()).sum()
