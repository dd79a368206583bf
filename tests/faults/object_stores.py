"""What an S3 server and other trainers do to a trainer whose snapshots are in S3."""

import os
import signal
import time

from tests.faults.brokers import outcome
from tests.faults.case import Ground, case
from tests.faults.stores import FAILED, WORKS
from tests.rig import Trainer, rows, send, wait_until_consumed
from trainer.snapshot import open_store


@case("S3 server SIGKILLed and restarted", "400 records, each once; said 1 and 1 times")
def server_killed(ground: Ground) -> str:
    config, settings = ground.settings(**ground.in_s3())
    send(settings, rows(200))
    trainer = Trainer(config)
    wait_until_consumed(settings, 200, trainer)
    ground.s3.kill()
    send(settings, rows(200, seed=1))
    trainer.says(FAILED)
    ground.s3.start()
    trainer.says(WORKS)
    wait_until_consumed(settings, 400, trainer)
    log = trainer.log.read_text()
    return f"{outcome(settings, trainer)}; said {log.count(FAILED)} and {log.count(WORKS)} times"


@case("second trainer on one store in S3", "exit 5 naming the first; the first goes on: 200 records, each once")
def second_trainer(ground: Ground) -> str:
    config, settings = ground.settings(**ground.in_s3())
    send(settings, rows(100))
    first = Trainer(config)
    wait_until_consumed(settings, 100, first)
    second = Trainer(config, wait=False)
    code = second.wait()
    named = "naming the first" if f"pid {first.pid}" in second.log.read_text() else "WITHOUT the first's name"
    send(settings, rows(100, seed=1))
    wait_until_consumed(settings, 200, first)
    return f"exit {code} {named}; the first goes on: {outcome(settings, first)}"


@case("trainer stopped past its lease, and woken up", "exit 5: its lock is lost; the other: 300 records, each once")
def paused_writer(ground: Ground) -> str:
    config, settings = ground.settings(**ground.in_s3())
    send(settings, rows(100))
    first = Trainer(config)
    wait_until_consumed(settings, 100, first)
    os.kill(first.pid, signal.SIGSTOP)
    time.sleep(settings.store.lease_s)
    second = Trainer(config)
    send(settings, rows(100, seed=1))
    wait_until_consumed(settings, 200, second)
    os.kill(first.pid, signal.SIGCONT)
    send(settings, rows(100, seed=2))  # both learn them, and one can save
    code = first.wait()
    why = "its lock is lost" if "took over with fencing number 2" in first.log.read_text() else "FOR ANOTHER REASON"
    wait_until_consumed(settings, 300, second)
    store = open_store(settings.store)
    fences = [store.manifest(version).fence for version in store.versions()]
    order = "" if fences == sorted(fences) else f" OUT OF ORDER {fences}"
    return f"exit {code}: {why}; the other: {outcome(settings, second)}{order}"
