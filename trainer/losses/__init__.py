"""Balanced losses for streams. Importing them needs torch alone.

One file a loss; `LOSSES` knows them by the names a configuration uses.
"""

from trainer.losses.bmc import BMCLoss, bmc_loss
from trainer.losses.bni import bni_loss
from trainer.losses.class_counts import ClassCounts, effective_number_weights, inverse_count_weights
from trainer.losses.classification import (
    balanced_log_probabilities,
    cross_entropy_loss,
    focal_loss,
    logit_adjusted_loss,
)
from trainer.losses.density import LOCATION_WEIGHT, density_bmc_loss, density_nll_loss
from trainer.losses.gai import gai_loss
from trainer.losses.influence_balanced import IBLoss, StreamIBLoss, influence_balanced_loss
from trainer.losses.inverse_density import InverseDensityWeights
from trainer.losses.label_histogram import LabelHistogram
from trainer.losses.label_mixture import LabelMixture
from trainer.losses.mixture import Mixture, mixture_log_density, mixture_of_outputs
from trainer.losses.noise import NoiseSigma
from trainer.losses.plain import huber_loss, l1_loss, mse_loss
from trainer.losses.registry import LOSSES, LossEntry, loss_named
from trainer.losses.rows import finite_rows

__all__ = [
    "LOCATION_WEIGHT",
    "LOSSES",
    "BMCLoss",
    "ClassCounts",
    "IBLoss",
    "InverseDensityWeights",
    "LabelHistogram",
    "LabelMixture",
    "LossEntry",
    "Mixture",
    "NoiseSigma",
    "StreamIBLoss",
    "balanced_log_probabilities",
    "bmc_loss",
    "bni_loss",
    "cross_entropy_loss",
    "density_bmc_loss",
    "density_nll_loss",
    "effective_number_weights",
    "finite_rows",
    "focal_loss",
    "gai_loss",
    "huber_loss",
    "influence_balanced_loss",
    "inverse_count_weights",
    "l1_loss",
    "logit_adjusted_loss",
    "loss_named",
    "mixture_log_density",
    "mixture_of_outputs",
    "mse_loss",
]
