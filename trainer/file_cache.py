"""Files that were fetched from far away, kept on a local disk by the digest of their content."""

import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final

import structlog

KEPT: Final = 8  # files; the newest model, and those that were asked for by version

log = structlog.get_logger()


class FileCache:
    """A folder of files; several processes may share it, and nothing in it is believed.

    Args:
        folder: made when the first file comes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._said = False

    def get(self, sha256: str) -> bytes | None:
        """The content with a digest; None where it is not here, or is not what it was."""
        path = self._folder / sha256
        try:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != sha256:
                path.unlink(missing_ok=True)
                return None
            os.utime(path)
        except OSError:
            return None
        return data

    def put(self, sha256: str, data: bytes) -> None:
        """Keeps a content; without it things are slower, so a disk that refuses is only said, once."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self._folder)
            try:
                with open(handle, "wb") as file:
                    file.write(data)
                os.replace(temporary, self._folder / sha256)
            except BaseException:
                with suppress(OSError):
                    os.unlink(temporary)
                raise
            for old in sorted(self._folder.iterdir(), key=_age)[KEPT:]:
                old.unlink(missing_ok=True)
        except OSError as error:
            if not self._said:
                self._said = True
                log.warning("fetched models are not kept on this disk", folder=str(self._folder), reason=str(error))


def _age(path: Path) -> float:
    try:
        return -path.stat().st_mtime
    except OSError:
        return 0.0
