"""Balanced MSE by bin-based numerical integration (BNI), over a histogram kept on the stream.

Source: Ren et al., "Balanced MSE for Imbalanced Visual Regression", CVPR 2022 (arXiv 2203.16427), the BNI form. With
v = sigma^2 and bins of share w_b and centre c_b, here the mean of the bin's labels:

    loss_i = 2 v ((p_i - y_i)^2 / 2v + logsumexp_b(log w_b - (p_i - c_b)^2 / 2v)),   the factor 2 v detached
"""

from torch import Tensor

from trainer.losses.bmc import loss_against, usable_sigma
from trainer.losses.label_histogram import LabelHistogram
from trainer.losses.rows import Reduction, as_rows
from trainer.losses.sigma_gradient import SigmaGradient


def bni_loss(
    pred: Tensor,
    target: Tensor,
    noise_sigma: Tensor | float,
    labels: LabelHistogram,
    *,
    reduction: Reduction = "mean",
    sigma_gradient: SigmaGradient = "likelihood",
) -> Tensor:
    """Balanced MSE against a histogram of all labels. Bins should be no wider than sigma.

    Args:
        pred: (B,) or (B, 1) predictions, in the unit of the labels.
        target: (B,) or (B, 1) labels. Rows that are not finite have loss and gradients 0.
        noise_sigma: 0-dim, the noise's standard deviation in label units; its sign is ignored.
        labels: The histogram, which has observed labels in the same unit, this batch's among them.
        reduction: `mean` over the finite rows, `sum`, or `none` for (B,).
        sigma_gradient: What a learned sigma follows; see `trainer.losses.sigma_gradient`.

    Returns:
        0-dim or (B,), in squared label units.

    Raises:
        ValueError: Shapes that do not belong together, labels of several dimensions, or an unknown reduction or
            gradient.
    """
    pred, target = as_rows(pred, target)
    if pred.dim() != 1:
        raise ValueError(f"BNI is for one label a row, not {tuple(target.shape)}")
    sigma = usable_sigma(noise_sigma, pred.device)
    centres, log_weights = labels.centres().to(pred.dtype), labels.log_weights().to(pred.dtype)
    return loss_against(pred, target, sigma, centres, log_weights, reduction, sigma_gradient)
