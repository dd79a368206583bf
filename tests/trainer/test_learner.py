import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import trainer.regression
from tests.trainer.stream import CLASSES, CPU, make_batches, make_learner, make_settings
from trainer.batching import Batch
from trainer.config import BatchSettings, Settings
from trainer.learner import Learner

ROWS = 8 * 32
GAUSSIAN = {"head": "gaussian"}
VARIANTS: dict[str, dict[str, Any]] = {
    "mixture bmc": {},
    "mixture nll": {"learner": {"loss": "nll"}},
    "gaussian bmc": {"model": GAUSSIAN},
    "gaussian bmc, sigma in label units": {"model": GAUSSIAN, "learner": {"sigma": {"label_units": 8.0}}},
    "gaussian bmc, adaptive sigma": {"model": GAUSSIAN, "learner": {"sigma": "adaptive"}},
    "gaussian gai": {"model": GAUSSIAN, "learner": {"loss": "gai"}},
    "gaussian bni": {"model": GAUSSIAN, "learner": {"loss": "bni"}},
    "gaussian mse": {"model": GAUSSIAN, "learner": {"loss": "mse"}},
    "a buffer of one batch": {"learner": {"replay_rows": 32, "label_memory": 32}},
    "a higher rate after drift": {"learner": {"drift_action": "learning_rate"}},
    "classes": CLASSES,
    "classes, weighted": {**CLASSES, "learner": {"loss": "class_balanced", "class_weights": "effective"}},
    "classes, two phases": {**CLASSES, "learner": {"loss": "influence_balanced", "influence_after": 130}},
}
BALANCED = {"mixture bmc": "density_bmc_loss", "gaussian bmc": "bmc_loss", "a buffer of one batch": "density_bmc_loss"}


def settings_of(variant: str, **tables: Any) -> Settings:
    return make_settings(**{**VARIANTS[variant], **tables})


def trained(given: Settings, batches: list[Batch], device: torch.device = CPU) -> Learner:
    learner = make_learner(given, device)
    for batch in batches:
        learner.step(batch)
    return learner


