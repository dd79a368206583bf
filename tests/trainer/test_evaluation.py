import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from typer import Typer
from typer.testing import CliRunner

from tests.trainer.stream import CPU, make_batches, make_settings
from trainer.cli_evaluate import _figure, evaluate
from trainer.config import Settings
from trainer.evaluation import balanced_mae, constant_balanced_mae, error_by_region, for_loss, run
from trainer.learner import Learner
from trainer.schema import FeatureSchema


def schema_of(given: Settings) -> FeatureSchema:
    return FeatureSchema.of(given)


def test_metrics_are_those_of_the_definitions() -> None:
    random = np.random.default_rng(0)
    label = random.exponential(10, 3000)
    error = np.abs(random.normal(size=3000))
    edges = np.linspace(label.min(), label.max(), 51)
    means = []
    for low, high in itertools.pairwise(edges):
        inside = (label >= low) & ((label < high) | (high == edges[-1]))
        if inside.sum() >= 10:
            means.append(error[inside].mean())
    assert balanced_mae(label, error) == pytest.approx(np.mean(means))


def test_no_constant_answer_beats_the_best_one() -> None:
    label = np.random.default_rng(1).exponential(10, 2000)
    best = constant_balanced_mae(label)
    others = [balanced_mae(label, np.abs(label - constant)) for constant in np.linspace(0, label.max(), 400)]
    assert best == pytest.approx(min(others), rel=1e-3)
    assert best <= min(others) + 1e-9


def test_regions_with_few_rows_say_nothing() -> None:
    label = np.array([0.0] * 20 + [5.0] * 9 + [10.0] * 30)
    middles, error, rows = error_by_region(label, label + 1, 10)
    assert (middles.tolist(), error.tolist(), rows.tolist()) == ([0.5, 9.5], [1.0, 11.0], [20.0, 30.0])


def test_an_evaluation_sees_what_the_trainers_own_metrics_see() -> None:
    given = make_settings()
    batches = make_batches(given, 40 * 32)
    seen: list[int] = []
    answers = run(given, schema_of(given), batches, [0.0, 1.0], CPU, seen.append)
    learner = Learner(given, schema_of(given), CPU)
    for batch in batches:
        learner.step(batch)
    whole = learner.read().metrics["whole"]
    assert sum(seen) == 40 * 32
    for balance in (0.0, 1.0):
        found = answers.summary(balance)
        assert found["mae"] == pytest.approx(whole[f"{balance:g}"]["mae"])
        assert found["log_score"] == pytest.approx(whole["log_score"], rel=1e-5)
    assert np.isfinite(answers.mean[0.5] if 0.5 in answers.mean else answers.mean[0.0]).all()


def test_a_plain_loss_is_compared_by_what_its_network_says() -> None:
    given = for_loss(make_settings(), "mse")
    batches = make_batches(given, 40 * 32)
    answers = run(given, schema_of(given), batches, [0.0], CPU, lambda rows: None)
    learner = Learner(given, schema_of(given), CPU)
    locations = []
    for batch in batches:
        result = learner.step(batch)
        if result is not None:
            components = result.density.components
            located = components.means[:, 0].double() * components.label_sd + components.label_mean
            locations.append(located.clamp(result.density.grid.edges[0], result.density.grid.edges[-1]))
    np.testing.assert_allclose(answers.median[0.0], np.concatenate(locations))
    np.testing.assert_array_equal(answers.median[0.0], answers.mean[0.0])


@pytest.mark.parametrize(("loss", "head"), [("mse", "gaussian"), ("nll", "mixture"), ("bmc", "mixture")])
def test_a_compared_loss_gets_the_head_it_needs(loss: str, head: str) -> None:
    changed = for_loss(make_settings(), loss)
    assert (changed.learner.loss, changed.model.head) == (loss, head)


CONFIG = """\
[kafka]
bootstrap_servers = ["127.0.0.1:9092"]
topic = "prices"
[schema]
label = "price"
features = { size = "numeric" }
[batch]
size = 32
[learner]
replay_rows = 64
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    random = np.random.default_rng(0)
    data, config = tmp_path / "prices.jsonl", tmp_path / "prices.toml"
    size = random.exponential(1, 400)
    records = [
        {"size": float(s), "price": float(10 * s + e)} for s, e in zip(size, random.normal(size=400), strict=True)
    ]
    data.write_text("".join(json.dumps(record) + "\n" for record in [*records, {"size": 1}]))
    config.write_text(CONFIG)
    return data, config


def invoke(*arguments: str) -> tuple[int, str]:
    app = Typer()
    app.command()(evaluate)
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


def test_the_command_compares_losses_over_seeds_and_draws(files: tuple[Path, Path], tmp_path: Path) -> None:
    data, config = map(str, files)
    out, plot = tmp_path / "runs.json", tmp_path / "errors.png"
    code, said = invoke(
        *(data, "--config", config, "--compare", "bmc,mse", "--balance", "0,1", "--seeds", "2"),
        *("--set", "learner.lr=1e-3", "--json", str(out), "--plot", str(plot)),
    )
    assert code == 0, said
    assert "1 records cannot be learned from, the first is number 400" in said
    found = json.loads(out.read_text())
    assert [(r["loss"], r["seed"], r["balance"]) for r in found["runs"]] == [
        (loss, seed, balance) for loss in ("bmc", "mse") for seed in (0, 1) for balance in (0.0, 1.0)
    ]
    assert found["rows_per_second"] > 0
    figures = "mae rmse balanced_mae mae_top_1_percent mae_top_5_percent log_score coverage_second_half"
    for run_ in found["runs"]:
        assert set(run_) == {"loss", "seed", "balance", "constant_balanced_mae", *figures.split()}
        assert all(np.isfinite(run_[name]) for name in figures.split())
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "-"), (0.87654, "0.8765"), (-12.5, "-12.5"), (76_240.4, "76,240"), (3e12, "3e+12")]
)
def test_figures_are_short_without_an_exponent(value: float | None, shown: str) -> None:
    assert _figure(value) == shown


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--set", "learner.lr", "give KEY=VALUE"),
        ("--set", "learner.rate=1", "learner.rate: unknown key"),
        ("--compare", "bmc,mean", "there is no loss 'mean'"),
        ("--balance", "2", "between 0"),
        ("--balance", "a", "give numbers"),
    ],
)
def test_options_that_cannot_be_used_say_why(files: tuple[Path, Path], option: str, value: str, message: str) -> None:
    code, said = invoke(str(files[0]), "--config", str(files[1]), option, value)
    assert code == 2
    assert message in said
