"""The learner: each batch is predicted, then learned from, then followed by replay; its state is one dictionary."""

import copy
import json
from collections import deque
from typing import Any, Final, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.batching import Batch
from trainer.config import Settings
from trainer.flat_weights import FlatWeights
from trainer.heads import MixtureHead
from trainer.label_density import LabelDensity, LabelGrid
from trainer.losses import (
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
from trainer.model import Model, build_model, inference_state, learned_prior, prefixed, unprefixed
from trainer.predictive import Components, log_score, predict
from trainer.prequential import MEDIAN, PrequentialMetrics
from trainer.replay import ReplayBuffer
from trainer.schema import FeatureSchema

BALANCES: Final = (0.0, 1.0)  # label priors that prequential metrics are kept for
INTERVAL: Final = 0.9
GRID_EVERY: Final = 4  # batches between refreshes of the label density that answers are made with, once it is settled
GRID_SETTLED: Final = 24  # batches
SCORE_DECAY: Final = 0.9  # of the log scores by which the averaged or the current weights are chosen, per batch
SCORE_FLOOR: Final = -20.0  # natural logs per label standard deviation; one surprise must not decide for long
HEALTHY_RATIO: Final = 1.05  # largest error beside that of the running median
HEALTHY_SDS: Final = 1e-3  # of the noise, added to that: where all labels are equal the median is never wrong
LOSS_WEIGHT: Final = 0.01  # of one step in the fading training loss
AVERAGING_WARM_UP: Final = 10  # steps
NEWEST_SAMPLES: Final = 100
PLAIN_LOSSES: Final = {"mse": mse_loss, "l1": l1_loss, "huber": huber_loss}


class Newest(NamedTuple):
    """Rows of one batch beside their predictions, for people to look at."""

    time_s: NDArray[np.float64]
    label: NDArray[np.float64]
    prediction: Tensor


class StepResult(NamedTuple):
    """What was predicted for B rows before they were learned from."""

    components: Components  # the head's density, of the weights that answer
    grid: LabelGrid
    log_score: Tensor  # (B,) at balance 0, natural logs per label unit
    covered: Tensor  # (B,) bool, whether the label lay in its interval at balance 0


class Readings(NamedTuple):
    """What `Learner.read` fetched off the device."""

    train_loss: float | None  # fading mean, squared label standard deviations
    noise_sigma: float  # label standard deviations
    noise_sigma_label_units: float
    nonfinite_steps: int
    metrics: dict[str, Any]  # PrequentialMetrics.compute()
    newest: list[tuple[float, float, float]]  # event time, label, prediction

    @property
    def healthy(self) -> bool:
        """Whether the fading error at the stream's own prior is finite and not clearly worse than the median's."""
        fading = self.metrics["fading"]
        if "0" not in fading:
            return self.nonfinite_steps == 0
        model, median = fading["0"]["mae"], fading[MEDIAN]["mae"]
        if model is None or not np.isfinite(model):
            return False
        # Where nothing can be learned a sound model is a little worse than the median, and that for ever.
        return bool(model <= HEALTHY_RATIO * median + HEALTHY_SDS * self.noise_sigma_label_units)


class Learner:
    """Learns from batches; deterministic given the settings and the batches.

    Attributes:
        model: the current weights, with the running scalers.
        averaged: the same network with averaged weights; the scalers are the model's own.
        steps: optimiser steps taken.
        samples: rows learned from (replayed ones not counted again).
    """

    def __init__(self, settings: Settings, schema: FeatureSchema, device: torch.device) -> None:
        learner = settings.learner
        self._settings = learner
        self._device = device
        self._seed = settings.seed
        self._prior = learned_prior(learner.loss)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = build_model(schema, settings.model, learner).to(device)
        self.averaged = copy.deepcopy(self.model)
        self.averaged.features, self.averaged.labels = self.model.features, self.model.labels
        self._weights, self._averaged_weights = _flat(self.model), _flat(self.averaged)
        self._sigma = self.model.head.sigma_parameters()
        groups: list[dict[str, Any]] = [{"params": [self._weights.vector]}]
        if self._sigma:
            groups.append({"params": self._sigma, "lr": learner.sigma_lr})
        self._skips_on_device = device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.Adam(groups, lr=learner.lr, fused=self._skips_on_device)
        self.replay = ReplayBuffer(learner.replay_rows, len(schema.numeric_columns), len(schema.buckets), device)
        self.density = LabelDensity()  # on the host, where labels arrive
        self.labels = _label_model(learner.loss).to(device)
        self.prequential = PrequentialMetrics([f"{b:g}" for b in BALANCES], learner.metrics_fading, device)
        self.steps = self.samples = self._batches = 0
        self._random = np.random.default_rng(settings.seed)
        self._own = np.zeros(learner.replay_rows, dtype=bool)
        self._grid, self._median = LabelGrid.empty(), 0.0
        self._scores = torch.zeros(2, dtype=torch.float64, device=device)  # of the current and the averaged weights
        self._loss = torch.full((), torch.nan, device=device)
        self._nonfinite = torch.zeros((), device=device)
        self._newest: deque[Newest] = deque(maxlen=NEWEST_SAMPLES)

    def step(self, batch: Batch) -> StepResult | None:
        """Predicts a batch, takes it into all statistics, learns from it, and replays older rows.

        Nothing here waits for the device. A step whose loss or gradient is not finite leaves weights and optimiser as
        they were and is counted.

        Returns:
            What was predicted before the batch was learned from; None for a batch without rows and for the first one.
        """
        if not len(batch):
            return None
        numeric = torch.from_numpy(batch.numeric).to(self._device, non_blocking=True)
        categorical = torch.from_numpy(batch.categorical).to(self._device, non_blocking=True)
        label = torch.from_numpy(batch.label).to(self._device, non_blocking=True)
        result = self._test(batch, numeric, categorical, label) if self._batches else None
        self._observe(batch, numeric, label)
        slots = self.replay.add(numeric, categorical, label)
        self.model.train()
        torch.manual_seed(self._seed + self._batches)  # what a body draws (dropout) is not part of the state
        rows = self._settings.step_rows
        for start in range(0, len(slots), rows):
            self._update(slots[start : start + rows])
        for _ in range(self._settings.replay_steps):
            self._update(self.replay.draw(rows, self._random))
        for slow, fast in zip(self.averaged.body.buffers(), self.model.body.buffers(), strict=True):
            slow.copy_(fast)  # a body's own running statistics are not averaged
        self.samples += len(batch)
        self._batches += 1
        return result

    @torch.no_grad()
    def _test(self, batch: Batch, numeric: Tensor, categorical: Tensor, label: Tensor) -> StepResult:
        """Predicts rows not yet learned from, and scores the predictions."""
        target = self.model.labels.standardise(label)
        both: list[Components] = []
        scores = []
        for model in (self.model, self.averaged):
            model.eval()
            mixture = model(numeric, categorical)
            model.head.observe(mixture, target)
            components = model.components(mixture)
            both.append(components)
            scores.append(log_score(components, self._grid, label, learned_prior=self._prior))
        answering = self._pick(*both)
        score = torch.where(self._averaged_is_better(), scores[1], scores[0])
        floor = SCORE_FLOOR - self.model.labels.sd.log()
        self._scores.mul_(SCORE_DECAY).add_(torch.stack([s.clamp(min=floor).double().mean() for s in scores]))
        answers = {
            f"{balance:g}": predict(
                answering, self._grid, learned_prior=self._prior, balance=balance, interval=INTERVAL
            )
            for balance in BALANCES
        }
        natural = answers["0"]
        assert natural.lower is not None
        assert natural.upper is not None
        covered = (label >= natural.lower) & (label <= natural.upper)
        points = {name: answer.point for name, answer in answers.items()}
        points[MEDIAN] = natural.point.new_full((len(batch),), self._median)
        self.prequential.observe(batch.label, points, covered, score)
        self._newest.append(Newest(batch.time_s, batch.label, natural.point))
        return StepResult(answering, self._grid, score, covered)

    def _observe(self, batch: Batch, numeric: Tensor, label: Tensor) -> None:
        """Takes a batch into the running statistics; predictions in label units stay as they were (Pop-Art)."""
        ratio, shift = self.model.observe(numeric, label)
        for model in (self.model, self.averaged):
            if self._batches:
                model.head.rescale(ratio, shift)
            else:
                model.head.begin(ratio)
        if isinstance(self.labels, LabelMixture | LabelHistogram):
            self.labels.rescale(ratio, shift)
            self.labels.observe(self.model.labels.standardise(label))
        self.density.observe(torch.from_numpy(batch.label))
        if self._batches < GRID_SETTLED or self._batches % GRID_EVERY == 0:
            grid = self.density.grid()
            self._median = _median(grid)
            self._grid = grid.to(self._device)

    def _update(self, slots: NDArray[np.int64]) -> None:
        """One optimiser step on rows of the replay buffer (the fresh ones lie there too), given by distinct slots."""
        memory = self.replay.draw(self._settings.label_memory, self._random)
        self._own[slots] = True
        memory = memory[~self._own[memory]]  # the step's own labels are in the loss already, exactly once
        self._own[slots] = False
        rows = torch.from_numpy(slots).to(self._device, non_blocking=True)
        others = torch.from_numpy(memory).to(self._device, non_blocking=True)
        label = self.replay.label[torch.cat([rows, others])]
        target, memory_labels = self.model.labels.standardise(label).tensor_split([len(rows)])

        mixture = self.model(self.replay.numeric[rows], self.replay.categorical[rows])
        loss = self._loss_of(mixture, target, memory_labels, label[: len(rows)])
        self._weights.zero_grad()
        for sigma in self._sigma:
            sigma.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        norm = self._weights.clip(self._settings.gradient_clip)
        # The losses leave rows out that are not finite, so a network that has gone astray shows in its outputs alone.
        checks = [
            norm,
            loss.detach(),
            *(part.detach().sum() for part in mixture),
            *(s.grad for s in self._sigma if s.grad is not None),
        ]
        nonfinite = (~torch.stack(checks).isfinite().all()).float()
        if self._skips_on_device:
            self.optimizer.found_inf = nonfinite  # type: ignore[attr-defined]  # where it is 1 the fused step does nothing
        self.optimizer.step()
        self.steps += 1

        with torch.no_grad():
            self._nonfinite += nonfinite
            kept = min(self._settings.weight_averaging, (1 + self.steps) / (AVERAGING_WARM_UP + self.steps))
            self._averaged_weights.follow(self._weights, 1 - kept)
            for slow, fast in zip(self.averaged.head.sigma_parameters(), self._sigma, strict=True):
                slow.lerp_(fast, 1 - kept)
            loss = torch.where(self._loss.isnan(), loss, self._loss.lerp(loss, LOSS_WEIGHT))
            self._loss = torch.where(nonfinite > 0, self._loss, loss)

    def _loss_of(self, mixture: Mixture, target: Tensor, memory: Tensor, label: Tensor) -> Tensor:
        """The configured loss of rows (B,); `memory` (M,) are further labels, `label` is in its own units."""
        name, head = self._settings.loss, self.model.head
        if isinstance(head, MixtureHead):
            if name == "bmc":
                return density_bmc_loss(mixture, target, memory=memory)
            return density_nll_loss(mixture, target, weights=self._grid.log_weight(label).exp().float())
        match name:
            case "bmc":
                return bmc_loss(mixture.location, target, head.sigma(), memory=memory)
            case "gai":
                return gai_loss(mixture.location, target, head.sigma(), cast("LabelMixture", self.labels))
            case "bni":
                return bni_loss(mixture.location, target, head.sigma(), cast("LabelHistogram", self.labels))
            case _:
                return PLAIN_LOSSES[name](mixture.location, target)

    def _averaged_is_better(self) -> Tensor:
        return self._scores[1] > self._scores[0]

    def _pick(self, current: Components, averaged: Components) -> Components:
        better = self._averaged_is_better()
        return Components(
            torch.where(better, averaged.log_weights, current.log_weights),
            torch.where(better, averaged.means, current.means),
            torch.where(better, averaged.scales, current.scales),
            current.label_mean,
            current.label_sd,
        )

    # What others read

    def read(self) -> Readings:
        """Metrics, fetched off the device; the one place that waits for it, but for the snapshots."""
        model = self.averaged if self._averaged_is_better() else self.model
        sigma = float(model.head.sigma().detach())
        loss = float(self._loss)
        newest: list[tuple[float, float, float]] = []
        for rows in reversed(self._newest):
            if len(newest) >= NEWEST_SAMPLES:
                break
            newest[:0] = zip(rows.time_s.tolist(), rows.label.tolist(), rows.prediction.tolist(), strict=True)
        return Readings(
            train_loss=None if np.isnan(loss) else loss,
            noise_sigma=sigma,
            noise_sigma_label_units=sigma * float(self.model.labels.sd),
            nonfinite_steps=int(self._nonfinite),
            metrics=self.prequential.compute(),
            newest=newest[-NEWEST_SAMPLES:],
        )

    def inference_state(self) -> dict[str, Tensor]:
        """Copies, on the CPU, of what predicting needs: the better weights, the scalers, the label density."""
        model = self.averaged if self._averaged_is_better() else self.model
        return _copies(inference_state(model, self.density.grid()))

    def state_dict(self) -> dict[str, Tensor]:
        """Copies, on the CPU, of everything: a learner that loads it goes on as this one would."""
        optimizer = {
            f"{index}.{name}": value
            for index, slots in self.optimizer.state_dict()["state"].items()
            for name, value in slots.items()
        }
        random = json.dumps(self._random.bit_generator.state).encode()
        parts = {
            "model": self.model.state_dict(),
            "averaged": {name: value for name, value in self.averaged.state_dict().items() if not _is_scaler(name)},
            "optimizer": optimizer,
            "replay": self.replay.state_dict(),
            "density": self.density.state_dict(),
            "labels": self.labels.state_dict(),
            "grid": self._grid.to_tensors(),
            "prequential": self.prequential.state_dict(),
            "learner": {
                "counts": torch.tensor([self.steps, self.samples, self._batches]),
                "random": torch.frombuffer(bytearray(random), dtype=torch.uint8),
                "scores": self._scores,
                "loss": self._loss,
                "nonfinite": self._nonfinite,
            },
        }
        return _copies(
            {key: value for part, tensors in parts.items() for key, value in prefixed(part, tensors).items()}
        )

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            KeyError, RuntimeError: it is of another model.
        """
        self.model.load_state_dict(unprefixed("model", state))
        averaged = self.averaged.load_state_dict(unprefixed("averaged", state), strict=False)
        if averaged.unexpected_keys or not all(map(_is_scaler, averaged.missing_keys)):
            raise RuntimeError(f"averaged weights do not fit the model: {averaged}")
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in unprefixed("optimizer", state).items():
            index, _, name = key.partition(".")
            slots.setdefault(int(index), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]  # learning rates are those of the configuration
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        self.replay.load_state_dict(unprefixed("replay", state))
        self.density.load_state_dict(unprefixed("density", state))
        self.labels.load_state_dict(unprefixed("labels", state))
        grid = LabelGrid.from_tensors(unprefixed("grid", state))
        self._grid, self._median = grid.to(self._device), _median(grid)
        self.prequential.load_state_dict(unprefixed("prequential", state))
        learner = unprefixed("learner", state)
        self.steps, self.samples, self._batches = learner["counts"].tolist()
        self._random.bit_generator.state = json.loads(learner["random"].numpy().tobytes())
        self._scores.copy_(learner["scores"])
        self._loss = learner["loss"].to(self._device)
        self._nonfinite.copy_(learner["nonfinite"])


def _flat(model: Model) -> FlatWeights:
    """All parameters of a model but sigma, which has a learning rate of its own."""
    sigma = model.head.sigma_parameters()
    return FlatWeights([p for p in model.parameters() if not any(p is s for s in sigma)])


def _median(grid: LabelGrid) -> float:
    """The median of the label density, label units; 0 before the first label."""
    if not len(grid):
        return 0.0
    cumulative = (grid.log_density.double().exp() * grid.widths).cumsum(0)
    cell = int(torch.searchsorted(cumulative, cumulative[-1] / 2).clamp(max=len(grid) - 1))
    return float(grid.centres[cell])


def _label_model(loss: str) -> LabelMixture | LabelHistogram | torch.nn.Module:
    """What a loss must know of the label density beside the step's labels: nothing, but for two of them."""
    match loss:
        case "gai":
            return LabelMixture()
        case "bni":
            return LabelHistogram()
        case _:
            return torch.nn.Module()


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}


def _is_scaler(name: str) -> bool:
    return name.startswith(("features.", "labels."))
