"""Free extents of PVs, and where new ones of an LV go.

The policies are tried in LVM's order, up to the LV's own: contiguous (right behind the last
segment, all in one piece), cling (on the PVs the LV is on), normal (every leg on another PV),
anywhere. Of each PV the largest free area is taken, and the PVs with the largest ones first.
(lib/metadata/lv_manip.c)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cow.lvm.errors import NoSpaceError
from cow.lvm.metadata import (
    Area,
    LogicalVolume,
    PhysicalVolume,
    Segment,
    VolumeGroupMetadata,
)

POLICIES: Final = ("contiguous", "cling", "normal", "anywhere")
DEFAULT_POLICY: Final = "normal"


@dataclass(eq=False)
class FreeArea:
    """A run of free extents."""

    pv: PhysicalVolume
    start: int
    count: int

    @property
    def end(self) -> int:
        """The first extent behind it."""
        return self.start + self.count


@dataclass(frozen=True)
class PVRange:
    """Extents of a PV that may be used: from `start` on, `count` of them (None: all)."""

    pv: PhysicalVolume
    start: int = 0
    count: int | None = None


def free_areas(vg: VolumeGroupMetadata) -> list[FreeArea]:
    """Return the free areas of all PVs, in order of PVs and extents."""
    used: dict[PhysicalVolume, list[tuple[int, int]]] = {pv: [] for pv in vg.pvs}
    for lv in vg.lvs:
        for segment in lv.segments:
            for area in segment.areas:
                if isinstance(area.of, PhysicalVolume):
                    used[area.of].append((area.start, area.start + segment.area_extents))
    found = []
    for pv, runs in used.items():
        at = 0
        for start, end in [*sorted(runs), (pv.pe_count, pv.pe_count)]:
            if start > at:
                found.append(FreeArea(pv, at, start - at))
            at = max(at, end)
    return found


def allocatable_areas(
    vg: VolumeGroupMetadata, ranges: Sequence[PVRange] | None = None
) -> list[FreeArea]:
    """Return the free areas that may be used: of allocatable PVs, inside `ranges` if given."""
    areas = [area for area in free_areas(vg) if area.pv.allocatable]
    if ranges is None:
        return areas
    found = []
    for area in areas:
        for each in ranges:
            if each.pv is area.pv:
                end = area.end if each.count is None else min(area.end, each.start + each.count)
                start = max(area.start, each.start)
                if start < end:
                    found.append(FreeArea(area.pv, start, end - start))
    return found


def allocate(
    lv: LogicalVolume,
    extents: int,
    *,
    stripes: int = 1,
    stripe_size: int = 0,
    ranges: Sequence[PVRange] | None = None,
    policy: str | None = None,
) -> None:
    """Add `extents` LEs in `stripes` legs behind what the LV has; NoSpaceError adds nothing.

    `extents` is a multiple of `stripes`; `stripe_size` in sectors.
    """
    allocator = _Allocator(lv, stripes, allocatable_areas(lv.vg, ranges))
    policy = policy or lv.allocation_policy or lv.vg.allocation_policy or DEFAULT_POLICY
    if policy == "inherit":
        policy = DEFAULT_POLICY
    needed = extents // stripes
    for name in POLICIES[: POLICIES.index(policy) + 1]:
        needed -= allocator.take(needed, name)
        if needed == 0:
            break
    if needed:
        kind = f"{policy} " if policy == "contiguous" else ""
        raise NoSpaceError(
            f"Insufficient suitable {kind}allocatable extents for logical volume {lv.name}:"
            f" {needed * stripes} more required"
        )
    for areas, count in allocator.taken:
        append_segment(
            lv,
            Segment(
                start_extent=lv.extent_count,
                extent_count=count * stripes,
                type="striped",
                areas=areas,
                stripe_size=stripe_size if stripes > 1 else 0,
            ),
        )


def append_segment(lv: LogicalVolume, segment: Segment) -> None:
    """Add a segment at the end, as part of the last one if it goes on where that ends."""
    last = lv.segments[-1] if lv.segments else None
    if last is not None and _continues(last, segment):
        last.extent_count += segment.extent_count
    else:
        lv.segments.append(segment)


def _continues(last: Segment, segment: Segment) -> bool:
    if segment.type in ("zero", "error"):
        return last.type == segment.type and last.tags == segment.tags
    if (last.type, segment.type) != ("striped", "striped"):
        return False
    if not last.runnable or last.extra or last.tags != segment.tags:
        return False
    if (len(last.areas), last.stripe_size) != (len(segment.areas), segment.stripe_size):
        return False
    return all(
        old.of is new.of and old.start + last.area_extents == new.start
        for old, new in zip(last.areas, segment.areas, strict=True)
    )


class _Allocator:
    """Takes areas from a map of what is free, policy by policy."""

    def __init__(self, lv: LogicalVolume, stripes: int, free: list[FreeArea]) -> None:
        self._stripes = stripes
        self._free = free
        self.taken: list[tuple[list[Area], int]] = []
        """(one area for each leg, extents of each)"""
        last = lv.segments[-1] if lv.segments else None
        self._last = last if last is not None and len(last.areas) == stripes else None
        self._pvs = {area.of for segment in lv.segments for area in segment.areas}

    def take(self, needed: int, policy: str) -> int:
        """Take up to `needed` extents for each leg; return how many."""
        if policy == "contiguous":
            return self._take_contiguous(needed)
        before = needed
        while needed:
            if policy == "anywhere":
                chosen = self._anywhere(needed)
            else:
                chosen = self._largest(self._pvs if policy == "cling" else None)
            if len(chosen) < self._stripes:
                break
            count = min(needed, *(area.count for area in chosen))
            self._use([area.start for area in chosen], chosen, count)
            needed -= count
        return before - needed

    def _take_contiguous(self, needed: int) -> int:
        if self._last is None:
            if self._pvs:
                return 0
            chosen = [area for area in self._largest(None) if area.count >= needed]
        else:
            chosen = []
            for leg in self._last.areas:
                end = leg.start + self._last.area_extents
                chosen += [a for a in self._free if a.pv is leg.of and a.start == end]
        if len(chosen) < self._stripes or any(area.count < needed for area in chosen):
            return 0
        self._use([area.start for area in chosen], chosen, needed)
        return needed

    def _largest(self, pvs: set[PhysicalVolume | LogicalVolume] | None) -> list[FreeArea]:
        """Return the largest area of each PV, of the PVs that have the largest, one per leg."""
        best: dict[PhysicalVolume, FreeArea] = {}
        for area in self._free:
            if area.count and (pvs is None or area.pv in pvs):
                found = best.get(area.pv)
                if found is None or area.count > found.count:
                    best[area.pv] = area
        ordered = sorted(best.values(), key=lambda area: -area.count)
        return ordered[: self._stripes]

    def _anywhere(self, needed: int) -> list[FreeArea]:
        """Return areas where legs may share a PV: pieces of the largest ones."""
        areas = [area for area in self._free if area.count]
        low, high = 0, min(needed, max((area.count for area in areas), default=0))
        while low < high:
            count = (low + high + 1) // 2
            if sum(area.count // count for area in areas) >= self._stripes:
                low = count
            else:
                high = count - 1
        pieces: list[FreeArea] = []
        for area in sorted(areas, key=lambda area: -area.count):
            while low and area.count >= low and len(pieces) < self._stripes:
                pieces.append(self._split(area, low))
        return pieces

    def _split(self, area: FreeArea, count: int) -> FreeArea:
        """Cut `count` extents off the start of an area, as an area of their own."""
        piece = FreeArea(area.pv, area.start, count)
        area.start += count
        area.count -= count
        self._free.append(piece)
        return piece

    def _use(self, starts: list[int], chosen: list[FreeArea], count: int) -> None:
        areas = [Area(area.pv, start) for area, start in zip(chosen, starts, strict=True)]
        self.taken.append((areas, count))
        for area in chosen:
            area.start += count
            area.count -= count
