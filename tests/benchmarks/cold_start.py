"""Two small streams on which balanced losses have a hard start: python -m tests.benchmarks.cold_start

`categories`: the label is told by categories alone, so embeddings must be learned before anything is known; a mixture
can explain the marginal distribution of the labels first, and learn late where they lie. `new year`: a year, nearly
always the same so far, moves on, many standard deviations past what it was; a network that extrapolates is far off.

The model at balance 0 stands beside MSE with the same body, replay and steps: mean absolute errors, prequential. Over
the first 5,000 rows, and over those that follow the turn, it is to be within 10% on the mean of the seeds.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.benchmarks.quality import batches_of, settings_of
from trainer.evaluation import for_loss, run

ROWS = 5_000
TURN = 3_000  # the row at which the year turns
AFTER_TURN = 500  # rows
OTHER_YEAR = 0.005  # share of rows that bore the year before
FEATURES = {
    "categories": {"shop": "categorical", "item": "categorical", "day": "categorical", "size": "numeric"},
    "new year": {"year": "numeric", "size": "numeric", "shop": "categorical"},
}


def categories(seed: int = 0) -> Iterator[dict[str, Any]]:
    """Labels that are the sum of three categories' effects; one item in forty is dear."""
    random = np.random.default_rng(seed)
    shop, item, day = random.normal(0, 20, 30), random.normal(0, 20, 40), random.normal(0, 10, 7)
    item[0] = 300
    for _ in range(ROWS):
        s, i, d = random.integers(30), random.integers(40), random.integers(7)
        label = shop[s] + item[i] + day[d] + random.normal(0, 5)
        yield {"shop": f"s{s}", "item": f"i{i}", "day": f"d{d}", "size": random.normal(), "label": label}


def new_year(seed: int = 0) -> Iterator[dict[str, Any]]:
    """Labels with a tail that have nothing to do with the year, which turns in the middle."""
    random = np.random.default_rng(seed)
    shop = random.normal(0, 10, 10)
    for row in range(ROWS):
        year = 2023 + int(row >= TURN) - int(random.random() < OTHER_YEAR)
        size, s = random.exponential(1.0), random.integers(10)
        label = 20 * size + 10 * size**2 + shop[s] + random.normal(0, 5)
        yield {"year": year, "size": size, "shop": f"s{s}", "label": label}


STREAMS = {"categories": categories, "new year": new_year}


def errors(stream: str, loss: str, seed: int = 0) -> NDArray[np.float64]:
    """(N,) absolute errors at balance 0, for all rows but those of the first batch, which nothing was known of."""
    settings = for_loss(settings_of("label", FEATURES[stream]), loss).model_copy(update={"seed": seed})
    schema, batches = batches_of(settings, STREAMS[stream](seed))
    answers = run(settings, schema, batches, [0.0], torch.device("cpu"), lambda rows: None)
    return np.abs(answers.label - answers.median[0.0])


def after_turn(error: NDArray[np.float64]) -> NDArray[np.float64]:
    """The errors of the rows that follow the turn of the year."""
    first = TURN - (ROWS - len(error))
    return error[first : first + AFTER_TURN]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs: list[dict[str, Any]] = []
    print(f"{'stream':<11} {'rows':<18} {'seed':>4} {'ours':>7} {'MSE':>7} {'ratio':>6}")
    for stream in STREAMS:
        for seed in range(arguments.seeds):
            ours, plain = errors(stream, "bmc", seed), errors(stream, "mse", seed)
            parts = {f"first {ROWS:,}": (ours, plain)}
            sixth = len(ours) // 6
            parts |= {f"sixth {n + 1}": (ours[n * sixth :][:sixth], plain[n * sixth :][:sixth]) for n in range(6)}
            if stream == "new year":
                parts[f"{AFTER_TURN} from the turn"] = after_turn(ours), after_turn(plain)
            for part, (a, b) in parts.items():
                mine, theirs = float(a.mean()), float(b.mean())
                runs.append({"stream": stream, "seed": seed, "rows": part, "ours": mine, "mse": theirs})
                print(
                    f"{stream:<11} {part:<18} {seed:>4} {mine:>7.2f} {theirs:>7.2f} {mine / theirs:>6.2f}", flush=True
                )
    for stream, part in dict.fromkeys((each["stream"], each["rows"]) for each in runs):
        of = [each for each in runs if (each["stream"], each["rows"]) == (stream, part)]
        mine, theirs = (float(np.mean([each[name] for each in of])) for name in ("ours", "mse"))
        print(f"{stream:<11} {part:<18} mean {mine:>7.2f} {theirs:>7.2f} {mine / theirs:>6.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
