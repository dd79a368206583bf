"""The learner: each batch is predicted, then learned from, then followed by replay; its state is one dictionary."""

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.batching import Batch
from trainer.classification import Classification
from trainer.config import Settings
from trainer.drift import PageHinkley
from trainer.flat_weights import FlatWeights
from trainer.model import prefixed, unprefixed
from trainer.ranks import ALONE, Ranks
from trainer.regression import Regression
from trainer.replay import ReplayBuffer, dealt
from trainer.schema import FeatureSchema
from trainer.task import Network, Noise, Task

SCORE_DECAY: Final = 0.9  # of the log scores by which the averaged or the current weights are chosen, per batch
LOSS_WEIGHT: Final = 0.01  # of one step in the fading training loss
DRIFT_RATE: Final = 3.0  # times the learning rate after a drift, where that is asked for
WARM_UP_TIMES: Final = 8.0  # as many replay steps a batch, at most, while few rows have been seen
REPLAY_SHARE: Final = 2  # rows replayed for each new one, at most, where the time for it decides
REPLAY_BACKLOG_STEPS: Final = 64  # replay steps that are made up for after a time without any
AVERAGING_WARM_UP: Final = 10  # steps
NEWEST_SAMPLES: Final = 100
RANK: Final = "rank"  # begins the names of what is the own of ranks but the first, in a state
TASKS: Final[Mapping[str, Callable[[Settings, FeatureSchema, torch.device], Task]]] = {
    "regression": Regression,
    "classification": Classification,
}


class Newest(NamedTuple):
    """The last rows of one batch beside their predictions, for people to look at."""

    time_s: NDArray[np.float64]
    label: NDArray[np.float64]
    prediction: Tensor


class _Fresh(NamedTuple):
    """B rows that came now, to all ranks."""

    time_s: NDArray[np.float64]  # (B,)
    host_label: NDArray[np.float64]  # (B,)
    label: Tensor  # (B,) on the device
    numeric: Tensor  # (B, F)


class _Exchanged(NamedTuple):
    """What the ranks bring together in a turn."""

    fresh: _Fresh
    predicted: Tensor  # (B, columns) of `Task.predict`
    beside: list[Tensor] | None  # labels that the others bring to each step, label units, NaN for none


class Readings(NamedTuple):
    """What `Learner.read` fetched off the device."""

    train_loss: float | None  # fading mean, squared label standard deviations
    noise: Noise | None
    nonfinite_steps: int
    drift_alarms: int
    drift_statistic: float  # share of the threshold
    metrics: dict[str, Any]  # Task.metrics()
    healthy: bool  # whether the fading error is finite and not clearly worse than a constant answer's
    newest: list[tuple[float, float | str, float | str]]  # event time, label, prediction


