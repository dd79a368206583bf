import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.trainer.stream import as_records, make_learner, make_schema, make_settings
from trainer.batching import Batch, Batcher
from trainer.class_calibration import LogitCalibration
from trainer.class_model import build_class_model, load_classifier
from trainer.class_predictive import ClassPriors, class_log_probabilities
from trainer.classes import ClassNames
from trainer.config import Settings
from trainer.errors import RecordError
from trainer.learner import Learner

LOSSES = ("logit_adjusted", "cross_entropy", "class_balanced", "focal", "influence_balanced")


def class_settings(**tables: Any) -> Settings:
    """Classes `species` told by two numbers."""
    base: dict[str, dict[str, Any]] = {
        "schema": {"label": "species", "features": {"x": "numeric", "y": "numeric"}},
        "batch": {"size": 64},
        "learner": {"replay_rows": 1024, "step_rows": 32, "lr": 1e-2},
    }
    for name, table in tables.items():
        base[name] = {**base.get(name, {}), **table}
    return make_settings(task="classification", **base)


def batches_of(given: Settings, species: np.ndarray, x: np.ndarray, y: np.ndarray) -> list[Batch]:
    batcher = Batcher(make_schema(given), given.batch.size)
    rows = zip(species.tolist(), x.tolist(), y.tolist(), strict=True)
    found = list(batcher.add(as_records([json.dumps({"species": s, "x": a, "y": b}).encode() for s, a, b in rows])))
    return [*found, batcher.flush()] if batcher.pending else found


def clusters(rows: int, shares: list[float], seed: int = 0, spread: float = 0.5) -> tuple[np.ndarray, ...]:
    """Classes 0, 1, ... on a circle of radius 3, with these shares of the rows."""
    random = np.random.default_rng(seed)
    species = random.choice(len(shares), rows, p=shares)
    angle = 2 * np.pi * species / len(shares)
    return (
        species,
        3 * np.cos(angle) + random.normal(0, spread, rows),
        3 * np.sin(angle) + random.normal(0, spread, rows),
    )


def trained(given: Settings, batches: list[Batch]) -> Learner:
    learner = make_learner(given)
    for batch in batches:
        learner.step(batch)
    return learner


def recalls(learner: Learner, balance: int = 0) -> np.ndarray:
    by_class = learner.task.prequential.by_class[0].numpy()
    return by_class[1 + balance] / by_class[0].clip(1)


def test_classes_are_learned_in_the_order_they_come_and_shown_by_their_names() -> None:
    given = class_settings()
    species, x, y = clusters(1000, [0.7, 0.2, 0.1])
    names = np.array(["tit", 12, "owl"], dtype=object)[species]
    learner = trained(given, batches_of(given, names, x, y))
    assert sorted(learner.task.names) == ["12", "owl", "tit"]
    assert learner.task.names[0] == str(names[0])
    readings = learner.read()
    assert readings.metrics["whole"]["0"]["accuracy"] > 0.8
    assert readings.noise is None
    assert readings.healthy
    _time, label, prediction = readings.newest[-1]
    assert label == str(names[-1])
    assert prediction in learner.task.names


