"""From a VG to the dm devices that LVM makes of it: names, uuids, tables. Nothing is touched here.

What belongs together is a family: an LV, its snapshots, and the hidden LVs they stand on.

    lv                    linear, striped, … over PVs and hidden LVs
    origin-real           what the origin would be without snapshots
    origin                snapshot-origin origin-real, or snapshot-merge origin-real snap-cow
    snap-cow              the LV of the snapshot: its COW store
    snap                  snapshot origin-real snap-cow, or error while it is merged

(lib/activate/dev_manager.c, device_mapper/libdm-deptree.c)
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from cow import _core
from cow.lvm.errors import LVMError
from cow.lvm.metadata import (
    Area,
    LogicalVolume,
    PhysicalVolume,
    Segment,
    VolumeGroupMetadata,
    segment_lvs,
)
from cow.lvm.names import dm_name, dm_uuid
from cow.table import quote_arg

REAL: Final = "real"
COW: Final = "cow"
MISSING: Final = "missing"

Arg: TypeAlias = "str | int | _core.BlockDevice | DMDevice"


@dataclass(frozen=True, eq=False)
class TableLine:
    """One line of a table, in sectors; `args` may name devices."""

    start: int
    length: int
    type: str
    args: tuple[Arg, ...] = ()


@dataclass(frozen=True, eq=False)
class DMDevice:
    """A dm device as it should be. `layer` is "" for the top: what users open."""

    name: str
    uuid: str
    lines: tuple[TableLine, ...]
    readonly: bool
    lv: LogicalVolume
    layer: str = ""
    minor: int | None = None

    @property
    def table(self) -> str:
        """The table with the devices' own names."""
        return self.render({})

    @property
    def sectors(self) -> int:
        """The length of the device."""
        return sum(line.length for line in self.lines)

    @property
    def below(self) -> list[DMDevice]:
        """The dm devices of the VG that it stands on."""
        return [arg for line in self.lines for arg in line.args if isinstance(arg, DMDevice)]

    @property
    def type(self) -> str:
        """The type of its first target."""
        return self.lines[0].type

    def render(self, names: Mapping[str, str]) -> str:
        """Return the table, with devices whose uuid is in `names` called as that says."""

        def word(arg: Arg) -> str:
            if isinstance(arg, DMDevice):
                return names.get(arg.uuid, arg.name)
            return quote_arg(str(arg)) if isinstance(arg, _core.BlockDevice) else str(arg)

        return "\n".join(
            " ".join([f"{line.start} {line.length} {line.type}", *map(word, line.args)])
            for line in self.lines
        )


@dataclass(frozen=True, eq=False)
class SnapshotDevices:
    """A snapshot of a family: what the store stands on, the store, the top."""

    below: tuple[DMDevice, ...]
    cow: DMDevice
    top: DMDevice
    chunk_size: int
    merging: bool


@dataclass(frozen=True, eq=False)
class Family:
    """The devices of an LV. `real` is None without snapshots; `below` are those of hidden LVs."""

    lv: LogicalVolume
    below: tuple[DMDevice, ...]
    real: DMDevice | None
    top: DMDevice
    snapshots: tuple[SnapshotDevices, ...] = ()

    @property
    def merging(self) -> bool:
        """Whether the top merges a snapshot."""
        return any(snapshot.merging for snapshot in self.snapshots)

    @property
    def devices(self) -> list[DMDevice]:
        """All of them, in the order in which their tables are loaded.

        That is LVM's: what a table reads when it is loaded comes before it, the rest is there.
        """
        found = [*self.below]
        if self.real is not None:
            found.append(self.real)
        for snapshot in self.snapshots:
            if snapshot.merging:
                found += [*snapshot.below, snapshot.cow]
        found.append(self.top)
        for snapshot in self.snapshots:
            if not snapshot.merging:
                found += [*snapshot.below, snapshot.cow]
            found.append(snapshot.top)
        return list({device.uuid: device for device in found}.values())

    @property
    def tops(self) -> list[DMDevice]:
        """What users open: the LV, and its snapshots."""
        return [self.top, *(snapshot.top for snapshot in self.snapshots)]


def holder_of(lv: LogicalVolume) -> LogicalVolume:
    """Return the LV of whose family an LV is: the origin of a snapshot, the mirror of an image."""
    seen: set[LogicalVolume] = set()
    while lv not in seen:
        seen.add(lv)
        record = lv if lv.is_snapshot_record else lv.snapshot
        if record is not None and record.segments[0].origin is not None:
            lv = record.segments[0].origin
        elif not lv.visible and not lv.is_origin:
            lv = next((user for user in lv.users if not user.is_snapshot_record), lv)
    return lv


def holders(vg: VolumeGroupMetadata) -> list[LogicalVolume]:
    """Return one LV for each family of the VG, in the VG's order."""
    tops = (lv for lv in vg.lvs if not lv.is_snapshot_record)
    return list(dict.fromkeys(holder_of(lv) for lv in tops))


def why_not(lv: LogicalVolume, *, partial: bool = False) -> str | None:
    """Return why the family of an LV cannot be activated, in LVM's words where it has them."""
    holder = holder_of(lv)
    for each in _members(holder):
        if "PVMOVE" in each.status or "LOCKED" in each.status:
            return f"Cannot activate {each}: a pvmove is in progress."
        for segment in each.segments:
            if not segment.known:
                return (
                    f"Refusing activation of LV {each} containing an unrecognised segment."
                    f" ({segment.type_text})"
                )
            if not segment.runnable:
                return f"Cannot activate {each}: segment type {segment.type_text} cannot be run."
            missing = any(
                isinstance(area.of, PhysicalVolume) and area.of.device is None
                for area in segment.areas
            )
            if missing and not partial:
                return (
                    f"Refusing activation of partial LV {holder}."
                    "  Use '--activationmode partial' to override."
                )
    return None


