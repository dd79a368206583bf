"""What becomes of a source's process when something ends."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import psutil
import pytest

from tests.trainer.polled import IDENTITY, SIZE, make, make_settings, wait_until
from trainer.batching import Batch
from trainer.errors import OffsetsLost, SourceError
from trainer.prefetch import BATCHES_AHEAD
from trainer.schema import FeatureSchema
from trainer.source_process import SHARED_MEMORY, SourceProcess

ROOT = Path(__file__).parents[2]
# Begins to read in a process, says which, and waits.
PARENT = """
import sys, threading, time
from functools import partial
from pathlib import Path
from tests.trainer.polled import IDENTITY, SIZE, make, make_settings
from trainer.schema import FeatureSchema
from trainer.source_process import SourceProcess

if __name__ == "__main__":
    given = partial(make, "regression", {}, Path(sys.argv[1]))
    schema = FeatureSchema.of(make_settings())
    source = SourceProcess(given, schema, SIZE, 1.0, IDENTITY, threading.Event())
    source.open({})
    print(source.pid, source._memory.name, "torch" in sys.modules, flush=True)
    time.sleep(100)
"""


@pytest.fixture
def source(tmp_path: Path) -> Iterator[SourceProcess]:
    schema = FeatureSchema.of(make_settings())
    made = SourceProcess(partial(make, "regression", {}, tmp_path), schema, SIZE, 1.0, IDENTITY, threading.Event())
    yield made
    made.close()


def takes(batches: Iterator[Batch | None], count: int) -> None:
    while count:
        count -= next(batches) is not None


def test_one_that_is_killed_is_an_error_that_says_so_after_the_batches_before(source: SourceProcess) -> None:
    source.open({})
    assert source.pid is not None
    with source.batches() as batches:
        takes(batches, 1)
        os.kill(source.pid, signal.SIGKILL)
        with pytest.raises(SourceError, match=r"reads 'prices' \(pid \d+\) was killed by SIGKILL"):
            takes(batches, BATCHES_AHEAD + 2)


@pytest.mark.parametrize(("at_end", "error"), [("expired", OffsetsLost), ("unforeseen", ZeroDivisionError)])
def test_why_one_ended_is_heard_after_its_batches_however_late_they_are_taken(
    tmp_path: Path, at_end: str, error: type[Exception]
) -> None:
    given = partial(make, "regression", {"polls": 2, "at_end": at_end}, tmp_path)
    schema = FeatureSchema.of(make_settings())
    source = SourceProcess(given, schema, SIZE, 1.0, IDENTITY, threading.Event())
    with closing(source), source.batches() as batches:
        source.open({})
        source._process.join(60)  # so that nobody is left to send to
        assert source._process.exitcode == 0
        takes(batches, 2)
        with pytest.raises(error):
            takes(batches, 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_leaves_it_to_the_trainer(source: SourceProcess, number: signal.Signals) -> None:
    source.open({})
    assert source.pid is not None
    with source.batches() as batches:
        os.kill(source.pid, number)
        takes(batches, 3 * BATCHES_AHEAD)
    source.close()


def test_closing_before_it_was_opened_ends_it(source: SourceProcess) -> None:
    assert source.pid is not None
    process = psutil.Process(source.pid)
    source.close()
    assert not process.is_running()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_a_trainer_that_is_killed_and_leaves_no_memory(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        assert parent.stdout is not None
        pid, memory, has_torch = parent.stdout.readline().split()
        child = psutil.Process(int(pid))
        loaded = {Path(mapped.path).name for mapped in child.memory_maps()}
        parent.send_signal(number)
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    wait_until(lambda: not (SHARED_MEMORY / memory).exists())
    assert has_torch == "False"
    assert not any("torch" in name for name in loaded)  # hundreds of megabytes, and most of a start
