"""Time, memory and accuracy of Balanced MSE beside the naive form, side by side: python -m tests.benchmarks.bmc

Forward and backward, medians of alternating runs on one thread, or with `--device cuda` on a CUDA device; 64 x 576 is a
training step with its label memory. What is quick runs several times in a row, as in training: right after the naive
form, whose matrices fill the caches, it would find neither its data nor its code there. Naive is the paper's code: the
B x M matrix, a softmax over it, autograd. Errors are those of ours in float32 against float64 over 256 rows,
|a - b| / (|b| + median |b|). Labels are lognormal; 1% of the predictions and of the labels lie 30 standard deviations
off.
"""

import argparse
import json
import math
import os
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.losses import Mixture, bmc_loss, density_bmc_loss, mixture_log_density

SIZES = [(64, 576), (256, 256), (512, 4096), (4096, 4096), (512, 65_536), (65_536, 65_536)]
SIGMAS_OVER_SD = [0.01, 0.1, 1.0]
NAIVE_PAIRS = 1 << 26  # beyond it the naive form's matrices, 17 GB each at 65,536 rows, do not fit
ERROR_ROWS = 256
SLOW_S = 0.4  # the naive forms at the large sizes
TURN_S, MOST_IN_A_TURN = 0.01, 20
Loss = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def naive(pred: Tensor, target: Tensor, sigma: Tensor, memory: Tensor | None) -> Tensor:
    labels = target if memory is None else torch.cat([target, memory])
    variance = sigma**2
    logits = -(pred[:, None] - labels[None]).pow(2) / (2 * variance)
    return F.cross_entropy(logits, torch.arange(len(pred), device=pred.device)) * (2 * variance).detach()


def ours(pred: Tensor, target: Tensor, sigma: Tensor, memory: Tensor | None) -> Tensor:
    return bmc_loss(pred, target, sigma, memory=memory)


