"""The README's tables, made from the code they describe: `python -m tests.readme_tables` writes them into README.md."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from service.metrics import ServiceMetrics
from trainer.config import TASK_DEFAULTS, Settings
from trainer.metrics import TrainerMetrics

README = Path(__file__).parent.parent / "README.md"
ALERTS = README.parent / "docker" / "alerts.yml"


def settings_table() -> str:
    lines = ["| setting | default | what it is |", "|---|---|---|"]
    lines += [f"| `{name}` | {default} | {text} |" for name, default, text in settings()]
    return "\n".join(lines)


def settings(model: type[BaseModel] = Settings, path: str = "") -> Iterator[tuple[str, str, str]]:
    for name, field in model.model_fields.items():
        key = path + (field.alias or name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from settings(field.annotation, f"{key}.")
        else:
            assert field.description, f"{key} has no description"
            table = TASK_DEFAULTS["classification"].get(path.removesuffix("."), {})
            of_classes = f"; `{json.dumps(table[name])}` for classes" if name in table else ""
            yield key, _default(field.get_default(call_default_factory=True)) + of_classes, field.description


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    return "none" if value is None else f"`{json.dumps(value)}`"


def metrics_table() -> str:
    lines = ["| metric | labels | from | what it is |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {labels} | {origin} | {text} |" for name, labels, origin, text in metrics()]
    return "\n".join(lines)


def metrics() -> Iterator[tuple[str, str, str, str]]:
    registries = {
        "trainer": TrainerMetrics().registry,
        "service": ServiceMetrics(lambda: None, lambda: 0, lambda: None).registry,
    }
    for origin, registry in registries.items():
        for collector in list(registry._collector_to_names):
            for family in collector.collect():
                name = family.name + ("_total" if family.type == "counter" else "")
                names = getattr(collector, "_labelnames", None) or getattr(family, "_labelnames", ())
                yield name, ", ".join(f"`{label}`" for label in names), origin, family.documentation


def alerts_table() -> str:
    """What to do about each alert, as Prometheus shows it: the README repeats it for those who have only the README."""
    lines = ["| alert | severity | after | what to do |", "|---|---|---|---|"]
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        for rule in group["rules"]:
            what = rule["annotations"]["runbook"]
            lines.append(f"| {rule['alert']} | {rule['labels']['severity']} | {rule.get('for', 'at once')} | {what} |")
    return "\n".join(lines)


def with_tables(text: str) -> str:
    for name, table in (("settings", settings_table()), ("metrics", metrics_table()), ("alerts", alerts_table())):
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)"
        text, count = re.subn(pattern, lambda m, table=table: f"{m[1]}\n{table}\n\n{m[2]}", text, flags=re.S)
        assert count == 1, f"README.md has no place for the table of {name}"
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
