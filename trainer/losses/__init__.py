"""Balanced losses for streams. Importing them needs torch alone.

One file a loss; `registry` knows them by the names a configuration uses.
"""

from trainer.losses.bmc import BMCLoss, bmc_loss
from trainer.losses.noise import NoiseSigma
from trainer.losses.plain import huber_loss, l1_loss, mse_loss
from trainer.losses.rows import finite_rows

__all__ = [
    "BMCLoss",
    "NoiseSigma",
    "bmc_loss",
    "finite_rows",
    "huber_loss",
    "l1_loss",
    "mse_loss",
]
