"""Whether anything waits for a device."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def nothing_waits_for_cuda() -> Iterator[None]:
    """What waits for a CUDA device raises."""

    def debug(mode: str) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode")
            torch.cuda.set_sync_debug_mode(mode)

    debug("error")
    try:
        yield
    finally:
        debug("default")


@contextmanager
def nothing_is_copied_to_meta() -> Iterator[None]:
    """What on a CUDA device would copy from the host, and wait, raises for the meta device."""
    with _Made(), _Copied():
        yield


class _Made(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("tensor", "new_tensor") and result.is_meta:
            raise AssertionError(f"{func.__name__}{args[-1:]} copies from the host: fill it there")
        return result


class _Copied(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        operation, where = func.overloadpacket.__name__, args[0]
        waits = False
        if operation == "_to_copy":
            waits = where.device.type == "cpu" and result.is_meta and not (kwargs or {}).get("non_blocking")
        elif operation == "copy_":
            waits = where.is_meta and args[1].device.type == "cpu" and not args[2:3]
        elif operation in ("index", "index_put_"):
            waits = where.is_meta and any(isinstance(i, Tensor) and not i.is_meta for i in args[1])
        if waits:
            raise AssertionError(f"{operation} copies from the host: say non_blocking=True")
        return result