def test_a_class_first_seen_at_row_10000_is_learned() -> None:
    given = class_settings(batch={"size": 256}, learner={"step_rows": 256})
    species, x, y = clusters(14000, [0.6, 0.3, 0.1])
    late = np.arange(14000) >= 10000
    species[~late & (species == 2)] = 0
    angle = 2 * np.pi * species / 3
    x, y = 3 * np.cos(angle) + 0.3 * (x - x.round()), 3 * np.sin(angle) + 0.3 * (y - y.round())
    batches = batches_of(given, species, x, y)
    assert [b for b, batch in enumerate(batches) if "2" in batch.new_classes] == [10000 // 256]
    learner = trained(given, batches[:-8])
    assert learner.task.names[2] == "2"
    sums = learner.task.prequential.by_class[0, :, 2].clone()
    for batch in batches[-8:]:
        learner.step(batch)
    rows, right = (learner.task.prequential.by_class[0, :, 2] - sums)[:2].tolist()
    assert rows > 100
    assert right / rows > 0.95


def test_growing_changes_no_answer_and_keeps_what_the_optimiser_knows() -> None:
    given = class_settings()
    batches = batches_of(given, *clusters(640, [0.6, 0.4]))
    learner = trained(given, batches)
    before = learner.state_dict()
    rows = torch.from_numpy(batches[0].numeric), torch.from_numpy(batches[0].categorical)
    logits = learner.model.eval()(*rows).values
    learner._grow(Batch(*[np.empty(0)] * 4, {}, new_classes=("new", "newer")))
    after = learner.state_dict()
    grown = learner.model(*rows).values
    assert grown.shape[1] == 4
    torch.testing.assert_close(grown[:, :2], logits, rtol=0, atol=1e-6)
    weights = sum(p.numel() for p in learner.model.parameters())
    width = learner.model.body.out_features
    for name in ("optimizer.0.exp_avg", "optimizer.0.exp_avg_sq"):
        assert after[name].shape == (weights,)
        body = len(before[name]) - 2 * (width + 1)
        assert torch.equal(after[name][: body + 2 * width], before[name][: body + 2 * width])
        assert not after[name][body + 2 * width :][: 2 * width].any()
        assert torch.equal(after[name][-4:-2], before[name][-2:])
    assert torch.equal(after["optimizer.0.step"], before["optimizer.0.step"])


@pytest.mark.parametrize("listed", [[], ["0", "1"]])
def test_every_weight_goes_on_learning_when_no_class_is_new(listed: list[str]) -> None:
    given = class_settings(schema={"classes": listed})
    batches = batches_of(given, *clusters(640, [0.6, 0.4]))
    learner = trained(given, batches[:-1])
    assert not batches[-1].new_classes
    networks = {"current": learner.model, "averaged": learner.averaged}
    before = {name: [p.detach().clone() for p in network.head.parameters()] for name, network in networks.items()}
    learner.step(batches[-1])
    for name, network in networks.items():
        for old, new in zip(before[name], network.head.parameters(), strict=True):
            assert bool((new != old).any(-1).all()), name


@pytest.mark.parametrize("loss", ["logit_adjusted", "cross_entropy", "focal"])
def test_a_class_that_is_only_listed_is_not_learned_against(loss: str) -> None:
    species, x, y = clusters(640, [0.6, 0.4])
    logits = []
    for unseen in ([], ["2"]):
        given = class_settings(schema={"classes": ["0", "1", *unseen]}, learner={"loss": loss})
        batches = batches_of(given, species, x, y)
        learner = trained(given, batches)
        rows = torch.from_numpy(batches[0].numeric), torch.from_numpy(batches[0].categorical)
        logits.append(learner.model.eval()(*rows).values)
    torch.testing.assert_close(logits[1][:, :2], logits[0])
    assert not learner.model.head.bias[2].any()


def test_a_thousand_classes_work() -> None:
    features = {"code": {"kind": "vector", "size": 24}}
    given = class_settings(
        schema={"features": features},
        batch={"size": 250},
        learner={"step_rows": 125, "replay_rows": 4096, "metrics_fading": 0.999},
        model={"hidden": [64]},
    )
    random = np.random.default_rng(0)
    codes = random.choice([-1.0, 1.0], (1000, 24))
    species = np.concatenate([np.arange(1000), random.integers(0, 1000, 6000)])
    batcher = Batcher(make_schema(given), 250)
    values = [json.dumps({"species": int(s), "code": codes[s].tolist()}).encode() for s in species]
    learner = trained(given, list(batcher.add(as_records(values))))
    assert len(learner.task.names) == 1000
    readings = learner.read()
    assert readings.nonfinite_steps == 0
    assert readings.metrics["fading"]["0"]["accuracy"] > 20 / 1000
    other = make_learner(given)
    other.load_state_dict(learner.state_dict())
    assert other.read()._replace(newest=[]) == readings._replace(newest=[])


def test_records_past_the_most_classes_are_rejected_and_the_others_go_on() -> None:
    given = class_settings(schema={"max_classes": 2}, batch={"size": 4})
    batches = batches_of(given, np.array(["a", "b", "c", "a", "d", "b"]), np.zeros(6), np.zeros(6))
    rejected = [rejection for batch in batches for rejection in batch.rejected]
    assert [(r.record.offset, r.error.reason, r.error.field) for r in rejected] == [
        (2, "too_many_classes", "species"),
        (4, "too_many_classes", "species"),
    ]
    assert "'c', a new class, and there are 2 already: raise schema.max_classes" in str(rejected[0].error)
    assert [batch.label.tolist() for batch in batches] == [[0, 1, 0, 1]]


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        ('"wren"', "unknown_class"),
        ("1.5", "wrong_type"),
        ("null", "no_label"),
        ('["a"]', "wrong_type"),
        (json.dumps("long" * 100), "wrong_type"),
    ],
)
def test_labels_that_are_no_class_are_rejected(label: str, reason: str) -> None:
    schema = make_schema(class_settings(schema={"classes": ["tit", 3, "owl"]}))
    assert [schema.decode(b'{"species": %s}' % text).label for text in (b'"tit"', b"3", b"3.0", b'"3"')] == [0, 1, 1, 1]
    with pytest.raises(RecordError, match="species") as caught:
        schema.decode(b'{"species": %s}' % label.encode())
    assert caught.value.reason == reason


