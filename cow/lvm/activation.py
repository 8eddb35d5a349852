"""The dm devices of a VG in a mapper: made, removed, and kept right while the metadata changes.

The order of every verb is LVM's (lib/activate/activate.c, device_mapper/libdm-deptree.c), as it was
traced on a real one. A change goes in four steps, with the commit between the second and the third:

    preload   new devices, and new tables in the inactive slots; a new COW store goes live at once
    suspend   the family: its tops, then what they stand on
    resume    everything, with the new tables, the origin last; then what is no more is removed
    revert    in place of resume if there was no commit: the old tables stay

In one thing LVM is not followed: there a store that grows is resumed with its new length before the
commit. A crash in between would leave exceptions in extents that the VG does not give it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from cow.device import Device
from cow.errors import CowOSError
from cow.lvm.errors import InUse, LVMError
from cow.lvm.metadata import LogicalVolume, VolumeGroupMetadata
from cow.lvm.names import dm_uuid
from cow.lvm.tables import COW, REAL, DMDevice, Family, family, holder_of, holders, why_not
from cow.mapper import DIRECTORY, Mapper

log = logging.getLogger("cow.lvm")

WIPED: int = 4096
"""Bytes of a new store that are zeroed, whatever its chunk size: a header is not found then."""


class Activation:
    """The active LVs of one VG in a mapper. Devices are known by their uuid, as LVM knows them.

    `readonly`: every table is loaded read-only, so that nothing below is ever written.
    """

    def __init__(
        self,
        mapper: Mapper,
        *,
        readonly: bool = False,
        report: Callable[[str], None] = log.info,
    ) -> None:
        self.mapper = mapper
        self.readonly = readonly
        self.report = report
        self._plans: list[_Plan] = []

    # Looking.

    def names(self) -> dict[str, str]:
        """Return the dm name of every device of LVM's, by uuid."""
        found = self.mapper.uuids().items()
        return {uuid: name for uuid, name in found if uuid.startswith("LVM-")}

    def name(self, lv: LogicalVolume, layer: str = "") -> str | None:
        """Return the dm name of an LV, or of a layer below it; None if there is no such device."""
        return self.mapper.name_of(dm_uuid(lv.vg.id, lv.id, layer))

    def is_active(self, lv: LogicalVolume) -> bool:
        """Tell whether an LV has a device."""
        return self.name(lv) is not None

    def device(self, lv: LogicalVolume) -> Device:
        """Return the device of an active LV."""
        name = self.name(lv)
        if name is None:
            raise LVMError(f"Logical volume {lv} is not active.")
        return self.mapper.device(DIRECTORY + name)

    def is_open(self, lv: LogicalVolume) -> bool:
        """Tell whether somebody has the device of an LV open."""
        name = self.name(lv)
        return name is not None and self.mapper.info(DIRECTORY + name).open_count > 0

    def is_merging(self, lv: LogicalVolume) -> bool:
        """Tell whether a snapshot is being merged into an origin now."""
        name = self.name(lv)
        return name is not None and self._type(name) == "snapshot-merge"

    def _type(self, name: str) -> str:
        words = self.mapper.table(DIRECTORY + name).split(" ", 3)
        return words[2] if len(words) > 2 else ""

    def _may_merge(self, lv: LogicalVolume) -> bool:
        """Tell whether a merge of an origin runs, or may start: nobody has a part of it open."""
        record = lv.merging_snapshot
        if record is None or self.is_merging(lv) or not self.is_active(lv):
            return True
        cow = record.segments[0].cow
        return not self.is_open(lv) and (cow is None or not self.is_open(cow))

    def family(self, lv: LogicalVolume, *, partial: bool = False) -> Family:
        """Return the devices of an LV's family as they should be now."""
        lv = holder_of(lv)
        merge = self._may_merge(lv)
        return family(lv, merge=merge, readonly=self.readonly, partial=partial)

    def live_family(self, lv: LogicalVolume) -> Family:
        """Return the devices of an active LV's family as they are: a merge that waits is none."""
        lv = holder_of(lv)
        return family(lv, merge=self.is_merging(lv), readonly=self.readonly)

    # Making and removing.

    def activate(self, lv: LogicalVolume, *, partial: bool = False) -> None:
        """Make the devices of an LV's family, those that are not there yet."""
        found = self.family(lv, partial=partial)
        names = self.names()
        made: list[DMDevice] = []
        try:
            for device in found.devices:
                if device.uuid not in names:
                    self._make(device, names, made)
                    if _goes_live_at_once(device, found):
                        self.mapper.resume(DIRECTORY + device.name)
            for device in _activation_order(found):
                if device in made and not _goes_live_at_once(device, found):
                    self.mapper.resume(DIRECTORY + device.name)
        except BaseException:
            self._unmake(made)
            raise

    def _make(self, device: DMDevice, names: dict[str, str], made: list[DMDevice]) -> None:
        """Create a device and load its table; it is not live yet."""
        try:
            self.mapper.create(device.name, uuid=device.uuid, minor=device.minor)
        except CowOSError as error:
            raise LVMError(f"Cannot activate {device.lv}: {error}", error.errno) from error
        made.append(device)
        names[device.uuid] = device.name
        self._load(device, names)

    def _load(self, device: DMDevice, names: dict[str, str]) -> None:
        name = DIRECTORY + names[device.uuid]
        try:
            self.mapper.load(name, device.render(names), readonly=device.readonly)
        except CowOSError as error:
            raise LVMError(f"Cannot activate {device.lv}: {error}", error.errno) from error

    def _unmake(self, made: list[DMDevice]) -> None:
        """Remove devices that were made in vain: first the tables, then the devices."""
        names = self.names()
        for device in reversed(made):
            self.mapper.clear(DIRECTORY + names[device.uuid])
        for device in reversed(made):
            try:
                self.mapper.remove(DIRECTORY + names[device.uuid])
            except CowOSError as error:
                log.warning("%s stays: %s", device.name, error)

    def deactivate(self, lv: LogicalVolume) -> None:
        """Remove the devices of an LV's family; InUse, and nothing happens, if one is open."""
        lv = holder_of(lv)
        self.check_not_in_use(lv)
        names = self.names()
        order = _removal_order(self, lv)
        prefixes = [f"LVM-{lv.vg.id}{each.id}" for each in (lv, *_stores(lv))]
        left = [uuid for uuid in names if uuid.startswith(tuple(prefixes)) and uuid not in order]
        # The layer of a store that was split off stands on the same devices as the LV itself.
        for uuid in dict.fromkeys([*order[:1], *left, *order[1:]]):
            if uuid in names:
                self._remove(names[uuid])

    def _remove(self, name: str) -> None:
        try:
            self.mapper.remove(DIRECTORY + name)
        except CowOSError as error:
            raise InUse(f"Unable to deactivate {name}: {error}") from error

    def check_not_in_use(self, lv: LogicalVolume) -> None:
        """Refuse if somebody has an LV, or one of its snapshots, open."""
        if self.is_open(lv):
            raise InUse(f"Logical volume {lv} in use.")
        in_use = [store for store in _stores(lv) if self.is_open(store)]
        for store in in_use:
            self.report(f"Logical volume {store} in use.")
        if in_use:
            raise InUse(f"LV {lv} has open {len(in_use)} snapshot(s), not deactivating.")

    def wipe(self, lv: LogicalVolume) -> None:
        """Zero the start of an LV that is not active, so that no old header is found there."""
        self.activate(lv)
        try:
            device = self.device(lv)
            device.write_zeroes(0, min(WIPED, device.size))
            device.flush()
        finally:
            self.deactivate(lv)

    def refresh(self, lv: LogicalVolume) -> None:
        """Load the tables anew where they differ; start a merge that was put off."""
        held = holder_of(lv)
        if not self.is_active(held):
            return
        present = _Plan(self, [self.live_family(held)], [self.family(held)])
        try:
            present.preload()
            present.suspend()
        except BaseException:
            present.revert()
            raise
        present.resume()

    # A change of the metadata (commit.ActiveWork).

    def preload(self, old: VolumeGroupMetadata, new: VolumeGroupMetadata) -> None:
        """Load the tables of the new generation for every family that looks different in it."""
        self._plans = []
        with old.looked_at(), new.looked_at():
            for before, after in self._changed(old, new):
                plan = _Plan(self, before, after)
                self._plans.append(plan)
                plan.preload()

    def suspend(self, old: VolumeGroupMetadata, new: VolumeGroupMetadata) -> None:
        """Suspend these families."""
        for plan in self._plans:
            plan.suspend()

    def resume(self, old: VolumeGroupMetadata, new: VolumeGroupMetadata) -> None:
        """Resume them with the new tables; LVMError when all is done that can be."""
        plans, self._plans = self._plans, []
        failed: list[CowOSError] = []
        for plan in plans:
            failed += plan.resume()
        if failed:
            raise LVMError(f"Failed to resume after a change of VG {new.name}: {failed[0]}")

    def revert(self, old: VolumeGroupMetadata, new: VolumeGroupMetadata) -> None:
        """Resume them with the tables they had."""
        plans, self._plans = self._plans, []
        for plan in reversed(plans):
            plan.revert()

    def _changed(
        self, old: VolumeGroupMetadata, new: VolumeGroupMetadata
    ) -> Iterable[tuple[list[Family], list[Family]]]:
        """Yield (families before, families after) for what is active and becomes different."""
        names = self.names()
        old_holders, new_holders = (
            {
                lv.id: lv
                for lv in holders(vg)
                if dm_uuid(vg.id, lv.id) in names and why_not(lv) is None
            }
            for vg in (old, new)
        )
        for ids in _groups(old, new):
            old_active, new_active = (
                [lv for lv_id, lv in found.items() if lv_id in ids]
                for found in (old_holders, new_holders)
            )
            before = [self.live_family(lv) for lv in old_active]
            after = [self.family(lv) for lv in new_active]
            if _look(self.family(lv) for lv in old_active) == _look(after):
                continue  # a merge that waits does not begin because something else changes
            # The family that is left comes first, what leaves it comes behind.
            after.sort(key=lambda each: each.lv.id not in [other.lv.id for other in before])
            if before and _look(before) != _look(after):
                yield before, after


