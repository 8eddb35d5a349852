"""Device-mapper tables, snapshots and the kernel's COW store over image files, without root.

`Mapper` is where to start; docs/architecture.md tells how it works inside.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cow import lvm, store
    from cow._core import COW, ORIGIN, ZERO
    from cow.device import Device, DeviceInfo
    from cow.errors import (
        CowError,
        CowOSError,
        DeviceBusy,
        DeviceIOError,
        DeviceNotFound,
        ImageError,
        ImageLocked,
        ImageNotFound,
        InvalidArgument,
        ResumeError,
        StoreError,
        TableError,
        TableFormatError,
        TargetError,
    )
    from cow.image import Image
    from cow.mapper import Mapper

__version__ = "0.1.0"

__all__ = [
    "COW",
    "ORIGIN",
    "ZERO",
    "CowError",
    "CowOSError",
    "Device",
    "DeviceBusy",
    "DeviceIOError",
    "DeviceInfo",
    "DeviceNotFound",
    "Image",
    "ImageError",
    "ImageLocked",
    "ImageNotFound",
    "InvalidArgument",
    "Mapper",
    "ResumeError",
    "StoreError",
    "TableError",
    "TableFormatError",
    "TargetError",
    "lvm",
    "store",
]

_MODULES = {
    "COW": "_core",
    "ORIGIN": "_core",
    "ZERO": "_core",
    "Device": "device",
    "DeviceInfo": "device",
    "Image": "image",
    "Mapper": "mapper",
}
"""Where the public names live; the errors in cow.errors."""


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import what is asked for when it is first used: a command that needs little starts fast."""
    if name in ("_core", "device", "errors", "image", "lvm", "mapper", "store", "table", "target"):
        return importlib.import_module(f"cow.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"cow.{_MODULES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
