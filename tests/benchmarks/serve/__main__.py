"""How fast the service is beside an echo, and what load, training and swaps do to it.

python -m tests.benchmarks.serve [--json FILE] [--parts throughput,training,overload,swaps]

Parts that are run alone add their figures to those that the file has.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.serve import overload, swaps, throughput, training


def main() -> None:
    parts: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
        "throughput": _throughput,
        "training": _training,
        "overload": _overload,
        "swaps": _swaps,
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--parts", default=",".join(parts), help="what to measure, a comma between")
    parser.add_argument("--rounds", type=int, default=5, help="in which servers take turns")
    parser.add_argument("--seconds", type=int, default=2, help="of one measurement in one round")
    parser.add_argument("--overload-seconds", type=int, default=60)
    parser.add_argument("--swaps", type=int, default=1000)
    arguments = parser.parse_args()
    chosen = arguments.parts.split(",")
    if not set(chosen) <= set(parts):
        parser.error(f"--parts: {arguments.parts} is not of {', '.join(parts)}")
    report: dict[str, Any] = {}
    if arguments.json and arguments.json.exists() and len(chosen) < len(parts):
        report = json.loads(arguments.json.read_text())
    for part in chosen:
        with tempfile.TemporaryDirectory() as folder:
            report |= parts[part](Path(folder), arguments)
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def _throughput(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    runs = throughput.measure(folder, arguments.rounds, arguments.seconds)
    print(
        f"{'server':<20} {'clients':>7} {'rows':>5} {'requests/s':>10} {'p99 ms':>8} {'a CPU second':>13} {'rows':>8}"
    )
    for run in runs:
        rate = run["requests_per_cpu_s"]
        print(
            f"{run['server']:<20} {run['clients']:>7} {run['instances']:>5} {run['requests_per_s']:>10.0f} "
            f"{run['p99_ms']:>8.1f} {rate:>13.0f} {rate * run['instances']:>8.0f}"
        )
    found = {
        "runs": runs,
        # Of single rows, with as many clients as make it worst.
        "echo_ratio": min(throughput.ratios(runs, "requests_per_s", "tailstream", "echo", 1)),
        "echo_ratio_cpu": min(throughput.ratios(runs, "requests_per_cpu_s", "tailstream", "echo", 1)),
        "forward_p99_ratio": max(throughput.ratios(runs, "p99_ms", "tailstream", "forward", 1)),
    }
    print(
        f"of the echo's requests, at worst: {found['echo_ratio']:.2f} a second, {found['echo_ratio_cpu']:.2f} "
        f"a second of CPU time; p99 {found['forward_p99_ratio']:.2f} of that with the forward pass in the handler"
    )
    return found


def _training(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    found = training.measure(folder, arguments.rounds)
    print(
        f"a trainer busy on the same two cores ({found['trainer_cores']:.2f} of one): p99 at {training.RATE:g} "
        f"requests/s {found['offered_busy_p99_ms']:.2f} ms, without {found['offered_still_p99_ms']:.2f} ms; at as many "
        f"as can be answered {found['most_busy_p99_ms']:.2f} and {found['most_still_p99_ms']:.2f} ms"
    )
    return {"training_p99_ratio": found["p99_ratio"], "training": found}


def _overload(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    found = overload.measure(folder, arguments.overload_seconds)
    print(
        f"{overload.TIMES} times what there is room for, {found['seconds']} s: {found['accepted']} accepted, p99 "
        f"{found['p99_ms']:.0f} ms ({found['p99_ratio']:.2f} of without), {found['refused_503']} refused, "
        f"{found['other']} else; memory {found['rss_ratio']:.3f} of before"
    )
    return {"overload": found}


def _swaps(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    found = swaps.measure(folder, arguments.swaps)
    print(
        f"{found['swaps']} swaps, {found['answers']} answers: {found['failed']} failed, {found['mixed']} mixed, p99 "
        f"{found['p99_ms']:.2f} ms, without swaps {found['still_p99_ms']:.2f} ms"
    )
    return {"swaps": found}


if __name__ == "__main__":
    main()
