"""What a VG does with LVs that may be active: activation, removal, sizes, snapshots, merges.

A change of what is active goes through the metadata and the devices together, in the steps of
`cow.lvm.activation`. Where LVM needs two generations there are two: a crash between them leaves a
plain LV that users see, with the name of the snapshot_record.
"""

from __future__ import annotations

import errno
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from cow.device import Device
from cow.lvm import edit, snapshot_record
from cow.lvm.activation import Activation
from cow.lvm.cow_size import (
    cap_extended,
    extend_percent,
)
from cow.lvm.errors import InUse, LVMError, RequestError
from cow.lvm.merge import usage_of
from cow.lvm.metadata import (
    LogicalVolume,
    VolumeGroupMetadata,
)
from cow.lvm.monitor import Monitor, Opener, monitor_of
from cow.lvm.size import display_size
from cow.lvm.tables import holder_of
from cow.mapper import Mapper

MERGE_INTERVAL = 15.0
"""Seconds between two reports of a merge's progress (activation/polling_interval)."""


class ActiveVolumeGroup(ABC):
    """The part of a VolumeGroup that works on devices."""

    mapper: Mapper
    activation: Activation
    lock: threading.RLock
    report: Callable[[str], None]
    confirm: Callable[[str], bool]
    partial: bool

    # What the other part gives.

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of the VG."""

    @property
    @abstractmethod
    def metadata(self) -> VolumeGroupMetadata:
        """The committed generation."""

    @property
    @abstractmethod
    def idle_reason(self) -> str | None:
        """Why no LV may be activated; None if they may."""

    @abstractmethod
    def lv(self, name: str) -> LogicalVolume:
        """Return an LV by name; LVNotFound if there is none."""

    @abstractmethod
    def change(
        self, command: str, *, cures: bool = False
    ) -> AbstractContextManager[VolumeGroupMetadata]:
        """Give a copy of the metadata to edit, and commit it at the end of the with block."""

    @abstractmethod
    def _check_writable(self, *, cures: bool = False) -> None:
        """Read the metadata again if it changed; VGNotWritable if the VG may not be."""

    @abstractmethod
    def _move_to(self, mapper: Mapper) -> None:
        """Open the devices in another mapper."""

    @abstractmethod
    def _opener(self) -> Opener:
        """Return what opens the same VG on the same devices once more."""

    # Active or not.

    def activate(
        self,
        mapper: Mapper | None = None,
        lvs: Iterable[str] | None = None,
        *,
        ignore_skip: bool = False,
    ) -> None:
        """Make the dm devices of LVs, of all that users see if none is named.

        An LV stands for its family: with an origin its snapshots are activated, and the other way
        round. In a group opened read-only nothing is written, and a pending merge does not start.
        LVMError names what could not be activated, when all the rest is. An exported VG is only
        activated in a group opened read-only.
        """
        with self.lock:
            if mapper is not None and mapper is not self.mapper:
                self._move_to(mapper)
            if reason := self.idle_reason:
                raise LVMError(reason)
            self._activate(lvs, ignore_skip=ignore_skip)

    def _activate(self, lvs: Iterable[str] | None, *, ignore_skip: bool) -> None:
        failed = []
        with self.metadata.looked_at():
            for lv in self._chosen(lvs):
                if "ACTIVATION_SKIP" in lv.flags and not ignore_skip:
                    if lvs is not None:
                        self.report(f"ACTIVATION_SKIP flag set for LV {lv}, skipping activation.")
                    continue
                try:
                    self.activation.activate(lv, partial=self.partial)
                except LVMError as error:
                    failed.append(error)
            self._watch_merges()
        if len(failed) == 1:
            raise failed[0]
        if failed:
            raise LVMError("\n".join(error.strerror or "" for error in failed), failed[0].errno)

    def deactivate(self, lvs: Iterable[str] | None = None) -> None:
        """Remove the dm devices of LVs, of all of them if none is named; InUse if one is open."""
        with self.lock, self.metadata.looked_at():
            for lv in self._chosen(lvs):
                self.activation.deactivate(lv)

    def _chosen(self, names: Iterable[str] | None) -> list[LogicalVolume]:
        """Return one LV for each family that is meant."""
        if names is None:
            lvs = [lv for lv in self.metadata.lvs if lv.visible]
        else:
            lvs = [self.lv(name) for name in names]
        chosen: dict[LogicalVolume, LogicalVolume] = {}
        for lv in lvs:
            chosen.setdefault(holder_of(lv), lv)
        return list(chosen.values())

    def is_active(self, name: str) -> bool:
        """Tell whether an LV has a dm device."""
        return self.activation.is_active(self.lv(name))

    def device(self, name: str) -> Device:
        """Return the device of an active LV, for I/O."""
        return self.activation.device(self.lv(name))

    def refresh_lv(self, name: str) -> None:
        """Bring the tables of an active LV up to date; a merge that was put off starts."""
        with self.lock:
            self.activation.refresh(self.lv(name))
            self._watch_merges()

    # Removing and resizing.

    def remove_lv(self, name: str) -> None:
        """Remove an LV; an origin goes with all its snapshots."""
        with self.lock:
            self._check_writable()
            lv = self.lv(name)
            if lv.is_virtual_origin:
                self.report(f"Ignoring virtual origin logical volume {lv}.")
                raise LVMError(f'Failed to find logical volume "{lv}"', errno.ENODEV)
            if lv.is_cow:
                self._remove_snapshot(lv)
            elif lv.is_origin:
                self._remove_origin(lv)
            else:
                self._remove_plain(lv)

    def _remove_plain(self, lv: LogicalVolume) -> None:
        trial = self.metadata.copy()
        _drop(trial, lv.id)
        self.activation.check_not_in_use(lv)
        self._confirm_removal(lv, f"active logical volume {lv}")
        self.activation.deactivate(lv)
        self._remove_now(lv)

    def _remove_now(self, lv: LogicalVolume) -> None:
        with self.change(f"lvremove {lv}") as new:
            _drop(new, lv.id)
        self.report(f'Logical volume "{lv.name}" successfully removed.')

    def _confirm_removal(self, lv: LogicalVolume, what: str) -> None:
        if self.activation.is_active(lv) and not self.confirm(
            f"Do you really want to remove {what}? [y/n]: "
        ):
            raise LVMError(f"Logical volume {lv} not removed.")

    def _remove_snapshot(self, cow: LogicalVolume) -> None:
        """Make it a plain LV first, then remove that: the origin is never without its table."""
        _, origin = snapshot_record.find_snapshot(self.metadata, cow.name)
        record = cow.snapshot
        merging = record is not None and record.segments[0].merging
        if merging and self.activation.is_active(origin):
            raise LVMError(f"Can't remove merging snapshot logical volume {cow}.")
        if self.activation.is_open(cow):
            raise InUse(f"Logical volume {cow} in use.")
        self._confirm_removal(cow, f"active logical volume {cow}")
        if origin.is_virtual_origin:
            self.activation.deactivate(origin)
        self._detach(cow, f"lvremove {cow}")
        plain = self.lv(cow.name)
        self.activation.deactivate(plain)
        with self.change(f"lvremove {cow}") as new:
            _drop(new, cow.id)
            if origin.is_virtual_origin:
                _drop(new, origin.id)
        self.report(f'Logical volume "{cow.name}" successfully removed.')

    def _detach(self, cow: LogicalVolume, command: str) -> None:
        with self.change(command) as new:
            found = new.lv_with_id(cow.id)
            if found is None or not found.is_cow:
                raise LVMError(f"Logical volume {cow} is no snapshot any more.")
            snapshot_record.detach(found)

    def _remove_origin(self, origin: LogicalVolume) -> None:
        """Remove the snapshots one generation each, and the origin with the last."""
        self.activation.check_not_in_use(origin)
        count = len(origin.snapshots)
        self._confirm_removal(
            origin, f"active origin logical volume {origin} with {count} snapshots(s)"
        )
        self.activation.deactivate(origin)
        stores = [record.segments[0].cow for record in origin.snapshots]
        command = f"lvremove {origin}"
        before: LogicalVolume | None = None
        for cow in (cow for cow in stores if cow is not None):
            with self.change(command) as new:
                if before is not None:
                    _drop(new, before.id)
                found = new.lv_with_id(cow.id)
                assert found is not None
                snapshot_record.detach(found)
            before = cow
            self.report(f'Logical volume "{cow.name}" successfully removed.')
        with self.change(command) as new:
            if before is not None:
                _drop(new, before.id)
            _drop(new, origin.id)
        self.report(f'Logical volume "{origin.name}" successfully removed.')

    def extend_lv(
        self,
        name: str,
        *,
        extents: int | None = None,
        size: int | None = None,
        **options: Any,  # noqa: ANN401
    ) -> None:
        """Make an LV as large as `extents` or `size` bytes say, which is more than it is.

        Of a snapshot that is the COW store, which is never larger than it can use: one that is that
        large stays as it is. An origin has to be inactive.
        """
        with self.lock:
            self._check_writable()
            lv = self.metadata.lv(name)
            wanted = self._extents(self.metadata, extents, size)
            self._check_family(lv)
            count = self._cap_store(lv, wanted)
            if count < wanted and count == lv.extent_count:
                self._report_size(lv)
            else:
                with self.change(f"lvextend {self.name}/{name}") as new:
                    edit.extend_lv(new.lv(name), count, report=self.report, **options)
                    self._report_size(new.lv(name))
        self.report(f"Logical volume {self.name}/{name} successfully resized.")

    def _cap_store(self, lv: LogicalVolume, count: int) -> int:
        record = lv.snapshot
        if record is None:
            return count
        segment = record.segments[0]
        size = segment.origin.extent_count if segment.origin is not None else segment.extent_count
        return cap_extended(count, size, segment.chunk_size, lv.vg.extent_size, self.report)

    def reduce_lv(self, name: str, *, extents: int | None = None, size: int | None = None) -> None:
        """Make an LV as small as `extents` or `size` bytes say; what is behind is lost.

        A COW store can lose what it does not use, while it is active.
        """
        with self.change(f"lvreduce {self.name}/{name}") as new:
            lv = new.lv(name)
            count = self._extents(new, extents, size)
            if lv.is_origin:
                raise LVMError("Snapshot origin volumes cannot be reduced in size yet.")
            self._check_family(lv)
            if lv.is_cow:
                self._check_reduce(lv, count)
            edit.reduce_lv(lv, count, self.report)
            self._report_size(lv)
        self.report(f"Logical volume {self.name}/{name} successfully resized.")

    def _check_family(self, lv: LogicalVolume) -> None:
        """Refuse to resize an active origin, and a snapshot that is merged."""
        record = lv.snapshot
        if record is not None and record.segments[0].merging:
            raise LVMError(f"Can't resize internal logical volume {lv}.")
        if lv.is_origin and self.activation.is_active(lv):
            raise LVMError(
                "Snapshot origin volumes can be resized only while inactive: try lvchange -an."
            )

    def _check_reduce(self, lv: LogicalVolume, extents: int) -> None:
        usage = usage_of(self.activation, lv)
        if usage is None:
            raise LVMError(f"Cannot reduce inactive snapshot {lv}: it is not known what it uses.")
        if usage.problem:
            raise LVMError(f"Cannot reduce snapshot {lv}: {usage.problem}.")
        if extents * lv.vg.extent_size < usage.allocated:
            raise LVMError(
                f"Cannot reduce snapshot {lv} below {display_size(usage.allocated)} that it uses."
            )

    def _report_size(self, lv: LogicalVolume) -> None:
        sizes = [
            f"{display_size(count * lv.vg.extent_size)} ({count} extents)"
            for count in (self.metadata.lv(lv.name).extent_count, lv.extent_count)
        ]
        change = "unchanged from {}" if sizes[0] == sizes[1] else "changed from {} to {}"
        self.report(f"Size of logical volume {lv} {change.format(*sizes)}.")

    def _extents(self, vg: VolumeGroupMetadata, extents: int | None, size: int | None) -> int:
        if (extents is None) is (size is None):
            raise RequestError("Please specify either size or extents (not both).")
        if extents is not None:
            return extents
        assert size is not None
        return edit.extents_of(vg, size, self.report)

    # Watching.

    @property
    def snapshots_live(self) -> bool:
        """Whether a snapshot is active and may be written."""
        stores = [lv for lv in self.metadata.lvs if lv.is_cow]
        return not self.activation.readonly and any(map(self.activation.is_active, stores))

    def monitor(self, *, threshold: int = 100, percent: int = 20) -> Monitor:
        """Have a thread finish merges and extend stores that fill, until it is stopped.

        `threshold`: percent of use from which on a store grows, by `percent` at least; 100: never.
        """
        found = monitor_of(self.mapper, self.metadata.id, self._opener())
        found.set_policy(threshold, percent)
        return found

    def _watch_merges(self) -> None:
        """See to it that merges that run are finished."""
        origins = [lv for lv in self.metadata.lvs if lv.merging_snapshot is not None]
        if not self.activation.readonly and any(map(self.activation.is_merging, origins)):
            monitor_of(self.mapper, self.metadata.id, self._opener()).wake()

    def extend_by_policy(self, name: str, *, threshold: int, percent: int) -> None:
        """Extend the store of a snapshot if more than `threshold` percent of it are used.

        It grows by `percent`, or by as much more as brings it below the threshold
        (lvextend --use-policies).
        """
        with self.lock:
            lv = self.lv(name)
            usage = usage_of(self.activation, lv)
            if usage is None or usage.problem:
                raise LVMError(f"Cannot tell how full snapshot {lv} is.")
            amount = extend_percent(usage.percent, threshold, percent)
            if amount == 0:
                return
            if percent == 0:
                raise LVMError(f"Can't extend {lv} with snapshot autoextend percent set to 0%.")
            more = -(-lv.extent_count * amount // 100)
            self.extend_lv(name, extents=lv.extent_count + more)


def _drop(vg: VolumeGroupMetadata, lv_id: str) -> None:
    """Take an LV out of a VG, with the hidden LVs it stands on."""
    lv = vg.lv_with_id(lv_id)
    if lv is None:
        raise LVMError("The logical volume is not there any more.", errno.ENODEV)
    edit.remove_lv(vg, lv)
