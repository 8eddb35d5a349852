"""What the devices of a mapper tell about LVs: active, open, how full a snapshot is.

Devices are found by uuid, as LVM finds them. Without a mapper nothing is known, which reports show
as X and "unknown".
"""

from __future__ import annotations

from dataclasses import dataclass

from cow.device import DeviceInfo
from cow.errors import DeviceNotFound
from cow.lvm.metadata import LogicalVolume
from cow.lvm.names import dm_uuid
from cow.mapper import DIRECTORY, Mapper


@dataclass(frozen=True)
class Usage:
    """How full a COW store is, or in `problem` why that is not known."""

    allocated: int = 0
    total: int = 0
    metadata: int = 0
    """Sectors."""
    problem: str = ""
    """Invalid, Overflow, Merge failed, or Unknown."""

    @property
    def percent(self) -> float:
        """What LVM shows: 0 and 100 only where nothing or all is used; an invalid store is full."""
        if self.problem:
            return 100.0
        if self.allocated == self.metadata:
            return 0.0
        if self.allocated == self.total:
            return 100.0
        return min(max(100 * self.allocated / self.total, 0.01), 99.99)

    @property
    def invalid(self) -> bool:
        """Whether the snapshot is lost."""
        return self.problem in ("Invalid", "Overflow")

    @property
    def merge_failed(self) -> bool:
        """Whether a merge came to an end before it was done."""
        return self.problem == "Merge failed"


@dataclass(frozen=True)
class LiveDevice:
    """A dm device as it is now: `targets` has (type, status) of its live table."""

    info: DeviceInfo
    targets: tuple[tuple[str, str], ...]

    def usage(self, target: str) -> Usage | None:
        """Return what a snapshot or snapshot-merge target tells; None if there is none."""
        for kind, status in self.targets:
            if kind == target:
                return parse_usage(status)
        return None


def parse_usage(status: str) -> Usage:
    """Return what "24/32768 16", or a word in its place, says."""
    words = status.replace("/", " ").split()
    if len(words) == 3 and all(word.isdigit() for word in words):
        allocated, total, metadata = map(int, words)
        return Usage(allocated, total, metadata)
    return Usage(problem=status or "Unknown")


class Live:
    """The devices of a mapper at one moment. `mapper` None: activation is off."""

    def __init__(self, mapper: Mapper | None) -> None:
        self.known = mapper is not None
        self._devices = dict(_look(mapper)) if mapper is not None else {}

    def device(self, lv: LogicalVolume, layer: str = "") -> LiveDevice | None:
        """Return the device of an LV, or of a layer below it ("real", "cow"); None if none."""
        return self._devices.get(dm_uuid(lv.vg.id, lv.id, layer))

    def is_active(self, lv: LogicalVolume) -> bool:
        """Tell whether the LV has a device."""
        return self.device(lv) is not None

    def is_open(self, lv: LogicalVolume) -> bool:
        """Tell whether somebody has the LV open."""
        device = self.device(lv)
        return device is not None and device.info.open_count > 0

    def usage(self, lv: LogicalVolume) -> Usage | None:
        """Return how full the store of a snapshot is, or what is left to merge into an origin."""
        record = lv.snapshot
        if record is not None:
            if record.segments[0].merging:
                origin = record.segments[0].origin
                above = self.device(origin) if origin is not None else None
                if above is not None and (merge := above.usage("snapshot-merge")) is not None:
                    return merge
            device = self.device(lv)
            return device.usage("snapshot") if device is not None else None
        device = self.device(lv)
        if device is not None and lv.merging_snapshot is not None:
            return device.usage("snapshot-merge")
        return None


def _look(mapper: Mapper) -> list[tuple[str, LiveDevice]]:
    found = []
    for name in mapper.names():
        try:
            info = mapper.info(DIRECTORY + name)
            lines = mapper.status(DIRECTORY + name).split("\n")
        except DeviceNotFound:  # removed in between
            continue
        targets = [line.split(" ", 3)[2:] for line in lines if line]
        pairs = tuple((words[0], words[1] if len(words) > 1 else "") for words in targets)
        if info.uuid:
            found.append((info.uuid, LiveDevice(info, pairs)))
    return found