def test_a_rejected_record_adds_no_class() -> None:
    schema = make_schema(class_settings())
    with pytest.raises(RecordError, match="too large"):
        schema.decode(b'{"species": "a", "x": 1e39}')
    assert schema.decode(b'{"species": "b"}').label == 0
    assert schema.classes is not None
    assert schema.classes.take_new() == ("b",)


def test_names_that_a_snapshot_does_not_cover_are_forgotten() -> None:
    names = ClassNames([], 10, "species")
    assert [names.number(name) for name in "abc"] == [0, 1, 2]
    names.restore("ab")
    assert names.take_new() == ()
    assert names.number("d") == 2
    assert names.take_new() == ("d",)


def test_listed_classes_are_never_answered_before_they_are_seen() -> None:
    given = class_settings(schema={"classes": ["0", "1", "2", "3"]})
    learner = trained(given, batches_of(given, *clusters(640, [0.7, 0.3])))
    state = learner.inference_state()
    model = build_class_model(make_schema(given), given.model)
    names, priors = load_classifier(state, model)
    assert names == ["0", "1", "2", "3"]
    logits = model.eval()(torch.zeros(3, 2), torch.zeros(3, 0, dtype=torch.int64)).values
    for balance in (0.0, 0.5, 1.0):
        probabilities = class_log_probabilities(logits, priors, balance).exp()
        assert probabilities[:, 2:].eq(0).all()
        torch.testing.assert_close(probabilities.sum(1), torch.ones(3))


@pytest.mark.parametrize("learned", ["uniform", "stream", "weighted"])
def test_the_answer_is_bayes_rule_whatever_prior_the_logits_carry(learned: str) -> None:
    prior = torch.tensor([0.7, 0.2, 0.1])
    carried = {"uniform": torch.ones(3), "stream": prior, "weighted": prior * torch.tensor([1.0, 2.0, 5.0])}[learned]
    likelihood = torch.tensor([[0.1, 0.5, 0.2], [0.3, 0.3, 0.3]])
    priors = ClassPriors(prior.log(), carried.log(), torch.tensor(2.0), torch.ones(3, dtype=torch.bool))
    for balance in (0.0, 0.4, 1.0):
        right = likelihood * prior ** (1 - balance)
        found = class_log_probabilities((likelihood * carried).log() / 2, priors, balance).exp()
        torch.testing.assert_close(found, right / right.sum(1, keepdim=True))
    with pytest.raises(ValueError, match="balance"):
        class_log_probabilities(likelihood.log(), priors, 1.5)


@pytest.mark.parametrize("loss", LOSSES)
def test_balance_trades_the_common_class_for_the_rare_ones(loss: str) -> None:
    given = class_settings(learner={"loss": loss, "influence_after": 1000, "metrics_fading": 0.999})
    learner = trained(given, batches_of(given, *clusters(4000, [0.9, 0.06, 0.04], spread=1.5)))
    found = learner.read().metrics["fading"]
    gain = found["1"]["macro_recall"] - found["0"]["macro_recall"]
    assert gain > (-0.01 if loss == "influence_balanced" else 0.05)  # which is balanced by itself
    assert found["0"]["accuracy"] > found["1"]["accuracy"]
    assert found["0"]["accuracy"] >= found["majority"]["accuracy"] - 0.02
    assert found["0"]["log_loss"] < found["majority"]["log_loss"]


