"""Merges: how far one is, and what is done when all is back in the origin.

A merge is asked for in one generation and ends in two: the store becomes a plain LV, empty by then,
and is removed. In between the dm target works by itself. (tools/lvconvert.c, tools/lvpoll.c)
"""

from __future__ import annotations

from collections.abc import Callable

from cow.errors import DeviceNotFound
from cow.lvm.activation import Activation
from cow.lvm.cow_size import Usage, parse_usage, shown_percent
from cow.lvm.errors import LVMError
from cow.lvm.metadata import LogicalVolume


def usage_of(activation: Activation, lv: LogicalVolume) -> Usage | None:
    """Return what the device of an LV tells; None if it is no live snapshot and merges none."""
    name = activation.name(lv)
    if name is None:
        return None
    try:
        words = activation.mapper.status(name).split(" ", 3)
    except DeviceNotFound:
        return None
    if len(words) < 4 or words[2] not in ("snapshot", "snapshot-merge"):
        return None
    return parse_usage(words[3])


def merge_is_over(activation: Activation, origin: LogicalVolume) -> bool:
    """Tell whether all is merged; LVMError if it never will be by itself."""
    usage = usage_of(activation, origin)
    if usage is None or not activation.is_merging(origin):
        return False
    if usage.problem == "Merge failed":
        raise LVMError(f"{origin}: Merge failed. Retry merge or inspect manually.")
    if usage.problem:
        raise LVMError(f"{origin}: Merging snapshot invalidated. Aborting merge.")
    return usage.empty


def report_progress(
    activation: Activation, origin: LogicalVolume, report: Callable[[str], None]
) -> None:
    """Say how much is merged, as LVM does."""
    usage = usage_of(activation, origin)
    if usage is not None and not usage.problem:
        report(f"{origin}: Merged: {shown_percent(100 - usage.percent):.2f}%")