def _members(lv: LogicalVolume) -> Iterator[LogicalVolume]:
    """Yield all LVs of a family."""
    todo, seen = [lv], {lv}
    while todo:
        each = todo.pop(0)
        yield each
        below = [*each.snapshots, *(lv for s in each.segments for lv in segment_lvs(s))]
        todo += [other for other in below if other not in seen]
        seen.update(below)


def family(
    lv: LogicalVolume,
    *,
    merge: bool = True,
    readonly: bool = False,
    partial: bool = False,
) -> Family:
    """Return the devices of the family of an LV; LVMError if it cannot be activated.

    `merge`: a snapshot that is to be merged is being merged. `readonly`: nothing may be written.
    """
    lv = holder_of(lv)
    if reason := why_not(lv, partial=partial):
        raise LVMError(reason, errno.EOPNOTSUPP)
    return _Builder(merge=merge, readonly=readonly).family(lv)


class _Builder:
    """Makes the devices of one family."""

    def __init__(self, *, merge: bool, readonly: bool) -> None:
        self._merge = merge
        self._readonly = readonly

    def family(self, lv: LogicalVolume) -> Family:
        below, lines = self._lines(lv)
        if not lv.is_origin:
            return Family(lv, tuple(below), None, self._device(lv, "", lines))
        real = self._device(lv, REAL, lines)
        snapshots = tuple(self._snapshot(record, real) for record in lv.snapshots)
        merging = next((each for each in snapshots if each.merging), None)
        if merging is None:
            line = TableLine(0, lv.sectors, "snapshot-origin", (real,))
        else:
            args = (real, merging.cow, "P", merging.chunk_size)
            line = TableLine(0, lv.sectors, "snapshot-merge", args)
        return Family(lv, tuple(below), real, self._device(lv, "", [line]), snapshots)

    def _snapshot(self, record: LogicalVolume, real: DMDevice) -> SnapshotDevices:
        segment = record.segments[0]
        assert segment.cow is not None
        below, lines = self._lines(segment.cow)
        cow = self._device(segment.cow, COW, lines)
        merging = segment.merging and self._merge
        line = TableLine(0, record.sectors, "snapshot", (real, cow, "P", segment.chunk_size))
        if merging:
            line = TableLine(0, record.sectors, "error")
        top = self._device(segment.cow, "", [line])
        return SnapshotDevices(tuple(below), cow, top, segment.chunk_size, merging)

    def _lines(self, lv: LogicalVolume) -> tuple[list[DMDevice], list[TableLine]]:
        """Return the devices below an LV's own extents, and its table."""
        below: list[DMDevice] = []
        lines: list[TableLine] = []
        for number, segment in enumerate(lv.segments):
            log = self._stack(segment.mirror_log) if segment.mirror_log is not None else []
            below += log
            legs: list[Arg] = []
            for index, area in enumerate(segment.areas):
                found, dev, start = self._area(lv, segment, area, f"{number}_{index}")
                below += found
                legs += [dev, start]
            lines.append(_line(segment, lv.vg.extent_size, legs, log[-1:]))
        return below, lines

    def _stack(self, lv: LogicalVolume) -> list[DMDevice]:
        """Return the device of a hidden LV, with what is below it, which comes first."""
        below, lines = self._lines(lv)
        return [*below, self._device(lv, "", lines)]

    def _area(
        self, lv: LogicalVolume, segment: Segment, area: Area, label: str
    ) -> tuple[list[DMDevice], _core.BlockDevice | DMDevice, int]:
        extent_size = lv.vg.extent_size
        if isinstance(area.of, LogicalVolume):
            found = self._stack(area.of)
            return found, found[-1], area.start * extent_size
        if area.of.device is not None:
            return [], area.of.device, area.of.pe_start + area.start * extent_size
        line = TableLine(0, segment.area_extents * extent_size, "error")
        missing = self._device(lv, f"{MISSING}_{label}", [line])
        return [missing], missing, 0

    def _device(self, lv: LogicalVolume, layer: str, lines: Iterable[TableLine]) -> DMDevice:
        fixed = layer == "" and "FIXED_MINOR" in lv.status
        return DMDevice(
            name=dm_name(lv.vg.name, lv.name, layer),
            uuid=dm_uuid(lv.vg.id, lv.id, layer),
            lines=tuple(lines),
            readonly=self._readonly or (layer != COW and not lv.writable),
            lv=lv,
            layer=layer,
            minor=lv.minor if fixed else None,
        )


def _line(segment: Segment, extent_size: int, legs: list[Arg], log: list[DMDevice]) -> TableLine:
    start, length = segment.start_extent * extent_size, segment.extent_count * extent_size
    count = len(segment.areas)
    args: list[Arg] = []
    kind = segment.type
    if kind == "striped" and count == 1:
        kind, args = "linear", legs
    elif kind == "striped":
        args = [count, segment.stripe_size, *legs]
    elif kind == "mirror":
        kept: list[Arg] = [*log, segment.region_size]
        args = ["disk" if log else "core", len(kept), *kept, count, *legs, 1, "handle_errors"]
    return TableLine(start, length, kind, tuple(args))
