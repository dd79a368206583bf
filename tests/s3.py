"""A real S3 server of one's own: started, killed, and its objects reached as the files that they are on its disk."""

import signal
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any, Final

from service.broker import free_port
from trainer.config import StoreSettings

BUCKET: Final = "snapshots"
START_S: Final = 60.0


class S3Server:
    """A server, not yet started.

    Args:
        script: starts one: `SCRIPT PORT FOLDER BUCKET`, with the key `test` and the secret `testsecret`.
        folder: where its objects and its log go.
    """

    def __init__(self, script: str, folder: Path) -> None:
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._script = script
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def options(self) -> dict[str, str]:
        return {
            "endpoint": self.endpoint,
            "region": "us-east-1",
            "access_key_id": "test",
            "secret_access_key": "testsecret",
        }

    def settings(self, **changes: Any) -> StoreSettings:
        """A store that nobody has used yet."""
        prefix = f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}"
        return StoreSettings(**{"url": prefix, "options": self.options, "lease_s": 1.0, "interval_s": 0.05, **changes})

    def file(self, url: str) -> Path:
        """Where the server keeps an object."""
        return self._folder / "objects" / url.removeprefix("s3://")

    def start(self) -> None:
        command = [self._script, str(self.port), str(self._folder / "objects"), BUCKET]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        until = time.monotonic() + START_S
        while not self._answers():
            assert self._process.poll() is None, (self._folder / "log").read_text()[-2000:]
            assert time.monotonic() < until, "the S3 server did not start"
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.endpoint}/health", timeout=2):
                return True
        except (OSError, urllib.error.URLError):
            return False

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(30)
            self._process = None
