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
    print(f"{'server':<20} {'clients':>7} {'rows':>5} {'requests/s':>10} {'rows/s':>9} {'p99 ms':>8}")
    for run in runs:
        rate = run["requests_per_s"]
        print(
            f"{run['server']:<20} {run['clients']:>7} {run['instances']:>5} {rate:>10.0f} "
            f"{rate * run['instances']:>9.0f} {run['p99_ms']:>8.1f}"
        )
    report["echo_ratio"] = ratio(runs, "tailstream", "echo", 64, 1)
    print(f"of the echo's requests a second, 64 clients: {report['echo_ratio']:.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
