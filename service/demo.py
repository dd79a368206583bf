"""`tailstream demo`: a broker, a trainer, a service and a data set, started, watched and stopped together."""

import itertools
import json
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from service.broker import EmbeddedBroker, free_port
from service.children import Child
from service.serve import bind
from service.stories import STORIES, Story
from trainer.config import Settings, TaskName, load
from trainer.datasets import records
from trainer.dead_letter import HEADER_PREFIX
from trainer.errors import ConfigError, DemoError, SnapshotCorrupt, TailstreamError
from trainer.files import as_json
from trainer.kafka_client import Consumer, create_topic, describe_topic
from trainer.manifest import Manifest
from trainer.publish import publish
from trainer.schema import FeatureSchema
from trainer.snapshot import SnapshotStore, open_store

WATCH_S: Final = 0.2
ANSWER_S: Final = 30.0  # to wait for the first prediction once records have been learned
TRAINER_STOP_S: Final = 25.0
SERVICE_STOP_S: Final = 12.0
QUIET_S: Final = 2.0  # without a dead letter: all have been read


@dataclass(frozen=True)
class DemoOptions:
    """What `tailstream demo` can be told; see its `--help`."""

    task: TaskName = "regression"
    rows: int | None = None
    rate: float | None = None
    bootstrap_servers: str | None = None
    port: int = 8000
    data_dir: Path | None = None
    inject_bad: int = 0
    kill_trainer_at: int | None = None
    exit_when_done: bool = False
    json_file: Path | None = None


@dataclass
class Summary:
    """What the demo saw; `--json` writes it."""

    published: int = 0
    trained: int = 0
    dead_lettered: int = 0
    first_prediction_s: float | None = None  # since the command began
    mae_balance_0: float | None = None  # minutes, prequential, whole stream
    balanced_mae_balance_1: float | None = None
    accuracy_balance_0: float | None = None  # of classes
    macro_recall_balance_1: float | None = None
    samples_per_second: float = 0.0  # learned, from the first record sent to the last one learned
    restarts: int = 0
    orphans: int = 0


def run_demo(options: DemoOptions) -> Summary:
    """Runs the demo to its end: all records learned, then Ctrl-C (or at once with `exit_when_done`).

    Raises:
        ConfigError: an option cannot be used, a port is taken, or the extra `demo` is not installed.
        DemoError: something that it started did not start, or died.
    """
    began = time.monotonic()
    bind("127.0.0.1", options.port).close()  # a taken port is better heard of now
    summary = Summary()
    with ExitStack() as stack:
        folder = _data_folder(options.data_dir, stack)
        demo = _Demo(options, folder, summary, Console(stderr=False))
        try:
            demo.start(stack)
            demo.learn(began)
            demo.report()
            if not options.exit_when_done:
                demo.serve_on()
        except KeyboardInterrupt:
            demo.console.print("stopping")
        finally:
            stack.close()
            summary.orphans = demo.orphans()
    if options.json_file is not None:
        options.json_file.write_text(json.dumps(asdict(summary), indent=1) + "\n")
    return summary


