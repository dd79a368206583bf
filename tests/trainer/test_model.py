import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.trainer.stream import make_batches, make_schema, make_settings
from trainer.calibration import LevelCalibration
from trainer.config import Settings
from trainer.label_density import LabelDensity
from trainer.model import (
    TRAINING_REACH,
    FeatureScaler,
    LabelScaler,
    Model,
    build_model,
    inference_state,
    load_inference,
    prefixed,
    unprefixed,
)

HEADS: dict[str, dict[str, Any]] = {
    "mixture": {},
    "learned sigma": {"model": {"head": "gaussian"}},
    "adaptive sigma": {"model": {"head": "gaussian"}, "learner": {"sigma": "adaptive"}},
    "sigma in label units": {"model": {"head": "gaussian"}, "learner": {"sigma": {"label_units": 8.0}}},
}


def build(given: Settings, seed: int = 0) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(make_schema(given), given.model, given.learner)


def inputs(given: Settings, rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    given = given.model_copy(update={"batch": given.batch.model_copy(update={"size": rows})})
    (batch,) = make_batches(given, rows, seed)
    return torch.from_numpy(batch.numeric), torch.from_numpy(batch.categorical), torch.from_numpy(batch.label)


@st.composite
def columns(draw: st.DrawFn) -> tuple[np.ndarray, list[slice], float]:
    """Rows of four columns with missing values, on a large offset perhaps, and how they are split into batches."""
    rows = draw(st.integers(1, 40))
    random = np.random.default_rng(draw(st.integers(0, 999)))
    offset = draw(st.sampled_from([0.0, 1.0, -1e4, 3e6]))
    values = (random.normal(size=(rows, 4)) * [1, 10, 0, 1e-2] + offset).astype(np.float32)
    values[random.random(values.shape) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = np.nan
    cuts = sorted(draw(st.lists(st.integers(1, rows), max_size=5, unique=True)))
    edges = sorted({0, *cuts, rows})
    return values, [slice(a, b) for a, b in itertools.pairwise(edges)], offset


@given(columns())
@settings(max_examples=100, deadline=None)
def test_feature_statistics_are_those_of_all_rows_however_they_came(
    drawn: tuple[np.ndarray, list[slice], float],
) -> None:
    values, parts, offset = drawn
    scaler = FeatureScaler(4)
    for part in parts:
        scaler.observe(torch.from_numpy(values[part]))
    for column in range(4):
        known = values[:, column][~np.isnan(values[:, column])].astype(np.float64)
        assert scaler.count[column] == len(known)
        if len(known):
            assert scaler.mean[column].item() == pytest.approx(known.mean(), rel=1e-12, abs=1e-9)
            tolerance = 1e-12 * max(1.0, offset**2) * len(known)
            assert scaler.squares[column].item() == pytest.approx(known.var() * len(known), rel=1e-6, abs=tolerance)
            assert (scaler.low[column], scaler.high[column]) == (known.min(), known.max())
        else:
            assert (scaler.mean[column], scaler.squares[column]) == (0, 0)


def test_features_are_standardised_and_missing_ones_marked() -> None:
    random = np.random.default_rng(0)
    values = (random.normal(size=(500, 3)) * [2, 300, 0] + [5, -1e6, 7]).astype(np.float32)
    values[::7, 0] = np.nan
    scaler = FeatureScaler(3)
    scaler.observe(torch.from_numpy(values))
    out = scaler.train()(torch.from_numpy(values))
    assert (out.shape, out.dtype) == ((500, 6), torch.float32)
    known = ~np.isnan(values)
    expected = (values - np.nanmean(values.astype(np.float64), 0)) / np.where(
        np.nanstd(values.astype(np.float64), 0) > 0, np.nanstd(values.astype(np.float64), 0), 1
    )
    np.testing.assert_allclose(out[:, :3], np.where(known, expected, 0), atol=1e-5)
    np.testing.assert_array_equal(out[:, 3:], ~known)


def test_a_value_beyond_the_range_is_let_in_over_some_batches() -> None:
    scaler = FeatureScaler(2)
    scaler.observe(torch.tensor([[2022.0, torch.nan], [2023.0, torch.nan]]))
    scaler.observe(torch.tensor([[2024.0, -5.0]]))
    held = [scaler.learned_high[0].item()]
    for _ in range(50):
        scaler.observe(torch.tensor([[2023.0, torch.nan]]))
        held.append(scaler.learned_high[0].item())
    assert held[:2] == pytest.approx([2023.1, 2023.19])
    assert held[-1] == pytest.approx(2024, abs=0.01)
    assert scaler.learned_low.tolist() == [2022, -5]
    assert scaler.high.tolist() == [2024, -5]
    answers = scaler.eval()(torch.tensor([[2024.0, 0.0], [held[-1], -5.0]]))
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-4, atol=0)  # bounds are float64, values float32


def test_a_prediction_is_held_to_the_range_trained_on_and_training_is_not() -> None:
    scaler = FeatureScaler(1)
    scaler.observe(torch.tensor([[-1.0], [0.0], [1.0], [4.0]]))
    beyond, ends = torch.tensor([[-9.0], [30.0], [torch.nan]]), torch.tensor([[-1.0], [4.0], [torch.nan]])
    predicting = scaler.eval()(beyond)
    assert torch.equal(predicting, scaler(ends))
    training = scaler.train()(beyond)
    assert training[0, 0] < predicting[0, 0]
    assert training[1, 0] > predicting[1, 0]
    assert training[2].tolist() == [0.0, 1.0]
    far = scaler.train()(torch.tensor([[-3e38], [3e38]]))[:, 0]
    assert far.tolist() == [-TRAINING_REACH, TRAINING_REACH]


def test_a_column_that_was_always_missing_gives_zeros_also_at_prediction() -> None:
    scaler = FeatureScaler(1)
    scaler.observe(torch.full((3, 1), torch.nan))
    for mode in (True, False):
        out = scaler.train(mode)(torch.tensor([[torch.nan], [5.0]]))
        assert out[0].tolist() == [0.0, 1.0]
        assert out.isfinite().all()


@given(
    st.integers(1, 60), st.sampled_from([0.0, 1e6, -1e9]), st.lists(st.integers(1, 60), max_size=5), st.integers(0, 99)
)
@settings(max_examples=80, deadline=None)
def test_label_statistics_are_those_of_all_labels_however_they_came(
    rows: int, offset: float, cuts: list[int], seed: int
) -> None:
    labels = np.random.default_rng(seed).normal(size=rows) * 3 + offset
    scaler = LabelScaler()
    edges = sorted({0, rows, *(cut for cut in cuts if cut < rows)})
    for start, end in itertools.pairwise(edges):
        scaler.observe(torch.from_numpy(labels[start:end]))
    assert scaler.mean.item() == pytest.approx(labels.mean(), rel=1e-12, abs=1e-9)
    assert scaler.sd.item() == pytest.approx(labels.std() if rows > 1 else 1.0, rel=1e-5)
    back = scaler.restore(scaler.standardise(torch.from_numpy(labels)))
    np.testing.assert_allclose(back, labels, rtol=1e-7, atol=1e-5)


def test_equal_labels_have_a_standard_deviation_to_divide_by() -> None:
    scaler = LabelScaler()
    assert (scaler.mean, scaler.sd) == (0, 1)
    scaler.observe(torch.full((4,), 7.0))
    assert (scaler.mean, scaler.sd) == (7, 1)


@pytest.mark.parametrize("variant", HEADS)
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 500.0), (30.0, 0.0), (0.01, -3.0), (1e4, 1e6)])
def test_predictions_and_noise_in_label_units_stay_when_the_label_scaling_moves(
    variant: str, scale: float, shift: float
) -> None:
    given_settings = make_settings(**HEADS[variant])
    model = build(given_settings).eval()
    numeric, categorical, label = inputs(given_settings, 64)
    ratio, _ = model.observe(numeric, label)
    model.head.begin(ratio)

    def answers() -> tuple[Tensor, Tensor, Tensor]:
        density = model.components(model(numeric, categorical))
        means = density.means.double() * density.label_sd + density.label_mean
        return means, density.scales.double() * density.label_sd, model.head.sigma().double() * model.labels.sd

    with torch.no_grad():
        before = answers()
        # Only the labels move: features have scaling of their own, which nothing makes up for.
        features = {name: value.clone() for name, value in model.features.state_dict().items()}
        model.head.rescale(*model.observe(numeric, label * scale + shift))
        model.features.load_state_dict(features)
        after = answers()
    sd = float(model.labels.sd)
    torch.testing.assert_close(after[0], before[0], rtol=1e-5, atol=1e-5 * max(sd, 1e-2 * abs(shift)))
    within = (after[1] > 0.021 * sd) & (after[1] < 1.49 * sd)  # a component's scale keeps to its bounds
    if variant in ("mixture", "sigma in label units"):
        torch.testing.assert_close(after[1][within], before[1][within], rtol=1e-4, atol=0)
        torch.testing.assert_close(after[2], before[2], rtol=1e-5, atol=0)
    elif 0.051 * sd < before[2] < 0.99 * sd:
        torch.testing.assert_close(after[2], before[2], rtol=1e-5, atol=0)


