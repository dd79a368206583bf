"""Objects under a URL, s3://, gs:// or az://, by one client that only this file knows; its errors turned into ours."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final, NamedTuple

from trainer.errors import ConfigError, StoreUnavailable

RETRIES: Final = 8  # of a request that is refused for now (5xx, no connection), with growing pauses
RETRY_S: Final = timedelta(seconds=5)  # and for no longer than this
REQUEST_S: Final = timedelta(seconds=20)  # a hung server is one that is away; 5 MB go in one request
CONNECT_S: Final = timedelta(seconds=3)
NO_BUCKET: Final = ("NoSuchBucket", "ContainerNotFound")


class Tag(NamedTuple):
    """Tells contents of one object apart: S3 and Azure compare the first, Google the second."""

    e_tag: str | None
    version: str | None


class Found(NamedTuple):
    """An object, and the tag that its content has."""

    data: bytes
    tag: Tag


class Objects:
    """Reads and writes objects; each request is tried again while the store is away, for some seconds.

    Args:
        url: of the folder, for instance `s3://bucket/prefix`.
        options: of the client, as they are; without them it looks into the environment (AWS_...).

    Raises:
        ConfigError: the client is not installed, or does not know the URL or an option.
    """

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        try:
            import obstore
            from obstore.exceptions import BaseError
            from obstore.store import from_url
        except ImportError:
            raise ConfigError(f"store.url = {url!r} needs a client: pip install 'tailstream[s3]'") from None
        self.url = url
        self._obstore: Any = obstore
        given = {name.lower(): str(value) for name, value in options.items()}
        try:
            # Plain HTTP is refused by default; a URL that says http:// asks for it.
            endpoint = next((given[name] for name in given if "endpoint" in name), None) or _endpoint_of_environment()
            open_url: Any = from_url
            self._store = open_url(
                url,
                config=given,
                client_options={
                    "timeout": REQUEST_S,
                    "connect_timeout": CONNECT_S,
                    "allow_http": endpoint.startswith("http://"),
                },
                retry_config={"max_retries": RETRIES, "retry_timeout": RETRY_S},
            )
        except (BaseError, ValueError, TypeError) as error:
            raise ConfigError(f"store.url = {url!r} with store.options cannot be used: {_first_line(error)}") from error

    def get(self, key: str) -> Found | None:
        """An object; None where there is none.

        Raises:
            StoreUnavailable: nobody can say.
        """
        return self._get(key, {})

    def get_if_changed(self, key: str, tag: Tag) -> Found | None:
        """An object that has another tag by now; the same one is not sent.

        Raises:
            FileNotFoundError: there is none any more.
            StoreUnavailable: nobody can say.
        """
        try:
            found = self._get(key, {"if_none_match": tag.e_tag} if tag.e_tag else {})
        except self._obstore.exceptions.NotModifiedError:
            return None
        if found is None:
            raise FileNotFoundError(self.at(key))
        return found

    def _get(self, key: str, condition: dict[str, str]) -> Found | None:
        with self._explained(key):
            try:
                answer = self._obstore.get(self._store, key, options=condition)
                return Found(bytes(answer.bytes()), _tag(answer.meta))
            except FileNotFoundError as error:
                if not _is_absent(error):
                    raise
                return None

    def put(self, key: str, data: bytes) -> None:
        """Writes an object, whatever was there; whoever reads sees the old one or the new one.

        Raises:
            StoreUnavailable: it may be there or not.
        """
        with self._explained(key):
            self._obstore.put(self._store, key, data)

    def replace(self, key: str, data: bytes, tag: Tag | None) -> Tag | None:
        """Writes an object if the one there still has a tag, or with None if there is none.

        Returns:
            The tag that it has now; None where another was there.

        Raises:
            StoreUnavailable: it may be there or not.
        """
        with self._explained(key):
            try:
                mode: Any = "create"
                if tag is not None:
                    mode = {name: value for name, value in tag._asdict().items() if value is not None}
                done = self._obstore.put(self._store, key, data, mode=mode, use_multipart=False)
            except (self._obstore.exceptions.AlreadyExistsError, self._obstore.exceptions.PreconditionError):
                return None
            return _tag(done)

    def delete(self, keys: Sequence[str]) -> None:
        """Removes objects; one that is not there is fine.

        Raises:
            StoreUnavailable: some may still be there.
        """
        if keys:
            with self._explained(keys[0]):
                try:
                    self._obstore.delete(self._store, list(keys))
                except FileNotFoundError as error:  # a disk says so, an object store does not
                    if not _is_absent(error):
                        raise

    def list(self) -> list[str]:
        """Keys of all objects.

        Raises:
            StoreUnavailable: they cannot be listed.
        """
        with self._explained(""):
            return [found["path"] for found in self._obstore.list(self._store).collect()]

    def at(self, key: str) -> str:
        """Where an object lies, for messages."""
        return f"{self.url.rstrip('/')}/{key}"

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        exceptions = self._obstore.exceptions
        try:
            yield
        except FileNotFoundError as error:
            if _code(error) in NO_BUCKET:
                raise StoreUnavailable(
                    f"{self.url}: there is no such bucket ({_reason(error)}): make it, or correct store.url"
                ) from error
            raise self._refused(key, error) from error
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
            raise self._refused(key, error) from error
        except exceptions.NotModifiedError:
            raise
        except exceptions.BaseError as error:
            raise StoreUnavailable(f"{self.at(key)}: the store cannot be reached ({_reason(error)})") from error

    def _refused(self, key: str, error: BaseException) -> StoreUnavailable:
        return StoreUnavailable(
            f"{self.at(key)}: the store does not let us in ({_reason(error)}): check the credentials (store.options, "
            "or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) and what they may do"
        )


def _tag(described: Mapping[str, Any]) -> Tag:
    return Tag(described["e_tag"], described["version"])


def _endpoint_of_environment() -> str:
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    return next((os.environ[name] for name in names if name in os.environ), "")


def _is_absent(error: FileNotFoundError) -> bool:
    """Whether there is no such object; there may be no such bucket, or no such user, as well."""
    return _code(error) in (None, "NoSuchKey", "BlobNotFound")


def _code(error: BaseException) -> str | None:
    found = re.search(r"<Code>(.*?)</Code>", str(error), re.DOTALL)
    return None if found is None else found[1]


def _reason(error: BaseException) -> str:
    """What the store said, without the client's own account of the request."""
    code, message = _code(error), re.search(r"<Message>(.*?)</Message>", str(error), re.DOTALL)
    if code is None:
        return _first_line(error)
    return code if message is None else f"{code}: {message[1].strip().rstrip('.')}"


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].strip().rstrip(".")