class _Demo:
    """The parts of a running demo."""

    def __init__(self, options: DemoOptions, folder: Path, summary: Summary, console: Console) -> None:
        self.options = options
        self.story: Story = STORIES[options.task]
        self.folder = folder
        self.summary = summary
        self.console = console
        self._children: list[Child] = []
        self._broker: Child | None = None
        self._trainer: Child | None = None
        self._service: Child | None = None
        self._total = 0  # records to publish, once known
        self._first_instance: dict[str, Any] | None = None
        self._stop_publishing = threading.Event()
        self._publish_error: list[Exception] = []

    # Starting

    def start(self, stack: ExitStack) -> None:
        """Broker, trainer, service, publisher; each is stopped by the stack, in the reverse order."""
        if self.options.bootstrap_servers:
            servers = self.options.bootstrap_servers
            topic = f"tailstream-demo-{int(time.time())}"
        else:
            broker = EmbeddedBroker(self.folder / "broker.log")
            stack.callback(broker.stop)
            self._broker = self._watch(broker.process)
            servers, topic = broker.bootstrap_server, self.story.topic
        self.config = self.folder / "tailstream.toml"
        self.config.write_text(config_text(self.options.task, servers, topic, self.folder, self.options.port))
        self.settings = load(self.config)
        create_topic(self.settings.kafka, topic, partitions=1)  # one: the order is the data set's
        self._trainer = self._start_trainer()
        stack.callback(self._stop_trainer)
        self._service = self._child("service", "service", "serve")
        stack.callback(self._service.stop, SERVICE_STOP_S)
        publisher = threading.Thread(target=self._publish, name="publisher", daemon=True)
        publisher.start()
        stack.callback(publisher.join, 10.0)
        stack.callback(self._stop_publishing.set)

    def _child(self, name: str, *arguments: str) -> Child:
        command = [sys.executable, "-m", *arguments, "--config", str(self.config)]
        return self._watch(Child(name, command, self.folder / f"{name}.log", {}))

    def _start_trainer(self) -> Child:
        return self._child("trainer", "trainer")

    def _stop_trainer(self) -> None:
        if self._trainer is not None:
            self._trainer.stop(TRAINER_STOP_S)

    def _watch(self, child: Child) -> Child:
        self._children.append(child)
        return child

    def orphans(self) -> int:
        """Processes that should have ended and have not."""
        return sum(child.leftovers() for child in self._children)

    # Publishing

    def _publish(self) -> None:
        try:
            schema = FeatureSchema.of(self.settings)
            publish(
                self.settings, schema, self._values(), records_per_s=self.options.rate, progress=self._note_published
            )
        except Exception as error:  # shown by the thread that watches
            self._publish_error.append(error)

    def _note_published(self, sent: int) -> None:
        self.summary.published = sent

    def _values(self) -> Iterator[bytes]:
        frame = self.story.frame().iloc[: self.options.rows]
        self._total = len(frame) + self.options.inject_bad
        every = max(1, len(frame) // self.options.inject_bad) if self.options.inject_bad else 0
        bad = itertools.islice(itertools.cycle(self.story.bad), self.options.inject_bad)
        for number, record in enumerate(records(frame)):
            if self._stop_publishing.is_set():
                return
            if every and number % every == 0:
                yield from itertools.islice(bad, 1)
            if self._first_instance is None:
                self._first_instance = self.story.instance(record)
            yield as_json(record)
        yield from bad

    # Watching

    def learn(self, began: float) -> None:
        """Watches until everything published has been learned or set aside."""
        kill_at = self.options.kill_trainer_at
        store = open_store(self.settings.store)
        with Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
        ) as progress:
            sent = progress.add_task("published", total=None, note="")
            learned = progress.add_task("learned", total=None, note="")
            learning_since: float | None = None
            while True:
                self._check()
                manifest = _newest(store)
                done = 0 if manifest is None else _consumed(manifest)
                if self.summary.published and learning_since is None:
                    learning_since = time.monotonic()
                if self.summary.first_prediction_s is None and self._first_instance is not None:
                    self._try_first_prediction(began, progress)
                self._show(progress, sent, learned, manifest, done)
                if kill_at is not None and done >= kill_at:
                    kill_at = None
                    self._kill_trainer()
                if self._total and done >= self._total and manifest is not None:
                    break
                time.sleep(WATCH_S)
            elapsed = time.monotonic() - (learning_since or began)
        self._finish(manifest, elapsed)
        deadline = time.monotonic() + ANSWER_S
        while self.summary.first_prediction_s is None and time.monotonic() < deadline:
            self._check()
            self._try_first_prediction(began, None)
            time.sleep(WATCH_S)
        if self.summary.first_prediction_s is None:
            assert self._service is not None
            raise DemoError(f"the service has not answered; its log ends:\n{self._service.tail()}")

    def _check(self) -> None:
        if self._publish_error:
            error = self._publish_error[0]
            raise error if isinstance(error, TailstreamError) else DemoError(f"publishing failed: {error!r}")
        for child in (self._broker, self._trainer, self._service):
            if child is not None:
                child.check()

    def _kill_trainer(self) -> None:
        assert self._trainer is not None
        self._trainer.kill()
        self.console.print("[bold]killed the trainer (SIGKILL)[/]; starting it again, it goes on from its snapshot")
        self._trainer = self._start_trainer()
        self.summary.restarts += 1

    def _try_first_prediction(self, began: float, progress: Progress | None) -> None:
        with suppress(OSError, urllib.error.HTTPError):
            _post(f"{self._url}/predict", self._first_instance)
            self.summary.first_prediction_s = round(time.monotonic() - began, 2)
            self.console.print(f"first prediction after {self.summary.first_prediction_s:.1f} s")
            self.console.print(f"page:    {self._url}/")
            line = curl_line(self._url, self._first_instance or {})
            # Not wrapped and not interpreted, so that it can be copied.
            self.console.print(f"predict: {line}", soft_wrap=True, markup=False, highlight=False)

    def _show(self, progress: Progress, sent: TaskID, learned: TaskID, manifest: Manifest | None, done: int) -> None:
        total = self._total or None
        progress.update(sent, completed=self.summary.published, total=total)
        note = ""
        if manifest is not None:
            note = self.story.note(manifest.metrics["whole"])
        progress.update(learned, completed=done, total=total, note=note)

    # The end

    def _finish(self, manifest: Manifest, elapsed: float) -> None:
        summary = self.summary
        summary.published = self._total
        summary.trained = sum(part.trained for part in manifest.partitions.values())
        summary.samples_per_second = round(summary.trained / elapsed, 1)
        for field, (answer, metric) in self.story.summary.items():
            value = manifest.metrics["whole"].get(answer, {}).get(metric)
            setattr(summary, field, None if value is None else round(value, 4))
        expected = sum(part.rejected for part in manifest.partitions.values())
        summary.dead_lettered = count_dead_letters(self.settings, expected)
        self._last = manifest

    def report(self) -> None:
        """Prints the prequential metrics, and where everything is."""
        whole = self._last.metrics["whole"]
        story = self.story
        table = Table(title=story.title)
        for heading in ("answer", *story.metrics.values()):
            table.add_column(heading, justify="left" if heading == "answer" else "right")
        for answer, name in story.answers.items():
            found = whole.get(answer, {})
            cells = ("-" if (value := found.get(key)) is None else f"{value:{story.digits}}" for key in story.metrics)
            table.add_row(name, *cells)
        self.console.print(table)
        summary = self.summary
        self.console.print(
            f"published {summary.published} = learned {summary.trained} + dead letters {summary.dead_lettered}, "
            f"{summary.samples_per_second:.0f} rows a second"
        )

    def serve_on(self) -> None:
        """Goes on serving until Ctrl-C, or until a part dies."""
        self.console.print(f"serving at {self._url}/ until Ctrl-C; configuration, snapshots and logs: {self.folder}")
        while True:
            self._check()
            time.sleep(WATCH_S)

    @property
    def _url(self) -> str:
        return f"http://127.0.0.1:{self.options.port}"


