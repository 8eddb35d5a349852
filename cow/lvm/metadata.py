"""One generation of a VG's metadata as objects: the VG, its PVs, LVs and segments.

`cow.lvm.metadata_text` makes them of the text and writes them. What is not known here (keys,
strings, whole sections, the contents of raid, thin and cache segments) is kept in `extra`, and
written again where it stood; LVM itself drops it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from cow.lvm.errors import LVNotFound
from cow.lvm.names import new_id
from cow.lvm.text import Section

if TYPE_CHECKING:
    from cow import _core

RUNNABLE_TYPES: Final = frozenset({"striped", "zero", "error", "snapshot", "mirror"})
"""The segment types that can be activated."""

KNOWN_TYPES: Final = RUNNABLE_TYPES | frozenset(
    "cache cache-pool integrity raid0 raid0_meta raid1 raid10 raid10_near raid4 raid5 raid5_la"
    " raid5_ls raid5_n raid5_ra raid5_rs raid6 raid6_la_6 raid6_ls_6 raid6_n_6 raid6_nc raid6_nr"
    " raid6_ra_6 raid6_rs_6 raid6_zr thin thin-pool vdo vdo-pool writecache".split()
)
"""The segment types LVM knows; the others make a VG read-only."""

KNOWN_TYPE_FLAGS: Final = frozenset(
    "CACHE_USES_CACHEVOL CROP_METADATA METADATA_FORMAT REMOVE_AFTER_RESHAPE RESHAPE"
    " RESHAPE_DELTA_DISKS_MINUS RESHAPE_DELTA_DISKS_PLUS".split()
)

LV_STATUS: Final = tuple(
    "READ WRITE FIXED_MINOR VISIBLE PVMOVE LOCKED NOTSYNCED REBUILD WRITEMOSTLY".split()
)
"""The words an LV's status may have, in the order LVM writes them."""

MAX_EXTENTS: Final = 2**32 - 1


@dataclass(eq=False, repr=False)
class PhysicalVolume:
    """A PV of a VG. `device` is None where it is missing; copies of the metadata share it."""

    label: str
    """The name of its section: pv0."""
    id: str
    """32 characters, no dashes."""
    pe_start: int
    """Sectors."""
    pe_count: int
    dev_size: int | None = None
    """Sectors."""
    device_hint: str = ""
    status: list[str] = field(default_factory=lambda: ["ALLOCATABLE"])
    flags: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    ba_start: int = 0
    """The bootloader area, in sectors; no size: none."""
    ba_size: int = 0
    extra: Section = field(default_factory=Section)
    device: _core.BlockDevice | None = None
    path: str = ""
    """How the user named the device; "" if it is missing."""
    mdas: list[Any] = field(default_factory=list)

    @property
    def missing(self) -> bool:
        """Whether the device is not there, or was away when the VG was changed."""
        return self.device is None or "MISSING" in self.status or "MISSING" in self.flags

    @property
    def allocatable(self) -> bool:
        """Whether new extents may be taken from it."""
        return "ALLOCATABLE" in self.status and not self.missing

    def __str__(self) -> str:
        return self.path or "[unknown]"

    def __repr__(self) -> str:
        return f"<PhysicalVolume {self.label} {self}>"


@dataclass(eq=False, repr=False)
class Area:
    """One leg of a segment: from extent `start` of a PV or an LV on."""

    of: PhysicalVolume | LogicalVolume
    start: int

    def __repr__(self) -> str:
        name = self.of.label if isinstance(self.of, PhysicalVolume) else self.of.name
        return f"<Area {name} {self.start}>"


@dataclass(eq=False, repr=False)
class Segment:
    """A run of logical extents of one kind."""

    start_extent: int
    extent_count: int
    type: str
    """What stands before the first "+" in the text; "linear" is read as "striped"."""
    type_flags: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    areas: list[Area] = field(default_factory=list)
    """striped: the legs; mirror: the images."""
    stripe_size: int = 0
    """Sectors; 0 with one leg."""
    region_size: int = 0
    """mirror: sectors."""
    mirror_log: LogicalVolume | None = None
    chunk_size: int = 0
    """snapshot: sectors."""
    origin: LogicalVolume | None = None
    cow: LogicalVolume | None = None
    merging: bool = False
    extra: Section = field(default_factory=Section)
    """Every other key; for raid, thin and cache all of them, with the names of LVs."""

    @property
    def end_extent(self) -> int:
        """The first extent behind it."""
        return self.start_extent + self.extent_count

    @property
    def area_extents(self) -> int:
        """Extents of each leg."""
        legs = len(self.areas) if self.type == "striped" else 1
        return self.extent_count // max(legs, 1)

    @property
    def known(self) -> bool:
        """Whether LVM knows type and flags; if not, the VG is read-only."""
        return self.type in KNOWN_TYPES and KNOWN_TYPE_FLAGS.issuperset(self.type_flags)

    @property
    def runnable(self) -> bool:
        """Whether it can be activated here."""
        return self.type in RUNNABLE_TYPES and not self.type_flags

    def __repr__(self) -> str:
        return f"<Segment {self.type_text} {self.start_extent}+{self.extent_count} {self.areas}>"

    @property
    def type_text(self) -> str:
        """The type with its flags, as in the text."""
        return "+".join([self.type, *self.type_flags])


