from pathlib import Path

import pytest

from tests.trainer.stream import make_manifest, make_schema, make_settings, values
from trainer.batching import PartitionProgress
from trainer.checkpoint import check_same_topic
from trainer.errors import ConfigError, TopicChanged
from trainer.kafka_client import TopicDescription
from trainer.source import FileSource

SETTINGS = make_settings()
LINES = values(25)


@pytest.fixture
def source(tmp_path: Path) -> FileSource:
    path = tmp_path / "prices.jsonl"
    path.write_bytes(b"\n".join(LINES))
    return FileSource(path, make_schema(SETTINGS))


def test_a_file_is_one_partition_and_the_number_of_a_record_its_offset(source: FileSource) -> None:
    source.open({})
    records = [record for _ in range(3) for record in source.poll(10, 0.0)]
    assert [(record.partition, record.offset) for record in records] == [(0, n) for n in range(25)]
    assert [record.value for record in records] == LINES
    assert source.identity.partitions == (0,)


@pytest.mark.parametrize("begin", [0, 7, 24, 25, 99])
def test_it_goes_on_after_what_was_learned(source: FileSource, begin: int) -> None:
    source.open({0: PartitionProgress(next_offset=begin)})
    assert [record.offset for record in source.poll(100, 0.0)] == list(range(begin, 25))


@pytest.mark.parametrize("size", [1, 5, 10, 25, 26])
def test_it_is_exhausted_once_its_end_was_seen(source: FileSource, size: int) -> None:
    source.open({})
    seen = 0
    while not source.exhausted:
        seen += len(source.poll(size, 0.0))
    assert seen == 25
    assert source.poll(size, 0.0) == []


def test_an_absent_file_is_said_when_it_is_read(tmp_path: Path) -> None:
    source = FileSource(tmp_path / "absent.jsonl", make_schema(SETTINGS))
    source.open({})
    with pytest.raises(ConfigError, match=r"absent\.jsonl"):
        source.poll(1, 0.0)


def test_a_closed_file_gives_nothing(source: FileSource) -> None:
    source.open({})
    source.close()
    assert source.poll(5, 0.0) == []


@pytest.mark.parametrize(
    ("found", "named"),
    [
        (TopicDescription("cluster", "prices", "id", (0,)), ""),
        (TopicDescription(None, "prices", None, (0,)), ""),
        (TopicDescription("other", "prices", "id", (0,)), "cluster_id"),
        (TopicDescription("cluster", "sales", "id", (0,)), "topic"),
        (TopicDescription("cluster", "prices", "made again", (0,)), "topic_id"),
    ],
)
def test_offsets_of_another_topic_are_refused_by_what_differs(found: TopicDescription, named: str) -> None:
    manifest = make_manifest(SETTINGS, version=4, topic_id="id")
    if not named:
        check_same_topic(manifest, found)
        return
    with pytest.raises(TopicChanged, match=f"snapshot 4 has learned from {named} "):
        check_same_topic(manifest, found)