def test_a_sigma_in_label_units_is_that_from_the_first_batch_on() -> None:
    given_settings = make_settings(**HEADS["sigma in label units"])
    model = build(given_settings)
    numeric, _, label = inputs(given_settings, 64)
    ratio, _ = model.observe(numeric, label)
    model.head.begin(ratio)
    assert float(model.head.sigma() * model.labels.sd) == pytest.approx(8.0, rel=1e-6)


@pytest.mark.parametrize("variant", HEADS)
def test_what_predicting_needs_is_all_that_a_reader_has_to_load(variant: str) -> None:
    given_settings = make_settings(**HEADS[variant])
    model, other = build(given_settings, 0), build(given_settings, 1)
    numeric, categorical, label = inputs(given_settings, 64)
    model.observe(numeric, label)
    density = LabelDensity()
    density.observe(label)
    calibration, read = LevelCalibration(), LevelCalibration()
    calibration.observe(torch.rand(64))
    state = inference_state(model, density.grid(), calibration)
    grid = load_inference(state, other, read)
    assert torch.equal(grid.log_density, density.grid().log_density)
    assert torch.equal(read.counts, calibration.counts)
    for left, right in zip(model.eval()(numeric, categorical), other.eval()(numeric, categorical), strict=True):
        assert torch.equal(left, right)
    with pytest.raises(RuntimeError):
        load_inference(state, build(make_settings(model={"hidden": [13]})), read)


