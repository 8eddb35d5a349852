"""What the devices of a mapper tell about LVs: active, open, how full a snapshot is.

Devices are found by uuid, as LVM finds them. Without a mapper nothing is known, which reports show
as X and "unknown".
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from cow.device import DeviceInfo
from cow.errors import DeviceNotFound
from cow.lvm.cow_size import Usage, parse_usage
from cow.lvm.metadata import LogicalVolume
from cow.lvm.monitor import threshold_of
from cow.lvm.names import dm_uuid
from cow.mapper import DIRECTORY, Mapper


@dataclass(frozen=True)
class LiveDevice:
    """A dm device as it is now: `targets` has (type, status) of its live table."""

    info: DeviceInfo
    targets: tuple[tuple[str, str], ...]

    @property
    def sync_percent(self) -> Fraction | None:
        """How much of its mirror targets is in sync, in percent; None if it has none."""
        done = total = 0
        for kind, status in self.targets:
            if kind == "mirror":
                legs, *words = status.split()
                synced, _, regions = words[int(legs)].partition("/")
                done, total = done + int(synced), total + int(regions)
        return Fraction(100 * done, total) if total else None

    def usage(self, target: str) -> Usage | None:
        """Return what a snapshot or snapshot-merge target tells; None if there is none."""
        for kind, status in self.targets:
            if kind == target:
                return parse_usage(status)
        return None


class Live:
    """The devices of a mapper at one moment. `mapper` None: activation is off."""

    def __init__(self, mapper: Mapper | None) -> None:
        self.known = mapper is not None
        self._mapper = mapper
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

    def monitored(self, lv: LogicalVolume) -> str:
        """Tell whether a store grows by itself: "monitored" or not; "" where nobody looks."""
        record = lv.snapshot
        if self._mapper is None or record is None or not self.is_active(lv):
            return ""
        threshold = threshold_of(self._mapper, lv.vg.id)
        if threshold is None:
            return ""
        grows = threshold < 100 and not record.segments[0].merging
        return "monitored" if grows else "not monitored"

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
