"""The synthetic benchmark of Balanced MSE: python -m tests.benchmarks.synthetic

After Ren et al., CVPR 2022 (arXiv 2203.16427). One-dimensional labels from a normal or an exponential distribution on
[0, 10], or two-dimensional normal ones; x = y - e with noise e ~ N(0, 1); a linear model trained by SGD, then tested on
uniform labels without noise, where the right answer is y = x.

What the paper leaves open is as in its authors' code: the noise is drawn once; weights start as those of `nn.Linear`
do; the cosine is stepped once an epoch; a learned sigma starts at 1.5 times the noise, without bounds, and its learning
rate is not annealed; of five snapshots, one each 400 epochs, the one with the least error on 1,024 other uniform labels
is tested. The error of the last weights stands beside it. One thing is not: what is learned is log sigma, at 1e-2,
where the authors' code learns sigma at 1e-3 in one dimension, which leaves more of the way to go (on N(5, .5) a test
MSE of .08 instead of .06).

2,000 epochs do not converge, so for BMC the error at the loss's optimum, found by L-BFGS over all rows at once, stands
beside that of the recipe: it is what the loss is good for, the difference what the optimiser left. On N(5, .5) inputs
around 5 make slope and intercept trade off, and along that valley the loss curves by .018, so that exp(-.018 x 40) = .5
of the error that the start leaves there is still left. With a sigma that follows the likelihood slope and sigma trade
off too, as little but their ratio shows in E[y|x], and the valley is several times as flat; while the predictions know
nothing yet it drives sigma to the millions, on some seeds for good. `learned` is a sigma that follows the moments
instead (`sigma_gradient`), `likelihood` the published derivative.
Nor is the optimum exact: by the noise on 1,024 rows its test MSE is .03 on average over draws, learned, and .02, fixed.

All runs of a loss (label distributions x sigma modes x seeds) train side by side as one batch of tensors, with the
gradients of the package's losses in closed form; before anything trains they are compared with the package's own.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from trainer.losses import LabelHistogram, LabelMixture, bmc_loss, bni_loss, gai_loss

SEEDS, ROWS, BATCH, EPOCHS = 5, 1024, 256, 2000
LR, MOMENTUM = 1e-3, 0.9
LOG_SIGMA_LR = 1e-2
NOISE, SIGMA_START = 1.0, 1.5
SNAPSHOTS, VALIDATION_ROWS = 5, 1024
COMPONENTS, BINS = 8, 64
RUNS_AT_ONCE = 8
MODES = ("fixed", "learned", "likelihood")  # of sigma
ONE_DIMENSIONAL = {
    "N(5,0.5)": ("normal", 0.5),
    "N(5,0.75)": ("normal", 0.75),
    "N(5,1)": ("normal", 1.0),
    "Exp(2)": ("exponential", 2.0),
    "Exp(1.5)": ("exponential", 1.5),
    "Exp(1)": ("exponential", 1.0),
}
TWO_DIMENSIONAL = "N2(0.5)"


def draw_labels(labels: str, generator: torch.Generator) -> Tensor:
    """(ROWS, D) labels; the one-dimensional ones are drawn again where they leave [0, 10]."""
    if labels == TWO_DIMENSIONAL:
        factor = torch.linalg.cholesky(torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
        return torch.randn(ROWS, 2, generator=generator) @ factor.T
    kind, parameter = ONE_DIMENSIONAL[labels]
    if kind == "normal":
        drawn = 5 + parameter * torch.randn(4 * ROWS, generator=generator)
    else:
        drawn = torch.empty(4 * ROWS).exponential_(parameter, generator=generator)
    return drawn[(drawn >= 0) & (drawn <= 10)][:ROWS, None]


def softmax_gradients(
    pred: Tensor, target: Tensor, variance: Tensor, labels: Tensor, log_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """BMC's and BNI's for R runs: d loss / d pred (R, B, D), and by sigma, of the likelihood and by moments (R, 2).

    From pred and target (R, B, D), variance (R,), candidates (R, N, D), log weights (R, N).
    """
    # A few runs at a time, so that their matrices (B, N) stay in the cache.
    few = zip(*(part.split(RUNS_AT_ONCE) for part in (pred, target, variance, labels, log_weights)), strict=True)
    by_pred, by_sigma = zip(*(_softmax_gradients(*part) for part in few), strict=True)
    return torch.cat(by_pred), torch.cat(by_sigma)


def _softmax_gradients(
    pred: Tensor, target: Tensor, variance: Tensor, labels: Tensor, log_weights: Tensor
) -> tuple[Tensor, Tensor]:
    v = variance[:, None, None]
    # |p|^2 is the same for all candidates of a row, so the softmax needs only the rest of the square; and no exponent
    # is above that of the point of the candidates' box which is nearest to p. Both in one product with few columns.
    nearest = torch.minimum(torch.maximum(pred, labels.amin(1, keepdim=True)), labels.amax(1, keepdim=True))
    most = (pred * nearest - 0.5 * nearest.square()).sum(2, keepdim=True) / v + log_weights.amax(1)[:, None, None]
    square = labels.square().sum(2, keepdim=True)
    by_row = torch.cat([pred / v, torch.ones_like(most), -most], 2)
    by_candidate = torch.cat([labels, log_weights[..., None] - 0.5 * square / v, torch.ones_like(square)], 2)
    weight = torch.bmm(by_row * math.log2(math.e), by_candidate.mT).exp2_()
    moments = torch.cat([torch.ones_like(square), square, labels], 2).mT.contiguous()  # not contiguous: 3 times slower
    total, *sums = torch.bmm(moments, weight.mT).unbind(1)
    second, mean = sums[0] / total, torch.stack([part / total for part in sums[1:]], 2)
    gap = pred.square().sum(2) - 2 * (pred * mean).sum(2) + second - (pred - target).square().sum(2)
    shares = torch.softmax(log_weights, 1)[..., None]
    most = (shares * (labels - (shares * labels).sum(1, keepdim=True)).square()).sum((1, 2))
    by_moments = _moment_gap(second - mean.square().sum(2), (mean - target).square().sum(2), most)
    gaps = torch.stack([gap.mean(1), by_moments], 1)
    return 2 * (mean - target), 2 * gaps / variance.sqrt()[:, None]


def _moment_gap(spread: Tensor, square: Tensor, most: Tensor) -> Tensor:
    """(R,), from variances and squared errors (R, B) of the posterior means and the labels' variance (R,)."""
    return spread.mean(1) - torch.minimum(square.mean(1), most)


