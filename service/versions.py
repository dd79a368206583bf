"""The versions that the store keeps: which there are, answers by any of them, and which one the services stay with."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Final, TypeVar

import structlog
from fastapi import APIRouter, Depends, Path, Request
from pydantic import BaseModel, ConfigDict, Field

from service.predictor import Predictor, load_predictor
from service.problems import FOREIGN, NO_SUCH_VERSION, OVERLOADED, STORE, UNUSABLE_VERSION, Problem, described
from service.watcher import Watcher
from trainer.config import Settings
from trainer.errors import SnapshotCorrupt, SnapshotError, TailstreamError
from trainer.manifest import Manifest
from trainer.snapshot import SnapshotStore
from trainer.storage import SnapshotKey

KEPT_LOADED: Final = 4  # models of asked versions that stay in memory
MOST_WAITING: Final = 64  # requests that wait for the store; a load takes some tens of milliseconds
LARGEST_VERSION: Final = 2**53 - 1  # what every JSON reader knows exactly

T = TypeVar("T")
VersionNumber = Annotated[int, Field(ge=1, le=LARGEST_VERSION)]

log = structlog.stdlib.get_logger(__name__)


class KeptModel(BaseModel):
    """A version that the store keeps."""

    version: int
    created_s: float = Field(description="When it was written, seconds since the epoch.")
    healthy: bool = Field(description="Whether its recent error is better than a constant answer's.")
    samples: int = Field(description="Rows trained on.")
    train_loss: float | None
    mae: float | None = Field(description="Recent mean absolute error at balance 0, label units.")
    balanced_mae: float | None = Field(description="Recent mean absolute error over label regions alike, at balance 1.")
    accuracy: float | None = Field(description="Recent share of rows answered right at balance 0, of classes.")
    macro_recall: float | None = Field(description="Recent mean recall over classes at balance 1.")
    bytes: int = Field(description="Size of all its files.")
    copy_of: int | None = Field(description="The version that a rollback went back to.")


class ModelsResponse(BaseModel):
    """What the store keeps, from the newest."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "in_use": 41,
                    "pinned": 41,
                    "models": [
                        {
                            "version": 42,
                            "created_s": 1767225600.5,
                            "healthy": True,
                            "samples": 327346,
                            "train_loss": 0.61,
                            "mae": 11.5,
                            "balanced_mae": 24.7,
                            "accuracy": None,
                            "macro_recall": None,
                            "bytes": 2097152,
                            "copy_of": None,
                        }
                    ],
                }
            ]
        }
    )

    in_use: int | None = Field(description="The version that answers here now; it may have left the store since.")
    pinned: int | None = Field(description="The version that every service stays with, null to follow the newest.")
    models: list[KeptModel]


