"""A device: live and inactive table, suspend and resume, its name and its counters.

The order of things in load, suspend, resume and remove is the kernel's (dm-ioctl.c, dm.c).
"""

from __future__ import annotations

import errno
import io
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cow import _core
from cow.errors import (
    DeviceIOError,
    DeviceNotFound,
    InvalidArgument,
    ResumeError,
    TableError,
    TargetError,
)
from cow.image import Image
from cow.table import Table
from cow.units import SECTOR_SIZE

MAX_NAME = 127
MAX_UUID = 128


@dataclass(frozen=True)
class DeviceInfo:
    """What `dmsetup info` tells of a device."""

    name: str
    uuid: str
    major: int
    minor: int
    open_count: int
    event_nr: int
    nr_targets: int
    live: bool
    inactive: bool
    suspended: bool
    readonly: bool
    deferred_remove: bool


class Device(_core.MappedDevice):
    """One device of a mapper. Its I/O is BlockDevice's; the mapper gives it its tables.

    `holders` are the tables that name it; they and files from open() make the open count. At the
    last close a deferred removal is done, by calling `last_close`.
    """

    def __init__(
        self, gate: _core.Gate, name: str, uuid: str, major_minor: tuple[int, int]
    ) -> None:
        self.name = name
        self.uuid = uuid
        self.major_minor = major_minor
        self.live: Table | None = None
        self.inactive: Table | None = None
        self.holders: list[Table] = []
        self.families: set[_core.Family] = set()
        self.files = 0
        self.deferred_remove = False
        self.last_close: Callable[[Device], None] | None = None
        self._limits_set = False

    @property
    def major(self) -> int:
        """The first device number."""
        return self.major_minor[0]

    @property
    def minor(self) -> int:
        """The second device number."""
        return self.major_minor[1]

    @property
    def open_count(self) -> int:
        """How many tables and open files use the device."""
        return len(self.holders) + self.files

    @property
    def logical_block_size(self) -> int:  # type: ignore[override]
        """Bytes: the largest of the devices below."""
        return self.live.logical_block_size if self.live else SECTOR_SIZE

    @property
    def supports_discard(self) -> bool:
        """Whether every target on the way down takes discards."""
        return self.live is None or all(t.supports_discard for t in self.live.targets)

    def info(self) -> DeviceInfo:
        """Return what `dmsetup info` tells."""
        return DeviceInfo(
            name=self.name,
            uuid=self.uuid,
            major=self.major,
            minor=self.minor,
            open_count=self.open_count,
            event_nr=self.event_nr,
            nr_targets=len(self.live.targets) if self.live else 0,
            live=self.live is not None,
            inactive=self.inactive is not None,
            suspended=self.suspended,
            readonly=self.readonly,
            deferred_remove=self.deferred_remove,
        )

    def closed(self) -> None:
        """Note that a table or a file let go of the device."""
        if self.deferred_remove and not self.open_count and self.last_close:
            self.last_close(self)

    def uses(self, device: _core.BlockDevice) -> bool:
        """Whether `device` lies below this one, in either table."""
        for table in (self.live, self.inactive):
            for below in table.devices if table else ():
                if below is device or (isinstance(below, Device) and below.uses(device)):
                    return True
        return False

    # The life cycle; the mapper's lock is held.

    def load(self, table: Table) -> None:
        """Put a table in the inactive slot. The first one is checked against its devices now."""
        if not self._limits_set:
            self._check(table)
        for target in table.targets:
            target.device = self
        table.read_metadata()
        self._limits_set = True
        old, self.inactive = self.inactive, table
        self._destroy(old)

    def clear(self) -> None:
        """Drop the inactive table."""
        old, self.inactive = self.inactive, None
        self._destroy(old)

    def suspend(self) -> None:
        """Let requests under way finish and hold new ones back."""
        if self.suspended:
            return
        for target in self.live.targets if self.live else ():
            target.presuspend()
        with self.gate:
            self.set_state(suspended=True)
        for target in self.live.targets if self.live else ():
            target.postsuspend()

    def resume(self) -> None:
        """Make the inactive table live, if there is one, and let requests go on.

        If a target refuses, the new table stays live and the device suspended; for want of memory
        nothing changes.
        """
        if self.inactive is None:
            if not self.suspended:
                return
            if self.live is None:
                raise InvalidArgument(f"{self}: no table to resume")
            self._go_live()
            return
        try:
            self._check(self.inactive)
        except TableError:
            self.clear()
            raise
        try:
            for target in self.inactive.targets:
                target.prepare()
        except TargetError as error:
            raise ResumeError(f"{self}: {target.name}: {error.strerror}", error.errno) from error
        self.suspend()
        old, new = self.live, self.inactive
        self.live, self.inactive = new, None
        with self.gate:
            self.set_map(new.map)
            self.set_state(readonly=new.readonly)
            self.relock()
        try:
            self._go_live()
        finally:
            self._destroy(old)
            self.gate.raise_event()

    def _go_live(self) -> None:
        assert self.live is not None
        try:
            for target in self.live.targets:
                target.preresume()
        except TargetError as error:
            raise ResumeError(
                f"{self}: {target.name}: {error.strerror} (preresume failed)", error.errno
            ) from error
        with self.gate:
            for target in self.live.targets:
                target.resume()
            self.set_state(suspended=False)

    def remove(self) -> None:
        """Destroy both tables; the device is no more."""
        self.suspend()
        with self.gate:
            self.set_state(removed=True)
            self.set_map(None)
            self.set_locks((), True)
        live, self.live = self.live, None
        self._destroy(live)
        self.clear()
        self.raise_event()  # who waits for one learns that there will be none

    def _destroy(self, table: Table | None) -> None:
        if table is not None:
            table.release()
            close_devices(table)

    # Locks: which families lie below, told to the core after every change of a live table.

    def relock(self) -> None:
        """Work out the families below this device and whoever stands on it. Exclusive gate held."""
        families, plain = _families_below(self.live)
        self.set_locks(families, plain)
        self.families = families  # holds them while the core has their locks
        for table in self.holders:
            holder = table.targets[0].device
            assert isinstance(holder, Device)
            if holder.live is table:
                holder.relock()

    def _check(self, table: Table) -> None:
        """Refuse a table that does not fit its devices, or where a write would meet itself."""
        table.check_limits()
        seen: set[_core.Family] = set()
        todo = _families_below(table)[0]
        while todo:
            family = todo.pop()
            seen.add(family)
            for below in {family.origin, *(member.cow for member in family.members)}:
                if not isinstance(below, Device):
                    continue
                if below is self or below.uses(self):
                    raise TableError(
                        f"{below} holds copies of what is written here, and would be written "
                        "through this table",
                        errno.ELOOP,
                    )
                todo |= below.families - seen

    # Files.

    def open(self, mode: str = "rb", buffering: int = -1) -> io.BufferedIOBase | io.RawIOBase:
        """Open the device as a Python file: "rb", or "r+b" to write; buffering 0 is unbuffered.

        While it is open the device cannot be removed. close() flushes the file's buffer, and
        nothing more: use the device's flush() for the disk.
        """
        if mode not in ("rb", "r+b", "rb+"):
            raise ValueError(f"mode {mode!r} is neither 'rb' nor 'r+b'")
        writable = "+" in mode
        if writable and self.readonly:
            raise DeviceIOError(f"{self}: the device is read-only", errno.EACCES)
        raw = DeviceFile(self, writable=writable)
        if buffering == 0:
            return raw
        size = io.DEFAULT_BUFFER_SIZE if buffering < 0 else buffering
        return io.BufferedRandom(raw, size) if writable else io.BufferedReader(raw, size)

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"<Device {self.name} {self.sectors} sectors>"


