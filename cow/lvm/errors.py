"""What LVM refuses, each with LVM's message, an errno, and the exit code of its commands.

Exit codes (lvm(8)): 3 for what is wrong with the command line, 5 for everything else.
"""

from __future__ import annotations

import errno

from cow.errors import CowOSError


class LVMError(CowOSError):
    """The base of everything `cow.lvm` refuses."""

    exit_code = 5


class RequestError(LVMError, ValueError):
    """A name, a tag, a size or an option no LVM command line may have."""

    exit_code = 3


class MetadataError(LVMError):
    """A label, a metadata area or its text cannot be read, or says what cannot be."""


class NoSpaceError(LVMError):
    """Free extents, or the room of a metadata area, do not suffice."""

    code = errno.ENOSPC


class VGNotWritable(LVMError):
    """The VG may be read but not changed: foreign, locked, exported, partial or not understood."""

    code = errno.EROFS


class VGNotFound(LVMError):
    """No VG of that name is on the devices."""

    code = errno.ENODEV


class PVNotFound(LVMError):
    """No PV is on that device, or none has that uuid."""

    code = errno.ENODEV


class LVNotFound(LVMError):
    """The VG has no LV of that name."""

    code = errno.ENODEV


class AlreadyExists(LVMError):
    """A VG, an LV or a PV of that name is there already."""

    code = errno.EEXIST


class InUse(LVMError):
    """A VG, an LV or a PV is needed as it is."""

    code = errno.EBUSY
