"""The mapper: the set of devices, what /dev/mapper/control is to the kernel.

Each verb does what the dmsetup command of its name does, with the kernel's rules (dm-ioctl.c).
"""

from __future__ import annotations

import functools
import re
import threading
import weakref
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from cow import _core
from cow.device import (
    Device,
    DeviceInfo,
    check_name,
    check_uuid,
    close_devices,
    event_counts,
)
from cow.errors import (
    DeviceBusy,
    DeviceNotFound,
    InvalidArgument,
    TableError,
    TableFormatError,
    TargetError,
)
from cow.image import Image, OpenImages, close_unused
from cow.table import ConciseDevice, Table, format_concise, parse_concise, quote_arg
from cow.target import NameOf, Target, all_targets
from cow.targets.snapshot import SnapshotTarget
from cow.targets.snapshot_merge import SnapshotMergeTarget

MAJOR = 254
DIRECTORY = "/dev/mapper/"

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T", bound=Target)


def _locked(
    method: Callable[Concatenate[Mapper, P], R],
) -> Callable[Concatenate[Mapper, P], R]:
    """Run a verb with the mapper's lock held: one at a time, as ioctls of one control device."""

    @functools.wraps(method)
    def verb(self: Mapper, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.lock:
            if self._closed:
                raise DeviceNotFound("the mapper is closed")
            return method(self, *args, **kwargs)

    return verb


class Mapper:
    """A set of devices that lives in this process.

    `durability` says what an acknowledged write, and every snapshot, survives: "power" a power cut
    (copies and exceptions are flushed in the kernel's order), "process" the death of the process
    (they are stored in that order, and the page cache keeps them).

    `images` are the files that stand under the devices.
    """

    def __init__(self, *, durability: str = "power") -> None:
        if durability not in ("power", "process"):
            raise InvalidArgument(f"durability {durability!r} is neither 'power' nor 'process'")
        self.durability = durability
        self.gate = _core.Gate(durability == "power")
        self.lock = threading.RLock()
        self._closed = False
        self._devices: dict[str, Device] = {}
        self._by_uuid: dict[str, Device] = {}
        self.images = OpenImages(self.gate)
        self._finalizer = weakref.finalize(self, _shut_down, self._devices, self.images)

    # Life and death.

    def close(self) -> None:
        """Stop merges, remove every device, close every image. No flush is needed before."""
        with self.lock:
            self._closed = True
            self._finalizer()
            self.gate.raise_event()

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def __enter__(self) -> Mapper:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # Devices.

    @_locked
    def create(
        self,
        name: str,
        table: str | None = None,
        *,
        uuid: str | None = None,
        readonly: bool = False,
        minor: int | None = None,
    ) -> Device:
        """Make a device, load its table and resume it; with no table (None) only make it.

        If the table is refused the device is gone again.
        """
        check_name(name)
        check_uuid(uuid)
        if name in self._devices:
            raise DeviceBusy(f"{name}: a device of that name exists")
        if uuid in self._by_uuid:
            raise DeviceBusy(f"{name}: a device with uuid {uuid} exists")
        taken = {device.minor for device in self._devices.values()}
        if minor is None:
            minor = next(n for n in range(len(taken) + 1) if n not in taken)
        elif minor in taken:
            raise DeviceBusy(f"{name}: minor {minor} is taken")
        device = Device(self.gate, name, uuid or "", (MAJOR, minor))
        device.last_close = functools.partial(_remove_weakly, weakref.ref(self))
        self._devices[name] = device
        if uuid:
            self._by_uuid[uuid] = device
        if table is not None:
            try:
                self._load(device, table, readonly)
                device.resume()
            except BaseException:
                self._remove(device)
                raise
        return device

    @_locked
    def create_concise(self, text: str) -> list[Device]:
        """Make the devices of a --concise text, in order; those before one that fails stay."""
        return [
            self.create(
                entry.name,
                entry.table,
                uuid=entry.uuid or None,
                readonly=bool(entry.readonly),
                minor=entry.minor,
            )
            for entry in parse_concise(text)
        ]

    @_locked
    def load(self, name: str, table: str, *, readonly: bool | None = None) -> None:
        """Load a table into the inactive slot, in place of one that is there."""
        device = self._device(name)
        if readonly is None:
            readonly = device.live is not None and device.readonly
        self._load(device, table, readonly)

    reload = load

    @_locked
    def clear(self, name: str) -> None:
        """Drop the inactive table."""
        self._device(name).clear()

    @_locked
    def suspend(self, name: str, *, noflush: bool = False, nolockfs: bool = False) -> None:
        """Let I/O under way finish and make new I/O wait.

        There is no file system to freeze and no queue to flush here: both options change nothing.
        """
        self._device(name).suspend()

    @_locked
    def resume(self, name: str) -> None:
        """Make the inactive table live, if there is one, and let I/O go on."""
        self._device(name).resume()

    @_locked
    def remove(self, name: str, *, force: bool = False, deferred: bool = False) -> None:
        """Remove a device that nobody has open; EBUSY otherwise.

        `force` puts an error target in place of its table first, so that I/O fails; `deferred`
        removes it at the last close.
        """
        device = self._device(name)
        if force and device.live is not None:
            self._load(device, f"0 {device.sectors} error", readonly=device.readonly)
            device.resume()
        if device.open_count:
            if deferred:
                device.deferred_remove = True
                return
            raise DeviceBusy(f"{name}: in use, open count {device.open_count}: {_users(device)}")
        self._remove(device)

    @_locked
    def remove_all(self, *, force: bool = False) -> None:
        """Remove every device, those in use by others after those; EBUSY if some stay open."""
        while self._devices:
            free = [device for device in self._devices.values() if not device.open_count]
            if not free:
                busy = ", ".join(sorted(self._devices))
                raise DeviceBusy(f"in use: {busy}")
            for device in free:
                self.remove(device.name, force=force)

    @_locked
    def rename(self, name: str, new_name: str) -> None:
        """Give a device another name. With a live table its event counter goes up by one."""
        device = self._device(name)
        check_name(new_name)
        if new_name in self._devices:
            raise DeviceBusy(f"{new_name}: a device of that name exists")
        del self._devices[device.name]
        device.name = new_name
        self._devices[new_name] = device
        if device.live is not None:
            device.raise_event()

    @_locked
    def set_uuid(self, name: str, uuid: str) -> None:
        """Give a device without uuid one. With a live table its event counter goes up by one."""
        device = self._device(name)
        check_uuid(uuid)
        if not uuid:
            raise InvalidArgument(f"{name}: the new uuid is empty")
        if uuid in self._by_uuid:
            raise DeviceBusy(f"{name}: a device with uuid {uuid} exists")
        if device.uuid:
            raise InvalidArgument(f"{name}: has the uuid {device.uuid} already")
        device.uuid = uuid
        self._by_uuid[uuid] = device
        if device.live is not None:
            device.raise_event()

    @_locked
    def message(self, name: str, sector: int, text: str) -> str:
        """Send a message to the target at a sector and return its answer."""
        device = self._device(name)
        args = text.split()
        if not args:
            raise InvalidArgument(f"{name}: empty message")
        if args[0].startswith("@"):
            if args == ["@cancel_deferred_remove"]:
                device.deferred_remove = False
                return ""
            raise InvalidArgument(f"{name}: unsupported core message {text!r}")
        if device.live is None:
            raise DeviceNotFound(f"{name}: no live table")
        try:
            return device.live.target_at(sector).message(args)
        except TargetError as error:
            raise InvalidArgument(f"{name}: {error.strerror}", error.errno) from error

    # Looking.

    @_locked
    def table(
        self,
        name: str | None = None,
        *,
        inactive: bool = False,
        target: str | None = None,
        concise: bool = False,
        numbers: bool = False,
    ) -> str:
        """Return the table lines of a device, or of all, each behind "NAME: ".

        `target` picks lines of one type, `concise` gives one line of --concise text, and `numbers`
        names devices MAJOR:MINOR as the kernel does.
        """
        name_of = _number_of if numbers else _name_of
        if concise:
            return self._concise(name, name_of)
        return self._lines(name, inactive, lambda table: table.lines(name_of, target), target)

    @_locked
    def status(
        self,
        name: str | None = None,
        *,
        inactive: bool = False,
        target: str | None = None,
        numbers: bool = False,
    ) -> str:
        """Return the status lines of a device, or of all, each behind "NAME: "."""
        name_of = _number_of if numbers else _name_of
        return self._lines(
            name, inactive, lambda table: table.status_lines(name_of, target), target
        )

    @_locked
    def info(self, name: str) -> DeviceInfo:
        """Return what `dmsetup info` tells of a device."""
        return self._device(name).info()

    @_locked
    def deps(self, name: str) -> list[str]:
        """Return what the live table of a device has open, the last opened first."""
        device = self._device(name)
        return [_name_of(below) for below in reversed(device.live.devices if device.live else [])]

    @_locked
    def names(self) -> list[str]:
        """Return the names of all devices in the kernel's order (strcmp)."""
        return sorted(self._devices, key=str.encode)

    ls = names

    @_locked
    def uuids(self) -> dict[str, str]:
        """Return the names of the devices that have a uuid, by it."""
        return {uuid: device.name for uuid, device in self._by_uuid.items()}

    @_locked
    def name_of(self, uuid: str) -> str | None:
        """Return the name of the device with a uuid, None if there is none."""
        device = self._by_uuid.get(uuid)
        return device.name if device is not None else None

    @_locked
    def events(self, name: str) -> int:
        """Return the event counter of a device."""
        return self._device(name).event_nr

    def wait(self, name: str, event_nr: int = 0, timeout: float | None = None) -> int:
        """Wait until the event counter of a device differs from `event_nr`; return it.

        TimeoutError after `timeout` seconds; ENXIO if the device goes away.
        """
        device = self.device(name)
        for now in event_counts(device.wait_event, event_nr, timeout):
            if device.removed:
                raise DeviceNotFound(f"{name}: the device was removed")
            if now != event_nr:
                return now
        raise TimeoutError(f"{name}: no event after {event_nr} in {timeout} s")

    @property
    def event_nr(self) -> int:
        """How many events there were: those of devices, tables gone live, merges over."""
        return self.gate.event_nr

    def wait_any(self, event_nr: int, timeout: float | None = None) -> int:
        """Wait until the count of all events differs from `event_nr`; return it.

        TimeoutError after `timeout` seconds.
        """
        for now in event_counts(self.gate.wait_event, event_nr, timeout):
            if now != event_nr:
                return now
        raise TimeoutError(f"no event after {event_nr} in {timeout} s")

    @_locked
    def set_low_water_mark(self, name: str, sectors: int) -> None:
        """Have a snapshot raise an event, once, when less than so much of its store is free.

        A store that is as full already raises it now. 0 sectors: no event.
        """
        self._target(name, SnapshotTarget).set_low_water_mark(sectors)

    def wait_merge(self, name: str, timeout: float | None = None) -> str:
        """Wait until the merge of a device is over and return its status line; no need to poll.

        The line tells how it ended: allocated equals metadata when all is merged, "Merge failed",
        or neither when a suspend stopped it. TimeoutError after `timeout` seconds.
        """
        with self.lock:
            merge = self._target(name, SnapshotMergeTarget)
        if not merge.wait(timeout):
            raise TimeoutError(f"{name}: still merging after {timeout} s: {self.status(name)}")
        return self.status(name)

    def devices(self) -> dict[str, Device]:
        """Return the devices by name as they are now, without waiting for a verb under way."""
        return dict(self._devices)

    @_locked
    def device(self, name: str) -> Device:
        """Return a device by name, /dev/mapper/NAME or MAJOR:MINOR, for I/O.

        This is not an open: the device can be removed.
        """
        return self._device(name)

    @staticmethod
    def targets() -> list[tuple[str, tuple[int, int, int]]]:
        """Return the types of targets and their versions."""
        return [(target.name, target.version) for target in all_targets()]

    @_locked
    def image(
        self,
        path: str,
        *,
        size: int | None = None,
        readonly: bool = False,
        logical_block_size: int = 512,
    ) -> Image:
        """Open an image ahead of the tables that name it, and keep it open until the mapper closes.

        `size` in bytes larger than the file's: the device has that size, the file grows on demand.
        """
        if self.images.find(str(path)) is not None:
            raise DeviceBusy(f"{path}: the image is open already")
        image = self.images.open(
            str(path), size=size, readonly=readonly, logical_block_size=logical_block_size
        )
        image.kept += 1
        return image

    @_locked
    def use(self, name: str, *, readonly: bool = False) -> Device | Image:
        """Return what a table would mean by `name`: a device, or an image, opened if it is not.

        An image stays open until release() was called as often as this, and no table names it.
        """
        device = self._find_device(name)
        if device is not None:
            return device
        image = self.images.get(name, writable=not readonly)
        image.kept += 1
        return image

    @_locked
    def release(self, device: _core.BlockDevice) -> None:
        """Let go of what `use` returned."""
        if isinstance(device, Image) and not device.removed:
            device.kept -= 1
            close_unused([device])

    # Inside.

    def _device(self, name: str) -> Device:
        device = self._find_device(name)
        if device is None:
            raise DeviceNotFound(f"{name}: no such device")
        return device

    def _target(self, name: str, kind: type[T]) -> T:
        """Return the first live target of a kind."""
        device = self._device(name)
        for target in device.live.targets if device.live else ():
            if isinstance(target, kind):
                return target
        raise InvalidArgument(f"{name}: no {kind.name} target")

    def _find_device(self, name: str) -> Device | None:
        if name in self._devices:
            return self._devices[name]
        numbers = re.fullmatch(r"([0-9]+):([0-9]{1,20})", name)
        if numbers and numbers[1] == str(MAJOR):
            minor = int(numbers[2])
            return next((d for d in self._devices.values() if d.minor == minor), None)
        if name.startswith(DIRECTORY):
            return self._devices.get(name[len(DIRECTORY) :])
        return None

    def _load(self, device: Device, text: str, readonly: bool) -> None:
        context = _Context(self, device, readonly)
        try:
            table = Table(text, context)
        except TableError as error:
            close_unused(context.opened)
            kind = TableFormatError if isinstance(error, TableFormatError) else TableError
            raise kind(error.text, error.errno, device=device.name, line=error.line) from error
        except BaseException:
            close_unused(context.opened)
            raise
        for below in context.opened:
            below.holders.append(table)
        table.devices = context.opened
        try:
            device.load(table)
        except BaseException as error:
            table.release()
            close_devices(table)
            if not isinstance(error, TableError):
                raise
            raise TableError(
                error.text, error.errno, device=device.name, line=error.line
            ) from error

    def _remove(self, device: Device) -> None:
        del self._devices[device.name]
        self._by_uuid.pop(device.uuid, None)
        device.remove()

    def _lines(
        self,
        name: str | None,
        inactive: bool,
        lines_of: Callable[[Table], list[str]],
        target: str | None,
    ) -> str:
        lines = []
        for each in self.names() if name is None else [name]:
            device = self._device(each)
            table = device.inactive if inactive else device.live
            found = lines_of(table) if table else [""] if target is None else []
            lines += [f"{device.name}: {line}" for line in found] if name is None else found
        return "\n".join(lines)

    def _concise(self, name: str | None, name_of: NameOf) -> str:
        entries = []
        for each in self.names() if name is None else [name]:
            device = self._device(each)
            lines = device.live.lines(name_of) if device.live else [""]
            entries.append(
                ConciseDevice(
                    device.name, device.uuid, device.minor, device.readonly, "\n".join(lines)
                )
            )
        return format_concise(entries)


class _Context:
    """What the targets of one table ask of the mapper."""

    def __init__(self, mapper: Mapper, device: Device, readonly: bool) -> None:
        self._mapper = mapper
        self._device = device
        self.readonly = readonly
        self.opened: list[_core.BlockDevice] = []

    def get_device(self, name: str, *, writable: bool) -> _core.BlockDevice:
        """Open a device by dm name, /dev/mapper/NAME, MAJOR:MINOR or path."""
        found: Device | Image
        device = self._mapper._find_device(name)
        if device is None:
            if re.fullmatch(r"[0-9]+:[0-9]+", name):
                raise DeviceNotFound(f"{name}: no such device")
            found = self._mapper.images.get(name, writable=writable)
        elif device is self._device or device.uses(self._device):
            raise InvalidArgument(f"{name}: the device would stand on itself")
        else:
            found = device
        if found not in self.opened:
            self.opened.append(found)
        return found


def _shut_down(devices: dict[str, Device], images: OpenImages) -> None:
    """Remove everything, upper devices first, whoever has them open."""
    while devices:
        free = [d for d in devices.values() if not d.holders] or list(devices.values())
        for device in free:
            del devices[device.name]
            device.last_close = None
            device.remove()
    images.close()


def _remove_weakly(mapper: weakref.ref[Mapper], device: Device) -> None:
    """Do a deferred removal, if the mapper is still there."""
    alive = mapper()
    if alive is not None:
        with alive.lock:
            if alive._devices.get(device.name) is device:
                alive._remove(device)


def _users(device: Device) -> str:
    names = [str(table.targets[0].device) for table in device.holders]
    if device.files:
        names.append(f"{device.files} open file{'s' * (device.files > 1)}")
    return ", ".join(names)


def _name_of(device: Any) -> str:  # noqa: ANN401
    return quote_arg(str(device))


def _number_of(device: Any) -> str:  # noqa: ANN401
    return "{}:{}".format(*device.major_minor)
