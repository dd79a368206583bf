import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

import trainer.cli

CONFIG = """\
[kafka]
bootstrap_servers = ["127.0.0.1:1"]
topic = "prices"
[schema]
label = "price"
[schema.features]
size = "numeric"
"""
COMMANDS = ("init", "evaluate", "check", "publish", "train", "dataset")


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    app = typer.Typer()
    trainer.cli.register(app)
    return app


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tailstream.toml"
    path.write_text(CONFIG)
    return path


def run(app: typer.Typer, *arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def python(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=100)


def test_every_command_is_listed_and_says_what_it_does(app: typer.Typer) -> None:
    whole = run(app, "--help")
    assert whole.exit_code == 0
    for command in COMMANDS:
        assert command in whole.output
        one = run(app, command, "--help")
        assert one.exit_code == 0
        first_line = (getattr(trainer.cli, command).__doc__ or "").split(".")[0].split(",")[0]
        assert first_line[:40] in " ".join(one.output.split())


def test_help_needs_none_of_the_heavy_packages() -> None:
    done = python(
        "-c",
        "import sys, trainer.cli, typer; app = typer.Typer(); trainer.cli.register(app)\n"
        "print(sorted({'torch', 'kafka', 'pandas', 'numpy', 'pydantic'} & set(sys.modules)))",
    )
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("command", ["train", "check"])
def test_an_unknown_key_ends_a_command_with_its_name_and_exit_code_2(
    app: typer.Typer, config: Path, command: str
) -> None:
    config.write_text(CONFIG + "[learner]\nlearning_rate = 1\n")
    done = run(app, command, "--config", config)
    assert done.exit_code == 2
    assert f"error: {config}" in done.stderr
    assert "learner.learning_rate: unknown key" in done.stderr
    assert "Traceback" not in done.output


def test_python_m_trainer_is_the_same_as_the_command_train(config: Path) -> None:
    config.write_text(CONFIG + "[learner]\nlearning_rate = 1\n")
    done = python("-m", "trainer", "--config", config)
    assert done.returncode == 2
    assert "learner.learning_rate: unknown key" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_option_or_file_is_said(app: typer.Typer, tmp_path: Path) -> None:
    assert run(app, "train").exit_code == 2
    assert "--config" in run(app, "train").output
    absent = run(app, "train", "--config", tmp_path / "absent.toml")
    assert absent.exit_code == 2
    assert "absent.toml" in absent.output


def test_check_looks_at_all_it_can_without_a_broker_and_says_what_to_do(
    config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TAILSTREAM_STORE__URL", str(tmp_path / "store"))
    command = "import sys, typer, trainer.cli; app = typer.Typer(); trainer.cli.register(app); app(sys.argv[1:])"
    done = python("-c", command, "check", "--config", config)
    assert done.returncode == 1, done.stderr
    lines = {line[5:17].strip(): line for line in done.stdout.splitlines()}
    assert [line[:4].strip() for line in lines.values()] == ["ok", *["FAIL"] * 4, "ok", "FAIL"]
    assert "127.0.0.1:1" in lines["broker"]
    assert "kafka.bootstrap_servers" in lines["broker"]
    assert "no broker" in lines["topic"]
    assert str(tmp_path / "store") in lines["store"]


def records(path: Path) -> Sequence[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_dataset_writes_as_many_records_as_it_says(app: typer.Typer, tmp_path: Path) -> None:
    out = tmp_path / "diamonds.jsonl"
    done = run(app, "dataset", "diamonds", out)
    assert done.exit_code == 0, done.output
    assert done.stdout == f"wrote 53940 records to {out}\n"
    written = records(out)
    assert len(written) == 53_940
    assert {"diamond_id", "carat", "cut", "price"} <= set(written[0])


def test_dataset_refuses_a_name_or_place_it_does_not_know(app: typer.Typer, tmp_path: Path) -> None:
    assert run(app, "dataset", "rubies", tmp_path / "out.jsonl").exit_code == 2
    done = run(app, "dataset", "portal", tmp_path / "absent" / "out.jsonl")
    assert done.exit_code == 2
    assert "out.jsonl cannot be written" in done.stderr


def test_the_documented_exit_codes_of_train_are_those_of_the_errors() -> None:
    from trainer.errors import ConfigError, SnapshotError, SourceError
    from trainer.process import ABORTED, OVERDUE

    text = " ".join((trainer.cli.train.__doc__ or "").split())
    for code, what in [
        (ConfigError.exit_code, "configuration"),
        (OVERDUE, "the stop took longer"),
        (SourceError.exit_code, "Kafka"),
        (SnapshotError.exit_code, "snapshots"),
        (ABORTED, "a second signal"),
    ]:
        assert f"{code} {what}" in text