def config_text(task: TaskName, servers: str, topic: str, folder: Path, port: int) -> str:
    """The demo's configuration, as a user would write it."""
    story = STORIES[task]
    features = "\n".join(f'{name} = "{kind}"' for name, kind in story.features.items())
    named = "" if task == "regression" else f'task = "{task}"\n\n'
    return f"""\
{named}[kafka]
bootstrap_servers = {json.dumps(servers.split(","))}
topic = "{topic}"

[schema]
{story.schema}
[schema.features]
{features}

[store]
url = {json.dumps(str(folder / "snapshots"))}

[trainer]
metrics_port = {free_port()}

[service]
port = {port}
"""


def curl_line(url: str, instance: dict[str, Any]) -> str:
    """A command that asks for a prediction and works as printed."""
    body = json.dumps(instance).replace("'", "'\\''")
    return f"curl -s {url}/predict -H 'content-type: application/json' -d '{body}'"


def count_dead_letters(settings: Settings, expected: int) -> int:
    """Distinct rejected records in the dead-letter topic, told apart by partition and offset in their headers."""
    if not expected:
        return 0
    kafka = settings.kafka.model_copy(update={"topic": settings.kafka.dead_letters})
    topic = describe_topic(kafka, kafka.topic)
    consumer = Consumer(kafka)
    try:
        consumer.assign(dict.fromkeys(topic.partitions))
        seen: set[tuple[bytes, bytes]] = set()
        quiet_since = time.monotonic()
        while time.monotonic() - quiet_since < QUIET_S and len(seen) < expected:
            for record in consumer.poll(500, 0.2):
                headers = dict(record.headers)
                seen.add((headers[f"{HEADER_PREFIX}partition"], headers[f"{HEADER_PREFIX}offset"]))
                quiet_since = time.monotonic()
        return len(seen)
    finally:
        consumer.close()


def _data_folder(wanted: Path | None, stack: ExitStack) -> Path:
    if wanted is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tailstream-demo-")))
    wanted.mkdir(parents=True, exist_ok=True)
    if any(wanted.iterdir()):
        raise ConfigError(f"--data-dir: {wanted} is not empty; a demo begins anew, so give it an empty folder")
    return wanted.resolve()


def _newest(store: SnapshotStore) -> Manifest | None:
    versions = store.versions()
    with suppress(SnapshotCorrupt):  # removed between the two looks
        return store.manifest(versions[-1]) if versions else None
    return None


def _consumed(manifest: Manifest) -> int:
    return sum(part.trained + part.rejected + part.skipped for part in manifest.partitions.values())


def _post(url: str, body: dict[str, Any] | None) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=5) as answer:
        return json.load(answer)
