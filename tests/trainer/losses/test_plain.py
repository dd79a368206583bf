import pytest
import torch
import torch.nn.functional as F

from trainer.losses import LOSSES, huber_loss, l1_loss, loss_named, mse_loss

PAIRS = [(mse_loss, F.mse_loss), (l1_loss, F.l1_loss), (huber_loss, F.huber_loss)]


@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_losses_are_torchs(ours, torchs) -> None:
    pred, target = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)) * 2
    torch.testing.assert_close(ours(pred[:, None], target), torchs(pred, target))
    weights = torch.linspace(0, 1, 50)
    right = (weights * torchs(pred, target, reduction="none")).mean()
    torch.testing.assert_close(ours(pred, target, weights=weights), right)
    square = pred.view(25, 2), target.view(25, 2)
    torch.testing.assert_close(ours(*square, reduction="none"), torchs(*square, reduction="none").sum(1))


@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_left_out(ours, torchs, bad: float) -> None:
    pred, target = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    right = torchs(pred[2:], target[2:])
    pred[0], target[0], target[1] = bad, bad, bad
    pred.requires_grad_()
    loss = ours(pred, target, weights=torch.where(torch.arange(50) < 2, torch.nan, 1.0))
    loss.backward()
    torch.testing.assert_close(loss.detach(), right)
    assert torch.equal(pred.grad[:2], torch.zeros(2))
    assert bool(pred.grad.isfinite().all())


def test_losses_are_known_by_name() -> None:
    assert loss_named("mse").function is mse_loss
    assert {name for name, entry in LOSSES.items() if entry.task == "regression"} == {
        "bmc", "nll", "gai", "bni", "mse", "l1", "huber",
    }  # fmt: skip
    assert {name for name, entry in LOSSES.items() if entry.task == "classification"} == {
        "cross_entropy", "logit_adjusted", "influence_balanced", "focal", "class_balanced",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"no loss 'msee'.*mse"):
        loss_named("msee")