@dataclass(eq=False, repr=False)
class LogicalVolume:
    """An LV, one of the hidden ones, or a snapshotN record."""

    name: str
    id: str
    """32 characters, no dashes."""
    vg: VolumeGroupMetadata
    status: list[str] = field(default_factory=lambda: ["READ", "WRITE", "VISIBLE"])
    flags: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    creation_time: int | None = None
    creation_host: str | None = None
    allocation_policy: str | None = None
    read_ahead: int | None = None
    """Sectors; -1 none, 0 (or no key) automatic."""
    major: int | None = None
    minor: int | None = None
    segments: list[Segment] = field(default_factory=list)
    extra: Section = field(default_factory=Section)

    @property
    def extent_count(self) -> int:
        """Its size in logical extents."""
        return sum(segment.extent_count for segment in self.segments)

    @property
    def sectors(self) -> int:
        """Its size in sectors."""
        return self.extent_count * self.vg.extent_size

    @property
    def writable(self) -> bool:
        """Whether its permission is rw."""
        return may_write(self.status, self.flags)

    def set_status(self, word: str, on: bool) -> None:
        """Put a word into `status`, in LVM's order, or take it out; unknown words stay behind."""
        words = {*self.status, word} if on else {*self.status} - {word}
        known = [each for each in LV_STATUS if each in words]
        self.status = known + [each for each in self.status if each not in LV_STATUS]

    @property
    def is_snapshot_record(self) -> bool:
        """Whether it is a snapshotN: no device, only the tie between an origin and a COW store."""
        return bool(self.segments) and self.segments[0].type == "snapshot"

    @property
    def snapshot(self) -> LogicalVolume | None:
        """The snapshotN that has this LV as its COW store."""
        if self.vg.ties is not None:
            return self.vg.ties.by_cow.get(self)
        found = (each for each in self.vg.snapshot_records if each.segments[0].cow is self)
        return next(found, None)

    @property
    def is_cow(self) -> bool:
        """Whether it is a COW store: what the user calls the snapshot."""
        return self.snapshot is not None

    @property
    def snapshots(self) -> list[LogicalVolume]:
        """The snapshotN records that have this LV as origin."""
        if self.vg.ties is not None:
            return self.vg.ties.by_origin.get(self, [])
        return [each for each in self.vg.snapshot_records if each.segments[0].origin is self]

    @property
    def is_origin(self) -> bool:
        """Whether it has snapshots."""
        return bool(self.snapshots)

    @property
    def merging_snapshot(self) -> LogicalVolume | None:
        """The snapshotN that is merging, or is to be merged, into this origin."""
        return next((each for each in self.snapshots if each.segments[0].merging), None)

    @property
    def is_virtual_origin(self) -> bool:
        """Whether it stands for the origin a sparse snapshot has not: an origin that is hidden."""
        return "VISIBLE" not in self.status and self.is_origin

    @property
    def visible(self) -> bool:
        """Whether LVM lists it among the user's LVs.

        A COW store is as visible as its origin (of a sparse snapshot it always is), whatever its
        status says; snapshotN never is, though its status says so.
        """
        return _is_visible(self, self.snapshot)

    @property
    def users(self) -> list[LogicalVolume]:
        """The LVs whose segments stand on this one or name it, snapshotN records among them."""
        if self.vg.ties is not None:
            return self.vg.ties.users.get(self, [])
        return [other for other in self.vg.lvs if other is not self and _names(other, self)]

    def __str__(self) -> str:
        return f"{self.vg.name}/{self.name}"

    def __repr__(self) -> str:
        return f"<LogicalVolume {self} {self.extent_count} extents>"


def _is_visible(lv: LogicalVolume, record: LogicalVolume | None) -> bool:
    """Tell whether an LV is shown; `record` is the snapshotN whose COW store it is."""
    if lv.is_snapshot_record:
        return False
    if record is None:
        return "VISIBLE" in lv.status
    origin = record.segments[0].origin
    if origin is None or "VISIBLE" not in origin.status:
        return origin is not None
    return not record.segments[0].merging


