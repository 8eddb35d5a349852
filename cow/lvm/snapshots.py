"""What a VG does with snapshots: make, split off, attach, merge them, while LVs may be active."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cow import _core, store
from cow.errors import CowError, StoreError
from cow.lvm import snapshot_record
from cow.lvm.active import ActiveVolumeGroup
from cow.lvm.cow_size import DEFAULT_CHUNK, check_chunk_size, check_minimum
from cow.lvm.create import LVOptions, create_lv, set_permission
from cow.lvm.errors import InUse, LVMError
from cow.lvm.merge import merge_is_over, report_progress, usage_of
from cow.lvm.metadata import LogicalVolume, PhysicalVolume
from cow.units import bytes_of

MERGE_INTERVAL = 15.0
"""Seconds between two reports of a merge's progress (activation/polling_interval)."""


class SnapshottingVolumeGroup(ActiveVolumeGroup):
    """The part of a VolumeGroup that works on snapshots."""

    def create_snapshot(
        self,
        origin: str,
        name: str | None = None,
        *,
        extents: int | None = None,
        size: int | None = None,
        chunk_size: int = DEFAULT_CHUNK,
        **options: Any,  # noqa: ANN401
    ) -> LogicalVolume:
        """Snapshot an LV, with a COW store of `extents` extents or `size` bytes.

        `chunk_size` in sectors; `options` are those of LVOptions. The snapshot is active if its
        origin is.
        """
        if extents is None and size is None:
            raise LVMError("Please specify either size or extents with snapshots.")
        wanted = LVOptions(**options)
        command = f"lvcreate -s {self.name}/{origin}"
        with self.lock:
            with self.change(command) as new:
                held = snapshot_record.find_origin(new, origin)
                snapshot_record.check_origin(held)
                count = self._extents(new, extents, size)
                cow = snapshot_record.create_store(
                    held, name, count, chunk_size, replace(wanted, permission="rw"), self.report
                )
            self._wipe_new(cow)
            with self._or_remove(cow), self.change(command) as new:
                found = new.lv_with_id(cow.id)
                assert found is not None
                set_permission(found, wanted.permission)
                snapshot_record.attach(snapshot_record.find_origin(new, origin), found, chunk_size)
        self.report(f'Logical volume "{cow.name}" created.')
        return self.lv(cow.name)

    def create_sparse(
        self,
        name: str | None = None,
        *,
        virtual_extents: int,
        extents: int | None = None,
        size: int | None = None,
        chunk_size: int = DEFAULT_CHUNK,
        activate: bool = False,
        **options: Any,  # noqa: ANN401
    ) -> LogicalVolume:
        """Make a sparse LV: a snapshot of `virtual_extents` extents of zeros (lvcreate -V)."""
        check_chunk_size(chunk_size)
        wanted = LVOptions(**options)
        command = f"lvcreate --type snapshot {self.name}"
        with self.lock:
            with self.change(command) as new:
                count = self._extents(new, extents, size)
                check_minimum(count, chunk_size, new.extent_size)
                cow = create_lv(new, name, count, replace(wanted, permission="rw"), self.report)
            self._wipe_new(cow)
            with self._or_remove(cow), self.change(command) as new:
                found = new.lv_with_id(cow.id)
                assert found is not None
                set_permission(found, wanted.permission)
                origin = snapshot_record.add_virtual_origin(new, found.name, virtual_extents)
                snapshot_record.attach(origin, found, chunk_size)
            if activate:
                self.activation.activate(self.lv(cow.name))
        self.report(f'Logical volume "{cow.name}" created.')
        return self.lv(cow.name)

    def _wipe_new(self, cow: LogicalVolume) -> None:
        with self._or_remove(cow):
            self.activation.wipe(self.lv(cow.name))

    def _or_remove(self, lv: LogicalVolume) -> _OrRemove:
        return _OrRemove(self, lv)

    def split_snapshot(self, name: str) -> None:
        """Make the COW store of a snapshot a plain LV; its exceptions stay in it."""
        with self.lock:
            self._check_writable()
            cow, origin = snapshot_record.find_snapshot(self.metadata, name)
            snapshot_record.check_split(cow, origin)
            if self.activation.is_open(cow):
                raise InUse(f"Logical volume {cow} in use.")
            if self.activation.is_active(cow) and not self.confirm(
                f"Do you really want to split off active logical volume {cow}? [y/n]: "
            ):
                raise LVMError(f"Logical volume {cow} not split.")
            self._detach(cow, f"lvconvert --splitsnapshot {cow}")
        self.report(f"Logical Volume {cow} split from its origin.")

    def attach_snapshot(
        self, origin: str, name: str, *, chunk_size: int = DEFAULT_CHUNK, zero: bool = True
    ) -> None:
        """Make an LV the COW store of a snapshot; without `zero` the exceptions in it count."""
        with self.lock:
            self._check_writable()
            cow = self.lv(name)
            snapshot_record.check_attach(
                snapshot_record.find_origin(self.metadata, origin), cow, chunk_size
            )
            self.report(f"WARNING: Converting logical volume {cow} to snapshot exception store.")
            self.report("THIS WILL DESTROY CONTENT OF LOGICAL VOLUME (filesystem etc.)")
            if not self.confirm(f"Do you really want to convert {cow}? [y/n]: "):
                raise LVMError("Conversion aborted.")
            self.activation.deactivate(cow)
            if zero and cow.writable:
                self.activation.wipe(cow)
            else:
                self.report(f"WARNING: {cow} not zeroed.")
            with self.change(f"lvconvert -s {self.name}/{origin} {cow}") as new:
                found = new.lv_with_id(cow.id)
                assert found is not None
                held = snapshot_record.find_origin(new, origin)
                snapshot_record.check_attach(held, found, chunk_size)
                snapshot_record.attach(held, found, chunk_size)
        self.report(f"Logical volume {cow} converted to snapshot.")

    # Merging.

    def merge(
        self, name: str, *, background: bool = False, interval: float = MERGE_INTERVAL
    ) -> None:
        """Merge a snapshot into its origin, and remove it when all is merged.

        While origin or snapshot is open, or inactive, the merge is put off to the next activation.
        In the `background` a thread waits for the end; otherwise progress is reported every
        `interval` seconds.
        """
        with self.lock:
            self._check_writable()
            cow, origin = snapshot_record.find_snapshot(self.metadata, name)
            self._check_valid(cow)
            with self.change(f"lvconvert --merge {cow}") as new:
                snapshot_record.start_merge(*snapshot_record.find_snapshot(new, name))
            started = self.activation.is_merging(origin)
            if not started:
                self._report_delay(cow, origin)
                return
            self.report(f"Merging of volume {cow} started.")
            if background:
                self._watch_merges()
        if not background:
            self.wait_merge(origin.name, interval=interval)

    def _check_valid(self, cow: LogicalVolume) -> None:
        usage = usage_of(self.activation, cow)
        if _is_marked_invalid(cow) if usage is None else usage.problem:
            raise LVMError(f"Unable to merge invalidated snapshot LV {cow}.")

    def _report_delay(self, cow: LogicalVolume, origin: LogicalVolume) -> None:
        for what, lv in (("origin", origin), ("snapshot", cow)):
            if self.activation.is_open(lv):
                self.report(f"Delaying merge since {what} is open.")
                break
        self.report(f"Merging of snapshot {cow} will occur on next activation of {origin}.")

    def wait_merge(self, name: str, *, interval: float = MERGE_INTERVAL) -> None:
        """Wait until the merge into an origin is over, and remove the snapshot then."""
        origin = self.lv(name)
        while True:
            seen = self.mapper.event_nr
            with self.lock:
                if self.finish_merge(origin.id):
                    return
                if not self.activation.is_merging(origin):
                    raise LVMError(f"{origin}: the merge was stopped: {origin} is not active.")
            try:
                self.mapper.wait_any(seen, timeout=interval)
            except TimeoutError:
                report_progress(self.activation, origin, self.report)

    def finish_merge(self, origin_id: str) -> bool:
        """Remove the snapshot of a merge that is over; True if there is none any more."""
        with self.lock:
            origin = self.metadata.lv_with_id(origin_id)
            if origin is not None and merge_is_over(self.activation, origin):
                self._check_writable()
                origin = self.metadata.lv_with_id(origin_id)
            record = origin.merging_snapshot if origin is not None else None
            if origin is None or record is None:
                return True
            cow = record.segments[0].cow
            if cow is None or not merge_is_over(self.activation, origin):
                return False
            report_progress(self.activation, origin, self.report)
            self._detach(cow, f"lvconvert --merge {cow}")
            self.activation.deactivate(self.lv(cow.name))
            self.report(f"Merge of snapshot into logical volume {origin} has finished.")
            self._remove_now(cow)
            return True


class _OrRemove:
    """Removes an LV that was made for something that failed."""

    def __init__(self, group: ActiveVolumeGroup, lv: LogicalVolume) -> None:
        self._group = group
        self._lv = lv

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        if kind is None:
            return
        try:
            with self._group.change(f"lvremove {self._lv}") as new:
                found = new.lv_with_id(self._lv.id)
                if found is not None and not found.is_cow:
                    new.lvs.remove(found)
        except CowError:
            self._group.report(
                "Manual intervention may be required to remove abandoned LV(s) before retrying."
            )


def _is_marked_invalid(cow: LogicalVolume) -> bool:
    """Look into the header of a store that is not active."""
    area = cow.segments[0].areas[0]
    if not isinstance(area.of, PhysicalVolume) or area.of.device is None:
        return False
    start = bytes_of(area.of.pe_start + area.start * cow.vg.extent_size)
    try:
        header = store.read_header(_At(area.of.device, start))
    except StoreError:
        return True
    return header is not None and not header.valid


class _At:
    """A device from some byte on."""

    def __init__(self, device: _core.BlockDevice, start: int) -> None:
        self._device = device
        self._start = start

    def pread(self, size: int, offset: int) -> bytes:
        return self._device.pread(size, self._start + offset)
