"""The README tells the truth: its tables come from the code, its blocks run, its commands exist."""

import re
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from service.cli import app
from tests.readme_tables import README, with_tables
from trainer.config import load
from trainer.schema import FeatureSchema

TEXT = README.read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.S)
COMMANDS = typer.main.get_command(app).commands


def test_the_tables_are_those_of_the_code() -> None:
    assert with_tables(TEXT) == TEXT, "run: python -m tests.readme_tables"


@pytest.mark.parametrize("block", [text for language, text in BLOCKS if language == "toml"])
def test_each_configuration_can_be_loaded(block: str, tmp_path: Path) -> None:
    path = tmp_path / "orders.toml"
    path.write_text(block)
    settings = load(path)
    FeatureSchema.of(settings)


def test_the_configuration_for_a_topic_of_ones_own_is_ten_lines_or_so() -> None:
    block, *_ = [text for language, text in BLOCKS if language == "toml"]
    assert len(block.splitlines()) <= 12


@pytest.mark.parametrize("block", [text for language, text in BLOCKS if language == "python"])
def test_each_python_block_runs(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {})


def test_init_says_and_writes_what_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ((said, written),) = re.findall(r"```console\n(\$ tailstream init .*?)```.*?```text\n(.*?)```", TEXT, flags=re.S)
    for command in ("dataset diamonds diamonds.jsonl", said.splitlines()[0].removeprefix("$ tailstream ")):
        done = CliRunner().invoke(app, command.split())
        assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [line for line in said.splitlines() if not line.startswith("$")]
    text = Path("tailstream.toml").read_text()
    places = [text.index(part) for part in written.split("...\n") if part]
    assert places == sorted(places)
    load(Path("tailstream.toml"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_documented(command: str) -> None:
    assert f"tailstream {command}" in TEXT or f"make {command}" in TEXT


def test_every_command_mentioned_exists() -> None:
    assert set(re.findall(r"tailstream ([a-z][a-z-]+)", TEXT.replace("'tailstream", ""))) - {"is", "train"} <= set(
        COMMANDS
    )


def test_every_option_of_the_demo_is_documented() -> None:
    options = {name for parameter in COMMANDS["demo"].params for name in parameter.opts if name.startswith("--")}
    assert {option for option in options if f"`{option}`" not in TEXT} == set()


def test_every_make_target_mentioned_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (README.parent / "Makefile").read_text(), flags=re.M))
    assert set(re.findall(r"(?:`|\$ )make ([a-z-]+)", TEXT)) <= targets