def _look(families: Iterable[Family]) -> set[tuple[str, str, str, bool]]:
    devices = [device for each in families for device in each.devices]
    return {(device.uuid, device.name, device.table, device.readonly) for device in devices}


def _groups(old: VolumeGroupMetadata, new: VolumeGroupMetadata) -> list[set[str]]:
    """Return sets of the ids of LVs that are one family before or after."""
    group_of: dict[str, set[str]] = {}
    for vg in (old, new):
        for lv in vg.lvs:
            ids = {lv.id, holder_of(lv).id} if not lv.is_snapshot_record else set()
            joined = ids.union(*(group_of.get(each, ()) for each in ids))
            group_of.update(dict.fromkeys(joined, joined))
    return list({id(group): group for group in group_of.values()}.values())


def _stores(lv: LogicalVolume) -> list[LogicalVolume]:
    """Return the COW stores of an origin's snapshots."""
    stores = (record.segments[0].cow for record in lv.snapshots)
    return [store for store in stores if store is not None]


def _goes_live_at_once(device: DMDevice, found: Family) -> bool:
    """Tell what another table reads when it is loaded: stores, hidden LVs, and below a merge."""
    if device.layer == REAL:
        return found.merging
    return device.layer == COW or device not in found.tops


def _activation_order(found: Family) -> list[DMDevice]:
    """Return what is resumed when all is loaded: the origin last."""
    real = [found.real] if found.real is not None else []
    return [*real, *(snapshot.top for snapshot in found.snapshots), found.top]