class Learner:
    """Learns from batches; deterministic given the settings and the batches.

    Several ranks call its methods together. Each brings a batch, or one without rows, and keeps its own replay buffer;
    all else, the metrics too, is the same on all of them.

    Attributes:
        task: the networks, and all that depends on what a label is.
        replay: the newest rows.
        drift: whether the error has risen.
        steps: optimiser steps taken.
        samples: rows learned from (replayed ones not counted again), by all ranks.
    """

    def __init__(self, settings: Settings, schema: FeatureSchema, device: torch.device, ranks: Ranks = ALONE) -> None:
        learner = settings.learner
        self._settings = learner
        self._device = device
        self._ranks = ranks
        self._seed = settings.seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.task: Task = TASKS[settings.task](settings, schema, device)
        self._fused = device.type in ("cpu", "cuda")
        self._flatten()
        self.drift = PageHinkley(learner.drift_threshold).to(device)
        self.replay = ReplayBuffer(learner.replay_rows, len(schema.numeric_columns), len(schema.buckets), device)
        self.steps = self.samples = self._batches = self._replay_rows_due = 0
        self._random = _generator(settings.seed, ranks)
        self._own = np.zeros(learner.replay_rows, dtype=bool)
        self._scores = torch.zeros(2, dtype=torch.float64, device=device)  # of the current and the averaged weights
        self._loss = torch.full((), torch.nan, device=device)
        self._nonfinite = torch.zeros((), device=device)
        self._newest: deque[Newest] = deque(maxlen=NEWEST_SAMPLES)

    def _flatten(self) -> None:
        """Puts the networks' weights into one vector each, and a fresh optimiser over them."""
        self._sigma = self.task.sigma_parameters()
        own_rate = {id(p) for pair in self._sigma for p in pair}
        self._weights, self._averaged_weights = (
            FlatWeights([p for p in network.parameters() if id(p) not in own_rate])
            for network in (self.task.model, self.task.averaged)
        )
        rate = self._settings.lr
        adapts = self._settings.drift_action == "learning_rate"  # on the device, which is not waited for
        groups: list[dict[str, Any]] = [
            {"params": [self._weights.vector], "lr": torch.tensor(rate, device=self._device) if adapts else rate}
        ]
        if self._sigma:
            groups.append({"params": [sigma for sigma, _ in self._sigma], "lr": self._settings.sigma_lr})
        self.optimizer = torch.optim.Adam(groups, lr=self._settings.lr, fused=self._fused)

    def _grow(self, batch: Batch) -> None:
        """Makes room for what a batch brings; what the optimiser knows of the weights stays with them."""
        before, state = self._weights, self.optimizer.state.get(self._weights.vector)
        if not self.task.grow(batch):
            return
        self._flatten()
        if state:
            shapes = self._weights.parts(self._weights.vector)
            self.optimizer.state[self._weights.vector] = {
                name: _padded(before.parts(value), shapes) if value.dim() else value for name, value in state.items()
            }

    def step(self, batch: Batch, sizes: Sequence[tuple[int, int]] | None = None) -> Any:
        """Predicts a batch, takes it into all statistics, learns from it, and replays older rows.

        Nothing here waits for the device. A step whose loss or gradient is not finite leaves weights and optimiser as
        they were and is counted.

        Args:
            batch: of this rank.
            sizes: of each rank its batch's rows and `len(replay)`, where they were exchanged already.

        Returns:
            What was predicted before the batch was learned from, in the task's own form; None for a batch without rows
            and for the first one.
        """
        if sizes is None:
            sizes = [(rows, held) for rows, held in self._ranks.numbers(len(batch), len(self.replay))]
        counts = [rows for rows, _ in sizes]
        total = sum(counts)
        if not total:
            return None
        numeric = torch.from_numpy(batch.numeric).to(self._device, non_blocking=True)
        categorical = torch.from_numpy(batch.categorical).to(self._device, non_blocking=True)
        label = torch.from_numpy(batch.label).to(self._device, non_blocking=True)
        self._grow(batch)
        predicted = None
        if self._batches:
            predicted = self.task.predict(numeric, categorical, label, self._averaged_is_better())
        slots = self.replay.add(numeric, categorical, label)
        self.samples += total

        rows, held = self._settings.step_rows, [min(self._settings.replay_rows, sum(both)) for both in sizes]
        starts = range(0, max(counts), rows)
        steps = [slots[start : start + rows] for start in starts]
        of_all = [sum(min(max(0, count - start), rows) for count in counts) for start in starts]
        if self._settings.replay_steps == "auto":
            most = REPLAY_BACKLOG_STEPS * rows
            self._replay_rows_due = min(self._replay_rows_due + REPLAY_SHARE * total // self._ranks.count, most)
        else:
            more = self._settings.replay_warm_up_rows / self.samples
            replays = round(self._settings.replay_steps * min(max(1.0, more), WARM_UP_TIMES))
            steps += self.replay.draw([rows] * replays, self._random)
            of_all += [sum(min(count, rows) for count in held)] * replays
        memories = self._memories(steps)

        columns = None if predicted is None else predicted.columns
        fresh, columns, beside = self._of_all_ranks(batch, numeric, label, columns, counts, steps, memories)
        if predicted is not None:
            self._score(columns, fresh)
        self.task.observe(fresh.numeric, fresh.label, fresh.host_label, self._batches)
        self.model.train()
        # What a body draws (dropout) is not part of the state.
        self._seed_draws(self._seed + self._batches * self._ranks.count + self._ranks.number)
        self._learn(steps, memories, beside, of_all, sum(held))
        self._batches += 1
        return None if predicted is None else predicted.result

    def _seed_draws(self, seed: int) -> None:
        """Seeds what a body draws from."""
        if self._device.type == "cpu":  # `manual_seed` keeps a stack trace for each other kind of device
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)

    @property
    def may_replay(self) -> bool:
        """Whether `replay_when_idle` has anything to do."""
        return self._replay_rows_due >= self._settings.step_rows

    def replay_when_idle(self, held: Sequence[int] | None = None) -> None:
        """One step on older rows, where `replay_steps` is `auto` and not enough of them were taken yet.

        Args:
            held: `len(replay)` of each rank, where they were exchanged already.
        """
        if not self.may_replay:
            return
        rows = self._settings.step_rows
        self._replay_rows_due -= rows
        self.model.train()
        if held is None:
            held = [count for (count,) in self._ranks.numbers(len(self.replay))]
        steps = self.replay.draw([rows], self._random)
        memories, beside = self._memories(steps), None
        brought = self._brought(steps, memories)
        if brought is not None:
            beside = self._of_others(torch.split(self._ranks.rows(brought, [1] * self._ranks.count), 1))
        self._learn(steps, memories, beside, [sum(min(count, rows) for count in held)], sum(held))

    def _of_all_ranks(
        self,
        batch: Batch,
        numeric: Tensor,
        label: Tensor,
        columns: Tensor | None,
        counts: Sequence[int],
        steps: Sequence[NDArray[np.int64]],
        memories: Sequence[NDArray[np.int64]],
    ) -> _Exchanged:
        """A batch's rows and what was predicted of them, beside those of the other ranks, and the labels they bring.

        Running statistics are taken over the rows of all. It is one message where it can be: on a CPU what a message
        costs hardly depends on what is in it.
        """
        columns = label.new_empty(len(label), 0) if columns is None else columns
        if self._ranks.alone:
            return _Exchanged(_Fresh(batch.time_s, batch.label, label, numeric), columns, None)
        own = torch.from_numpy(np.column_stack([batch.time_s, batch.label, batch.numeric]))  # float64 holds all of it
        brought = self._brought(steps, memories)
        also = label.new_empty(0) if brought is None else brought
        if self._device.type == "cpu":
            both = torch.cat([own, columns.double()], 1)
            found, labels = self._ranks.rows_beside(both, counts, also)
            found, predicted = found.tensor_split([own.shape[1]], 1)
        else:
            found = self._ranks.rows(own, counts)
            predicted, labels = self._ranks.rows_beside(columns.double(), counts, also)
        there = found.to(self._device, non_blocking=True)
        host_label, of_all = found[:, 1].numpy().copy(), there[:, 1].contiguous()
        fresh = _Fresh(found[:, 0].numpy(), host_label, of_all, there[:, 2:].float())
        return _Exchanged(fresh, predicted.to(columns.dtype), None if brought is None else self._of_others(labels))

    @torch.no_grad()
    def _score(self, columns: Tensor, fresh: _Fresh) -> None:
        """Scores predictions that were made before their rows are learned from."""
        tested = self.task.score(columns, fresh.label, fresh.host_label)
        self.drift.observe(tested.error)
        match self._settings.drift_action:
            case "learning_rate":
                rate = self.optimizer.param_groups[0]["lr"]
                rate.copy_(torch.where(self.drift.acting, DRIFT_RATE * self._settings.lr, self._settings.lr))
            case "forget":
                self.task.forget(bool(self.drift.acting))
        self._scores.mul_(SCORE_DECAY).add_(tested.scores)
        last = slice(-NEWEST_SAMPLES, None)  # copied: a view would keep the whole batch
        newest = fresh.time_s[last].copy(), fresh.host_label[last].copy(), tested.point[last].clone()
        self._newest.append(Newest(*newest))

    def _memories(self, steps: Sequence[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
        """Slots of a label memory for each step, without those of its rows, whose labels are in the loss already."""
        memory_rows = self._settings.label_memory // self._ranks.count
        drawn = self.replay.draw([memory_rows] * len(steps), self._random)
        return [self._not_own(memory, slots) for memory, slots in zip(drawn, steps, strict=True)]

    def _not_own(self, memory: NDArray[np.int64], slots: NDArray[np.int64]) -> NDArray[np.int64]:
        self._own[slots] = True
        others = memory[~self._own[memory]]
        self._own[slots] = False
        return others

    def _brought(self, steps: Sequence[NDArray[np.int64]], memories: Sequence[NDArray[np.int64]]) -> Tensor | None:
        """Labels (1, steps, M) that this rank brings to the others' steps, NaN for none: what `Task.compared` asks for.

        In label units, and of one shape on all ranks.
        """
        if self._ranks.alone or self.task.compared == "none":
            return None
        brought, most = memories, self._settings.label_memory // self._ranks.count
        if self.task.compared == "all":
            brought = [np.concatenate(both) for both in zip(steps, memories, strict=True)]
            most += self._settings.step_rows
        index = np.full((1, len(steps), most), -1)
        for number, own in enumerate(brought):
            index[0, number, : len(own)] = own
        slots = torch.from_numpy(index).to(self._device)
        return torch.where(slots < 0, torch.nan, self.replay.label[slots.clamp(min=0)])

    def _of_others(self, brought: Sequence[Tensor]) -> list[Tensor]:
        """The labels that the others have `_brought`, by step, label units."""
        others = [labels for rank, labels in enumerate(brought) if rank != self._ranks.number]
        return list(torch.cat(others).transpose(0, 1).flatten(1))

    def _learn(
        self,
        steps: Sequence[NDArray[np.int64]],
        memories: Sequence[NDArray[np.int64]],
        beside: Sequence[Tensor] | None,
        of_all: Sequence[int],
        held: int,
    ) -> None:
        """Takes optimiser steps, each on rows of the replay buffer (the fresh ones lie there too) at distinct slots.

        Args:
            steps: slots of this rank's rows; the ranks take the same number of steps, some perhaps without rows.
            memories: slots of each step's label memory.
            beside: labels that the other ranks bring to each step, label units, NaN for none.
            of_all: how many rows all ranks have in each step.
            held: rows in the replay buffers of all ranks.
        """
        # What does not change between the steps is done for all of them at once.
        sizes, rows = [len(slots) for slots in steps], sum(map(len, steps))
        index = torch.from_numpy(np.concatenate([*steps, *memories])).to(self._device, non_blocking=True)
        labels = self.task.targets(self.replay.label[index])
        columns = self.task.columns(self.replay.numeric[index[:rows]])
        categorical = self.replay.categorical[index[:rows]]
        targets, others = labels.tensor_split([rows])
        columns_of, categorical_of, targets_of = (torch.split(of, sizes) for of in (columns, categorical, targets))
        memory = list(torch.split(others, [len(slots) for slots in memories]))
        for at, labels in enumerate(beside or ()):
            # A device is not waited for: there the losses mask what is NaN.
            there = self.task.targets(labels if self._device.type != "cpu" else labels[~labels.isnan()])
            memory[at] = torch.cat([memory[at], there])
        for at, rows_of_all in enumerate(of_all):
            self._update(columns_of[at], categorical_of[at], targets_of[at], memory[at], rows_of_all, held)
        self._follow_statistics()

    def _update(
        self, columns: Tensor, categorical: Tensor, target: Tensor, memory: Tensor, of_all: int, held: int
    ) -> None:
        """One optimiser step: the gradient is that of the mean over the rows of all ranks; see `Task.loss`."""
        self._weights.zero_grad()
        for sigma, _ in self._sigma:
            sigma.grad = None if self._ranks.alone else torch.zeros_like(sigma)
        loss, checked = torch.zeros(2, device=self._device)
        if len(target):
            stands_for = max(1.0, (held - len(target)) / max(1, len(memory)))
            outputs, own = self.task.loss(columns, categorical, target, memory, stands_for)
            own.backward()  # type: ignore[no-untyped-call]
            # The losses leave rows out that are not finite, so a network that has gone astray shows in its outputs.
            loss, checked = own.detach(), sum((part.detach().sum() for part in outputs), own.detach())
        slopes = [sigma.grad for sigma, _ in self._sigma if sigma.grad is not None]
        if not self._ranks.alone:
            loss, checked, share = loss.clone(), 0.0 * checked, len(target) / of_all
            for part in (self._weights.gradient, loss, *slopes):
                part.mul_(share)
            self._ranks.sum_(self._weights.gradient, loss, checked, *slopes)
        norm = self._weights.norm()
        excess = (norm / self._settings.gradient_clip).clamp(min=1.0)
        nonfinite = sum(slopes, norm + checked).isfinite().logical_not_().float()
        if self._fused:  # the optimiser divides, and where `found_inf` is 1 it does nothing
            self.optimizer.grad_scale, self.optimizer.found_inf = excess, nonfinite  # type: ignore[attr-defined]
        else:
            self._weights.divide_gradient(excess)
        self.optimizer.step()
        self.steps += 1

        with torch.no_grad():
            self._nonfinite += nonfinite
            kept = min(self._settings.weight_averaging, (1 + self.steps) / (AVERAGING_WARM_UP + self.steps))
            self._averaged_weights.follow(self._weights, 1 - kept)
            for fast, slow in self._sigma:
                slow.lerp_(fast, 1 - kept)
            loss = torch.where(self._loss.isnan(), loss, self._loss.lerp(loss, LOSS_WEIGHT))
            self._loss = torch.where(nonfinite > 0, self._loss, loss)

    @torch.no_grad()
    def _follow_statistics(self) -> None:
        """A body's own running statistics are not averaged over time; over the ranks they are, and those of losses."""
        if not self._ranks.alone:
            own = [*self.task.running(), *filter(torch.is_floating_point, self.model.body.buffers())]
            means = [value / self._ranks.count for value in own]
            if means:
                self._ranks.sum_(*means)
            for value, mean in zip(own, means, strict=True):
                value.copy_(mean)
        for slow, fast in zip(self.averaged.body.buffers(), self.model.body.buffers(), strict=True):
            slow.copy_(fast)

    def _averaged_is_better(self) -> Tensor:
        return self._scores[1] > self._scores[0]

    # What others read

    @property
    def model(self) -> Network:
        """The network with the current weights."""
        return self.task.model

    @property
    def averaged(self) -> Network:
        """The network with averaged weights."""
        return self.task.averaged

    def read(self) -> Readings:
        """Metrics, fetched off the device; the one place that waits for it, but for the snapshots."""
        loss, nonfinite_steps = float(self._loss), int(self._nonfinite)
        metrics, noise = self.task.metrics(), self.task.noise(bool(self._averaged_is_better()))
        fading = metrics["fading"]
        newest: list[tuple[float, float | str, float | str]] = []
        for rows in reversed(self._newest):
            if len(newest) >= NEWEST_SAMPLES:
                break
            labels, predictions = (self.task.shown(part.tolist()) for part in (rows.label, rows.prediction))
            newest[:0] = zip(rows.time_s.tolist(), labels, predictions, strict=True)
        return Readings(
            train_loss=None if np.isnan(loss) else loss,
            noise=noise,
            nonfinite_steps=nonfinite_steps,
            drift_alarms=int(self.drift.alarms),
            drift_statistic=float(self.drift.statistic),
            metrics=metrics,
            healthy=self.task.is_healthy(fading, noise) if "0" in fading else nonfinite_steps == 0,
            newest=newest[-NEWEST_SAMPLES:],
        )

    def inference_state(self) -> dict[str, Tensor]:
        """Copies, on the CPU, of what predicting needs, with the better weights."""
        return _copies(self.task.inference_state(bool(self._averaged_is_better())))

    def state_dict(self) -> dict[str, Tensor]:
        """Copies, on the CPU, of everything: a learner that loads it goes on as this one would."""
        return {**self.common_state(), **self.own_state()}

    def own_state(self) -> dict[str, Tensor]:
        """Copies, on the CPU, of what is this rank's alone: the replay buffer and the generator."""
        random = json.dumps(self._random.bit_generator.state).encode()
        own = {"learner.random": torch.frombuffer(bytearray(random), dtype=torch.uint8)}
        return _copies({**prefixed("replay", self.replay.state_dict()), **own})

    def common_state(self) -> dict[str, Tensor]:
        """Copies, on the CPU, of all that is the same on all ranks."""
        optimizer = {
            f"{index}.{name}": value
            for index, slots in self.optimizer.state_dict()["state"].items()
            for name, value in slots.items()
        }
        parts = {
            **self.task.state_dict(),
            "optimizer": optimizer,
            "drift": self.drift.state_dict(),
            "learner": {
                "counts": torch.tensor([self.steps, self.samples, self._batches]),
                "scores": self._scores,
                "loss": self._loss,
                "nonfinite": self._nonfinite,
            },
        }
        return _copies(
            {key: value for part, tensors in parts.items() for key, value in prefixed(part, tensors).items()}
        )

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state_dict` gave, or `joint_state` of ranks that may have been more or fewer than now.

        Raises:
            KeyError, RuntimeError: it is of another model.
        """
        self.task.load_state_dict(state)
        self._flatten()  # the networks may have changed their size
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in unprefixed("optimizer", state).items():
            index, _, name = key.partition(".")
            slots.setdefault(int(index), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]  # learning rates are those of the configuration
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        self.drift.load_state_dict(unprefixed("drift", state))
        learner = unprefixed("learner", state)
        self.steps, self.samples, self._batches = learner["counts"].tolist()
        self._scores.copy_(learner["scores"])
        self._loss = learner["loss"].to(self._device)
        self._nonfinite.copy_(learner["nonfinite"])
        own = _own_states(state)
        before = [unprefixed("replay", part) for part in own]
        same = len(own) == self._ranks.count
        self.replay.load_state_dict(before[self._ranks.number] if same else dealt(before, self._ranks))
        if self._ranks.number < len(own):
            random = own[self._ranks.number]["learner.random"]
            self._random.bit_generator.state = json.loads(random.numpy().tobytes())


def _padded(values: Sequence[Tensor], like: Sequence[Tensor]) -> Tensor:
    """Values by parameter as one vector, each parameter filled up with 0 to the shape that it has now."""
    grown = [torch.zeros_like(shape) for shape in like]
    for new, old in zip(grown, values, strict=True):
        new[tuple(map(slice, old.shape))] = old
    return torch.cat([part.reshape(-1) for part in grown])


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}


def _generator(seed: int, ranks: Ranks) -> np.random.Generator:
    """Each rank draws by its own."""
    return np.random.default_rng([seed, ranks.number] if ranks.number else seed)


def joint_state(common: dict[str, Tensor], own: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One state of `common_state` and the `own_state` of each rank; that of one rank is its `state_dict`."""
    others = (prefixed(f"{RANK}{rank}", part) for rank, part in enumerate(own) if rank)
    return {**common, **own[0], **{name: value for part in others for name, value in part.items()}}


def _own_states(state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """What was each rank's own in a `joint_state`."""
    own = [state]
    while part := unprefixed(f"{RANK}{len(own)}", state):
        own.append(part)
    return own
