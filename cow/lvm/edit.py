"""Change, rename, resize and remove plain LVs. Edits of a generation, without any device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from cow.lvm.allocation import PVRange, allocate, append_segment, free_areas
from cow.lvm.create import Report, check_policy, set_permission
from cow.lvm.errors import AlreadyExists, InUse, LVMError, LVNotFound, NoSpaceError, RequestError
from cow.lvm.metadata import (
    MAX_EXTENTS,
    NOT_LV_KEYS,
    LogicalVolume,
    PhysicalVolume,
    Segment,
    VolumeGroupMetadata,
    segment_lvs,
)
from cow.lvm.names import RESERVED_PARTS, check_lv_name, check_tag, fits, is_name
from cow.lvm.size import display_size
from cow.lvm.text import Section
from cow.units import bytes_of

ALIGNMENT_OF_READ_AHEAD = 8
"""Sectors: a page of 4 KiB."""


def remove_lv(vg: VolumeGroupMetadata, lv: LogicalVolume) -> None:
    """Take an LV out of the VG, with the hidden ones that only it stands on.

    InUse if another one stands on it or names it.
    """
    if lv.is_snapshot_record:
        raise LVMError(f"Can't remove {lv.name}: it is the record of a snapshot.")
    if "LOCKED" in lv.status or "PVMOVE" in lv.status:
        raise InUse(f"Can't remove locked logical volume {lv}.")
    if users := lv.users:
        names = ", ".join(user.name for user in users)
        raise InUse(f"Can't remove logical volume {lv}: it is used by {names}.")
    if not lv.visible and not lv.name.endswith("_vorigin"):  # that one goes with its snapshot
        raise LVMError(f"Can't remove internal logical volume {lv}.")
    below = {lv}
    while more := {each for part in below for each in _hidden_below(part)} - below:
        below |= more
    for each in below:
        for segment in each.segments:
            if not segment.runnable:
                raise LVMError(
                    f"Can't remove logical volume {lv}: LVs of type {segment.type} are not"
                    " supported."
                )
    for each in below - {lv}:
        if others := [user.name for user in each.users if user not in below]:
            raise InUse(f"Can't remove logical volume {each}: it is used by {', '.join(others)}.")
    vg.lvs = [each for each in vg.lvs if each not in below]


def _hidden_below(lv: LogicalVolume) -> list[LogicalVolume]:
    return [each for segment in lv.segments for each in segment_lvs(segment) if not each.visible]


# Names.


def rename_lv(vg: VolumeGroupMetadata, old_name: str, new_name: str) -> None:
    """Rename an LV, with the hidden LVs that are named after it."""
    if not is_name(new_name):
        raise RequestError(f'New logical volume name "{new_name}" is invalid')
    check_lv_name(new_name, vg.name)
    if old_name == new_name:
        raise RequestError("Old and new logical volume names must differ")
    if vg.find_lv(new_name) is not None:
        raise AlreadyExists(
            f'Logical Volume "{new_name}" already exists in volume group "{vg.name}"'
        )
    lv = vg.find_lv(old_name)
    if lv is None:
        raise LVNotFound(
            f'Existing logical volume "{old_name}" not found in volume group "{vg.name}"'
        )
    if not lv.visible:
        raise LVMError(f'Cannot rename internal LV "{old_name}".')
    if "LOCKED" in lv.status or "PVMOVE" in lv.status:
        raise InUse(f"Cannot rename locked LV {old_name}")
    names = {old_name: new_name}
    for each in vg.lvs:
        part = each.name.removeprefix(old_name)
        if each is not lv and not each.visible and part.startswith(RESERVED_PARTS):
            names[each.name] = new_name + part
    for name in names.values():
        if not fits(vg.name, name):
            raise RequestError(f'Name "{vg.name}/{name}" is too long.')
        if vg.find_lv(name) is not None:
            raise AlreadyExists(
                f'Logical Volume "{name}" already exists in volume group "{vg.name}"'
            )
    for each in vg.lvs:
        each.name = names.get(each.name, each.name)
        for segment in each.segments:
            if not segment.runnable:
                _rename_in(segment.extra, names)


def _rename_in(section: Section, names: dict[str, str]) -> None:
    """Rename what the keys of a raid, thin or cache segment name."""
    for key, value in section.items():
        if isinstance(value, Section):
            _rename_in(value, names)
        elif isinstance(value, str) and key not in NOT_LV_KEYS:
            section[key] = names.get(value, value)
        elif isinstance(value, list):
            section[key] = [names.get(e, e) if isinstance(e, str) else e for e in value]


# Sizes.


def extend_lv(
    lv: LogicalVolume,
    extents: int,
    *,
    stripes: int | None = None,
    stripe_size: int | None = None,
    ranges: Sequence[PVRange] | None = None,
    policy: str | None = None,
    report: Report = lambda text: None,
) -> None:
    """Make a plain LV `extents` extents long: more than it has.

    New extents have as many stripes of the same size as the last segment, where nothing else is
    asked for; the new size is rounded up to whole stripes.
    """
    old = lv.extent_count
    check_resize(lv)
    check_policy(policy)
    _check_larger(old, extents)
    last = lv.segments[-1] if lv.segments else Segment(0, 0, "striped")
    if last.type in ("zero", "error"):
        append_segment(lv, Segment(old, extents - old, last.type))
        return
    if stripes is None and len({(len(s.areas), s.stripe_size) for s in lv.segments}) > 1:
        raise LVMError("Please specify number of stripes (-i) and stripesize (-I)")
    stripes = stripes or max(len(last.areas), 1)
    if stripes > 1 and stripe_size is None:
        stripe_size = last.stripe_size or None
        if stripe_size is None:
            raise RequestError("Stripe size is needed where the last segment has no stripes.")
        report(f"Using stripesize of last segment {display_size(stripe_size)}")
    rounded = old + -(-(extents - old) // stripes) * stripes
    if rounded != extents:
        report(
            f"Rounding size ({extents} extents) up to stripe boundary size for segment"
            f" ({rounded} extents)."
        )
        extents = rounded
    _check_larger(old, extents)
    allocate(
        lv,
        extents - old,
        stripes=stripes,
        stripe_size=stripe_size or 0,
        ranges=ranges,
        policy=policy,
    )


def _check_larger(old: int, new: int) -> None:
    if new == old:
        raise LVMError(f"New size ({new} extents) matches existing size ({old} extents).")
    if new < old:
        raise LVMError(
            f"New size given ({new} extents) not larger than existing size ({old} extents)"
        )
    if new > MAX_EXTENTS:
        raise NoSpaceError(f"{new} extents are more than {MAX_EXTENTS}.")


def check_resize(lv: LogicalVolume) -> None:
    """Refuse LVs whose size is not theirs alone."""
    if lv.is_snapshot_record or not (lv.visible or lv.is_cow):
        raise LVMError(f"Can't resize internal logical volume {lv}.")
    if "LOCKED" in lv.status or "PVMOVE" in lv.status:
        raise InUse(f"Can't resize locked logical volume {lv}.")
    for segment in lv.segments:
        if not segment.runnable or segment.type in ("mirror", "snapshot"):
            raise LVMError(
                f"Can't resize logical volume {lv}: type {segment.type} is not supported."
            )


def reduce_lv(lv: LogicalVolume, extents: int, report: Report = lambda text: None) -> None:
    """Make a plain LV `extents` extents long: fewer than it has; whole stripes stay."""
    old = lv.extent_count
    check_resize(lv)
    if extents < 1:
        raise LVMError(f"Unable to reduce {lv} below 1 extent.")
    if extents == old:
        raise LVMError(f"New size ({extents} extents) matches existing size ({old} extents).")
    rounded = whole_stripes(lv, extents)
    if rounded != extents:
        report(
            f"Rounding size ({extents} extents) up to stripe boundary size for segment"
            f" ({rounded} extents)."
        )
        extents = rounded
    if extents == old:
        raise LVMError(f"New size ({extents} extents) matches existing size ({old} extents)")
    if extents > old:
        raise LVMError(
            f"New size given ({extents} extents) not less than existing size ({old} extents)"
        )
    while lv.segments and lv.segments[-1].start_extent >= extents:
        lv.segments.pop()
    lv.segments[-1].extent_count = extents - lv.segments[-1].start_extent


def whole_stripes(lv: LogicalVolume, extents: int) -> int:
    """Return how many extents an LV keeps that is to be reduced to `extents`."""
    for segment in lv.segments:
        if segment.start_extent < extents <= segment.end_extent:
            stripes = max(len(segment.areas), 1)
            inside = -(-(extents - segment.start_extent) // stripes) * stripes
            return segment.start_extent + inside
    return extents


# Properties.


def change_lv(
    lv: LogicalVolume,
    *,
    permission: str | None = None,
    add_tags: Iterable[str] = (),
    remove_tags: Iterable[str] = (),
    policy: str | None = None,
    read_ahead: int | None = None,
    flags: dict[str, bool] | None = None,
    report: Report = lambda text: None,
) -> None:
    """Change what lvchange changes without touching extents.

    `read_ahead` in sectors, -1 none, 0 automatic; `flags` such as ACTIVATION_SKIP on or off.
    """
    if permission is not None:
        old = lv.writable
        set_permission(lv, permission)
        if lv.writable is old:
            shown = f"{lv} is already writable." if old else f'"{lv}" is already read only.'
            raise LVMError(f"Logical volume {shown}")
    if lv.is_origin and (policy is not None or read_ahead is not None):
        raise LVMError(
            f"Command on LV {lv} uses options that are invalid with LV properties:"
            f" lv_is_thick_origin .\nCommand not permitted on LV {lv}."
        )
    if policy is not None:
        check_policy(policy)
        new_policy = None if policy == "inherit" else policy
        if new_policy == lv.allocation_policy:
            raise LVMError(f"Allocation policy of logical volume {lv} is already {policy}.")
        lv.allocation_policy = new_policy
    if read_ahead is not None:
        _set_read_ahead(lv, read_ahead, report)
    change_tags(lv.tags, add_tags, remove_tags)
    _set_flags(lv.flags, flags)


def _set_read_ahead(lv: LogicalVolume, read_ahead: int, report: Report) -> None:
    if read_ahead > 0 and read_ahead % ALIGNMENT_OF_READ_AHEAD:
        read_ahead = -(-read_ahead // ALIGNMENT_OF_READ_AHEAD) * ALIGNMENT_OF_READ_AHEAD
        report(
            f"WARNING: Overriding readahead to {read_ahead} sectors, a multiple of 4K page size."
        )
    if read_ahead < -1:
        raise RequestError(f"Invalid read ahead {read_ahead}.")
    if read_ahead == (lv.read_ahead or 0):
        shown = {-1: "none", 0: "auto"}.get(read_ahead, str(read_ahead))
        raise LVMError(f"Read ahead is already {shown} for {lv}.")
    lv.read_ahead = read_ahead or None


def change_tags(tags: list[str], add: Iterable[str], remove: Iterable[str]) -> None:
    """Add and remove tags in place; those that are there, or not there, are no error."""
    for tag in add:
        check_tag(tag)
        if tag not in tags:
            tags.append(tag)
    for tag in remove:
        check_tag(tag)
        if tag in tags:
            tags.remove(tag)


def change_vg(
    vg: VolumeGroupMetadata,
    *,
    add_tags: Iterable[str] = (),
    remove_tags: Iterable[str] = (),
    resizeable: bool | None = None,
    max_lv: int | None = None,
    max_pv: int | None = None,
    policy: str | None = None,
    flags: dict[str, bool] | None = None,
) -> None:
    """Change what vgchange changes; limits of 0 are none."""
    change_tags(vg.tags, add_tags, remove_tags)
    if resizeable is not None:
        if resizeable is ("RESIZEABLE" in vg.status):
            raise LVMError(
                f'Volume group "{vg.name}" is already {"" if resizeable else "not "}resizeable'
            )
        rest = [word for word in vg.status if word != "RESIZEABLE"]
        vg.status = ["RESIZEABLE", *rest] if resizeable else rest
    if max_lv is not None:
        count = len(vg.visible_lvs())
        if max_lv and max_lv < count:
            raise LVMError(
                f"MaxLogicalVolume is less than the current number {count} of LVs for {vg.name}"
            )
        vg.max_lv = max_lv
    if max_pv is not None:
        if max_pv and max_pv < len(vg.pvs):
            raise LVMError(
                f'MaxPhysicalVolumes is less than the current number {len(vg.pvs)} of PVs for "'
                f'{vg.name}"'
            )
        vg.max_pv = max_pv
    if policy is not None:
        check_policy(policy)
        if policy == "inherit":
            raise LVMError("Volume Group allocation policy cannot inherit from anything")
        if policy == (vg.allocation_policy or "normal"):
            raise LVMError(f"Volume group allocation policy is already {policy}")
        vg.allocation_policy = None if policy == "normal" else policy
    _set_flags(vg.flags, flags)


def remove_pv(vg: VolumeGroupMetadata, pv_id: str) -> None:
    """Take a PV out of the VG; InUse if an LV lies on it."""
    pv = vg.pv_with_id(pv_id)
    assert pv is not None
    above = [lv for lv in vg.lvs if any(a.of is pv for s in lv.segments for a in s.areas)]
    if above and pv.missing:
        names = [f"WARNING: Partial LV {lv.name} needs to be repaired or removed." for lv in above]
        raise InUse("\n".join([*names, f"There are still partial LVs in VG {vg.name}."]))
    if above:
        raise InUse(f'Physical volume "{pv.path}" still in use')
    if len(vg.pvs) == 1:
        raise LVMError(
            f'Can\'t remove final physical volume "{pv.path}" from volume group "{vg.name}"'
        )
    vg.pvs.remove(pv)


def resize_pv(vg: VolumeGroupMetadata, pv: PhysicalVolume, size: int) -> None:
    """Give a PV the extents that fit into `size` sectors; LVMError if others are in use.

    As LVM writes it, dev_size is then without what is before the extents.
    """
    if size < pv.pe_start:
        raise LVMError(
            f"Size must exceed physical extent start of {pv.pe_start} sectors on PV {pv.path}."
        )
    if any(mda.start > bytes_of(pv.pe_start) for mda in pv.mdas):
        raise LVMError(f"{pv.path}: its second metadata area, at the end, cannot be moved.")
    extents = (size - pv.pe_start) // vg.extent_size
    if not extents:
        raise LVMError(
            f"Size must leave space for at least one physical extent of {vg.extent_size} sectors"
            f" on PV {pv.path}."
        )
    free = [area for area in free_areas(vg) if area.pv is pv]
    used = pv.pe_count - sum(area.count for area in free)
    last = free[-1].start if free and free[-1].end == pv.pe_count else pv.pe_count
    if extents < last:
        which = "later ones" if extents >= used else f"{used}"
        raise InUse(f"{pv.path}: cannot resize to {extents} extents as {which} are allocated.")
    pv.pe_count, pv.dev_size = extents, size - pv.pe_start


def set_exported(vg: VolumeGroupMetadata, exported: bool) -> None:
    """Mark a VG and its PVs as exported, or not; LVMError if they are that already."""
    if exported is ("EXPORTED" in vg.status):
        shown = f"{vg.name} is" if exported else f'"{vg.name}" is not'
        raise LVMError(f"Volume group {shown} exported")
    vg.status = [word for word in vg.status if word != "EXPORTED"]
    for pv in vg.pvs:
        pv.status = [word for word in pv.status if word != "EXPORTED"]
    if exported:
        vg.status.insert(0, "EXPORTED")
        for pv in vg.pvs:
            pv.status.append("EXPORTED")


def _set_flags(flags: list[str], changes: dict[str, bool] | None) -> None:
    for flag, on in (changes or {}).items():
        if not on and flag in flags:
            flags.remove(flag)
        elif on and flag not in flags:
            flags.append(flag)


def extents_of(
    vg: VolumeGroupMetadata, size: int, report: Callable[[str], None] = lambda text: None
) -> int:
    """Return the extents that hold `size` bytes, rounded up, which `report` is told."""
    extent_bytes = vg.extent_size * 512
    extents = -(-size // extent_bytes)
    if size % extent_bytes:
        shown = display_size(extents * vg.extent_size)
        report(f"Rounding up size to full physical extent {shown}")
    return extents