def _removal_order(activation: Activation, lv: LogicalVolume) -> list[str]:
    """Return the uuids of a family in the order in which its devices are removed."""
    if why_not(lv, partial=True):
        return []
    found = family(lv, merge=activation.is_merging(lv), partial=True)
    real = [found.real] if found.real is not None else []
    below = [*real, *reversed(found.below)]
    order = [found.top]
    merging = [snapshot for snapshot in found.snapshots if snapshot.merging]
    others = [snapshot for snapshot in found.snapshots if not snapshot.merging]
    order += [snapshot.cow for snapshot in merging]
    order += below if merging and not others else []
    for snapshot in merging:
        order += [snapshot.top, *reversed(snapshot.below)]
    for snapshot in others:
        order += [snapshot.top, snapshot.cow, *reversed(snapshot.below)]
    return [device.uuid for device in [*order, *below]]


class _Plan:
    """What a change means for the devices of the families it concerns."""

    def __init__(self, activation: Activation, old: list[Family], new: list[Family]) -> None:
        self._activation = activation
        self._mapper = activation.mapper
        self._old = old
        self._new = new
        self._names = activation.names()
        self._before = dict(self._names)
        self._made: list[DMDevice] = []
        self._loaded: list[DMDevice] = []
        self._live: set[str] = set()
        self._was_merging = any(activation.is_merging(each.lv) for each in old)

    def _path(self, uuid: str) -> str:
        return DIRECTORY + self._names[uuid]

    # The four steps.

    def preload(self) -> None:
        """Make new devices, and load tables that differ from the live ones."""
        for found in self._new:
            for device in found.devices:
                if device.uuid not in self._names:
                    self._activation._make(device, self._names, self._made)
                    if _goes_live_at_once(device, found):
                        self._mapper.resume(self._path(device.uuid))
                        self._live.add(device.uuid)
                elif self._differs(device):
                    self._loaded.append(device)
                    self._activation._load(device, self._names)

    def _differs(self, device: DMDevice) -> bool:
        path = self._path(device.uuid)
        live = [line.rstrip() for line in self._mapper.table(path).split("\n")]
        wanted = device.render(self._names).split("\n")
        return live != wanted or self._mapper.info(path).readonly != device.readonly

    def suspend(self) -> None:
        """Suspend what was there before, and the layer below an origin that is new."""
        for uuid in self._suspend_order():
            if uuid not in self._live:
                self._mapper.suspend(self._path(uuid))
        for device in self._loaded:
            self._check_shrinking(device)

    def _check_shrinking(self, device: DMDevice) -> None:
        """Refuse to cut off what a store uses. It is suspended, so nothing is added."""
        if (
            device.layer != COW
            or device.sectors >= self._mapper.device(self._path(device.uuid)).sectors
        ):
            return
        top = dm_uuid(device.lv.vg.id, device.lv.id)
        words = self._mapper.status(self._path(top)).split(" ")[3].split("/")
        if len(words) != 2 or int(words[0]) > device.sectors:
            raise LVMError(
                f"Cannot reduce active snapshot {device.lv}: {words[0]} sectors are used."
            )

    def resume(self) -> list[CowOSError]:
        """Resume in order, rename on the way, remove what is no more; return what failed."""
        wanted = {device.uuid: device for each in self._new for device in each.devices}
        failed: list[CowOSError] = []
        for uuid in self._resume_order():
            try:
                device = wanted.get(uuid)
                if device is not None and device.name != self._names[uuid]:
                    self._mapper.rename(self._path(uuid), device.name)
                    self._names[uuid] = device.name
                if uuid not in self._live:
                    self._mapper.resume(self._path(uuid))
            except CowOSError as error:
                log.exception("%s is not resumed", self._names[uuid])
                failed.append(error)
        for found in self._old:
            # What was split off keeps the layer of a store until its own tables are loaded anew.
            for layer in (REAL, COW):
                uuid = dm_uuid(found.lv.vg.id, found.lv.id, layer)
                if uuid not in wanted and uuid in self._names:
                    try:
                        self._mapper.remove(self._path(uuid))
                    except CowOSError as error:
                        failed.append(error)
        return failed

    def revert(self) -> None:
        """Forget the new tables and resume with the old ones."""
        for device in reversed([*self._loaded, *self._made]):
            self._quietly(self._mapper.clear, device.uuid)
        for uuid in self._resume_order():
            if uuid in self._before:
                self._quietly(self._mapper.resume, uuid)
        for device in reversed(self._made):
            self._quietly(self._mapper.remove, device.uuid)

    def _quietly(self, verb: Callable[[str], None], uuid: str) -> None:
        try:
            if uuid in self._names:
                verb(self._path(uuid))
        except CowOSError:
            log.exception("%s", self._names[uuid])

    # Their orders, as uuids of devices there are.

    def _suspend_order(self) -> list[str]:
        """Tops, then what they stand on, from above; stores last but for one being merged."""
        order: list[DMDevice] = []
        for found in self._old:
            order += found.tops
        for found in self._old:
            order += [each.cow for each in found.snapshots if each.merging]
        both = [*self._old, *self._new]
        order += [found.real for found in both if found.real is not None]
        for found in both:
            order += reversed(found.below)
        for found in self._old:
            for snapshot in found.snapshots:
                order += [snapshot.cow, *reversed(snapshot.below)]
        return self._uuids(order)

    def _resume_order(self) -> list[str]:
        """From below: stores, snapshots, the origin last; then the top of what is merged."""
        order: list[DMDevice] = []
        staying = {each.cow.uuid for found in self._new for each in found.snapshots}
        merges = any(found.merging for found in self._new)
        for found in self._old:
            leaving = [each for each in found.snapshots if each.cow.uuid not in staying]
            if self._was_merging and not merges:
                for each in leaving:
                    order += [*each.below, each.top, each.cow]
            order += reversed(found.below) if leaving else []
            for snapshot in leaving:
                order += [*snapshot.below, snapshot.cow]
            if leaving and found.real is not None:
                order += [found.real, *(snapshot.top for snapshot in leaving)]
        for found in self._new:
            order += found.below
            merging = [each.cow for each in found.snapshots if each.merging]
            order += merging if self._was_merging else []
            order += [found.real] if found.real is not None else []
            order += merging
            for snapshot in found.snapshots:
                order += [*snapshot.below, snapshot.cow]
            order += [each.top for each in found.snapshots if not each.merging]
            order.append(found.top)
            order += [each.top for each in found.snapshots if each.merging]
        for found in self._old:
            order += found.devices
        return self._uuids(order)

    def _uuids(self, order: list[DMDevice]) -> list[str]:
        found = dict.fromkeys(device.uuid for device in order)
        return [uuid for uuid in found if uuid in self._names]
