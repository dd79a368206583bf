"""What a fault is: something done to a real trainer, what must come of it, and what came of it."""

import os
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.conftest import BASIC, set_in
from tests.rig import Kafka
from tests.s3 import S3Server
from trainer.config import Settings, load

S3_SCRIPT: Final = "TAILSTREAM_TEST_S3_SERVER"


class Ground:
    """A folder, a broker when asked for, and configurations for trainers."""

    def __init__(self, script: str, folder: Path) -> None:
        self.script = script
        self.folder = folder
        self._kafka: Kafka | None = None
        self._s3: S3Server | None = None
        self._at_the_end: list[Callable[[], None]] = []

    @property
    def kafka(self) -> Kafka:
        """A broker that runs; cases may kill it, and leave it running."""
        if self._kafka is None:
            self._kafka = Kafka(self.script, self.folder / "kafka")
            self._kafka.start()
        return self._kafka

    @property
    def s3(self) -> S3Server:
        """An S3 server that runs; cases may kill it, and leave it running."""
        if self._s3 is None:
            self._s3 = S3Server(os.environ[S3_SCRIPT], self.folder / "s3")
            self._s3.start()
        return self._s3

    def in_s3(self) -> dict[str, str]:
        """What `config` is to lay over, for a store of its own in S3."""
        store = self.s3.settings()
        options = ", ".join(f'{name} = "{value}"' for name, value in store.options.items())
        return {
            "store__url": f'"{store.url}"',
            "store__options": f"{{{options}}}",
            "store__lease_s": f"{store.lease_s}",
        }

    def config(self, server: str | None = None, *, topic: str | None = None, **more: Any) -> Path:
        """A configuration in a folder of its own; `table__key=value` lays over what is in it, as TOML text."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        topic = topic or f"faults-{uuid.uuid4().hex[:12]}"
        text = BASIC.format(server=server or self.kafka.server, topic=topic, store=folder / "snapshots")
        for key, value in {"batch__max_wait_s": "0.05", **more}.items():
            table, _, name = key.rpartition("__")
            text = set_in(text, table, name, value)
        path = folder / "trainer.toml"
        path.write_text(text)
        return path

    def settings(self, server: str | None = None, **more: Any) -> tuple[Path, Settings]:
        path = self.config(server, **more)
        return path, load(path)

    def on_close(self, act: Callable[[], None]) -> None:
        self._at_the_end.append(act)

    def close(self) -> None:
        for act in self._at_the_end:
            act()
        if self._kafka is not None:
            self._kafka.kill()
        if self._s3 is not None:
            self._s3.kill()


class Case(NamedTuple):
    name: str
    expected: str
    run: Callable[[Ground], str]  # does it, and says what was seen


CASES: Final[list[Case]] = []


def case(name: str, expected: str) -> Callable[[Callable[[Ground], str]], Callable[[Ground], str]]:
    """Notes a function as a case; it says what it saw, and that must be `expected`."""

    def note(run: Callable[[Ground], str]) -> Callable[[Ground], str]:
        CASES.append(Case(name, expected, run))
        return run

    return note
