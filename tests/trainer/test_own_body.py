"""A body of the user's own: the README's example from a file to an answer, and whatever can be wrong with one."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from service.cli import app
from service.predictor import load_predictor
from tests.readme_tables import README
from tests.trainer.stream import make_batches, make_learner, make_manifest, make_schema, make_settings, values
from trainer.calibration import LevelCalibration
from trainer.config import Settings
from trainer.errors import ConfigError, SnapshotMismatch
from trainer.model import build_model, load_inference
from trainer.own_body import own_body
from trainer.predictive import predict
from trainer.snapshot import SnapshotStore

(EXAMPLE,) = [
    block for block in re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S) if "def make_body" in block
]
BODY = """\
import torch
from torch import nn
class Body(nn.Module):
    out_features = 5
    def __init__(self, schema):
        super().__init__()
        self.layer = nn.Linear(schema.numeric_width, 5)
        self.embedding = nn.Embedding(schema.buckets[0], 5)
    def forward(self, numeric, categorical):
        return self.layer(numeric) + self.embedding(categorical[:, 0])
def make_body(schema):
    return Body(schema)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module `my_bodies` to write, which no other test has imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_bodies", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


def with_body(name: str = "my_bodies:make_body", **tables: Any) -> Settings:
    return make_settings(model={"body": name}, **tables)


def build(given: Settings) -> None:
    build_model(make_schema(given), given.model, given.learner)


def test_the_example_of_the_readme_learns_and_answers(folder: Path) -> None:
    (folder / "my_bodies.py").write_text(EXAMPLE)
    (folder / "prices.jsonl").write_bytes(b"\n".join(values(600)))
    initialised = CliRunner().invoke(app, ["init", "prices.jsonl", "--label", "price"])
    assert initialised.exit_code == 0, initialised.output
    chosen = ["--set", "model.body=my_bodies:make_body", "--set", "batch.size=32"]
    done = CliRunner().invoke(app, ["evaluate", "prices.jsonl", "--config", "tailstream.toml", *chosen])
    assert done.exit_code == 0, done.output
    assert "Prequential errors" in done.output


def test_a_service_loads_the_readmes_example_from_a_snapshot_and_answers_as_the_learner_would(folder: Path) -> None:
    (folder / "my_bodies.py").write_text(EXAMPLE)
    given = with_body(store=folder / "store")
    learner = make_learner(given)
    for batch in make_batches(given, 640):
        learner.step(batch)
    store = SnapshotStore(given.store.path)
    store.storage.path.mkdir()
    written = store.write(make_manifest(given), learner.inference_state(), learner.state_dict())

    resumed = make_learner(given)
    resumed.load_state_dict(store.load(written.version, training=True).training)
    for batch in make_batches(given, 64, seed=1):
        learner.step(batch)
        resumed.step(batch)
    for left, right in zip(learner.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(left, right)

    schema = make_schema(given)
    rows = [schema.decode_instance(value) for value in values(64, seed=2)]
    model = build_model(schema, given.model, given.learner).eval()
    grid = load_inference(store.load(written.version, training=False).model, model, LevelCalibration())
    density = model.components(
        model(torch.from_numpy(schema.numeric(rows)), torch.from_numpy(schema.categorical(rows)))
    )
    expected = predict(density, grid, learned_prior="uniform", balance=0.5).point
    predictor = load_predictor(store, written.version, given)
    assert type(model.body).__name__ == "ResidualBody"
    torch.testing.assert_close(predictor.predict(rows, balance=0.5).point, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(SnapshotMismatch, match=r"model\.body: the store has 'my_bodies:make_body'"):
        load_predictor(store, written.version, make_settings(store=folder / "store"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("return Body(schema)", "return 3"), "'my_bodies:make_body' returned int, not a torch.nn.Module"),
        (("return Body(schema)", "raise KeyError('w')"), r"raised KeyError: 'w' \(.*my_bodies.py, line 12\)"),
        (("Linear(schema.numeric_width", "Linear(3.5"), r"raised TypeError: .* \(.*my_bodies.py, line 7\)"),
        (("    out_features = 5\n", ""), "made Body, which has no integer out_features"),
        (
            ("out_features = 5", "out_features = 6"),
            r"returned \(1, 5\) torch.float32 in training.*; as its out_features is 6",
        ),
        (
            ("return self.layer", "return self.layers"),
            r"raised AttributeError: .* \(.*line 10\) in training, given numeric",
        ),
        (("numeric) +", "numeric[:, :2]) +"), r"raised RuntimeError: mat1 and mat2 .*line 10\)"),
        (("Embedding(schema.buckets[0]", "Embedding(7"), r"raised IndexError: index out of range .*line 10\)"),
        (("categorical[:, 0])", "categorical[:, 0]).double()"), r"returned \(1, 5\) torch.float64"),
        (("return self.layer(numeric)", "return None and (0)"), "returned NoneType, not a tensor"),
        (
            ("return self.layer(numeric)", "return nn.BatchNorm1d(5)(self.layer(numeric))"),
            "more than 1 value per channel",
        ),
        (("self.layer = nn.Linear", "self.lock = iter(()); self.layer = nn.Linear"), None),
        (("self.layer = nn.Linear", "self.g = (i for i in ()); self.layer = nn.Linear"), "cannot be copied"),
        (("numeric_width, 5)", "numeric_width, 5).double()"), "parameter 'layer.weight' is torch.float64"),
        (
            ("import torch\n", "import torch, no_such_module\n"),
            r"'my_bodies' cannot be imported: .*'no_such_module' \(.*line 1\)",
        ),
        (
            ("import torch\n", "import torch +\n"),
            r"'my_bodies' cannot be imported: SyntaxError: .*my_bodies.py, line 1",
        ),
        (("def make_body", "def make_boddy"), r"my_bodies.py has no function 'make_body'"),
    ],
)
def test_what_is_wrong_with_a_body_is_said_under_its_key(
    folder: Path, change: tuple[str, str], message: str | None
) -> None:
    assert BODY.count(change[0]) == 1
    (folder / "my_bodies.py").write_text(BODY.replace(*change))
    if message is None:
        build(with_body())
        return
    with pytest.raises(ConfigError, match=message) as caught:
        build(with_body())
    assert str(caught.value).startswith("model.body: ")


def test_a_module_that_is_nowhere_is_said_with_where_it_was_looked_for(folder: Path) -> None:
    for name in ("no_such_module:own", "no_such_module.inside:own"):
        with pytest.raises(ConfigError, match=f"model.body: there is no module 'no_such_module', neither in {folder}"):
            build(with_body(name))


def test_trying_a_body_changes_neither_it_nor_what_is_drawn_after_it(folder: Path) -> None:
    counting = BODY.replace("self.layer(numeric)", "self.count() + torch.rand(5) + self.layer(numeric)")
    counting = counting.replace(
        "def forward", "def count(self):\n        self.calls += 1\n        return 0\n    def forward"
    )
    counting = counting.replace("self.layer =", "self.register_buffer('calls', torch.zeros(())); self.layer =")
    (folder / "my_bodies.py").write_text(counting)
    schema = make_schema(with_body())
    torch.manual_seed(3)
    tried: Any = own_body("my_bodies:make_body", schema)
    after_trying = torch.rand(3)
    torch.manual_seed(3)
    made = sys.modules["my_bodies"].make_body(schema)
    assert torch.equal(after_trying, torch.rand(3))
    assert torch.equal(tried.layer.weight, made.layer.weight)
    assert (tried.calls, tried.training) == (0, True)
