"""Make LVs: linear, striped, zero and error. Edits of a generation, without any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from cow.lvm.allocation import POLICIES, PVRange, allocate
from cow.lvm.errors import AlreadyExists, LVMError, NoSpaceError, RequestError
from cow.lvm.metadata import MAX_EXTENTS, LogicalVolume, Segment, VolumeGroupMetadata
from cow.lvm.names import check_lv_name, check_tag, fits, free_name
from cow.lvm.size import display_size
from cow.units import is_power_of_2

Report = Callable[[str], None]

DEFAULT_STRIPE_SIZE: Final = 128
"""Sectors."""
MIN_STRIPE_SIZE: Final = 8
MAX_STRIPES: Final = 128
VIRTUAL_TYPES: Final = ("zero", "error")
TYPES: Final = ("striped", *VIRTUAL_TYPES)


@dataclass(frozen=True)
class LVOptions:
    """What an LV is made with, beside its name and size."""

    type: str = "striped"
    """striped (with one stripe: linear), zero or error."""
    stripes: int = 1
    stripe_size: int | None = None
    """Sectors."""
    policy: str | None = None
    """contiguous, cling, normal or anywhere; None: as the VG has it."""
    permission: str = "rw"
    """rw or r."""
    tags: Sequence[str] = ()
    read_ahead: int | None = None
    """Sectors; -1 none, None or 0 automatic."""
    flags: Sequence[str] = ()
    """ACTIVATION_SKIP, NOAUTOACTIVATE."""
    ranges: Sequence[PVRange] | None = field(default=None)
    """Where extents may come from; None: all PVs."""


def create_lv(
    vg: VolumeGroupMetadata,
    name: str | None,
    extents: int,
    options: LVOptions | None = None,
    report: Report = lambda text: None,
) -> LogicalVolume:
    """Add an LV of `extents` extents; without `name` it is lvol%d.

    The size is rounded up to whole stripes, which `report` is told.
    """
    options = options or LVOptions()
    name = new_lv_name(vg, name)
    check_limit(vg)
    if extents <= 0:
        raise RequestError("--extents may not be zero.")
    kind = "striped" if options.type == "linear" else options.type
    if kind not in TYPES:
        raise LVMError(f"Creation of LVs of type {options.type} is not supported.")
    for tag in options.tags:
        check_tag(tag)
    check_policy(options.policy)
    stripe_size = 0
    if kind == "striped":
        stripe_size = check_stripes(vg, options.stripes, options.stripe_size, report)
        extents = round_to_stripes(vg, extents, options.stripes, report)
        check_room(vg, extents, options)
    if extents > MAX_EXTENTS:
        raise RequestError(f"{extents} extents are more than {MAX_EXTENTS}.")
    lv = vg.new_lv(
        name,
        tags=list(dict.fromkeys(options.tags)),
        flags=list(options.flags),
        allocation_policy=options.policy if options.policy != "inherit" else None,
        read_ahead=options.read_ahead or None,
    )
    set_permission(lv, options.permission)
    if kind == "striped":
        allocate(
            lv, extents, stripes=options.stripes, stripe_size=stripe_size, ranges=options.ranges
        )
    else:
        lv.segments.append(Segment(0, extents, kind))
    return lv


def new_lv_name(vg: VolumeGroupMetadata, name: str | None) -> str:
    """Check a name for a new LV, or make one."""
    if name is None:
        name = free_name("lvol", (lv.name for lv in vg.lvs))
        if not fits(vg.name, name):
            raise RequestError(f'Name "{vg.name}/{name}" is too long.')
        return name
    check_lv_name(name, vg.name)
    if vg.find_lv(name) is not None:
        raise AlreadyExists(f'Logical Volume "{name}" already exists in volume group "{vg.name}"')
    return name


def check_limit(vg: VolumeGroupMetadata) -> None:
    """Refuse a further LV where the VG has its number."""
    if vg.max_lv and len(vg.visible_lvs()) >= vg.max_lv:
        raise LVMError(
            f"Maximum number of logical volumes ({vg.max_lv}) reached in volume group {vg.name}"
        )


def check_policy(policy: str | None) -> None:
    """Refuse an allocation policy there is not."""
    if policy is not None and policy not in (*POLICIES, "inherit"):
        raise RequestError(f"Unrecognised allocation policy {policy}")


def check_stripes(
    vg: VolumeGroupMetadata, stripes: int, stripe_size: int | None, report: Report
) -> int:
    """Check number and size of stripes; return the size in sectors, 0 with one stripe."""
    if stripes == 0:
        raise RequestError("--stripes may not be zero.")
    if not 1 <= stripes <= MAX_STRIPES:
        raise RequestError(f"Number of stripes ({stripes}) must be between 1 and {MAX_STRIPES}.")
    if stripes == 1:
        return 0
    if stripe_size is None:
        report(f"Using default stripesize {display_size(DEFAULT_STRIPE_SIZE)}.")
        stripe_size = DEFAULT_STRIPE_SIZE
    if stripe_size < MIN_STRIPE_SIZE or not is_power_of_2(stripe_size):
        raise RequestError(f"Invalid stripe size {display_size(stripe_size)}.")
    if stripe_size > vg.extent_size:
        report(
            f"Reducing requested stripe size {display_size(stripe_size)} to maximum, physical"
            f" extent size {display_size(vg.extent_size)}."
        )
        stripe_size = 1 << (vg.extent_size.bit_length() - 1)
    return stripe_size


def round_to_stripes(vg: VolumeGroupMetadata, extents: int, stripes: int, report: Report) -> int:
    """Return `extents` rounded up so that every stripe has as many."""
    rounded = -(-extents // stripes) * stripes
    if rounded != extents:
        report(
            f"Rounding size {display_size(extents * vg.extent_size)} ({extents} extents) up to"
            f" stripe boundary size {display_size(rounded * vg.extent_size)} ({rounded} extents)."
        )
    return rounded


def check_room(vg: VolumeGroupMetadata, extents: int, options: LVOptions) -> None:
    """Refuse more than is free, and more stripes than PVs."""
    pvs = {each.id for each in vg.pvs}
    if options.ranges is not None:
        pvs &= {each.pv.id for each in options.ranges}
    if options.stripes > len(pvs) and options.policy != "anywhere":
        raise LVMError(
            f"Number of stripes ({options.stripes}) must not exceed number of physical volumes"
            f" ({len(pvs)})"
        )
    free = vg.free_extents
    if extents > free:
        raise NoSpaceError(
            f'Volume group "{vg.name}" has insufficient free space ({free} extents): {extents}'
            " required."
        )


def set_permission(lv: LogicalVolume, permission: str) -> None:
    """Make an LV rw or r."""
    if permission not in ("rw", "r"):
        raise RequestError(f"Invalid permission {permission}: rw or r.")
    lv.set_status("WRITE", permission == "rw")
