"""Device-mapper tables, snapshots and the kernel's COW store over image files, without root.

`Mapper` is where to start; docs/architecture.md tells how it works inside.
"""

from cow import store
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
    "store",
]
