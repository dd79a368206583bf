"""The configuration file that `tailstream init` writes: what was chosen and why, and every other setting's default."""

import re
from collections.abc import Iterable
from typing import Any, Final

import tomlkit
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from trainer.config import TASK_DEFAULTS, Settings, TaskName
from trainer.proposal import Feature, Proposal

WIDEST: Final = 44  # columns that a setting may take before its comment leaves the others' column
TOPIC_LETTERS: Final = re.compile(r"[^A-Za-z0-9._-]+")
LONGEST_TOPIC: Final = 249


def config_text(proposal: Proposal, source: str, seen: str) -> str:
    """A whole configuration, ready to use, in which whatever is not there to be changed is a comment.

    Args:
        proposal: label, features and remarks.
        source: name of the data file, for which the topic is called.
        seen: how much of the file was looked at, in a sentence.
    """
    task = [
        line for name, line in _commented(Settings, proposal.task) if name != "task" or proposal.task == "regression"
    ]
    if proposal.task != "regression":
        task.insert(0, _setting("task", proposal.task, "the label is a class"))
    blocks = [_head(proposal, seen), _aligned(task), _kafka(source), _schema(proposal), _features(proposal)]
    tables = (name for name, field in Settings.model_fields.items() if _is_table(field.annotation))
    blocks += [
        [f"[{name}]", *_aligned(_rest(name, set(), proposal.task))]
        for name in tables
        if name not in ("kafka", "record_schema")
    ]
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def topic_name(source: str) -> str:
    """A topic's name made from a file's: letters, digits, dots, hyphens and underscores."""
    stem = re.sub(r"(\.(csv|tsv|jsonl?|ndjson|txt|gz))+$", "", source, flags=re.IGNORECASE)
    return TOPIC_LETTERS.sub("-", stem).strip("-.")[:LONGEST_TOPIC] or "records"


def _head(proposal: Proposal, seen: str) -> list[str]:
    lines = [f"# Written by tailstream init. {_in_a_line(seen)}"]
    if proposal.notes:
        lines += ["#", "# To look at:", *(f"# - {_in_a_line(note)}." for note in proposal.notes)]
    return [*lines, "#", "# A line that begins with # says what holds without it."]


def _kafka(source: str) -> list[str]:
    rows = [
        _setting("bootstrap_servers", ["127.0.0.1:9092"], "your brokers, host:port"),
        _setting("topic", topic_name(source), "where the records will come from"),
    ]
    return ["[kafka]", *_aligned([*rows, *_rest("kafka", {"bootstrap_servers", "topic"})])]


def _schema(proposal: Proposal) -> list[str]:
    rows = [_setting("label", proposal.label, proposal.label_comment)]
    if proposal.id is None:
        rows.append(("# id: no field has another value in each row", ""))
    else:
        rows.append(_setting("id", proposal.id, proposal.id_comment))
    if proposal.time is None:
        rows.append(("# time: no field has a time in ISO 8601 or milliseconds; that of the Kafka record is taken", ""))
    else:
        rows.append(_setting("time", proposal.time, proposal.time_comment))
    rest = _rest("record_schema", {"label", "id", "time", "features"}, proposal.task)
    return ["[schema]", *_aligned(rows), *_aligned(rest)]


def _features(proposal: Proposal) -> list[str]:
    used = [feature for feature in proposal.features if not feature.left_out and feature.settings]
    others = [feature for feature in proposal.features if feature.left_out or not feature.settings]
    lines = ["[schema.features]", *_aligned(_feature(feature) for feature in used)]
    return lines + (["# Left out:", *_aligned(map(_feature, others))] if others else [])


def _feature(feature: Feature) -> tuple[str, str]:
    comment = "; ".join(part for part in (feature.left_out, feature.comment) if part)
    if feature.settings is None:
        return f"# {tomlkit.key(_in_a_line(feature.name)).as_string()}", comment
    given = feature.settings.model_dump(exclude_none=True)
    value = given["kind"] if len(given) == 1 else given
    left, comment = _setting(feature.name, value, comment)
    return (f"# {left}" if feature.left_out else left), comment


def _rest(table: str, without: set[str], task: TaskName = "regression") -> list[tuple[str, str]]:
    """The settings of a table that stay as they are."""
    annotation = Settings.model_fields[table].annotation
    assert isinstance(annotation, type)
    assert issubclass(annotation, BaseModel)
    return [line for name, line in _commented(annotation, task, table) if name not in without]


def _commented(model: type[BaseModel], task: TaskName, table: str = "") -> Iterable[tuple[str, tuple[str, str]]]:
    """The settings of a table with the task's defaults, each a comment that is TOML once it is none any more."""
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        default = TASK_DEFAULTS[task].get(table, {}).get(name, default)
        if default is PydanticUndefined or isinstance(default, BaseModel):
            continue
        description = field.description or ""
        if default is None:
            yield name, (f"# {name}: none", description)
        else:
            left, comment = _setting(name, default, description)
            yield name, (f"# {left}", comment)


def _setting(key: str, value: Any, comment: str) -> tuple[str, str]:
    item = tomlkit.item(value)
    if isinstance(value, dict):
        item = tomlkit.inline_table()
        item.update(value)
    return f"{tomlkit.key(key).as_string()} = {item.as_string()}", comment


def _aligned(rows: Iterable[tuple[str, str]]) -> list[str]:
    rows = list(rows)
    width = max((len(left) for left, _ in rows if len(left) <= WIDEST), default=0)
    return [f"{left:<{width}}  # {_in_a_line(comment)}".rstrip() if comment else left for left, comment in rows]


def _in_a_line(text: str) -> str:
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _is_table(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