def stored(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state as it comes back from a file."""
    return safetensors.torch.load(safetensors.torch.save(state))


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        assert torch.equal(value.nan_to_num(7e7), right[name].nan_to_num(7e7)), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_learner_that_crashed_after_any_batch_goes_on_bit_for_bit(variant: str) -> None:
    given_settings = settings_of(variant)
    batches = make_batches(given_settings, ROWS)
    whole = trained(given_settings, batches)

    @given(st.lists(st.integers(0, len(batches)), min_size=1, max_size=2))
    @settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
    def resumed_after(crashes: list[int]) -> None:
        learner = make_learner(given_settings)
        done = 0
        for crash in [*sorted(crashes), len(batches)]:
            for batch in batches[done:crash]:
                learner.step(batch)
            done = crash
            state = stored(learner.state_dict())
            learner = make_learner(given_settings.model_copy(update={"seed": 99}))
            learner.load_state_dict(state)
        assert_same(learner.state_dict(), whole.state_dict())
        assert_same(learner.inference_state(), whole.inference_state())
        assert learner.read()._replace(newest=[]) == whole.read()._replace(newest=[])
        assert (learner.steps, learner.samples) == (whole.steps, whole.samples)

    resumed_after()


def test_the_same_seed_gives_the_same_learner_and_another_seed_another() -> None:
    given_settings = settings_of("mixture bmc")
    batches = make_batches(given_settings, 4 * 32)
    torch.manual_seed(1)
    first = trained(given_settings, batches).state_dict()
    torch.manual_seed(2)  # torch's own generator has no part in it
    assert_same(trained(given_settings, batches).state_dict(), first)
    other = trained(given_settings.model_copy(update={"seed": 1}), batches).state_dict()
    assert not torch.equal(other["model.head.linear.weight"], first["model.head.linear.weight"])


def test_making_a_learner_leaves_torchs_generator_as_it_was() -> None:
    before = torch.get_rng_state()
    make_learner(settings_of("mixture bmc"))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_state_is_a_copy_that_further_steps_do_not_change() -> None:
    given_settings = settings_of("mixture bmc")
    batches = make_batches(given_settings, 6 * 32)
    learner = trained(given_settings, batches[:4])
    state, model = learner.state_dict(), learner.inference_state()
    kept = copy.deepcopy((state, model))
    for batch in batches[4:]:
        learner.step(batch)
    assert_same(state, kept[0])
    assert_same(model, kept[1])


def test_a_state_of_another_model_is_refused() -> None:
    state = trained(settings_of("mixture bmc"), make_batches(settings_of("mixture bmc"), 64)).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        make_learner(settings_of("mixture bmc", model={"hidden": [13]})).load_state_dict(state)
    state.pop("learner.random")
    with pytest.raises(KeyError, match="random"):
        make_learner(settings_of("mixture bmc")).load_state_dict(state)


def parameters(learner: Learner) -> dict[str, Tensor]:
    """Weights and the optimiser's state, as they are."""
    return {
        name: value for name, value in learner.state_dict().items() if name.startswith(("model.body.", "optimizer."))
    }


def poison_with_nan(learner: Learner) -> None:
    learner.model.body.layers[0].weight.data[0, 0] = torch.nan  # type: ignore[index, union-attr]


def poison_with_huge(learner: Learner) -> None:
    learner.model.head.linear.bias.data.fill_(1e25)  # its square leaves float32


@pytest.mark.parametrize(
    ("variant", "poison"),
    [
        ("mixture bmc", poison_with_nan),
        ("gaussian bmc", poison_with_nan),
        ("gaussian mse", poison_with_nan),
        ("gaussian mse", poison_with_huge),
    ],
)
def test_a_step_that_is_not_finite_changes_neither_weights_nor_optimiser_and_is_counted(
    variant: str, poison: Any
) -> None:
    given_settings = settings_of(variant)
    batches = make_batches(given_settings, 5 * 32)
    learner = trained(given_settings, batches[:4])
    assert learner.read().nonfinite_steps == 0
    loss_before = learner.read().train_loss
    poison(learner)
    before = parameters(learner)
    steps = learner.steps
    learner.step(batches[4])
    assert_same(parameters(learner), before)
    readings = learner.read()
    assert readings.nonfinite_steps == learner.steps - steps == 4  # two of fresh rows, two of replay
    assert readings.train_loss == loss_before


def test_a_healthy_learner_goes_on_after_the_largest_features_and_labels_there_are() -> None:
    given_settings = settings_of("mixture bmc")
    *first, last = make_batches(given_settings, 6 * 32)
    learner = trained(given_settings, first)
    last.numeric[:4] = [[3e38, -3e38], [np.nan, 3e38], [-3e38, 0], [1e-38, 1e38]]
    last.label[:4] = [3e38, -3e38, 1e30, 0]
    for batch in (last, *first):
        learner.step(batch)
    weights = parameters(learner)
    assert all(value.isfinite().all() for value in weights.values())
    assert np.isfinite(learner.read().noise.sigma)


def test_a_batch_without_rows_changes_nothing() -> None:
    given_settings = settings_of("mixture bmc")
    batches = make_batches(given_settings, 3 * 32)
    learner = trained(given_settings, batches)
    before = learner.state_dict()
    empty = Batch(
        np.empty((0, 2), np.float32), np.empty((0, 1), np.int64), np.empty(0), np.empty(0), batches[0].progress
    )
    learner.step(empty)
    assert_same(learner.state_dict(), before)


@pytest.mark.filterwarnings("ignore:a batch of one row without a label memory")
def test_batches_of_one_row_teach_and_are_scored() -> None:
    given_settings = settings_of("mixture bmc", batch={"size": 1})
    learner = trained(given_settings, make_batches(given_settings, 60))
    assert (learner.samples, learner.read().metrics["whole"]["rows"]) == (60, 59)
    assert learner.read().nonfinite_steps == 0


def spied(monkeypatch: pytest.MonkeyPatch, variant: str) -> list[tuple[Tensor, Tensor]]:
    """The labels of each step, and the memory beside them, as the balanced loss is given them from now on."""
    calls: list[tuple[Tensor, Tensor]] = []
    real = getattr(trainer.regression, BALANCED[variant])

    def spy(prediction: Any, target: Tensor, *sigma: Tensor, memory: Tensor, **weight: float) -> Tensor:
        calls.append((target.clone(), memory.clone()))
        loss: Tensor = real(prediction, target, *sigma, memory=memory, **weight)
        return loss

    monkeypatch.setattr(trainer.regression, BALANCED[variant], spy)
    return calls


@pytest.mark.parametrize("variant", BALANCED)
def test_a_steps_own_labels_are_in_the_balanced_loss_exactly_once(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_settings = settings_of(variant)
    calls = spied(monkeypatch, variant)
    learner = make_learner(given_settings)
    for batch in make_batches(given_settings, 8 * 32):
        assert len(set(batch.label)) == len(batch)  # so that a label says which row it is of
        calls.clear()
        learner.step(batch)
        held = learner.model.labels.standardise(learner.replay.label[: len(learner.replay)]).tolist()
        assert len(calls) == 4
        for target, memory in calls:
            own, others = target.tolist(), memory.tolist()
            assert len(set(own)) == len(own) == 16
            assert len(set(others)) == len(others)
            assert not set(own) & set(others)
            assert {*own, *others} <= set(held)
            # All that was drawn from the buffer but the own rows.
            assert len(others) >= min(given_settings.learner.label_memory, len(held)) - len(own)


def test_every_fresh_row_is_trained_on_once_before_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    given_settings = settings_of("mixture bmc")
    calls = spied(monkeypatch, "mixture bmc")
    learner = make_learner(given_settings)
    for batch in make_batches(given_settings, 4 * 32):
        calls.clear()
        learner.step(batch)
        fresh = learner.model.labels.restore(torch.cat([calls[0][0], calls[1][0]]))
        np.testing.assert_allclose(fresh, batch.label, rtol=1e-4, atol=1e-3)


# Adam takes a learning rate from the device only in its fused form, which `meta` does not have.
@pytest.mark.parametrize("variant", [v for v in VARIANTS if "buffer" not in v and "rate" not in v])
def test_a_step_waits_for_the_device_nowhere(variant: str) -> None:
    """On the `meta` device a tensor has no values: whoever asks for one, or leaves one on the CPU, fails."""
    given_settings = settings_of(variant)
    batches = make_batches(given_settings, 3 * 32)
    learner = trained(given_settings, batches, torch.device("meta"))
    assert learner.steps == 3 * 4


def test_there_is_more_replay_while_few_rows_were_seen() -> None:
    given_settings = make_settings(learner={"replay_steps": 1, "replay_warm_up_rows": 320})
    learner, steps = make_learner(given_settings), [0]
    for batch in make_batches(given_settings, 12 * 32):
        learner.step(batch)
        steps.append(learner.steps)
    # Two steps on the fresh rows; then one as many times as 320 rows are times those seen: 10, capped at 8, 5, 3.3, ...
    assert np.diff(steps).tolist() == [2 + n for n in (8, 5, 3, 2, 2, 2, 1, 1, 1, 1, 1, 1)]


def test_replay_by_the_clock_takes_up_to_two_rows_for_each_new_one() -> None:
    given_settings = make_settings(learner={"replay_steps": "auto", "step_rows": 16})
    learner = make_learner(given_settings)
    learner.replay_when_idle()
    assert learner.steps == 0
    for number, batch in enumerate(make_batches(given_settings, 3 * 32), 1):
        learner.step(batch)
        assert learner.steps == 2 * number  # the fresh rows alone
    while learner.may_replay:
        learner.replay_when_idle()
    assert learner.steps == 3 * (2 + 4)
    learner.replay_when_idle()
    assert learner.steps == 3 * (2 + 4)


def test_metrics_count_rows_that_were_predicted_before_they_were_learned() -> None:
    given_settings = settings_of("mixture bmc")
    batches = make_batches(given_settings, ROWS)
    readings = trained(given_settings, batches).read()
    assert readings.metrics["whole"]["rows"] == ROWS - 32  # nothing can be predicted before the first batch
    assert 0 < readings.metrics["whole"]["coverage"] <= 1
    assert readings.noise.label_units > readings.noise.sigma > 0
    labels = np.concatenate([batch.label for batch in batches])[-100:]
    times = np.concatenate([batch.time_s for batch in batches])[-100:]
    assert [(time, label) for time, label, _ in readings.newest] == list(zip(times, labels, strict=True))


def test_what_people_look_at_does_not_keep_whole_batches_in_memory() -> None:
    given_settings = settings_of("mixture bmc").model_copy(update={"batch": BatchSettings(size=1000)})
    learner = trained(given_settings, make_batches(given_settings, 3000))
    kept = [rows.prediction.untyped_storage().nbytes() // 8 for rows in learner._newest]
    assert kept == 2 * [100]
    for rows in learner._newest:
        assert rows.label.base is None
        assert rows.time_s.base is None


def test_predictions_come_from_the_model_before_it_has_seen_the_batch() -> None:
    given_settings = settings_of("mixture bmc")
    batches = make_batches(given_settings, 6 * 32)
    learner, changed = trained(given_settings, batches[:5]), trained(given_settings, batches[:5])
    learner.step(batches[5])
    batches[5].label[:] += 1000
    changed.step(batches[5])
    assert [p for *_, p in changed.read().newest[-32:]] == [p for *_, p in learner.read().newest[-32:]]


def test_a_fresh_learner_is_healthy_until_it_is_clearly_worse_than_the_running_median() -> None:
    given_settings = settings_of("mixture bmc")
    batches = make_batches(given_settings, 40 * 32)
    assert make_learner(given_settings).read().healthy
    learner = trained(given_settings, batches)
    assert learner.read().healthy
    for answer in ("0", "1"):
        readings = learner.read()
        errors = readings.metrics["fading"]
        errors[answer]["mae"] = errors["median"]["mae"] * 1.2
        assert learner.task.is_healthy(errors, readings.noise) == (answer == "1")
        errors[answer]["mae"] = float("nan")
        assert learner.task.is_healthy(errors, readings.noise) == (answer == "1")


@pytest.mark.parametrize("labels", ["noise", "constant"])
def test_a_model_of_what_cannot_be_learned_is_healthy(labels: str) -> None:
    given_settings = settings_of("mixture bmc")
    random = np.random.default_rng(0)
    batches = make_batches(given_settings, 100 * 32)
    for batch in batches:
        batch.label[:] = random.normal(size=len(batch)) if labels == "noise" else 3.0
    assert trained(given_settings, batches).read().healthy


def test_the_median_to_beat_is_that_of_the_labels_before_whatever_lies_far_out() -> None:
    given_settings = settings_of("mixture bmc")
    batches = make_batches(given_settings, 60 * 32)
    batches[3].label[5] = 1e6 * batches[3].label.std()
    median = trained(given_settings, batches).read().metrics["whole"]["median"]
    label = np.concatenate([batch.label for batch in batches])
    medians = [np.median(label[: start + 32]) for start in range(0, len(label) - 32, 32)]
    expected = np.mean([np.abs(b.label - m).mean() for b, m in zip(batches[1:], medians, strict=True)])
    assert median["mae"] == pytest.approx(expected, rel=0.01)


def test_a_network_that_has_gone_astray_is_counted_though_its_rows_are_left_out_of_the_loss() -> None:
    given_settings = settings_of("mixture bmc")
    batches = make_batches(given_settings, 4 * 32)
    learner = trained(given_settings, batches[:3])
    with torch.no_grad():
        learner.model.head.linear.bias.fill_(torch.nan)
    before = learner.read().nonfinite_steps
    learner.step(batches[3])
    assert learner.read().nonfinite_steps - before == 4  # two of fresh rows, two of replayed ones


@pytest.mark.parametrize("features", [{"size": "numeric"}, None])
def test_the_balanced_loss_learns_the_rare_labels(features: dict[str, str] | None) -> None:
    common = {"step_rows": 32, "replay_steps": 2, "replay_rows": 4096, "label_memory": 128, "lr": 5e-3}
    found = {}
    for loss in ("bmc", "mse") if features else ("bmc",):
        model = {"hidden": [24], "head": "mixture" if loss == "bmc" else "gaussian"}
        schema = {"features": features} if features else {}
        learner = {**common, "loss": loss}
        given_settings = make_settings(batch={"size": 64}, learner=learner, model=model, schema=schema)
        found[loss] = trained(given_settings, make_batches(given_settings, 4000)).read().metrics["whole"]
    balanced, natural = found["bmc"]["1"], found["bmc"]["0"]
    if features:  # by the size alone a rare row is one of many ordinary ones, and plain regression leaves it
        assert balanced["balanced_mae"] < 0.97 * found["mse"]["0"]["balanced_mae"]
    else:
        assert balanced["balanced_mae"] < 0.5 * found["bmc"]["median"]["balanced_mae"]
        assert natural["mae"] < 0.5 * found["bmc"]["median"]["mae"]


def test_a_feature_that_was_never_missing_is_answered_as_its_mean_and_one_that_was_is_learned() -> None:
    given = make_settings()
    batches = make_batches(given, ROWS)
    complete = [replace(batch, numeric=np.nan_to_num(batch.numeric, nan=20.0)) for batch in batches]
    for taught, same in ((complete, True), (batches, False)):
        model = trained(given, taught).task.model
        model.eval()
        numeric, categorical = (torch.from_numpy(part) for part in (taught[-1].numeric, taught[-1].categorical))
        absent, mean = numeric.clone(), numeric.clone()
        absent[:, 1], mean[:, 1] = torch.nan, float(model.features.mean[1])
        answers = [model(columns, categorical).location for columns in (absent, mean)]
        assert torch.allclose(*answers, atol=1e-5) == same