class ActivatedResponse(BaseModel):
    """What every service of the store is to answer with."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"pinned": 41, "in_use": 42}]})

    pinned: int | None = Field(description="The version to stay with, null to follow the newest.")
    in_use: int | None = Field(description="The version that answered here so far; it follows within a poll.")


class Versions:
    """Reads and pins versions in one thread of its own: the event loop never waits for a disk.

    Args:
        store: where they lie.
        settings: of the model that they must be.
    """

    def __init__(self, store: SnapshotStore, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        self._loaded: OrderedDict[SnapshotKey, Predictor] = OrderedDict()  # the least recently asked first
        self._listed: dict[SnapshotKey, KeptModel] = {}
        self._waiting = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="versions")

    def close(self) -> None:
        """Waits for what runs in the thread."""
        self._thread.shutdown(cancel_futures=True)

    async def predictor(self, version: int) -> Predictor:
        """The model of a version.

        Raises:
            Problem: there is no such version, it is damaged or of another model, or too many requests wait.
        """
        return await self._run(self._predictor, version)

    async def kept(self) -> list[KeptModel]:
        """Every readable version, from the newest.

        Raises:
            Problem: the store cannot be read, or too many requests wait.
        """
        return await self._run(self._kept)

    async def activate(self, version: int | None) -> None:
        """Makes every service stay with a version, or with None follow the newest.

        Raises:
            Problem: there is no such version, no service could use it, or the store cannot be written.
        """
        await self._run(self._activate, version)

    async def _run(self, function: Callable[..., T], *arguments: Any) -> T:
        if self._waiting >= MOST_WAITING:
            raise Problem(OVERLOADED, f"{self._waiting} requests wait for the store already; try again later.")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)
        finally:
            self._waiting -= 1

    # In the thread

    def _predictor(self, version: int) -> Predictor:
        key = self._key(version)
        if key is None:
            raise _no_such(version)
        if key not in self._loaded:
            self._loaded[key] = self._load(key)
            if len(self._loaded) > KEPT_LOADED:
                self._loaded.popitem(last=False)
        self._loaded.move_to_end(key)
        return self._loaded[key]

    def _key(self, version: int) -> SnapshotKey | None:
        try:
            return self._store.key(version)
        except SnapshotError as error:
            raise Problem(STORE, f"{error}.") from error

    def _load(self, key: SnapshotKey) -> Predictor:
        try:
            return load_predictor(self._store, key.version, self._settings)
        except TailstreamError as error:
            if self._key(key.version) != key:  # retention was faster
                raise _no_such(key.version) from None
            raise Problem(UNUSABLE_VERSION, f"Version {key.version} cannot answer: {error}.") from error

    def _kept(self) -> list[KeptModel]:
        try:
            keys = self._store.snapshots()
        except SnapshotError as error:
            raise Problem(STORE, f"{error}.") from error
        listed: dict[SnapshotKey, KeptModel] = {}
        for key in reversed(keys):
            try:
                listed[key] = self._listed.get(key) or _summary(self._store.manifest(key.version))
            except SnapshotCorrupt:
                continue  # the watcher says so, where it matters
        self._listed = listed
        return list(listed.values())

    def _activate(self, version: int | None) -> None:
        try:
            if version is not None:
                self._predictor(version)  # what no service could load is refused here, not found out by each
            self._store.pin(version)
        except SnapshotCorrupt as error:
            raise _no_such(version) from error
        except SnapshotError as error:
            raise Problem(STORE, f"{error}.") from error
        except OSError as error:
            raise Problem(STORE, f"The pin could not be written to {self._store.where}: {error.strerror}.") from error
        log.info("services follow the newest snapshot" if version is None else "version pinned", model_version=version)


def _no_such(version: int | None) -> Problem:
    return Problem(NO_SUCH_VERSION, f"The store keeps no version {version}; GET /models lists those that it keeps.")


def _summary(manifest: Manifest) -> KeptModel:
    recent = manifest.metrics.get("fading") or {}
    return KeptModel(
        mae=(recent.get("0") or {}).get("mae"),
        balanced_mae=(recent.get("1") or {}).get("balanced_mae"),
        accuracy=(recent.get("0") or {}).get("accuracy"),
        macro_recall=(recent.get("1") or {}).get("macro_recall"),
        bytes=sum(file.bytes for file in manifest.files.values()),
        **manifest.model_dump(include={"version", "created_s", "healthy", "samples", "train_loss", "copy_of"}),
    )


def refuse_foreign_pages(request: Request) -> None:
    """Without keys, a page of another site that is open in a browser here could otherwise change what is served.

    Raises:
        Problem: a browser says that another site asks.
    """
    if request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        raise Problem(FOREIGN, "A page of another site may not change which version answers.")


def versions_router(versions: Versions, watcher: Watcher) -> APIRouter:
    """Listing the versions, and staying with one."""
    router = APIRouter(tags=["versions"])

    def in_use() -> int | None:
        return None if watcher.predictor is None else watcher.predictor.version

    @router.get("/models", operation_id="list_models", summary="Versions kept", responses=described(401, 503))
    async def list_models() -> ModelsResponse:
        """The versions that the store keeps, from the newest, with how well each did when it was written."""
        kept = await versions.kept()
        return ModelsResponse(in_use=in_use(), pinned=watcher.pinned, models=kept)

    # Before the path with a number, which would take `latest` for one.
    @router.post(
        "/models/latest/activate",
        operation_id="activate_latest_model",
        summary="Follow the newest version",
        responses=described(401, 403, 503),
        dependencies=[Depends(refuse_foreign_pages)],
    )
    async def activate_latest_model() -> ActivatedResponse:
        """Makes every service of the store follow the newest healthy version again, within a poll of the store."""
        await versions.activate(None)
        return ActivatedResponse(pinned=None, in_use=in_use())

    @router.post(
        "/models/{version}/activate",
        operation_id="activate_model",
        summary="Stay with a version",
        responses=described(401, 403, 404, 409, 422, 503),
        dependencies=[Depends(refuse_foreign_pages)],
    )
    async def activate_model(
        version: Annotated[int, Path(ge=1, le=LARGEST_VERSION, examples=[41])],
    ) -> ActivatedResponse:
        """Makes every service of the store answer with one version, within a poll of the store; the trainer goes on."""
        await versions.activate(version)
        return ActivatedResponse(pinned=version, in_use=in_use())

    return router
