"""How long the answer takes a row, beside a plain implementation of the same formula in the same run.

python -m tests.benchmarks.predictive [--json FILE]

Four components, balance 0.5, median and a 90% interval, one thread. The plain implementation forms the (B, G, K) tensor
of logs on as many cells, normalises it and reads off the same quantiles.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from trainer.label_density import LabelDensity, LabelGrid
from trainer.predictive import Components, predict

BATCH_SIZES = (1, 64, 256, 1024)
ROUNDS = 15
ROUND_S = 0.02


def best_us(measured: list[Callable[[], object]]) -> list[float]:
    """Microseconds a call of each, the best of rounds that take turns, so that a busy machine hurts all alike."""
    best = [math.inf] * len(measured)
    calls = []
    for call in measured:
        call()
        begin = time.perf_counter()
        call()
        calls.append(max(1, int(ROUND_S / (time.perf_counter() - begin))))
    for _ in range(ROUNDS):
        for which, call in enumerate(measured):
            begin = time.perf_counter()
            for _ in range(calls[which]):
                call()
            best[which] = min(best[which], (time.perf_counter() - begin) / calls[which] * 1e6)
    return best


def plain(components: Components, grid: LabelGrid, balance: float) -> list[Tensor]:
    """The median and the 5% and 95% quantiles of a head trained by a balanced loss."""
    z = ((grid.centres - components.label_mean) / components.label_sd).float()[None, :, None]
    offsets = (z - components.means[:, None]) / components.scales[:, None]
    log_h = torch.logsumexp((components.log_weights - components.scales.log())[:, None] - 0.5 * offsets**2, 2)
    logits = log_h + grid.widths.log().float() + (1 - balance) * grid.log_density + balance * grid.log_mask
    probabilities = torch.softmax(logits, 1)
    cumulative = probabilities.cumsum(1)
    answers = []
    for level in (0.5, 0.05, 0.95):
        cell = (cumulative < level).sum(1).clamp(max=len(grid) - 1)[:, None]
        mass = probabilities.gather(1, cell)
        part = ((level - cumulative.gather(1, cell) + mass) / mass.clamp_min(1e-12)).clamp(0, 1)
        answers.append((grid.edges[cell] + part * grid.widths[cell])[:, 0])
    return answers


def example(rows: int) -> Components:
    generator = torch.Generator().manual_seed(0)
    weights, means, scales = torch.randn(3, rows, 4, generator=generator).unbind(0)
    return Components(torch.log_softmax(weights, 1), means, torch.exp(0.5 * scales - 1), 20.0, 40.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    labels = 40 * torch.empty(65_536, dtype=torch.float64).exponential_(generator=generator) - 20
    density = LabelDensity()
    for batch in labels.split(256):
        density.observe(batch)
    grid = density.grid()
    report: dict[str, object] = {"cells": len(grid), "threads": 1, "runs": []}
    runs = []
    print(f"{'rows':>6} {'us a row':>9} {'plain':>9} {'ratio':>6}")
    for rows in BATCH_SIZES:
        components = example(rows)
        expected = plain(components, grid, 0.5)
        answer = predict(components, grid, learned_prior="uniform", balance=0.5, interval=0.9)
        torch.testing.assert_close(answer.point, expected[0], rtol=0, atol=0.1)
        torch.testing.assert_close(answer.upper, expected[2], rtol=0, atol=0.1)
        ours, theirs = best_us(
            [
                lambda c=components: predict(c, grid, learned_prior="uniform", balance=0.5, interval=0.9),  # type: ignore[misc]
                lambda c=components: plain(c, grid, 0.5),  # type: ignore[misc]
            ]
        )
        runs.append(
            {"rows": rows, "us_per_row": ours / rows, "plain_us_per_row": theirs / rows, "ratio": theirs / ours}
        )
        print(f"{rows:>6} {ours / rows:>9.2f} {theirs / rows:>9.2f} {theirs / ours:>6.1f}")
    observe_us, grid_us = best_us([lambda: density.observe(labels[:256]), density.grid])
    report |= {"runs": runs, "observe_256_us": observe_us, "grid_us": grid_us}
    print(f"observe, 256 labels: {observe_us:.0f} us; grid: {grid_us:.0f} us")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
