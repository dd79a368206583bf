"""Every fault there is a case for, on real parts: `python -m tests.faults --json FILE`. Needs root, for small disks."""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from tests.faults import CASES
from tests.faults.place import ground_or_leave


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    options = parser.parse_args()
    seen = []
    with tempfile.TemporaryDirectory(prefix="tailstream-faults-") as folder:
        ground = ground_or_leave(parser, Path(folder))
        try:
            for case in CASES:
                if options.only not in case.name:
                    continue
                began = time.monotonic()
                try:
                    found = case.run(ground)
                except Exception as error:
                    found = f"{type(error).__name__}: {error}"
                seen.append({"name": case.name, "expected": case.expected, "seen": found})
                verdict = "ok  " if found == case.expected else "FAIL"
                print(f"{verdict} {time.monotonic() - began:5.1f} s  {case.name}: {found}", flush=True)
        finally:
            ground.close()
    if options.json:
        options.json.write_text(json.dumps({"cases": seen}, indent=1) + "\n")
    return int(any(case["expected"] != case["seen"] for case in seen))


if __name__ == "__main__":
    sys.exit(main())
