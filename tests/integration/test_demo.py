"""The demo as a person runs it: one command, real processes, nothing left behind."""

import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from service.broker import free_port

WAIT_S = 90.0
pytestmark = pytest.mark.timeout(180)


class Demo:
    """A running `tailstream demo`, its output in a file."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.port = free_port()
        self.output = folder / "output.txt"
        command = [sys.executable, "-m", "service", "demo", "--port", str(self.port), *options]
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    def said(self) -> str:
        return self.output.read_text()

    def wait_until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not true():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self) -> int:
        return self.process.wait(WAIT_S)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_all_is_learned_though_records_are_broken_and_the_trainer_is_killed(broker: str, tmp_path: Path) -> None:
    summary_file = tmp_path / "summary.json"
    demo = Demo(
        tmp_path,
        *("--rows", "6000", "--inject-bad", "40", "--kill-trainer-at", "2000"),
        *("--exit-when-done", "--bootstrap-servers", broker, "--json", str(summary_file)),
    )
    assert demo.end() == 0, demo.said()
    summary = json.loads(summary_file.read_text())
    assert (summary["published"], summary["trained"], summary["dead_lettered"]) == (6040, 6000, 40)
    assert (summary["restarts"], summary["orphans"]) == (1, 0)
    assert summary["first_prediction_s"] > 0
    assert summary["samples_per_second"] > 0
    # Flights vary by some 20 minutes about their median: less than that has been learned.
    assert 0 < summary["mae_balance_0"] < 18
    assert summary["balanced_mae_balance_1"] > 0
    assert "published 6040 = learned 6000 + dead letters 40" in demo.said()


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGHUP])
def test_the_curl_line_works_as_printed_and_the_end_leaves_nothing_behind(
    ending: signal.Signals, tmp_path: Path
) -> None:
    demo = Demo(tmp_path, "--rows", "1000")
    demo.wait_until(lambda: "until Ctrl-C" in demo.said())
    (line,) = re.findall(r"^predict: +(curl .*)$", demo.said(), flags=re.M)
    answer = json.loads(subprocess.run(shlex.split(line), capture_output=True, check=True, text=True).stdout)
    assert isinstance(answer["predictions"][0], float)
    children = demo.children()
    assert len(psutil.Process(demo.process.pid).children()) == 3  # broker, trainer, service; the trainer has its own
    demo.process.send_signal(ending)
    assert demo.end() == 0, demo.said()
    assert alive(children) == []


@pytest.mark.parametrize("part", ["trainer", "service"])
def test_a_part_that_dies_is_named_with_its_log_and_the_others_are_stopped(part: str, tmp_path: Path) -> None:
    demo = Demo(tmp_path, "--rows", "100000", "--rate", "500")
    demo.wait_until(lambda: "first prediction" in demo.said())
    children = demo.children()
    (victim,) = [child for child in children if child.cmdline()[1:3] == ["-m", part]]
    victim.kill()
    assert demo.end() == 7
    assert f"the {part} ended with code -9" in demo.said()
    assert alive(children) == []


def test_a_taken_port_is_said_before_anything_is_started(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        demo = Demo(tmp_path, "--port", str(taken.getsockname()[1]))
        assert demo.end() == 2
    assert "cannot be bound" in demo.said()


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    (folder / "precious.txt").write_text("data")
    demo = Demo(tmp_path, "--data-dir", str(folder))
    assert demo.end() == 2
    assert "is not empty" in demo.said()
    assert [path.name for path in folder.iterdir()] == ["precious.txt"]


def test_classes_are_learned_by_the_same_command(tmp_path: Path) -> None:
    summary_file = tmp_path / "summary.json"
    demo = Demo(
        tmp_path,
        *("--task", "classification", "--rows", "3000", "--inject-bad", "8", "--kill-trainer-at", "1000"),
        *("--exit-when-done", "--json", str(summary_file)),
    )
    assert demo.end() == 0, demo.said()
    summary = json.loads(summary_file.read_text())
    assert (summary["published"], summary["trained"], summary["dead_lettered"]) == (3008, 3000, 8)
    assert (summary["restarts"], summary["orphans"]) == (1, 0)
    assert summary["accuracy_balance_0"] > 0.6
    assert summary["macro_recall_balance_1"] > 0.2