NOT_LV_KEYS: Final = ("cache_mode", "discards", "policy")
"""Keys of raid, thin and cache segments whose strings are no names of LVs."""


def _names(user: LogicalVolume, used: LogicalVolume) -> bool:
    if any(lv is used for segment in user.segments for lv in segment_lvs(segment)):
        return True
    return used.name in _named_by(user)


def _named_by(user: LogicalVolume) -> set[object]:
    """Return the names in the segments that are known by their text alone."""
    return {
        value
        for segment in user.segments
        if not segment.runnable
        for value in _values_in(segment.extra)
    }


def _values_in(section: Section) -> Iterator[object]:
    for key, value in section.items():
        if isinstance(value, Section):
            yield from _values_in(value)
        elif key not in NOT_LV_KEYS:
            yield from value if isinstance(value, list) else [value]


def segment_lvs(segment: Segment) -> Iterator[LogicalVolume]:
    """Yield the LVs a segment refers to as an object; those of raid and the like are names."""
    for area in segment.areas:
        if isinstance(area.of, LogicalVolume):
            yield area.of
    for lv in (segment.mirror_log, segment.origin, segment.cow):
        if lv is not None:
            yield lv


def may_write(status: Sequence[str], flags: Sequence[str]) -> bool:
    """Tell whether the permission of a VG or of an LV is rw.

    In a VG that is another host's, or shared, a flag takes the place of the status WRITE, so that
    an old LVM takes it to be read-only (format_text/flags.c).
    """
    return "WRITE" in status or "WRITE_LOCKED" in flags


@dataclass(frozen=True)
class Ties:
    """What ties the LVs of a VG together, found once: see VolumeGroupMetadata.looked_at()."""

    by_cow: dict[LogicalVolume, LogicalVolume]
    by_origin: dict[LogicalVolume, list[LogicalVolume]]
    users: dict[LogicalVolume, list[LogicalVolume]]


