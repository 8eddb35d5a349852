"""One exception class per kind of failure.

Every class is a `CowError` and the builtin it is nearest to. What the kernel answers with an
errno is an `OSError` with that errno; its text says what, where and which limit was broken.
"""

from __future__ import annotations

import errno
import os


class CowError(Exception):
    """The base of everything this package raises on purpose."""


class CowOSError(CowError, OSError):
    """A failure the kernel answers with an errno; `code` is the one used where none is given."""

    code = errno.EINVAL

    def __init__(self, text: str, code: int | None = None) -> None:
        super().__init__(self.code if code is None else code, text)

    def __str__(self) -> str:
        return f"{self.strerror} ({errno_name(self.errno or 0)})"


class TableError(CowOSError):
    """A table was refused. `device` is the dm name, `line` counts from 1 (None: all of it)."""

    def __init__(
        self,
        text: str,
        code: int | None = None,
        *,
        device: str | None = None,
        line: int | None = None,
    ) -> None:
        where = [device] if device is not None else []
        if line is not None:
            where.append(f"table line {line}")
        super().__init__(": ".join([*where, text]), code)
        self.text = text
        self.device = device
        self.line = line


class TableFormatError(TableError, ValueError):
    """A table line is not `START LENGTH TYPE [PARAMS]`, or a concise text is incomplete."""


class TargetError(CowOSError):
    """A target refused its arguments; the table adds device and line and raises TableError."""


class DeviceNotFound(CowOSError):
    """No device has that name, or it was removed while in use."""

    code = errno.ENXIO


class DeviceBusy(CowOSError):
    """The device is in use, or the name, uuid or minor is taken."""

    code = errno.EBUSY


class InvalidArgument(CowOSError, ValueError):
    """A name, uuid, offset or option is outside what is allowed."""


class ResumeError(CowOSError):
    """A target refused to resume; the device stays suspended with the new table live."""


class DeviceIOError(CowOSError):
    """A read, write, discard or flush failed, as the kernel fails one: EIO, ENOSPC, EPERM …"""

    code = errno.EIO


class StoreError(CowOSError):
    """A COW store cannot be read, or what it holds is corrupt. Nothing was changed on it."""


class ImageError(CowOSError):
    """An image file cannot be opened, locked, grown or mapped."""


class ImageNotFound(ImageError, FileNotFoundError):
    """The file a table names does not exist."""

    code = errno.ENOENT


class ImageLocked(ImageError):
    """Another process, or another mapper, holds the image `path`; `pid` is whose, where known."""

    code = errno.EBUSY

    def __init__(self, text: str, pid: int | None = None, path: str = "") -> None:
        super().__init__(text)
        self.pid = pid
        self.path = path


def errno_name(code: int) -> str:
    """Return the symbol of `code`, "EIO" for 5."""
    return errno.errorcode.get(code, os.strerror(code))
