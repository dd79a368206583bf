"""The network: running feature scaling, a body, a head, and the label scaling that is undone outside it.

Everything here is what inference needs, and all of it is in `model.safetensors`. Inside, labels are in standard
deviations from the running mean; outside, in the label's own units.
"""

import itertools
import math
from typing import Final, TypeVar, cast

import torch
from torch import Tensor, nn

from trainer.calibration import LevelCalibration
from trainer.config import LearnerSettings, ModelSettings, SigmaInLabelUnits
from trainer.heads import GaussianHead, Head, MixtureHead
from trainer.label_density import LabelGrid
from trainer.losses import LOSSES, Mixture, NoiseSigma
from trainer.own_body import own_body
from trainer.predictive import Components, LearnedPrior
from trainer.schema import FeatureSchema

TRAINING_REACH: Final = 50.0  # standard deviations; nearer bounds hide the rare rows that matter (delays, claims)
SMALLEST_SD: Final = 1e-6  # of a feature, beside its mean: below it what varies is rounding, and is not blown up
RANGE_RATE: Final = 0.1  # of the way to the range observed, that the range of prediction goes with each batch
PLAIN_SIGMA_BOUNDS: Final = (1e-3, 1e3)  # label standard deviations


class FeatureScaler(nn.Module):
    """Standardises numeric features by the mean and variance of all rows observed, missing values apart.

    Buffers (float64, one value a column, F columns): `count`, `mean`, `squares` (sum of squared deviations), `low`,
    `high` (the range observed), `learned_low`, `learned_high` (the range of prediction, which follows that one).
    """

    count: Tensor
    mean: Tensor
    squares: Tensor
    low: Tensor
    high: Tensor
    learned_low: Tensor
    learned_high: Tensor

    def __init__(self, columns: int) -> None:
        super().__init__()
        for name, value in {
            **dict.fromkeys(("count", "mean", "squares"), 0.0),
            **dict.fromkeys(("low", "learned_low"), math.inf),
            **dict.fromkeys(("high", "learned_high"), -math.inf),
        }.items():
            self.register_buffer(name, torch.full((columns,), value, dtype=torch.float64))

    @torch.no_grad()
    def observe(self, numeric: Tensor) -> None:
        """Takes rows (B, F), NaN where missing, into the statistics.

        Pairwise update of Chan, Golub and LeVeque (1979), "Updating formulae and a pairwise algorithm for computing
        sample variances".
        """
        values = numeric.double()
        present = ~values.isnan()
        count = present.sum(0).double()
        known = torch.where(present, values, 0.0)
        mean = known.sum(0) / count.clamp(min=1)
        squares = torch.where(present, values - mean, 0.0).square().sum(0)
        total = self.count + count
        shift = mean - self.mean
        share = count / total.clamp(min=1)
        self.squares += squares + shift.square() * self.count * share
        self.mean += shift * share
        self.count.copy_(total)
        torch.minimum(self.low, torch.where(present, values, math.inf).amin(0), out=self.low)
        torch.maximum(self.high, torch.where(present, values, -math.inf).amax(0), out=self.high)
        for learned, seen in ((self.learned_low, self.low), (self.learned_high, self.high)):
            learned.copy_(torch.where(learned.isfinite(), learned.lerp(seen, RANGE_RATE), seen))

    def forward(self, numeric: Tensor) -> Tensor:
        """Rows (B, F), NaN where missing -> (B, 2F): the standardised columns (0 where missing), then 1 for missing.

        In training a value may lie up to 50 standard deviations out. At prediction each column is held to the range
        trained on so far: beyond it a network only extrapolates, and features that grow for ever (a year, a counter)
        would leave every range. A value beyond it is let in over some batches: a few steps teach little about it.
        """
        values = numeric.double()
        if not self.training:
            values = torch.minimum(torch.maximum(values, self.learned_low), self.learned_high)
        values = ((values - self.mean) / self.scale()).clamp(-TRAINING_REACH, TRAINING_REACH)
        missing = numeric.isnan()
        return torch.cat([torch.where(missing, 0.0, values), missing], dim=1).float()

    def scale(self) -> Tensor:
        """What each column is divided by, (F,): its standard deviation; 1 where it is constant."""
        sd = (self.squares / self.count.clamp(min=1)).sqrt()
        return torch.where(sd <= SMALLEST_SD * self.mean.abs(), 1.0, sd)


