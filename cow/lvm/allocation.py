"""Free extents of PVs, and where new ones of an LV go: the choice that LVM makes.

The policies are tried in LVM's order, up to the LV's own:

    contiguous   right behind the last segment, all in one piece
    cling        on the PVs the LV is on, leg by leg
    normal       every leg on another PV; what follows goes where the first extents went
    anywhere     legs may share a PV

On a PV the smallest free area that suffices is preferred, else the largest one is used up; PVs with
areas that suffice go before those with smaller ones, in the VG's order. (lib/metadata/lv_manip.c)
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
            if each.pv.id == area.pv.id:
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
    policy = policy or lv.allocation_policy or lv.vg.allocation_policy or DEFAULT_POLICY
    if policy == "inherit":
        policy = DEFAULT_POLICY
    free_map = allocatable_areas(lv.vg, ranges)
    free = sum(area.count for area in free_map)
    if extents > free:
        raise NoSpaceError(
            f"Insufficient free space: {extents} extents needed, but only {free} available"
        )
    allocator = _Allocator(lv, stripes, free_map, can_split=policy != "contiguous")
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


class _PVMap:
    """The free areas of one PV, the largest first, and how much of each a round has reserved."""

    def __init__(self, pv: PhysicalVolume) -> None:
        self.pv = pv
        self.areas: list[FreeArea] = []
        self.left: dict[FreeArea, int] = {}

    def add(self, area: FreeArea) -> None:
        """Put an area in its place, behind those of its size."""
        self.left[area] = area.count
        self._insert(area, area.count)

    def _insert(self, area: FreeArea, count: int) -> None:
        at = next((i for i, each in enumerate(self.areas) if count > each.count), len(self.areas))
        self.areas.insert(at, area)

    def reset(self) -> None:
        """Forget what is reserved."""
        for area in [area for area in self.areas if self.left[area] != area.count]:
            self.areas.remove(area)
            self.add(area)

    def reserve(self, area: FreeArea, needed: int) -> int:
        """Reserve up to `needed` extents; the area then stands where its rest belongs."""
        count = min(needed, self.left[area])
        self.left[area] -= count
        if self.left[area]:
            self.areas.remove(area)
            self._insert(area, self.left[area])
        return count

    def consume(self, area: FreeArea, count: int) -> int:
        """Take extents off the start of an area; return the first."""
        start = area.start
        self.areas.remove(area)
        if count < area.count:
            area.start += count
            area.count -= count
            self.add(area)
        return start


@dataclass
class _Slot:
    """An area that may serve as a leg, and how much of it."""

    pv_map: _PVMap
    area: FreeArea
    count: int


class _Allocator:
    """Takes areas from a map of what is free, policy by policy, round by round."""

    def __init__(
        self, lv: LogicalVolume, stripes: int, free: list[FreeArea], *, can_split: bool
    ) -> None:
        self._stripes = stripes
        self._can_split = can_split
        maps: dict[PhysicalVolume, _PVMap] = {}
        for area in free:
            maps.setdefault(area.pv, _PVMap(area.pv)).add(area)
        self._maps = list(maps.values())
        last = lv.segments[-1] if lv.segments else None
        matches = last is not None and len(last.areas) == stripes
        self._last = last if matches else None
        self._first_legs = [area.of for area in lv.segments[0].areas] if matches else []
        self.taken: list[tuple[list[Area], int]] = []
        """(one area for each leg, extents of each)"""

    def take(self, needed: int, policy: str) -> int:
        """Take up to `needed` extents for each leg; return how many."""
        before = needed
        positional = policy in ("contiguous", "cling") and self._last is not None
        positional |= policy == "cling"
        cling = policy == "normal"
        while needed:
            count = self._round(needed, policy, positional, cling)
            needed -= count
            if policy == "contiguous" or not self._can_split:
                break
            if count == 0:
                if policy == "cling" and positional and self._last is not None:
                    positional = False
                elif cling:
                    cling = False
                else:
                    break
            elif policy == "normal":
                cling = True
        return before - needed

    def _round(self, needed: int, policy: str, positional: bool, cling: bool) -> int:
        """Take one area for each leg, as long as the shortest of them; return the length."""
        for pv_map in self._maps:
            pv_map.reset()
        fixed: list[_Slot | None] = [None] * (self._stripes if positional else 0)
        chosen: list[_Slot] = []
        follow = positional or cling or (policy == "cling")
        while True:
            before = len(chosen)
            for pv_map in self._maps:
                self._look_at(pv_map, needed, policy, follow, positional, fixed, chosen)
                if policy == "anywhere" and len(chosen) >= self._stripes:
                    break
                if fixed and None not in fixed:
                    break
            if policy != "anywhere" or not before < len(chosen) < self._stripes:
                break
        chosen.sort(key=lambda slot: -slot.count)
        rest = iter(chosen)
        legs = [slot or next(rest, None) for slot in fixed] if any(fixed) else []
        slots = [slot for slot in [*legs, *rest] if slot is not None][: self._stripes]
        if len(slots) < self._stripes:
            return 0
        length = min(needed, *(slot.count for slot in slots))
        areas = [Area(s.area.pv, s.pv_map.consume(s.area, length)) for s in slots]
        self.taken.append((areas, length))
        return length

    def _look_at(
        self,
        pv_map: _PVMap,
        needed: int,
        policy: str,
        follow: bool,
        positional: bool,
        fixed: list[_Slot | None],
        chosen: list[_Slot],
    ) -> None:
        """Add the area of a PV that serves best: to its leg in `fixed`, or to `chosen`."""
        found = False
        at = 0
        while at < len(pv_map.areas):
            area = pv_map.areas[at]
            left = pv_map.left[area]
            at += 1
            if left == 0:
                continue
            if follow:
                leg = self._leg(area, policy, fixed)
                if leg is None and policy == "contiguous":
                    continue
                if leg is None:
                    return
                if positional:
                    fixed[leg] = _Slot(pv_map, area, area.count)
                    return
            elif left < needed and (not self._can_split or (found and policy != "anywhere")):
                return
            slot = _Slot(pv_map, area, pv_map.reserve(area, needed))
            if found and policy != "anywhere":
                chosen[-1] = slot
            else:
                chosen.append(slot)
            found = True
            # Reserving moves the area behind larger ones, which are not looked at any more.
            at = pv_map.areas.index(area) + 1

    def _leg(self, area: FreeArea, policy: str, fixed: list[_Slot | None]) -> int | None:
        """Return the leg that would go on in an area, by the rules of a policy."""

        def is_free(leg: int) -> bool:
            return leg >= len(fixed) or fixed[leg] is None

        if self._last is not None:
            for leg, old in enumerate(self._last.areas):
                end = old.start + self._last.area_extents
                if is_free(leg) and old.of is area.pv and end == area.start:
                    return leg
            if policy == "contiguous":
                return None
            for leg, of in enumerate(self._first_legs[: self._stripes]):
                if is_free(leg) and of is area.pv:
                    return leg
        for leg in range(self._stripes):
            if is_free(leg) and any(areas[leg].of is area.pv for areas, _ in self.taken):
                return leg
        return None