def _families_below(table: Table | None) -> tuple[set[_core.Family], bool]:
    """Return the families whose exceptions requests through a table follow, and if it is plain."""
    families: set[_core.Family] = set()
    plain = True
    for target in table.targets if table else ():
        plain = plain and target.plain
        if target.family is not None:
            families.add(target.family)
    for below in table.devices if table else ():
        plain = plain and below.plain
        if isinstance(below, Device):
            families |= below.families
    return families, plain


def event_counts(
    wait_event: Callable[[int, int], int], event_nr: int, timeout: float | None
) -> Iterator[int]:
    """Yield an event counter when it differs from `event_nr`, and now and then until it does.

    In the main thread that is ten times a second: signals are seen in between. Ends when the time
    is over.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    pause = 0.1 if threading.current_thread() is threading.main_thread() else 60.0
    while True:
        left = pause if deadline is None else min(pause, deadline - time.monotonic())
        yield wait_event(event_nr, max(0, int(left * 1000)))
        if left <= 0:
            return


def close_devices(table: Table) -> None:
    """Take a table off the devices it opened; images nobody else holds are closed."""
    while table.devices:
        device = table.devices.pop()
        device.holders.remove(table)
        if isinstance(device, Device):
            device.closed()
        elif isinstance(device, Image) and not device.holders and not device.kept:
            with device.gate:
                device.close()


class DeviceFile(io.RawIOBase):
    """A device as a raw file with a position."""

    def __init__(self, device: Device, *, writable: bool) -> None:
        if device.removed:
            raise DeviceNotFound(f"{device}: the device was removed")
        self.device = device
        self.name = device.name
        self.mode = "rb+" if writable else "rb"
        self._writable = writable
        self._position = 0
        device.files += 1

    def readable(self) -> bool:
        """Yes."""
        return True

    def writable(self) -> bool:
        """Whether it was opened for writing."""
        return self._writable

    def seekable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401
        """Fill a buffer from the position on."""
        self._check_open()
        n = self.device.preadinto(buffer, self._position)
        self._position += n
        return n

    def write(self, data: Any) -> int:  # noqa: ANN401
        """Write at the position."""
        self._check_open()
        if not self._writable:
            raise io.UnsupportedOperation("not writable")
        n = self.device.pwrite(data, self._position)
        self._position += n
        return n

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position and return it."""
        self._check_open()
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.device.size}[whence]
        if start + offset < 0:
            raise InvalidArgument(f"{self.device}: seek to {start + offset}")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        """Return the position."""
        self._check_open()
        return self._position

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")

    def close(self) -> None:
        """Close; the device may be removed now, and is if its removal was deferred."""
        if not self.closed:
            super().close()
            self.device.files -= 1
            self.device.closed()


def _encoded_size(text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"{text!r}: not to be encoded in UTF-8") from error


def check_name(name: str) -> None:
    """Refuse what cannot be a dm name."""
    if not name:
        raise InvalidArgument("Non empty new name is required.")
    if "/" in name:
        raise InvalidArgument(f'Name "{name}" invalid. It contains "/".')
    if _encoded_size(name) > MAX_NAME:
        raise InvalidArgument(f'Name "{name}" too long: at most {MAX_NAME} bytes.')
    if name in ("control", ".", ".."):
        raise InvalidArgument(f'Name "{name}" is reserved.')


def check_uuid(uuid: str | None) -> None:
    """Refuse what cannot be a dm uuid."""
    if uuid is None:
        return
    if _encoded_size(uuid) > MAX_UUID:
        raise InvalidArgument(f'UUID "{uuid}" too long: at most {MAX_UUID} bytes.')
    if "/" in uuid:
        raise InvalidArgument(f'UUID "{uuid}" invalid. It contains "/".')