class FrozenScaler(FeatureScaler):
    """A scaler whose statistics do not move any more: the same at prediction, by fewer steps.

    Args:
        scaler: has the statistics.
    """

    def __init__(self, scaler: FeatureScaler) -> None:
        super().__init__(len(scaler.mean))
        self.load_state_dict(scaler.state_dict())
        self.eval()
        self._scale = scaler.scale()

    def forward(self, numeric: Tensor) -> Tensor:
        """Rows (B, F), NaN where missing -> (B, 2F), as the scaler that it was made of has them."""
        values = numeric.double().clamp(self.learned_low, self.learned_high).sub_(self.mean).div_(self._scale)
        values = values.clamp_(-TRAINING_REACH, TRAINING_REACH).nan_to_num_(0.0)
        return torch.cat([values.float(), numeric.isnan().float()], dim=1)


class LabelScaler(nn.Module):
    """Mean and standard deviation of all labels observed, in label units; 0 and 1 before the first.

    Buffers (0-dim, float64): `count`, `mean`, `squares`.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("count", "mean", "squares"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    @property
    def sd(self) -> Tensor:
        """Standard deviation, 0-dim, label units; 1 while all labels are equal."""
        sd = (self.squares / self.count.clamp(min=1)).sqrt()
        return torch.where(sd > 0, sd, 1.0)

    @torch.no_grad()
    def observe(self, labels: Tensor) -> None:
        """Takes labels (B,), label units, into the statistics (the pairwise update of `FeatureScaler`)."""
        labels = labels.double()
        mean = labels.mean()
        total = self.count + len(labels)
        shift = mean - self.mean
        share = len(labels) / total
        self.squares += (labels - mean).square().sum() + shift.square() * self.count * share
        self.mean += shift * share
        self.count.copy_(total)

    def standardise(self, labels: Tensor) -> Tensor:
        """Labels (B,) in label units -> (B,) float32 in standard deviations."""
        return ((labels.double() - self.mean) / self.sd).float()

    def restore(self, labels: Tensor) -> Tensor:
        """Labels (B,) in standard deviations -> (B,) float64 in label units."""
        return labels.double() * self.sd + self.mean


class TabularBody(nn.Module):
    """Embeddings of hashed categories beside the numeric columns, then fully connected layers with ReLU.

    Attributes:
        out_features: width H of what `forward` returns.
    """

    offsets: Tensor

    def __init__(self, schema: FeatureSchema, hidden: list[int], embedding: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(max(1, sum(schema.buckets)), embedding)
        nn.init.normal_(self.embedding.weight, std=0.1)
        starts = torch.tensor([0, *schema.buckets], dtype=torch.int64).cumsum(0)[:-1]
        self.register_buffer("offsets", starts, persistent=False)
        widths = [schema.numeric_width + embedding * len(schema.buckets), *hidden]
        self.layers = nn.Sequential()
        for width_in, width_out in itertools.pairwise(widths):
            self.layers.extend([nn.Linear(width_in, width_out), nn.ReLU()])
        # A feature that was never missing has taught its mark nothing: without it a row is one with its mean.
        first, marks = cast("nn.Linear", self.layers[0]), schema.numeric_width // 2
        with torch.no_grad():
            first.weight[:, marks : 2 * marks].zero_()
        self.out_features = hidden[-1]

    def forward(self, numeric: Tensor, categorical: Tensor) -> Tensor:
        """Standardised columns (B, 2F) float32 and buckets (B, C) int64 -> features (B, H) float32."""
        embedded = self.embedding(categorical + self.offsets).flatten(1)
        features: Tensor = self.layers(torch.cat([numeric, embedded], dim=1))
        return features


class Model(nn.Module):
    """Feature scaling, body, head and label scaling in one."""

    def __init__(self, body: nn.Module, head: Head, columns: int) -> None:
        super().__init__()
        self.features = FeatureScaler(columns)
        self.body = body
        self.head = head
        self.labels = LabelScaler()

    def forward(self, numeric: Tensor, categorical: Tensor) -> Mixture:
        """Raw columns (B, F), NaN where missing, and buckets (B, C) -> h(y|x), label standard deviations."""
        return self.density(self.features(numeric), categorical)

    def density(self, columns: Tensor, categorical: Tensor) -> Mixture:
        """Standardised columns (B, 2F), as `features` gives them, and buckets (B, C) -> h(y|x)."""
        mixture: Mixture = self.head(self.body(columns, categorical))
        return mixture

    def components(self, mixture: Mixture) -> Components:
        """What `forward` gave, in the form that `trainer.predictive` answers from."""
        scales = mixture.log_scales.exp()
        mean = self.labels.mean.clone()  # which moves with the next batch
        return Components(mixture.log_weights, mixture.means, scales, mean, self.labels.sd)

    @torch.no_grad()
    def observe(self, numeric: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Takes rows (B, F) and labels (B,) into the running statistics.

        Returns:
            The ratio and shift by which the label scaling moved, for the head's `rescale`.
        """
        self.features.observe(numeric)
        mean, sd = self.labels.mean.clone(), self.labels.sd
        self.labels.observe(labels)
        new_sd = self.labels.sd
        return (sd / new_sd).float(), ((mean - self.labels.mean) / new_sd).float()


