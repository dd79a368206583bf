"""Each fault as a test, where a script that starts an Apache Kafka is named, chaos too; fuzzing in short on any."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults import CASES, Case, Ground, chaos, fuzz
from tests.faults.case import S3_SCRIPT
from tests.faults.place import SCRIPT


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    script = os.environ.get(SCRIPT)
    if not script:
        pytest.skip(f"nothing starts a broker to ill-treat: set {SCRIPT}")
    ground = Ground(script, tmp_path_factory.mktemp("faults"))
    yield ground
    ground.close()


@pytest.mark.kafka
@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_comes_of_a_fault_is_what_should(case: Case, ground: Ground) -> None:
    assert case.run(ground) == case.expected


@pytest.mark.kafka
@pytest.mark.timeout(300)
@pytest.mark.parametrize("partitions", [1, 4])
def test_killed_trainers_end_with_the_weights_of_an_undisturbed_one(ground: Ground, partitions: int) -> None:
    outcome = chaos.run(ground, ground.kafka.server, kills=4, records=4800, partitions=partitions)
    assert outcome.fine, outcome
    assert outcome.kills == 4


@pytest.mark.kafka
@pytest.mark.s3
@pytest.mark.timeout(300)
@pytest.mark.skipif(S3_SCRIPT not in os.environ, reason=f"nothing starts an S3 server: set {S3_SCRIPT}")
def test_the_same_with_snapshots_in_s3(ground: Ground) -> None:
    outcome = chaos.run(ground, ground.kafka.server, kills=3, records=3200, partitions=1, in_s3=True)
    assert outcome.fine, outcome
    assert outcome.kills == 3


@pytest.mark.kafka  # the embedded broker is wrong about where the dead letters end
def test_every_strange_record_is_trained_or_a_dead_letter_or_skipped(
    real_kafka: str, write_config: Callable[..., Path]
) -> None:
    count = fuzz.run(write_config(real_kafka, more="batch.max_wait_s = 0.05"), 1500)
    assert count.fine, count
    assert min(count.trained, count.dead_lettered, count.skipped) > 50
