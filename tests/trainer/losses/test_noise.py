import pytest
import torch

from trainer.losses import NoiseSigma


def test_a_learned_sigma_is_the_only_parameter_and_stays_inside_its_bounds() -> None:
    noise = NoiseSigma("learned")
    assert [name for name, _ in noise.named_parameters()] == ["sigma"]
    assert noise.value().item() == pytest.approx(0.3)
    optimizer = torch.optim.SGD(noise.parameters(), lr=1.0)
    for direction, bound in ((1.0, 0.05), (-1.0, 1.0), (1.0, 0.05)):
        for _ in range(3):
            optimizer.zero_grad()
            (direction * noise.value()).backward()
            optimizer.step()
        assert noise.value().item() == pytest.approx(bound)
    # Past a bound the gradient that leads on is dropped, so the way back is one step, not as many as led out.
    assert -1.1 < noise.sigma.item() <= 0.05


def test_a_fixed_sigma_is_what_it_was_set_to() -> None:
    noise = NoiseSigma("fixed", 8.0, unit="label")
    assert noise.value().item() == 8.0
    assert not list(noise.parameters())
    noise.rescale(1 / 40)
    assert noise.value().item() == pytest.approx(0.2)
    share = NoiseSigma("fixed", 0.2)
    share.rescale(1 / 40)
    assert share.value().item() == pytest.approx(0.2)


@pytest.mark.parametrize("mode", ["learned", "adaptive"])
def test_a_change_of_the_labels_sd_keeps_sigma_in_label_units(mode: str) -> None:
    noise = NoiseSigma(mode, 0.3)  # type: ignore[arg-type]
    noise.rescale(torch.tensor(10.0) / torch.tensor(5.0))
    assert noise.value().item() * 5.0 == pytest.approx(0.3 * 10.0)
    noise.observe(torch.zeros(0))
    assert noise.value().item() == pytest.approx(0.6)


def test_an_adaptive_sigma_follows_a_share_of_the_residual() -> None:
    noise = NoiseSigma("adaptive", 0.3, share=0.5, decay=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        residuals = 0.8 * torch.randn(500, generator=generator)
        residuals[::7] = torch.nan
        noise.observe(residuals)
    assert noise.value().item() == pytest.approx(0.4, rel=0.05)
    for _ in range(200):
        noise.observe(torch.full((10,), 100.0))
    assert noise.value().item() == pytest.approx(1.0)
    before = noise.value().item()
    noise.observe(torch.full((3,), torch.nan))
    assert noise.value().item() == before


@pytest.mark.parametrize("mode", ["fixed", "learned", "adaptive"])
def test_state_goes_round(mode: str) -> None:
    noise = NoiseSigma(mode, 0.4)  # type: ignore[arg-type]
    noise.observe(torch.full((5,), 1.7))
    other = NoiseSigma(mode, 0.2)  # type: ignore[arg-type]
    other.load_state_dict(noise.state_dict())
    assert torch.equal(other.value(), noise.value())
    for each in (noise, other):
        each.observe(torch.full((5,), 0.3))
    assert torch.equal(other.value(), noise.value())


@pytest.mark.parametrize(
    "wrong",
    [{"mode": "guess"}, {"initial": 0.0}, {"bounds": (1.0, 0.5)}, {"share": 1.5}, {"unit": "m"}, {"decay": 1.0}],
)
def test_values_outside_their_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(wrong.values()))).replace("(", ".").replace(")", ".")):
        NoiseSigma(**wrong)  # type: ignore[arg-type]
