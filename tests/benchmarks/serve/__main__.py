"""How fast the service is beside an echo, and what load, training and swaps do to it.

python -m tests.benchmarks.serve [--json FILE]
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.serve.throughput import measure, ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=2, help="of one measurement in one round")
    arguments = parser.parse_args()
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        runs = report["runs"] = measure(Path(folder), arguments.rounds, arguments.seconds)
    print(
        f"{'server':<20} {'clients':>7} {'rows':>5} {'requests/s':>10} {'p99 ms':>8} {'a CPU second':>13} {'rows':>8}"
    )
    for run in runs:
        rate = run["requests_per_cpu_s"]
        print(
            f"{run['server']:<20} {run['clients']:>7} {run['instances']:>5} {run['requests_per_s']:>10.0f} "
            f"{run['p99_ms']:>8.1f} {rate:>13.0f} {rate * run['instances']:>8.0f}"
        )
    report["echo_ratio"] = ratio(runs, "requests_per_s", "tailstream", "echo", 64, 1)
    report["echo_ratio_cpu"] = ratio(runs, "requests_per_cpu_s", "tailstream", "echo", 64, 1)
    print(
        f"of the echo's requests, 64 clients: {report['echo_ratio']:.2f} a second, "
        f"{report['echo_ratio_cpu']:.2f} a second of CPU time"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
