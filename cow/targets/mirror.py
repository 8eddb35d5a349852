"""mirror: `<log> <#log args> <log arg>… <#legs> {<dev> <start>} × n [<#features> <feature>…]`.

The log says which regions of the legs hold the same (dm-log.c):
  core <region size> [sync|nosync]              nobody knows after the device was removed
  disk <log dev> <region size> [sync|nosync]    a bit for each region on the log device
On the log device, little-endian: u32 magic "rRiM", u32 version 2, u64 number of regions; from byte
1024 on a bit for each region, 1 where it is in sync.

Before the device goes live, regions that are not in sync are copied from the first leg, where they
differ. While it is live the log on disk calls every region out of sync, and says what is true again
when the device is suspended: after a crash all legs are compared.

In the kernel a write that one leg refuses is held until dmeventd takes the leg out of the table
(handle_errors), or done on the others alone. Here it is done if the first leg takes it: that one
counts when the device is made again.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from typing import NamedTuple

from cow import _core
from cow.errors import CowOSError, TargetError
from cow.target import NameOf, Target, TargetContext, open_device, parse_number
from cow.units import SECTOR_SIZE, bytes_of, is_power_of_2

log = logging.getLogger("cow")

MAX_LEGS = 9
FEATURES = ("handle_errors", "keep_log")
SYNC = ("sync", "nosync")

HEADER = struct.Struct("<4sIQ")
MAGIC, VERSION = b"rRiM", 2
BITS_OFFSET = 1024
COPY_SIZE = 1 << 20
"""Bytes compared at once."""


class MirrorTarget(Target):
    """Keeps the same bytes on several devices."""

    name = "mirror"
    version = (1, 14, 0)
    map: _core.Mirror

    def __init__(self, context: TargetContext, start: int, length: int, args: list[str]) -> None:
        self.readonly = context.readonly
        self.log, args = _parse_log(context, length, args)
        count = parse_number(args[0] if args else "", "Invalid number of mirrors", 2**32 - 1)
        if not 2 <= count <= MAX_LEGS:
            raise TargetError("Invalid number of mirrors")
        if len(args) < 1 + 2 * count:
            raise TargetError("Too few mirror arguments")
        self.legs = []
        for name, sector in zip(args[1 : 2 * count : 2], args[2 : 2 * count + 1 : 2], strict=True):
            dev_start = parse_number(sector, "Invalid offset")
            dev = open_device(context, name, "Device lookup failure", writable=not self.readonly)
            self.legs.append((dev, dev_start))
        self.features = _parse_features(args[1 + 2 * count :])
        self.length = length
        self.map = _core.Mirror(
            start,
            length,
            self.log.region_size,
            self.legs,
            events="handle_errors" in self.features,
        )
        self._known = False

    def preresume(self) -> None:
        if self._known and not any(self.map.failed):
            return
        below = [dev for dev, _ in self.legs] + ([self.log.dev] if self.log.dev else [])
        if any(isinstance(dev, _core.MappedDevice) and dev.suspended for dev in below):
            raise TargetError("a device below is suspended")
        try:
            if not self._known:
                self.map.in_sync = self._read_log()
            if not self.readonly:
                self._write_log(bytearray(len(self.map.in_sync)))
        except CowOSError as error:
            raise TargetError(f"{error}: log of the mirror", error.errno) from error
        self._known = True
        if not self.readonly:
            self._copy()

    def resume(self) -> None:
        self.map.activate(self.device)

    def postsuspend(self) -> None:
        if not self._known or self.readonly or self.log.dev is None:
            return
        if isinstance(self.log.dev, _core.MappedDevice) and self.log.dev.suspended:
            log.error("%s: log device %s is suspended: not written", self.device, self.log.dev)
            return
        try:
            self._flush(*(dev for dev, _ in self.legs))
            self._write_log(self.map.in_sync)
        except CowOSError:
            log.exception("%s: log not written: the legs will be compared", self.device)
        self._known = False  # the log has to be opened again

    def _copy(self) -> None:
        """Make the other legs equal to the first in every region that is not in sync."""
        regions = self.map.in_sync
        if all(regions):
            return
        try:
            for number in (number for number, same in enumerate(regions) if not same):
                first = number * self.log.region_size
                end = min(first + self.log.region_size, self.length)
                for at in range(bytes_of(first), bytes_of(end), COPY_SIZE):
                    self._copy_run(at, min(COPY_SIZE, bytes_of(end) - at))
            self._flush(*(dev for dev, _ in self.legs[1:]))
        except CowOSError:
            log.exception("%s: legs not brought in sync", self.device)
            return
        self.map.in_sync = bytearray(b"\1") * len(regions)
        self.device.raise_event()

    def _copy_run(self, offset: int, size: int) -> None:
        dev, dev_start = self.legs[0]
        data = dev.pread(size, bytes_of(dev_start) + offset)
        for other, other_start in self.legs[1:]:
            at = bytes_of(other_start) + offset
            if other.pread(size, at) != data:
                other.pwrite(data, at)

    def _read_log(self) -> bytearray:
        """Return a byte for each region, 1 where the legs are known to hold the same."""
        count = -(-self.length // self.log.region_size)
        unknown = bytearray([self.log.sync == "nosync"]) * count
        if self.log.dev is None or self.log.sync == "sync":
            return bytearray(count) if self.log.sync == "sync" else unknown
        magic, version, known = HEADER.unpack(self.log.dev.pread(HEADER.size, 0))
        if magic != MAGIC:
            return unknown
        if version != VERSION:
            raise TargetError(f"{self.log.dev}: log version {version}, not {VERSION}")
        known = min(known, count)
        bits = int.from_bytes(self.log.dev.pread(-(-known // 8), BITS_OFFSET), "little")
        return bytearray(bits >> i & 1 for i in range(known)) + unknown[known:]

    def _write_log(self, regions: bytearray) -> None:
        if self.log.dev is None:
            return
        bits = sum(1 << i for i, same in enumerate(regions) if same)
        size = -(-len(regions) // 8)
        self.log.dev.pwrite(bits.to_bytes(size, "little"), BITS_OFFSET)
        header = HEADER.pack(MAGIC, VERSION, len(regions))
        self.log.dev.pwrite(header.ljust(SECTOR_SIZE, b"\0"), 0)
        self._flush(self.log.dev)

    def _flush(self, *devices: _core.BlockDevice) -> None:
        for dev in devices:
            if dev.gate.power:
                dev.flush()

    def table_args(self, name_of: NameOf) -> str:
        words = [*self.log.words(name_of), str(len(self.legs))]
        words += [f"{name_of(dev)} {dev_start}" for dev, dev_start in self.legs]
        if self.features:
            words += [str(len(self.features)), *self.features]
        return " ".join(words)

    def status(self, name_of: NameOf) -> str:
        regions = self.map.in_sync
        names = " ".join(name_of(dev) for dev, _ in self.legs)
        letters = "".join(_leg_letter(failed) for failed in self.map.failed)
        kept = f"1 {self.log.type}"
        if self.log.dev is not None:
            kept = f"3 {self.log.type} {name_of(self.log.dev)} A"
        return f"{len(self.legs)} {names} {sum(regions)}/{len(regions)} 1 {letters} {kept}"

    def areas(self) -> Iterator[tuple[_core.BlockDevice, int, int]]:
        for dev, dev_start in self.legs:
            yield dev, dev_start, self.length
        if self.log.dev is not None:
            regions = -(-self.length // self.log.region_size)
            yield self.log.dev, 0, -(-(BITS_OFFSET + -(-regions // 8)) // SECTOR_SIZE)

    @property
    def supports_discard(self) -> bool:
        """As the legs."""
        return all(dev.supports_discard for dev, _ in self.legs)


class _Log(NamedTuple):
    """What a table says of its log. `sync` is "sync", "nosync" or empty; sizes are sectors."""

    type: str
    dev: _core.BlockDevice | None
    region_size: int
    sync: str

    def words(self, name_of: NameOf) -> list[str]:
        args = [str(self.region_size)]
        if self.dev is not None:
            args.insert(0, name_of(self.dev))
        if self.sync:
            args.append(self.sync)
        return [self.type, str(len(args)), *args]


def _parse_log(context: TargetContext, length: int, args: list[str]) -> tuple[_Log, list[str]]:
    """Parse the log and return it with the words behind it."""
    if len(args) < 2:
        raise TargetError("Insufficient mirror log arguments")
    count = parse_number(args[1], "Invalid mirror log argument count", 2**32 - 1)
    if len(args) < 2 + count:
        raise TargetError("Insufficient mirror log arguments")
    failed = "Error creating mirror dirty log"
    kind, words, rest = args[0], args[2 : 2 + count], args[2 + count :]
    if kind not in ("core", "disk"):
        raise TargetError(f"{failed}: no log type {kind!r}")
    device_words = 1 if kind == "disk" else 0
    if not 1 <= count - device_words <= 2:
        raise TargetError(f"{failed}: wrong number of arguments to {kind} log")
    region_size = parse_number(words[device_words], f"{failed}: invalid region size", 2**32 - 1)
    if not 2 <= region_size <= length or not is_power_of_2(region_size):
        raise TargetError(f"{failed}: invalid region size {region_size}")
    sync = words[device_words + 1] if len(words) > device_words + 1 else ""
    if sync and sync not in SYNC:
        raise TargetError(f"{failed}: unrecognised sync argument {sync!r}")
    dev = None
    if device_words:
        try:
            dev = context.get_device(words[0], writable=not context.readonly)
        except CowOSError as cause:
            raise TargetError(f"{failed}: {cause.strerror}") from cause
    return _Log(kind, dev, region_size, sync), rest


def _parse_features(args: list[str]) -> list[str]:
    if not args:
        return []
    count = parse_number(args[0], "Invalid number of features", 2**32 - 1)
    if count > len(args) - 1:
        raise TargetError("Not enough arguments to support feature count")
    words = args[1 : 1 + count]
    if any(word not in FEATURES for word in words):
        raise TargetError("Unrecognised feature requested")
    if "keep_log" in words and "handle_errors" not in words:
        raise TargetError("keep_log feature requires the handle_errors feature")
    if len(args) > 1 + count:
        raise TargetError("Too many mirror arguments")
    return [feature for feature in FEATURES if feature in words]


def _leg_letter(failed: int) -> str:
    """Return what a status line calls a leg: alive, or what failed last there (dm-raid1.c)."""
    for bit, letter in (
        (_core.Mirror.FAILED_FLUSH, "F"),
        (_core.Mirror.FAILED_WRITE, "D"),
        (_core.Mirror.FAILED_READ, "R"),
    ):
        if failed & bit:
            return letter
    return "A"