def test_names_of_parts_are_put_before_and_taken_off_again() -> None:
    state = {**prefixed("model", {"a.b": torch.zeros(1)}), **prefixed("models", {"a": torch.ones(1)})}
    assert list(unprefixed("model", state)) == ["a.b"]
    assert list(unprefixed("models", state)) == ["a"]


@pytest.mark.parametrize("features", [{"kind": "categorical"}, {"size": "numeric"}])
def test_a_body_of_one_kind_of_feature_alone_works(features: dict[str, str]) -> None:
    given_settings = make_settings()
    given_settings = given_settings.model_copy(
        update={"record_schema": given_settings.record_schema.model_validate({"label": "price", "features": features})}
    )
    schema = make_schema(given_settings)
    model = build(given_settings)
    row = schema.decode(b'{"price": 1, "size": 2, "kind": "a"}')
    mixture = model(torch.from_numpy(schema.numeric([row])), torch.from_numpy(schema.categorical([row])))
    assert mixture.location.shape == (1,)


def test_equal_buckets_of_two_features_are_two_embeddings() -> None:
    features = {"a": {"kind": "categorical", "buckets": 3}, "b": {"kind": "categorical", "buckets": 5}}
    given_settings = make_settings()
    given_settings = given_settings.model_copy(
        update={"record_schema": given_settings.record_schema.model_validate({"label": "y", "features": features})}
    )
    body: Any = build(given_settings).body
    assert body.embedding.num_embeddings == 8
    seen: list[Tensor] = []
    body.embedding.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    body(torch.empty(2, 0), torch.tensor([[0, 0], [2, 4]]))
    assert seen[0].tolist() == [[0, 3], [2, 7]]
