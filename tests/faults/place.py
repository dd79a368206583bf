"""Where faults are done: with a broker of one's own."""

import argparse
import os
import signal
from pathlib import Path

from tests.faults.case import Ground

SCRIPT = "TAILSTREAM_TEST_KAFKA_SERVER"


def ground_or_leave(parser: argparse.ArgumentParser, folder: Path) -> Ground:
    """A ground for faults; ends the program where no broker can be started."""
    script = os.environ.get(SCRIPT)
    if not script:
        parser.error(f"{SCRIPT} must name a script that starts an Apache Kafka")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that brokers and trainers are ended then, too
    return Ground(script, folder)