def build_model(schema: FeatureSchema, model: ModelSettings, learner: LearnerSettings) -> Model:
    """A fresh model as the configuration describes it, its weights drawn from torch's global generator.

    Raises:
        ConfigError: a body of the user's own cannot be used.
    """
    body, out_features = build_body(schema, model)
    head: Head
    if model.head == "mixture":
        head = MixtureHead(out_features, model.components)
    else:
        head = GaussianHead(out_features, _noise(learner))
    return Model(body, head, len(schema.numeric_columns))


def build_body(schema: FeatureSchema, model: ModelSettings) -> tuple[nn.Module, int]:
    """The body that the configuration names, and the width of what it returns.

    Raises:
        ConfigError: a body of the user's own cannot be used.
    """
    tabular = model.body == "tabular"
    body = TabularBody(schema, model.hidden, model.embedding) if tabular else own_body(model.body, schema)
    return body, cast("int", body.out_features)


ModelOfAnyTask = TypeVar("ModelOfAnyTask", bound=nn.Module)


def frozen(model: ModelOfAnyTask) -> ModelOfAnyTask:
    """The model, to answer with from now on: nothing of it is learned or observed any more."""
    scaler = model.features
    assert isinstance(scaler, FeatureScaler)
    model.features = FrozenScaler(scaler)
    return model.eval().requires_grad_(False)


def inference_state(model: Model, grid: LabelGrid, calibration: LevelCalibration) -> dict[str, Tensor]:
    """What predicting needs, by the names it has in `model.safetensors`."""
    return {
        **prefixed("model", model.state_dict()),
        **prefixed("grid", grid.to_tensors()),
        **prefixed("calibration", calibration.state_dict()),
    }


def load_inference(state: dict[str, Tensor], model: Model, calibration: LevelCalibration) -> LabelGrid:
    """Loads what `inference_state` gave into a model and a calibration, and returns the label density beside them.

    Raises:
        RuntimeError, KeyError: it is of another model.
    """
    model.load_state_dict(unprefixed("model", state))
    calibration.load_state_dict(unprefixed("calibration", state))
    return LabelGrid.from_tensors(unprefixed("grid", state))


def averaged_state(averaged: nn.Module) -> dict[str, Tensor]:
    """The state of averaged weights, without the running statistics that are the model's own."""
    return {name: value for name, value in averaged.state_dict().items() if not _is_statistic(name)}


def load_averaged(state: dict[str, Tensor], averaged: nn.Module) -> None:
    """Loads what `averaged_state` gave.

    Raises:
        RuntimeError: it is of another model.
    """
    found = averaged.load_state_dict(state, strict=False)
    if found.unexpected_keys or not all(map(_is_statistic, found.missing_keys)):
        raise RuntimeError(f"averaged weights do not fit the model: {found}")


def _is_statistic(name: str) -> bool:
    return name.startswith(("features.", "labels."))


def prefixed(part: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of one part of a state, by the names they have in the whole."""
    return {f"{part}.{name}": value for name, value in tensors.items()}


def unprefixed(part: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """One part of a state, by its own names."""
    return {name.removeprefix(f"{part}."): value for name, value in state.items() if name.startswith(f"{part}.")}


def learned_prior(loss: str) -> LearnedPrior:
    """What a head trained by a loss is proportional to: see `trainer.predictive`."""
    if loss == "nll":
        return "weighted"
    return "uniform" if LOSSES[loss].balanced else "stream"


def _noise(learner: LearnerSettings) -> NoiseSigma:
    if not LOSSES[learner.loss].balanced:
        # These losses do not use sigma, so the running residual itself is safe: nothing feeds back.
        return NoiseSigma("adaptive", initial=0.3, share=0.999, decay=0.95, bounds=PLAIN_SIGMA_BOUNDS)
    match learner.sigma:
        case "learned" | "adaptive":
            return NoiseSigma(learner.sigma)
        case SigmaInLabelUnits(label_units=sigma):
            return NoiseSigma("fixed", initial=sigma, unit="label")
        case sigma:
            return NoiseSigma("fixed", initial=sigma)