def make_case(
    batch: int, labels: int, sigma_over_sd: float, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Predictions and labels (batch,), sigma, and a memory that makes the candidates `labels` in all."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(labels, generator=generator).exp()
    sd = drawn.std()
    target, memory = drawn[:batch].clone(), drawn[batch:]
    pred = target + 0.5 * sd * torch.randn(batch, generator=generator)
    pred[5::100] += 30 * sd
    target[7::100] += 30 * sd
    pred, target, sigma, memory = (part.to(device) for part in (pred, target, sigma_over_sd * sd, memory))
    return pred, target, sigma, memory if len(memory) else None


def step(loss: Loss, case: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> None:
    pred, target, sigma, memory = case
    loss(pred.detach().requires_grad_(), target, sigma.detach().requires_grad_(), memory).backward()


def timed_s(run: Callable[[], None], times: int = 1) -> float:
    """Mean of a few runs in a row, until the device is done with them."""
    start = time.perf_counter()
    for _ in range(times):
        run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def median_s(runs: dict[str, Callable[[], None]], budget_s: float = 2.0) -> dict[str, float]:
    """Medians of runs that take turns, so that whatever else the machine does hits all alike.

    After a warm-up, which may compile, what takes long is timed once.
    """
    for run in runs.values():
        run()
    took = {name: [timed_s(run)] for name, run in runs.items()}
    in_a_turn = {name: min(MOST_IN_A_TURN, math.ceil(TURN_S / first)) for name, (first,) in took.items()}
    quick = [name for name, (first,) in took.items() if first < SLOW_S]
    began, rounds = time.perf_counter(), 0
    while quick and (rounds < 3 or (time.perf_counter() - began < budget_s and rounds < 200)):
        for name in quick:
            took[name].append(timed_s(runs[name], in_a_turn[name]))
        rounds += 1
    return {name: statistics.median(times) for name, times in took.items()}


def peak_bytes(loss: Loss, case: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> int:
    """What one step adds to the resident memory of a fresh process, at its peak; on CUDA, to the device's."""
    if case[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(loss, case)
        return torch.cuda.max_memory_allocated() - before
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        step(loss, make_case(8, 8, 1.0))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step(loss, case)
        os.write(writer, str(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    return int(os.read(reader, 64))


def relative_error(value: Tensor, exact: Tensor) -> float:
    return float(((value.double() - exact).abs() / (exact.abs() + exact.abs().median())).max())


def errors(case: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> tuple[float, float, float]:
    """Of loss, prediction gradient and sigma gradient, over some of the rows; each row still has all candidates."""
    pred, target, sigma, memory = case
    rows = torch.linspace(0, len(pred) - 1, min(ERROR_ROWS, len(pred))).long().to(pred.device)
    p, s = pred.detach().requires_grad_(), sigma.detach().requires_grad_()
    loss = bmc_loss(p, target, s, memory=memory, reduction="none")[rows].mean()
    loss.backward()
    others = torch.ones(len(target), dtype=torch.bool, device=pred.device)
    others[rows] = False
    rest = target[others] if memory is None else torch.cat([target[others], memory])
    p64, s64 = pred[rows].double().requires_grad_(), sigma.double().requires_grad_()
    exact = naive(p64, target[rows].double(), s64, rest.double())
    exact.backward()
    assert p.grad is not None
    assert s.grad is not None
    assert p64.grad is not None
    assert s64.grad is not None
    return (
        relative_error(loss.detach(), exact.detach()),
        relative_error(p.grad[rows], p64.grad),
        relative_error(s.grad, s64.grad),
    )


def compiled_naive(device: str) -> Loss | None:
    """The naive form through torch.compile, or None where there is no compiler."""
    try:
        compiled: Loss = torch.compile(naive, dynamic=True)
        step(compiled, make_case(64, 64, 1.0, device))
        step(compiled, make_case(64, 128, 1.0, device))
    except Exception as error:
        print(f"torch.compile does not work here: {type(error).__name__}")
        return None
    return compiled


def density_ratio(device: str) -> tuple[float, float]:
    """Times of the broadcast form by autograd and of ours: 64 rows, 576 candidates, 4 components."""
    generator = torch.Generator().manual_seed(0)
    logits, offsets, scales = torch.randn(3, 64, 4, generator=generator).to(device)
    location = torch.randn(64, generator=generator).to(device)
    labels = torch.randn(576, generator=generator).to(device)

    own = torch.arange(64, device=device)

    def mixture() -> tuple[Mixture, Tensor]:
        head = [
            x.detach().requires_grad_() for x in (torch.log_softmax(logits, 1), offsets, 0.3 * scales - 1, location)
        ]
        return Mixture(head[0], head[3][:, None] + head[1], head[2], head[3]), labels[:64]

    def broadcast() -> None:
        head, target = mixture()
        entropy = F.cross_entropy(mixture_log_density(head, labels), own, reduction="none")
        ((head.spread() * entropy).mean() + 2 * (head.location - target).square().mean()).backward()

    def by_hand() -> None:
        head, target = mixture()
        density_bmc_loss(head, target, memory=labels[64:]).backward()

    took = median_s({"broadcast": broadcast, "ours": by_hand})
    return took["broadcast"], took["ours"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    cases = {(b, m, s): make_case(b, m, s, arguments.device) for b, m in SIZES for s in SIGMAS_OVER_SD}
    peaks = {key: peak_bytes(ours, case) for key, case in cases.items()}  # first, while the process is small
    naive_peaks = {key: peak_bytes(naive, case) for key, case in cases.items() if key[0] * key[1] < NAIVE_PAIRS}
    compiled = compiled_naive(arguments.device)
    rows = []
    print(
        f"{'B x M':>14} {'sigma/sd':>8} {'naive ms':>9} {'compiled':>9} {'ours ms':>8} {'ratio':>6} {'naive MB':>9}"
        f" {'ours MB':>8} {'loss':>8} {'d pred':>8} {'d sigma':>8}"
    )
    for (batch, labels, sigma_over_sd), case in cases.items():
        runs: dict[str, Callable[[], None]] = {"ours": lambda case=case: step(ours, case)}
        feasible = batch * labels < NAIVE_PAIRS
        if feasible:
            runs["naive"] = lambda case=case: step(naive, case)
            if compiled is not None:
                runs["compiled"] = lambda case=case: step(compiled, case)
        took = median_s(runs)
        loss_error, pred_error, sigma_error = errors(case)
        ratio = took["naive"] / took["ours"] if feasible else None
        peak = peaks[batch, labels, sigma_over_sd]
        rows.append(
            {
                "batch": batch,
                "memory": labels,
                "sigma_over_sd": sigma_over_sd,
                "ratio": ratio,
                "ours_s": took["ours"],
                "naive_s": took.get("naive"),
                "compiled_naive_s": took.get("compiled"),
                "peak_bytes": peak,
                "naive_peak_bytes": naive_peaks.get((batch, labels, sigma_over_sd)),
                "loss_error": loss_error,
                "pred_grad_error": pred_error,
                "sigma_grad_error": sigma_error,
            }
        )
        slow, mid = 1e3 * took.get("naive", math.nan), 1e3 * took.get("compiled", math.nan)
        print(
            f"{f'{batch} x {labels}':>14} {sigma_over_sd:8} {slow:9.2f} {mid:9.2f} {1e3 * took['ours']:8.2f}"
            f" {ratio or math.nan:6.1f} {naive_peaks.get((batch, labels, sigma_over_sd), math.nan) / 1e6:9.0f}"
            f" {peak / 1e6:8.1f} {loss_error:8.0e} {pred_error:8.0e} {sigma_error:8.0e}",
            flush=True,
        )
    broadcast, by_hand = density_ratio(arguments.device)
    print(f"density head, 64 x 576, K = 4: broadcast {1e3 * broadcast:.2f} ms, ours {1e3 * by_hand:.2f} ms", end=", ")
    print(f"ratio {broadcast / by_hand:.1f}")
    if arguments.json:
        density = {"broadcast_s": broadcast, "ours_s": by_hand, "ratio": broadcast / by_hand}
        arguments.json.write_text(json.dumps({"rows": rows, "density_head": density}, indent=2) + "\n")


if __name__ == "__main__":
    main()