def gai_gradients(
    pred: Tensor, target: Tensor, variance: Tensor, mixture: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The same for GAI, D = 1; the mixture's log weights, means and variances are (R, K) each."""
    log_weights, means, variances = (part[:, None] for part in mixture)
    v = variance[:, None, None]
    width, gap = variances + v, pred - means
    share = torch.softmax(log_weights - 0.5 * width.log() - 0.5 * gap.square() / width, 2)
    by_pred = 2 * v * ((pred - target) / v - (share * gap / width).sum(2, keepdim=True))
    by_width = (share * (gap.square() / width - 1) / width).sum(2, keepdim=True)
    sigma = v.sqrt()
    by_sigma = 2 * v * (1 / sigma - (pred - target).square() / sigma**3 + sigma * by_width)
    means_given = (means * v + pred * variances) / width
    posterior, centre = (share * means_given).sum(2), (log_weights.exp() * means).sum(2)
    second = (share * (variances * v / width + means_given.square())).sum(2)
    most = (log_weights.exp() * (variances + means.square())).sum(2) - centre.square()
    by_moments = _moment_gap(second - posterior.square(), (posterior - target[..., 0]).square(), most[:, 0])
    return by_pred, torch.stack([by_sigma.mean((1, 2)), 2 * by_moments / sigma[:, 0, 0]], 1)


def _fitted(labels: Tensor, loss: str) -> tuple[Tensor, ...]:
    """Of labels (ROWS,): a histogram's centres and log shares, inverse densities as weights, a mixture if GAI asks."""
    histogram, mixture = LabelHistogram(BINS, decay=1.0), LabelMixture(COMPONENTS)
    histogram.observe(labels)
    for _ in range(30 if loss == "gai" else 0):
        for part in labels.split(BATCH):
            mixture.observe(part)
    inverse = 1 / histogram.mass[histogram.index(labels)]
    parts = histogram.centres(), histogram.log_weights(), (inverse / inverse.mean())[:, None]
    return tuple(part.float() for part in (*parts, *(mixture.parameters_of_mixture() if loss == "gai" else ())))


def optimum(x: Tensor, target: Tensor, learns: bool) -> tuple[Tensor, Tensor]:
    """Weight (D, D) and bias (1, D) of least BMC over all rows, x and target (ROWS, D); sigma too if it learns."""
    x, target = x.double(), target.double()
    centre, dims = x.mean(0, keepdim=True), x.shape[1]
    # Around the mean of the inputs slope and intercept do not trade off.
    parameters = [torch.eye(dims, dtype=torch.float64), centre.clone(), torch.zeros((), dtype=torch.float64)]
    weight, bias, log_sigma = (p.requires_grad_() for p in parameters)
    search = torch.optim.LBFGS(
        [weight, bias, *([log_sigma] if learns else [])],
        max_iter=300,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        search.zero_grad()
        sigma = NOISE * log_sigma.exp()
        # What is minimised in sigma is the cross-entropy, without the detached factor.
        loss = bmc_loss((x - centre) @ weight + bias, target, sigma) / (2 * sigma.detach() ** 2)
        loss.backward()
        return loss

    search.step(closure)
    return weight.detach().float(), (bias - centre @ weight).detach().float()


def train(loss: str, names: list[str], modes: Sequence[str]) -> dict[str, Tensor]:
    """Train names x modes x SEEDS runs: test error of the chosen and the last weights, the last sigma, BMC's optimum.

    (names, modes, SEEDS) each.
    """
    sets = [[draw_labels(name, torch.Generator().manual_seed(seed)) for seed in range(SEEDS)] for name in names]
    dims = sets[0][0].shape[1]
    # The same labels, noise, first weights and order of rows for every loss and sigma mode of a seed.
    order = [(n, m, s) for n in range(len(names)) for m in range(len(modes)) for s in range(SEEDS)]
    target = torch.stack([sets[n][s] for n, _, s in order])
    seeds = torch.tensor([s for _, _, s in order])
    linears = []
    for seed in range(SEEDS):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            linears.append(torch.nn.Linear(dims, dims).requires_grad_(False))
    weight = torch.stack([linear.weight.T for linear in linears])[seeds]
    bias = torch.stack([linear.bias[None] for linear in linears])[seeds]
    parameters = [weight, bias]  # (R, D, D) and (R, 1, D)
    learns, by_moments = (torch.tensor([modes[m] in chosen for _, m, _ in order]) for chosen in (MODES[1:], MODES[1:2]))
    sigma = torch.where(learns, SIGMA_START, NOISE)
    log_sigma = sigma.log()
    momenta = [torch.zeros_like(p) for p in (*parameters, log_sigma)]
    # What the losses know of the labels is fitted once a data set, for fixed and learned sigma alike.
    fitted = [_fitted(labels[:, 0], loss) for of_name in sets for labels in of_name]
    at = torch.tensor([n * SEEDS + s for n, _, s in order])
    centres, log_shares, row_weights, *gaussians = (torch.stack(part)[at] for part in zip(*fitted, strict=True))

    span = 5.0 if dims == 2 else 10.0
    noise, check = [], []
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(2000 + seed)
        noise.append(NOISE * torch.randn(ROWS, dims, generator=generator))
        check.append(span * torch.rand(VALIDATION_ROWS, dims, generator=generator))
    x = target - torch.stack(noise)[seeds]
    held_out = torch.stack(check)[seeds]
    if dims == 2:
        held_out = 2 * held_out - span
    test = torch.linspace(-span, span, 51) if dims == 2 else torch.linspace(0, span, 1001)
    grid = torch.cartesian_prod(test, test) if dims == 2 else test[:, None]

    def error(labels: Tensor, at: list[Tensor] = parameters) -> Tensor:
        return (labels @ at[0] + at[1] - labels).square().sum(2).mean(1)

    best, chosen = (torch.full((len(order),), start) for start in (torch.inf, torch.nan))  # NaN: all snapshots diverged
    shuffle = torch.Generator().manual_seed(7)
    for epoch in range(EPOCHS):
        rate = LR * 0.5 * (1 + math.cos(math.pi * epoch / EPOCHS))
        for rows in torch.randperm(ROWS, generator=shuffle).split(BATCH):
            part_x, part_y = x[:, rows], target[:, rows]
            pred = part_x @ parameters[0] + parameters[1]
            sigma = log_sigma.exp()
            by_sigma = sigma.new_zeros(len(sigma), 2)
            if loss == "mse":
                by_pred = 2 * (pred - part_y)
            elif loss == "reweighted":
                by_pred = 2 * (pred - part_y) * row_weights[:, rows]
            elif loss == "gai":
                by_pred, by_sigma = gai_gradients(pred, part_y, sigma**2, tuple(gaussians))  # type: ignore[arg-type]
            else:
                labels, log_weights = (
                    (part_y, torch.zeros_like(part_y[..., 0])) if loss == "bmc" else (centres[..., None], log_shares)
                )
                by_pred, by_sigma = softmax_gradients(pred, part_y, sigma**2, labels, log_weights)
            grads = (
                part_x.mT @ by_pred / BATCH,
                by_pred.mean(1, keepdim=True),
                torch.where(by_moments, by_sigma[:, 1], by_sigma[:, 0]) * sigma * learns,
            )
            rates = rate, rate, LOG_SIGMA_LR
            for value, momentum, grad, lr in zip((*parameters, log_sigma), momenta, grads, rates, strict=True):
                momentum.mul_(MOMENTUM).add_(grad)
                value.sub_(momentum, alpha=lr)
        if (epoch + 1) % (EPOCHS // SNAPSHOTS) == 0:
            validation = error(held_out)
            chosen = torch.where(validation < best, error(grid), chosen)
            best = torch.minimum(validation, best)

    shape = len(names), len(modes), SEEDS
    results = {"test_mse": chosen, "last_mse": error(grid), "sigma": log_sigma.exp()}
    if loss == "bmc":
        found = zip(*(optimum(*run) for run in zip(x, target, learns.tolist(), strict=True)), strict=True)
        results["optimum_mse"] = error(grid, [torch.stack(part) for part in found])
    return {name: values.view(shape) for name, values in results.items()}


def check_gradients() -> None:
    """The closed forms above are the gradients of the package's losses."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randn(64, generator=generator) + 2
    histogram, mixture = LabelHistogram(BINS), LabelMixture(COMPONENTS)
    histogram.observe(labels)
    mixture.observe(labels)
    pred = (labels + 0.5).requires_grad_()
    sigma = torch.tensor(0.7, requires_grad=True)
    parts = [part.float()[None] for part in mixture.parameters_of_mixture()]
    shares = histogram.centres().float()[None, :, None], histogram.log_weights().float()[None]
    shaped = pred.detach()[None, :, None], labels[None, :, None], sigma.detach()[None] ** 2
    for loss, closed in (
        (partial(bmc_loss, pred, labels, sigma), softmax_gradients(*shaped, labels[None, :, None], torch.zeros(1, 64))),
        (partial(bni_loss, pred, labels, sigma, histogram), softmax_gradients(*shaped, *shares)),
        (partial(gai_loss, pred, labels, sigma, mixture), gai_gradients(*shaped, tuple(parts))),  # type: ignore[arg-type]
    ):
        for kind, name in enumerate(("likelihood", "moments")):
            by_pred, by_sigma = torch.autograd.grad(loss(sigma_gradient=name), (pred, sigma))
            torch.testing.assert_close(closed[0][0, :, 0] / 64, by_pred, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(closed[1][0, kind], by_sigma, rtol=1e-3, atol=1e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--labels", nargs="*", choices=[*ONE_DIMENSIONAL, TWO_DIMENSIONAL], help="only these")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    check_gradients()
    runs, began = [], time.perf_counter()
    plans = [(list(ONE_DIMENSIONAL), loss) for loss in ("mse", "reweighted", "gai", "bni", "bmc")]
    plans += [([TWO_DIMENSIONAL], loss) for loss in ("mse", "bmc")]
    if arguments.labels:
        plans = [([name for name in names if name in arguments.labels], loss) for names, loss in plans]
    print(
        f"{'labels':<10} {'loss':<11} {'sigma':<10} {'test MSE':>9} {'sd':>8} {'of last':>9} {'sd':>8}"
        f" {'optimum':>9} {'sd':>8}"
        f"   last sigma (learned: log sigma from {SIGMA_START}, lr {LOG_SIGMA_LR})"
    )
    for names, loss in (plan for plan in plans if plan[0]):
        modes = ("none",) if loss in ("mse", "reweighted") else MODES
        result = train(loss, names, modes)
        for n, name in enumerate(names):
            for m, mode in enumerate(modes):
                run: dict[str, str | float] = {"labels": name, "loss": loss, "sigma": mode}
                errors = ""
                for key in ("test_mse", "last_mse", "optimum_mse"):
                    if key in result:
                        error = result[key][n, m]
                        run |= {f"{key}_mean": error.mean().item(), f"{key}_sd": error.std().item()}
                        errors += f"{run[f'{key}_mean']:9.4f} {run[f'{key}_sd']:8.4f} "
                    else:
                        errors += " " * 19
                runs.append(run)
                sigma = f"{result['sigma'][n, m].mean().item():.2f}" if mode != "none" else ""
                print(f"{name:<10} {loss:<11} {mode:<10} {errors}  {sigma}", flush=True)
    print(f"{time.perf_counter() - began:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps({"runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
