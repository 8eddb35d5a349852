"""LVM2: read and write volume groups in image files, as LVM does, without root or kernel.

`VolumeGroup.open` is where to start; docs/lvm.md tells the rest.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cow.lvm.errors import (
        AlreadyExists,
        InUse,
        LVMError,
        LVNotFound,
        MetadataError,
        NoSpaceError,
        PVNotFound,
        RequestError,
        VGNotFound,
        VGNotWritable,
    )
    from cow.lvm.group import Scan, VolumeGroup, scan
    from cow.lvm.manage import create_pv, create_vg, remove_pv, resize_pv, restore_vg

__all__ = [
    "AlreadyExists",
    "InUse",
    "LVMError",
    "LVNotFound",
    "MetadataError",
    "NoSpaceError",
    "PVNotFound",
    "RequestError",
    "Scan",
    "VGNotFound",
    "VGNotWritable",
    "VolumeGroup",
    "create_pv",
    "create_vg",
    "remove_pv",
    "resize_pv",
    "restore_vg",
    "scan",
]

_MODULES = {
    "Scan": "group",
    "VolumeGroup": "group",
    "create_pv": "manage",
    "create_vg": "manage",
    "remove_pv": "manage",
    "resize_pv": "manage",
    "restore_vg": "manage",
    "scan": "group",
}
"""Where the public names live; the errors in cow.lvm.errors."""


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import what is asked for when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"cow.lvm.{_MODULES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
