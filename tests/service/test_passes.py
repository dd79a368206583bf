"""How rows go through a network is found out by trying: whatever the network is, an answer is that of its row alone."""

import sys
from pathlib import Path

import pytest
import structlog
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from service import passes
from service.answers import Asked
from service.passes import CHOICES, Passes, passes_of
from service.predictor import Predictor, Question
from tests.service.store import columns_of, fitted, in_process, make_settings, write_snapshot
from trainer.model import frozen
from trainer.schema import Columns, FeatureSchema

# Bodies whose rows differ by what is beside them, as matrix kernels' do, but by more than their last bits.
BODIES = {
    Passes(16): "",
    Passes(64): "    if len(hidden) % 64: hidden = hidden * 1.001",
    Passes(256): "    if len(hidden) % 256: hidden = hidden * 1.001",
    Passes(64, 64): "    if len(hidden) != 64: hidden = hidden * (1 + 1e-4 * len(hidden))",
    Passes(16, 16): "    hidden = torch.cat([hidden[:16], hidden[16:] * 1.001])",
    Passes(16, 1): "    hidden = hidden + hidden.mean(0)",
}
BODY = """\
import torch
from torch import nn
class Body(nn.Module):
    out_features = 5
    def __init__(self, schema):
        super().__init__()
        self.layer = nn.Linear(schema.numeric_width, 5)
    def forward(self, numeric, categorical):
        return beside(self.layer(numeric))
def beside(hidden):
{lines}
    return hidden
def make_body(schema):
    return Body(schema)
"""


@pytest.fixture
def predictor(expected: Passes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Predictor:
    """Of a body whose rows depend on the others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "odd_bodies", raising=False)
    monkeypatch.setattr(passes, "_known", {})
    (tmp_path / "odd_bodies.py").write_text(BODY.format(lines=BODIES[expected]))
    settings = make_settings(tmp_path / "store")
    settings = settings.model_copy(
        update={"model": settings.model.model_copy(update={"body": "odd_bodies:make_body", "head": "gaussian"})}
    )
    return in_process(settings, write_snapshot(settings).version)


@pytest.mark.parametrize("expected", CHOICES, ids=str)
def test_the_fastest_that_makes_rows_independent_is_found(
    predictor: Predictor, expected: Passes, tmp_path: Path
) -> None:
    assert predictor._answering.passes == expected
    columns = columns_of(make_settings(tmp_path / "store"), 200)
    for asked in (Asked(0.5), Asked(0.2, 0.9)):
        together = predictor.answer([Question(columns, asked)])[0]
        for row in (0, 1, 63, 64, 199):
            one = Question(Columns(columns.numeric[row : row + 1], columns.categorical[row : row + 1]), asked)
            mixed = predictor.answer([one, Question(columns, Asked(0.7)), one])
            assert mixed[0] == mixed[2] == predictor.answer([one])[0]
            assert mixed[0].predictions[0] == together.predictions[row]


@pytest.mark.parametrize("expected", [Passes(16), Passes(64, 64)], ids=str)
def test_it_is_said_and_not_looked_for_again(predictor: Predictor, expected: Passes, tmp_path: Path) -> None:
    model = predictor._answering.model  # type: ignore[attr-defined]
    passes._known.clear()
    with structlog.testing.capture_logs() as logs:
        assert passes_of(model, (64,)) == passes_of(model, (64,)) == expected
    (entry,) = logs
    assert entry["log_level"] == ("info" if expected == CHOICES[0] else "warning")
    assert entry["rows_multiple"] == expected.multiple


@hypothesis_settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(hidden=st.lists(st.integers(1, 200), min_size=1, max_size=2).map(tuple), rows=st.integers(1, 300))
def test_networks_of_any_width_answer_a_row_alike_in_any_batch(hidden: tuple[int, ...], rows: int) -> None:
    """By what is found on this very machine."""
    settings = make_settings(Path("nowhere"), hidden=hidden)
    model = frozen(fitted(settings, 0)[0])
    found = passes_of(model, FeatureSchema.of(settings).buckets)
    columns = columns_of(settings, 40)
    numeric, categorical = torch.from_numpy(columns.numeric), torch.from_numpy(columns.categorical)

    @torch.inference_mode()
    def means(index: torch.Tensor) -> torch.Tensor:
        filled = torch.zeros(found.padded(len(index)), dtype=torch.int64)
        filled[: len(index)] = index
        said: torch.Tensor = found.run(model, numeric[filled], categorical[filled]).means
        return said[: len(index)]

    together = means(torch.arange(rows) % 40)
    for row in {0, rows // 2, rows - 1}:
        assert torch.equal(together[row : row + 1], means(torch.tensor([row % 40])))
