"""Regression: the label density beside the model, the balanced losses, answers under any label prior, their errors."""

import copy
from typing import Any, Final, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.batching import Batch
from trainer.calibration import LevelCalibration
from trainer.config import Settings
from trainer.heads import MixtureHead
from trainer.label_density import WINDOW_LABELS, LabelDensity, LabelGrid
from trainer.losses import (
    LOCATION_WEIGHT,
    LabelHistogram,
    LabelMixture,
    Mixture,
    bmc_loss,
    bni_loss,
    density_bmc_loss,
    density_nll_loss,
    gai_loss,
    huber_loss,
    l1_loss,
    mse_loss,
)
from trainer.model import Model, averaged_state, build_model, inference_state, learned_prior, load_averaged, unprefixed
from trainer.predictive import GridDensity
from trainer.prequential import BALANCES, MEDIAN, PrequentialMetrics
from trainer.schema import FeatureSchema
from trainer.task import FORGETTING, Compared, Noise, Predicted, Tested

INTERVAL: Final = 0.9
GRID_EVERY: Final = 4  # batches between refreshes of the label density that answers are made with, once it is settled
GRID_SETTLED: Final = 24  # batches
TRIED_EVERY: Final = 4  # of so many rows one is predicted by the weights that do not answer, to compare the two
TRIED_ROWS: Final = 256  # of a batch, about as many at most
SCORE_FLOOR: Final = -20.0  # natural logs per label standard deviation; one surprise must not decide for long
EARLY_ROWS: Final = 1024  # up to which the location's squared error counts more than later, the fewer the more
EARLY_TIMES: Final = 8.0  # as much, at most
HEALTHY_RATIO: Final = 1.05  # largest error beside that of the running median
HEALTHY_SDS: Final = 1e-3  # of the noise, added to that: where all labels are equal the median is never wrong
PLAIN_LOSSES: Final = {"mse": mse_loss, "l1": l1_loss, "huber": huber_loss}


class StepResult(NamedTuple):
    """What was predicted for B rows before they were learned from."""

    density: GridDensity  # of the weights that answer
    log_score: Tensor  # (B,) at balance 0, natural logs per label unit
    covered: Tensor  # (B,) bool, whether the label lay in its interval at balance 0


class _Columns(NamedTuple):
    """What is kept of each predicted row, (B,) each; NaN where weights that do not answer were not tried."""

    reading: Tensor  # of the head with current weights
    averaged_reading: Tensor
    current_score: Tensor  # log scores
    averaged_score: Tensor
    score: Tensor  # of the weights that answer
    level: Tensor  # P(Y <= label)
    covered: Tensor
    natural: Tensor  # points at both balances
    balanced: Tensor