def test_the_switch_to_the_second_phase_does_not_lose_what_was_learned() -> None:
    given = class_settings(
        batch={"size": 256}, learner={"loss": "influence_balanced", "influence_after": 4096, "step_rows": 256}
    )
    batches = batches_of(given, *clusters(8192, [0.8, 0.15, 0.05], spread=0.8))
    learner = make_learner(given)
    right: list[float] = []
    for batch in batches:
        result = learner.step(batch)
        if result is not None:
            answer = class_log_probabilities(result.logits, result.priors, 1.0).argmax(1).numpy()
            right.append(float(np.mean([(answer == batch.label)[batch.label == k].mean() for k in range(3)])))
    before, after = np.mean(right[11:15]), np.array(right[15:])
    assert bool(learner.task.phases.balanced)
    assert after.min() > before - 0.1
    assert after.mean() > before - 0.02


def test_metrics_are_those_of_the_definitions() -> None:
    given = class_settings()
    batches = batches_of(given, *clusters(1500, [0.9, 0.095, 0.005], spread=1.5))
    learner = make_learner(given)
    labels, answers = [], []
    for batch in batches:
        result = learner.step(batch)
        if result is not None:
            labels.append(batch.label.astype(int))
            found = class_log_probabilities(result.logits, result.priors, 0.0).double().numpy()
            answers.append(np.pad(found, [(0, 0), (0, 3 - found.shape[1])], constant_values=-np.inf))
    label, log_p = np.concatenate(labels), np.concatenate(answers)
    chosen = log_p.argmax(1)
    recall = np.array([(chosen == label)[label == k].mean() for k in range(3)])
    metrics = learner.read().metrics["whole"]
    assert metrics["rows"] == len(label) == 1500 - 64
    assert metrics["classes"] == 3
    expected = {
        "accuracy": (chosen == label).mean(),
        "macro_recall": recall.mean(),
        "g_mean": np.prod(recall) ** (1 / 3),
        "log_loss": -log_p[np.arange(len(label)), label].clip(-20).mean(),
    }
    for name, value in expected.items():
        assert metrics["0"][name] == pytest.approx(value, abs=1e-9), name
    shares = np.bincount(label, minlength=3) / len(label)
    assert [metrics["0"][f"recall_{shots}"] for shots in ("many", "medium")] == pytest.approx(
        [recall[shares >= 1 / 50].mean(), recall[(shares < 1 / 50) & (shares >= 1 / 500)].mean()]
    )
    assert metrics["0"]["recall_few"] is None
    confidence = np.exp(log_p.max(1))
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [abs((chosen == label)[bins == b].sum() - confidence[bins == b].sum()) for b in range(15)]
    assert metrics["0"]["calibration_error"] == pytest.approx(sum(gaps) / len(label), abs=1e-6)
    fading = learner.read().metrics["fading"]
    assert fading["rows"] < metrics["rows"]


def test_a_model_of_what_cannot_be_learned_is_healthy_and_one_that_is_always_wrong_is_not() -> None:
    given = class_settings()
    random = np.random.default_rng(0)
    species = random.choice(3, 1500, p=[0.5, 0.3, 0.2])
    learner = trained(given, batches_of(given, species, random.normal(size=1500), random.normal(size=1500)))
    readings = learner.read()
    assert readings.healthy
    readings.metrics["fading"]["0"]["accuracy"] = 0.3
    assert not learner.task.is_healthy(readings.metrics["fading"], None)


def test_calibration_finds_the_scale_and_the_prior_that_logits_carry() -> None:
    random = torch.Generator().manual_seed(0)
    prior = torch.tensor([0.7, 0.2, 0.1])
    seen = torch.tensor([True, True, True, False])
    calibration = LogitCalibration()
    for rows in (256, 16) * 100:
        target = torch.multinomial(prior, rows, replacement=True, generator=random)
        evidence = 1.5 * F.one_hot(target, 3) + torch.randn(rows, 3, generator=random)
        carried = (1.5 * evidence + 0.4 * prior.log()) / 3
        logits = torch.cat([carried, torch.full((rows, 1), 9.0)], 1)
        target[0], logits[1, 0] = 7, torch.nan  # a class not known yet, and a row gone astray
        calibration.observe(logits, torch.cat([prior, prior[:1]]).log(), seen, target)
    scale, tilt = calibration.fitted.tolist()
    assert scale == pytest.approx(3, abs=0.3)
    assert tilt == pytest.approx(0.6, abs=0.15)