@dataclass(eq=False, repr=False)
class VolumeGroupMetadata:
    """A VG as one text tells it. A change is made on a copy(), which shares the devices."""

    name: str
    id: str
    """32 characters, no dashes."""
    seqno: int = 0
    extent_size: int = 8192
    """Sectors."""
    status: list[str] = field(default_factory=lambda: ["RESIZEABLE", "READ", "WRITE"])
    flags: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    format: str = "lvm2"
    system_id: str | None = None
    lock_type: str | None = None
    max_lv: int = 0
    max_pv: int = 0
    allocation_policy: str | None = None
    metadata_copies: int = 0
    pvs: list[PhysicalVolume] = field(default_factory=list)
    lvs: list[LogicalVolume] = field(default_factory=list)
    """All of them, hidden ones and snapshotN records too."""
    extra: Section = field(default_factory=Section)
    header: Section = field(default_factory=Section)
    """The scalars beside the VG: contents, version, description, creation_host, creation_time."""
    ties: Ties | None = None
    """Kept while many LVs are looked at and none is changed."""

    @contextlib.contextmanager
    def looked_at(self) -> Iterator[None]:
        """Find once what ties the LVs together, for those who look at many and change none.

        Otherwise each look goes through all LVs, and a look at each of them takes the square.
        """
        before = self.ties
        self.ties = before or Ties(self.records_by_cow(), self.records_by_origin(), self._users())
        try:
            yield
        finally:
            self.ties = before

    def _users(self) -> dict[LogicalVolume, list[LogicalVolume]]:
        by_name = {lv.name: lv for lv in self.lvs}
        users: dict[LogicalVolume, list[LogicalVolume]] = {}
        for user in self.lvs:
            used = [lv for segment in user.segments for lv in segment_lvs(segment)]
            used += [by_name[name] for name in _named_by(user) if name in by_name]
            for lv in dict.fromkeys(used):
                if lv is not user:
                    users.setdefault(lv, []).append(user)
        return users

    @property
    def snapshot_records(self) -> list[LogicalVolume]:
        """The snapshotN records."""
        return [lv for lv in self.lvs if lv.is_snapshot_record]

    def records_by_cow(self) -> dict[LogicalVolume, LogicalVolume]:
        """Return the snapshotN record of every COW store: for those who look at many LVs."""
        records: dict[LogicalVolume, LogicalVolume] = {}
        for record in self.snapshot_records:
            cow = record.segments[0].cow
            if cow is not None:
                records.setdefault(cow, record)
        return records

    def records_by_origin(self) -> dict[LogicalVolume, list[LogicalVolume]]:
        """Return the snapshotN records of every origin."""
        records: dict[LogicalVolume, list[LogicalVolume]] = {}
        for record in self.snapshot_records:
            origin = record.segments[0].origin
            if origin is not None:
                records.setdefault(origin, []).append(record)
        return records

    def visible_lvs(self) -> list[LogicalVolume]:
        """Return the LVs that LVM shows, in their order."""
        records = self.records_by_cow()
        return [lv for lv in self.lvs if _is_visible(lv, records.get(lv))]

    @property
    def needs_lockd(self) -> bool:
        """Whether other hosts may use the VG too, so that lvmlockd has to be asked."""
        return self.lock_type not in (None, "none")

    @property
    def extent_count(self) -> int:
        """Physical extents of all PVs."""
        return sum(pv.pe_count for pv in self.pvs)

    @property
    def free_extents(self) -> int:
        """Physical extents that no segment uses."""
        used = sum(
            segment.area_extents
            for lv in self.lvs
            for segment in lv.segments
            for area in segment.areas
            if isinstance(area.of, PhysicalVolume)
        )
        return self.extent_count - used

    def new_lv(self, name: str, **fields: Any) -> LogicalVolume:  # noqa: ANN401
        """Add an LV of this name, with a new uuid, made here and now; without segments yet."""
        lv = LogicalVolume(
            name=name,
            id=new_id(),
            vg=self,
            creation_time=int(time.time()),
            creation_host=os.uname().nodename,
            **fields,
        )
        self.lvs.append(lv)
        return lv

    @property
    def missing_pvs(self) -> list[PhysicalVolume]:
        """The PVs whose devices are not there."""
        return [pv for pv in self.pvs if pv.missing]

    def find_lv(self, name: str) -> LogicalVolume | None:
        """Return the LV of that name, or None."""
        return next((lv for lv in self.lvs if lv.name == name), None)

    def lv(self, name: str) -> LogicalVolume:
        """Return the LV of that name, a hidden one too."""
        found = self.find_lv(name)
        if found is None:
            raise LVNotFound(f'Failed to find logical volume "{self.name}/{name}"')
        return found

    def lv_with_id(self, lv_id: str) -> LogicalVolume | None:
        """Return the LV with that uuid, by which one is known from generation to generation."""
        return next((lv for lv in self.lvs if lv.id == lv_id), None)

    def pv_with_id(self, pv_id: str) -> PhysicalVolume | None:
        """Return the PV with that uuid."""
        return next((pv for pv in self.pvs if pv.id == pv_id), None)

    def copy(self) -> VolumeGroupMetadata:
        """Return a copy to edit. Devices and metadata areas are shared, all else is new."""
        new = replace(
            self,
            **_copied(self, "status", "flags", "tags", "extra", "header"),
            pvs=[_copy_pv(pv) for pv in self.pvs],
            lvs=[],
            ties=None,
        )
        new.lvs = [replace(lv, vg=new, **_copied(lv, *_LV_LISTS), segments=[]) for lv in self.lvs]
        other: dict[int, Any] = {id(pv): copy for pv, copy in zip(self.pvs, new.pvs, strict=True)}
        other |= {id(lv): copy for lv, copy in zip(self.lvs, new.lvs, strict=True)}
        for lv, copy in zip(self.lvs, new.lvs, strict=True):
            copy.segments = [_copy_segment(segment, other) for segment in lv.segments]
        return new

    def __repr__(self) -> str:
        return f"<VolumeGroupMetadata {self.name} seqno {self.seqno}>"

    def __deepcopy__(self, memo: object) -> VolumeGroupMetadata:
        return self.copy()

    def number_pvs(self) -> None:
        """Name the sections of the PVs pv0, pv1, … as every write of LVM does."""
        for number, pv in enumerate(self.pvs):
            pv.label = f"pv{number}"


_LV_LISTS = ("status", "flags", "tags", "extra")


def _copied(thing: Any, *names: str) -> dict[str, Any]:  # noqa: ANN401
    return {name: getattr(thing, name).copy() for name in names}


def _copy_pv(pv: PhysicalVolume) -> PhysicalVolume:
    return replace(pv, **_copied(pv, "status", "flags", "tags", "extra", "mdas"))


def _copy_segment(segment: Segment, other: Mapping[int, Any]) -> Segment:
    return replace(
        segment,
        **_copied(segment, "type_flags", "tags", "extra"),
        areas=[Area(other[id(area.of)], area.start) for area in segment.areas],
        mirror_log=other.get(id(segment.mirror_log)),
        origin=other.get(id(segment.origin)),
        cow=other.get(id(segment.cow)),
    )