class Regression:
    """Labels are numbers; the network gives a density, and the label density beside it makes it an answer.

    Attributes:
        model: the current weights, with the running scalers.
        averaged: the same network with averaged weights; the scalers are the model's own.
        density: of the labels, on the host, where they arrive.
        labels: what the loss must know of the label density beside the step's labels.
        calibration: of the levels of intervals.
        prequential: errors of each answer.
    """

    def __init__(self, settings: Settings, schema: FeatureSchema, device: torch.device) -> None:
        self._loss = settings.learner.loss
        self._device = device
        self._prior = learned_prior(self._loss)
        self.model = build_model(schema, settings.model, settings.learner).to(device)
        self.averaged = copy.deepcopy(self.model)
        self.averaged.features, self.averaged.labels = self.model.features, self.model.labels
        self.averaged.eval()
        self.density = LabelDensity()
        self.labels = _label_model(self._loss).to(device)
        self.prequential = PrequentialMetrics([f"{b:g}" for b in BALANCES], settings.learner.metrics_fading, device)
        self.calibration = LevelCalibration().to(device)
        self._grid, self._median = LabelGrid.empty(), 0.0
        self._smooth()

    def sigma_parameters(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """A learned sigma beside its average, or nothing."""
        pair = self.model.head.sigma_parameters(), self.averaged.head.sigma_parameters()
        return list(zip(*pair, strict=True))

    def grow(self, batch: Batch) -> bool:
        """False: numbers need no room."""
        return False

    @torch.no_grad()
    def predict(self, numeric: Tensor, categorical: Tensor, label: Tensor, averaged_is_better: Tensor) -> Predicted:
        """Predicts rows not yet learned from; see `Task.predict`."""
        self.model.eval()
        rows = self.model.features(numeric), categorical, self.model.labels.standardise(label)
        # Only a CPU may look which weights answer, and then spares most of the work for the others.
        looks = self._device.type == "cpu"
        swapped = looks and bool(averaged_is_better)
        first, second = (self.averaged, self.model) if swapped else (self.model, self.averaged)
        tried = slice(None, None, max(TRIED_EVERY, len(label) // TRIED_ROWS) if looks else 1)
        density, reading = self._density(first, *rows)
        other, tried_reading = self._density(second, *(part[tried] for part in rows))
        answering = density if looks else other.where(averaged_is_better, density)
        of = answering.scored(label, self.calibration.ends(INTERVAL))
        score = of.log_score if looks else density.log_score(label)
        other_score, other_reading = torch.full_like(score, torch.nan), torch.full_like(reading, torch.nan)
        other_score[tried], other_reading[tried] = other.log_score(label[tried]), tried_reading
        scores, readings = [score, other_score], [reading, other_reading]
        if swapped:
            scores, readings = scores[::-1], readings[::-1]
        assert of.natural.lower is not None
        assert of.natural.upper is not None
        covered = (label >= of.natural.lower) & (label <= of.natural.upper)
        points = of.natural.point, of.balanced.point
        columns = [*readings, *scores, of.log_score, of.level, covered, *points]  # see `_Columns`
        result = StepResult(answering, of.log_score, covered)
        return Predicted(result, torch.stack([column.double() for column in columns], 1))

    def _density(
        self, model: Model, columns: Tensor, categorical: Tensor, target: Tensor
    ) -> tuple[GridDensity, Tensor]:
        """What weights say of rows not yet learned from, and what their head will take in of it."""
        mixture = model.density(columns, categorical)
        return GridDensity.of(model.components(mixture), self._grid, self._prior), model.head.reading(mixture, target)

    def score(self, columns: Tensor, label: Tensor, host_label: NDArray[np.float64]) -> Tested:
        """Takes the errors of predicted rows into the metrics; see `Task.score`."""
        of = _Columns(*columns.unbind(1))
        for model, reading in ((self.model, of.reading), (self.averaged, of.averaged_reading)):
            model.head.observe(reading.float())
        self.calibration.observe(of.level)
        points = dict(zip((f"{balance:g}" for balance in BALANCES), (of.natural, of.balanced), strict=True))
        points[MEDIAN] = torch.full_like(of.natural, self._median)
        self.prequential.observe(host_label, points, of.covered, of.score)
        floor = SCORE_FLOOR - self.model.labels.sd.log()
        both = torch.stack([of.current_score, of.averaged_score]).clamp(min=floor)
        means = torch.where(both.isnan().any(0), torch.nan, both).nanmean(1)  # of rows that both have predicted
        return Tested(of.natural, means, (label - of.natural).abs())

    def observe(self, numeric: Tensor, label: Tensor, host_label: NDArray[np.float64], batches: int) -> None:
        """Takes rows into the running statistics; predictions in label units stay as they were (Pop-Art)."""
        ratio, shift = self.model.observe(numeric, label)
        for model in (self.model, self.averaged):
            if batches:
                model.head.rescale(ratio, shift)
            else:
                model.head.begin(ratio)
        if isinstance(self.labels, LabelMixture | LabelHistogram):
            self.labels.rescale(ratio, shift)
            self.labels.observe(self.model.labels.standardise(label))
        self.density.observe(torch.from_numpy(host_label))
        self._smooth()
        if batches < GRID_SETTLED or batches % GRID_EVERY == 0:
            grid = self.density.grid()
            self._median = _median(grid)
            self._grid = grid.to(self._device)

    def _smooth(self) -> None:
        """Brings the smoothing of the label density into label standard deviations, on the device."""
        centre, unit, width = self.density.smoothing()
        sd = self.model.labels.sd
        self._smooth_centre = ((centre - self.model.labels.mean) / sd).float()
        self._smooth_least, self._smooth_share = (width * unit / sd).square().float(), width**2

    def forget(self, fast: bool) -> None:
        """The window of the label density, as ever or `fast`."""
        self.density.window_labels = WINDOW_LABELS / FORGETTING if fast else WINDOW_LABELS

    def columns(self, numeric: Tensor) -> Tensor:
        """Standardised columns; see `Task.columns`."""
        columns: Tensor = self.model.features(numeric)
        return columns

    def targets(self, label: Tensor) -> Tensor:
        """(B,) float32, standardised."""
        return self.model.labels.standardise(label)

    def loss(
        self, columns: Tensor, categorical: Tensor, target: Tensor, memory: Tensor, memory_weight: float
    ) -> tuple[Mixture, Tensor]:
        """The mixtures of B rows, and the configured loss."""
        mixture = self.model.density(columns, categorical)
        return mixture, self._loss_of(mixture, target, memory, memory_weight)

    def _loss_of(self, mixture: Mixture, target: Tensor, memory: Tensor, memory_weight: float) -> Tensor:
        """The configured loss of rows (B,); `memory` (M,) are further labels."""
        name, head = self._loss, self.model.head
        if isinstance(head, MixtureHead):
            if name == "bmc":
                # As smooth as the p(y) that the answer multiplies h with: else h is free where p is small and not 0.
                offset = memory - self._smooth_centre
                variances = torch.addcmul(self._smooth_least, offset, offset, value=self._smooth_share)
                return density_bmc_loss(
                    mixture,
                    target,
                    memory=memory,
                    memory_weight=memory_weight,
                    memory_variances=variances,
                    location_weight=self._location_weight,
                    gather=False,
                )
            label = self.model.labels.restore(target)
            return density_nll_loss(mixture, target, weights=self._grid.log_weight(label).exp().float())
        match name:
            case "bmc":
                return bmc_loss(mixture.location, target, head.sigma(), memory=memory, gather=False)
            case "gai":
                return gai_loss(mixture.location, target, head.sigma(), cast("LabelMixture", self.labels))
            case "bni":
                return bni_loss(mixture.location, target, head.sigma(), cast("LabelHistogram", self.labels))
            case _:
                return PLAIN_LOSSES[name](mixture.location, target)

    @property
    def _location_weight(self) -> float:
        """Of the location's squared error beside BMC: what a mixture has learned first, it explains the labels from."""
        early = EARLY_ROWS / max(1, int(self.density.seen))
        return LOCATION_WEIGHT * min(max(1.0, early), EARLY_TIMES)

    @property
    def compared(self) -> Compared:
        """A sum over labels is as good over a sample of them, where it knows how many each stands for."""
        if self._loss != "bmc":
            return "none"
        return "memory" if isinstance(self.model.head, MixtureHead) else "all"

    def running(self) -> list[Tensor]:
        """None: what losses need is observed, not computed by them."""
        return []

    def metrics(self) -> dict[str, Any]:
        """`PrequentialMetrics.compute`."""
        return self.prequential.compute()

    def noise(self, averaged: bool) -> Noise:
        """Sigma of the head, read off the device."""
        model = self.averaged if averaged else self.model
        sigma = float(model.head.sigma().detach())
        return Noise(sigma, sigma * float(self.model.labels.sd))

    def is_healthy(self, errors: dict[str, Any], noise: Noise | None) -> bool:
        """Whether the error at the stream's own prior is finite and not clearly worse than the running median's."""
        model, median = errors["0"]["mae"], errors[MEDIAN]["mae"]
        if model is None or noise is None or not np.isfinite(model):
            return False
        # Where nothing can be learned a sound model is a little worse than the median, and that for ever.
        return bool(model <= HEALTHY_RATIO * median + HEALTHY_SDS * noise.label_units)

    def shown(self, labels: list[float]) -> list[float]:
        """Numbers as they are."""
        return labels

    def inference_state(self, averaged: bool) -> dict[str, Tensor]:
        """What predicting needs: the weights, the scalers, the label density."""
        return inference_state(self.averaged if averaged else self.model, self.density.grid(), self.calibration)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """All state, by part."""
        return {
            "model": self.model.state_dict(),
            "averaged": averaged_state(self.averaged),
            "density": self.density.state_dict(),
            "labels": self.labels.state_dict(),
            "calibration": self.calibration.state_dict(),
            "grid": self._grid.to_tensors(),
            "prequential": self.prequential.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            KeyError, RuntimeError: it is of another model.
        """
        self.model.load_state_dict(unprefixed("model", state))
        load_averaged(unprefixed("averaged", state), self.averaged)
        self.density.load_state_dict(unprefixed("density", state))
        self.labels.load_state_dict(unprefixed("labels", state))
        self.calibration.load_state_dict(unprefixed("calibration", state))
        grid = LabelGrid.from_tensors(unprefixed("grid", state))
        self._grid, self._median = grid.to(self._device), _median(grid)
        self.prequential.load_state_dict(unprefixed("prequential", state))
        self._smooth()


def _median(grid: LabelGrid) -> float:
    """The median of the label density, label units; 0 before the first label."""
    if not len(grid):
        return 0.0
    cumulative = (grid.log_density.double().exp() * grid.widths).cumsum(0)
    cell = int(torch.searchsorted(cumulative, cumulative[-1] / 2).clamp(max=len(grid) - 1))
    return float(grid.centres[cell])


def _label_model(loss: str) -> LabelMixture | LabelHistogram | nn.Module:
    """What a loss must know of the label density beside the step's labels: nothing, but for two of them."""
    match loss:
        case "gai":
            return LabelMixture()
        case "bni":
            return LabelHistogram()
        case _:
            return nn.Module()
