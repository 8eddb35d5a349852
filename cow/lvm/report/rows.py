"""What a row of a report is about, and the rows there are of each kind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from cow.lvm.allocation import free_areas
from cow.lvm.label_scan import PVDevice
from cow.lvm.metadata import LogicalVolume, PhysicalVolume, Segment, VolumeGroupMetadata
from cow.lvm.report.live import Live


@dataclass(frozen=True)
class Piece:
    """A run of extents of a PV."""

    start: int
    count: int


@dataclass(frozen=True, eq=False)
class Row:
    """What the fields of a row look at; what a row is not about is None.

    A PV of a VG has `pv`; `device` is where it was found, None if it is missing. An orphan has only
    its device. A free piece of a PV has no segment.
    """

    live: Live
    vg: VolumeGroupMetadata | None = None
    lv: LogicalVolume | None = None
    segment: Segment | None = None
    pv: PhysicalVolume | None = None
    device: PVDevice | None = None
    piece: Piece | None = None
    path: str = ""
    """A device that is no PV."""
    duplicate: bool = False
    show_hidden: bool = True
    """Whether hidden LVs have their names in brackets."""


def lv_rows(row: Row, lvs: Iterable[LogicalVolume], *, segments: bool = False) -> Iterator[Row]:
    """Yield a row for each LV, or for each of its segments."""
    for lv in lvs:
        if not segments:
            first = lv.segments[0] if lv.segments else None
            yield replace(row, vg=lv.vg, lv=lv, segment=first)
        else:
            for segment in lv.segments:
                yield replace(row, vg=lv.vg, lv=lv, segment=segment)


def pv_rows(row: Row, *, pieces: bool = False) -> Iterator[Row]:
    """Yield the row of a PV, or one for each piece of it that is used or free, in order."""
    if not pieces:
        yield row
    elif row.vg is None or row.pv is None:
        yield replace(row, piece=Piece(0, 0))
    else:
        yield from _pieces(row, row.vg, row.pv)


def _pieces(row: Row, vg: VolumeGroupMetadata, pv: PhysicalVolume) -> Iterator[Row]:
    found = [
        replace(row, lv=lv, segment=segment, piece=Piece(area.start, segment.area_extents))
        for lv in vg.lvs
        for segment in lv.segments
        for area in segment.areas
        if area.of is pv
    ]
    found += [
        replace(row, piece=Piece(area.start, area.count))
        for area in free_areas(vg)
        if area.pv is pv
    ]
    yield from sorted(found, key=lambda each: each.piece.start if each.piece else 0)
