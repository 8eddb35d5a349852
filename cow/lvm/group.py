"""A volume group to work with: open it, look at it, change it."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from cow.lvm import create, edit
from cow.lvm.activation import Activation
from cow.lvm.backups import Backups
from cow.lvm.check import (
    access_problem,
    change_problem,
    check_change,
    problems,
    reading_problems,
    refuse_change,
)
from cow.lvm.commit import (
    ActiveWork,
    flush_devices,
    metadata_backup,
    new_header,
    usable_mdas,
    write_generation,
)
from cow.lvm.devices import Devices, lock_of
from cow.lvm.errors import (
    AlreadyExists,
    InUse,
    LVMError,
    MetadataError,
    PVNotFound,
    RequestError,
    VGNotFound,
    VGNotWritable,
)
from cow.lvm.label_scan import Findings, FoundVG, PVDevice, scan_devices
from cow.lvm.mda import REPAIRABLE, MetadataArea
from cow.lvm.metadata import LogicalVolume, PhysicalVolume, VolumeGroupMetadata
from cow.lvm.metadata_text import vg_from_text
from cow.lvm.monitor import Opener
from cow.lvm.names import check_vg_name, dashed_id
from cow.lvm.pv import PVOptions, connect_pvs, device_hint, make_pvs, new_pv, set_used
from cow.lvm.text import parse
from cow.lvm.vg_changes import ChangingVolumeGroup
from cow.mapper import Mapper

log = logging.getLogger("cow.lvm")


class Scan:
    """What some devices hold: `pvs` with orphans, `vgs`, `warnings` in LVM's words.

    The VGs stay open as long as this is.
    """

    def __init__(self, devices: Devices) -> None:
        self.devices = devices
        with lock_of(devices.mapper):  # a change is seen whole or not at all
            found = scan_devices(devices.items())
        self.pvs = found.devices
        self.duplicates = found.duplicates
        self.without_label = found.without_label
        self.warnings = found.warnings
        self.unreadable = [vg for vg in found.vgs if vg.metadata is None]
        self.vgs = [VolumeGroup(vg, found, self.devices) for vg in found.vgs if vg.metadata]

    def vg(self, name: str | None = None) -> VolumeGroup:
        """Return the VG of that name or uuid, or the only one there is; LVMError if it cannot."""
        return _pick(self.vgs, self.unreadable, name)

    def close(self) -> None:
        """Give the devices back."""
        self.devices.close()

    def __enter__(self) -> Scan:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def scan(paths: Iterable[str], *, mapper: Mapper | None = None, readonly: bool = False) -> Scan:
    """Look for PVs and VGs on devices: paths of images, or names of the mapper's dm devices."""
    devices = Devices(mapper, readonly=readonly)
    try:
        devices.open_all(map(str, paths))
        return Scan(devices)
    except BaseException:
        devices.close()
        raise


def _open_again(paths: list[str], vg_id: str, mapper: Mapper) -> VolumeGroup:
    return VolumeGroup.open(paths, vg_id, mapper=mapper)


_open_groups: weakref.WeakKeyDictionary[Mapper, weakref.WeakSet[VolumeGroup]] = (
    weakref.WeakKeyDictionary()
)
"""Who has VGs of a mapper open: what one commits, the others read again."""


def _pick(vgs: list[VolumeGroup], unreadable: list[FoundVG], name: str | None) -> VolumeGroup:
    if name is None:
        if len(vgs) + len(unreadable) > 1:
            names = ", ".join(sorted([*(vg.name for vg in vgs), *(vg.name for vg in unreadable)]))
            raise RequestError(f"Please name a volume group: there are {names}.")
        chosen, broken = vgs, unreadable
    else:
        chosen = [vg for vg in vgs if name in (vg.name, vg.id, dashed_id(vg.id))]
        broken = [vg for vg in unreadable if name in (vg.name, vg.id, dashed_id(vg.id))]
    if len(chosen) > 1:
        raise LVMError(f"Multiple VGs found with the same name: skipping {name}")
    if chosen:
        return chosen[0]
    if broken:
        assert broken[0].error is not None
        raise MetadataError(
            f"Cannot read volume group {broken[0].name}: {broken[0].error.strerror}"
        )
    raise VGNotFound(f'Volume group "{name}" not found' if name else "No volume group found")


class VolumeGroup(ChangingVolumeGroup):
    """One VG on devices that stay open until close().

    `metadata` is the committed generation; to change it, edit what change() gives. `report` gets
    what LVM's commands print, `confirm` is asked where they ask. `activation` knows which LVs have
    devices; `work` keeps those right during a change.
    """

    def __init__(self, vg: FoundVG, findings: Findings, devices: Devices) -> None:
        self._owns_devices = False
        self.report: Callable[[str], None] = log.info
        self.confirm: Callable[[str], bool] = lambda question: True
        self.backups: Backups | None = None
        """Where the metadata before and after each command is kept."""
        self._use(devices)
        self.partial = False
        """Whether LVs that miss a PV may be activated."""
        self._command = ""
        self._writes = 0
        self._take(vg, findings)

    def _use(self, devices: Devices) -> None:
        self._devices = devices
        self.mapper = devices.mapper
        self.lock = lock_of(devices.mapper)
        self.activation = Activation(
            devices.mapper, readonly=devices.readonly, report=lambda text: self.report(text)
        )
        self.work: ActiveWork = self.activation
        _open_groups.setdefault(devices.mapper, weakref.WeakSet()).add(self)

    def _take(self, vg: FoundVG, findings: Findings) -> None:
        assert vg.metadata is not None
        self._found = vg
        self._findings = findings
        self._metadata = vg.metadata
        self._outdated = False
        self.warnings = vg.warnings

    @classmethod
    def open(
        cls,
        paths: Iterable[str],
        name: str | None = None,
        *,
        readonly: bool = False,
        mapper: Mapper | None = None,
        partial: bool = False,
    ) -> VolumeGroup:
        """Open the VG `name` (or uuid), or the only one there is, on images or dm devices.

        With `readonly` no byte of them is ever written. Missing PVs are told in `warnings`; then
        the VG can only be read.
        """
        devices = Devices(mapper, readonly=readonly)
        try:
            devices.open_all(map(str, paths))
            vg = cls.of_devices(devices, name)
        except BaseException:
            devices.close()
            raise
        vg.partial = partial
        return vg

    @classmethod
    def of_devices(cls, devices: Devices, name: str | None) -> VolumeGroup:
        """Open the VG on devices that it closes itself."""
        found = Scan(devices)
        vg = _pick(found.vgs, found.unreadable, name)
        vg._owns_devices = True
        vg.warnings = found.warnings
        return vg

    def close(self) -> None:
        """Give the devices back; with them go the LVs that are active in a mapper of its own."""
        if self._owns_devices:
            self._owns_devices = False
            _open_groups.get(self.mapper, set()).discard(self)
            self._devices.close()

    def __enter__(self) -> VolumeGroup:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<VolumeGroup {self.name} seqno {self.metadata.seqno}>"

    @property
    def command(self) -> str:
        """The command line that later changes are described with; "": the name of the method.

        Set it when a command begins: its first change is archived, the others are numbered.
        """
        return self._command

    @command.setter
    def command(self, command: str) -> None:
        self._command = command
        self._writes = 0

    # Looking.

    @property
    def name(self) -> str:
        """The name of the VG."""
        return self.metadata.name

    @property
    def metadata(self) -> VolumeGroupMetadata:
        """The committed generation, also if it was committed through another VolumeGroup."""
        if self._outdated:
            self.refresh()
        return self._metadata

    @property
    def id(self) -> str:
        """The uuid of the VG, 32 characters without dashes."""
        return self.metadata.id

    @property
    def pvs(self) -> list[PhysicalVolume]:
        """Its PVs, missing ones too."""
        return self.metadata.pvs

    def lvs(self, *, hidden: bool = False) -> list[LogicalVolume]:
        """Return the LVs that LVM shows; with `hidden` all but the snapshotN records."""
        if hidden:
            return [lv for lv in self.metadata.lvs if not lv.is_snapshot_record]
        return self.metadata.visible_lvs()

    def lv(self, name: str) -> LogicalVolume:
        """Return an LV by name; LVNotFound if there is none."""
        return self.metadata.lv(name)

    @property
    def readonly_reason(self) -> str | None:
        """Why the VG can only be read, in LVM's words; None if it can be changed."""
        return self._devices_problem or change_problem(self.metadata)

    @property
    def _devices_problem(self) -> str | None:
        if self._devices.readonly:
            return f"Volume group {self.name} was opened read-only."
        if self._found.duplicates:
            return f"Cannot update volume group {self.name} with duplicate PV devices."
        return None

    @property
    def idle_reason(self) -> str | None:
        """Why no LV may be activated; None if they may, as always where nothing is written."""
        if self._devices.readonly:
            return None
        if self._found.duplicates:
            return f"Cannot activate LVs in VG {self.name} while PVs appear on duplicate devices."
        if "EXPORTED" in self.metadata.status:
            return f"Volume group {self.name} is exported"
        return access_problem(self.metadata)

    def refresh(self) -> None:
        """Read the metadata from the devices again."""
        with self.lock:
            findings = scan_devices(self._devices.items())
            found = next((vg for vg in findings.vgs if vg.id == self._metadata.id), None)
            if found is None or found.metadata is None:
                raise VGNotFound(f'Volume group "{self.name}" not found')
            self._take(found, findings)

    def problems(self) -> list[str]:
        """Return what `vgck` finds wrong; [] if all is well."""
        missing = len(self.metadata.missing_pvs)
        found = [f"The volume group is missing {missing} physical volumes."] if missing else []
        return found + problems(self.metadata)

    # Changing.

    @contextmanager
    def change(self, command: str, *, cures: bool = False) -> Iterator[VolumeGroupMetadata]:
        """Give a copy of the metadata to edit, and commit it at the end of the with block.

        `command` describes the change in the metadata. If anything raises, the VG is as it was.
        With `cures` the VG may be one that cannot be changed, if the copy can at the end.
        """
        with self.lock:
            self._check_writable(cures=cures)
            new = self.metadata.copy()
            yield new
            if cures:
                refuse_change(new)
            self._commit(new, command)

    def _check_writable(self, *, cures: bool = False) -> None:
        if any(mda.changed() for pv in self.pvs for mda in pv.mdas if not mda.bad):
            self.refresh()
        reason = self._devices_problem or access_problem(self.metadata)
        if reason := reason or (None if cures else change_problem(self.metadata)):
            raise VGNotWritable(reason)

    def _commit(
        self,
        new: VolumeGroupMetadata,
        command: str,
        *,
        joined: Sequence[PVDevice] = (),
        repaired: Sequence[MetadataArea] = (),
    ) -> None:
        """Check `new` and make it the generation in force.

        `joined` are PVs that are new in it; `repaired` damaged areas that get the text too.
        """
        old = self.metadata
        new.number_pvs()
        new.seqno = old.seqno + 1
        for pv in new.pvs:
            pv.device_hint = device_hint(pv)
        new.header = new_header(old.header, self._description(command))
        check_change(old, new)
        if self.backups and not (self._command and self._writes):
            self.backups.archive(old, self._command or command)
        self._update_labels(joined)
        mdas = [*usable_mdas(new), *repaired]
        for mda in self._found.stale:
            if mda in mdas:
                self.report(
                    f"WARNING: updating old metadata to {new.seqno} on {mda.where} for VG"
                    f" {new.name}."
                )

        def committed() -> None:
            self._metadata = self._found.metadata = new
            for other in _open_groups.get(self.mapper, ()):
                if other is not self and other._metadata.id == new.id:
                    other._outdated = True
            self.warnings = self._found.warnings = []
            self._writes += 1

        try:
            complete = write_generation(old, new, mdas, self.work, committed, self.report)
        except BaseException:
            self._read_again()
            raise
        self._found.stale = []
        if not complete:
            self._read_again()
        if self.backups:
            try:
                self.backups.backup(self.metadata, self._command or command)
                if old.name != new.name:
                    self.backups.remove(old.name)
            except OSError as error:
                self.report(f"WARNING: This metadata update is NOT backed up: {error}")

    def _read_again(self) -> None:
        """Find out what is on the devices after a failure; what was known stays if they fail."""
        try:
            self.refresh()
        except OSError as error:
            log.warning("%s: cannot be read again: %s", self, error)

    def _move_to(self, mapper: Mapper) -> None:
        """Open the devices in another mapper, and give them back in the one of before."""
        if not self._owns_devices or self._devices.mapper.names():
            raise InUse(f"The devices of volume group {self.name} are in use in their mapper.")
        paths = [path for path, _ in self._devices.items()]
        readonly = self._devices.readonly
        self._devices.close()
        devices = Devices(mapper, readonly=readonly)
        try:
            devices.open_all(paths)
        except BaseException:
            devices.close()
            raise
        self._use(devices)
        self.refresh()

    def _opener(self) -> Opener:
        paths = [path for path, _ in self._devices.items()]
        return partial(_open_again, paths, self.id)

    def _description(self, command: str) -> str:
        number = f"[{self._writes + 1}]" if self._writes and self._command else ""
        return f"Write{number} from {self._command or command}."

    def _update_labels(self, joined: Sequence[PVDevice]) -> None:
        """Write the labels that do not say that their PVs are used."""
        for found in self._found.old_labels:
            self.report(f"WARNING: updating PV header on {found.path} for VG {self.name}.")
        changed = [*self._found.old_labels, *joined]
        for found in changed:
            set_used(found, True)
        flush_devices(found.device for found in changed)
        self._found.old_labels = []

    # The VG as a whole.

    def extend(self, paths: Sequence[str], **options: Any) -> None:  # noqa: ANN401
        """Add PVs, which are made where there are none; `options` are those of PVOptions."""
        with self.lock:
            self._check_writable()
            if "RESIZEABLE" not in self.metadata.status:
                raise VGNotWritable(f"Volume group {self.name} is not resizeable.")
            new = self.metadata.copy()
            joined = make_pvs(
                paths,
                self._devices,
                self._findings,
                PVOptions(**options),
                self.confirm,
                self.report,
            )
            new.pvs += [new_pv(found, new.extent_size) for found in joined]
            self._commit(new, f"vgextend {self.name} {' '.join(paths)}", joined=joined)
            for found in joined:
                found.vg_name, found.vg_id = self.name, self.id
                if found not in self._findings.devices:
                    self._findings.devices.append(found)
        self.report(f'Volume group "{self.name}" successfully extended')

    def reduce(self, path: str) -> None:
        """Take a PV out of the VG on which nothing lies; it belongs to nobody then."""
        found = next((pv for pv in self.pvs if pv.path == path), None)
        if found is None:
            raise PVNotFound(f'Failed to find physical volume "{path}".')
        with self.change(f"vgreduce {self.name} {path}") as new:
            edit.remove_pv(new, found.id)
        members = [each for each in self._findings.devices if each.label.pv_id == found.id]
        self._make_orphans(members)
        self.report(f'Removed "{path}" from volume group "{self.name}"')

    def rename(self, new_name: str) -> None:
        """Give the VG another name, and the devices of its active LVs."""
        check_vg_name(new_name)
        if new_name == self.name:
            raise RequestError("Old and new volume group names must differ")
        if any(vg.name == new_name and vg.id != self.id for vg in self._findings.vgs):
            raise AlreadyExists(f'New VG name "{new_name}" already exists')
        old_name = self.name
        with self.change(f"vgrename {old_name} {new_name}") as new:
            new.name = new_name
        self.report(f'Volume group "{old_name}" successfully renamed to "{new_name}"')

    def remove(self) -> None:
        """Remove the VG with all its LVs; its PVs belong to nobody then."""
        with self.lock:
            self._check_writable()
            for lv in self.metadata.visible_lvs():
                if self.metadata.find_lv(lv.name) is not None:
                    self.remove_lv(lv.name)
            if left := [lv.name for lv in self.metadata.lvs]:
                raise LVMError(
                    f'Volume group "{self.name}" still contains {len(left)} logical volume(s)'
                )
            if self.backups and not (self._command and self._writes):
                self.backups.archive(self.metadata, self._command or f"vgremove {self.name}")
            self._make_orphans([each for each in self._findings.devices if each.vg_id == self.id])
            if self.backups:
                self.backups.remove(self.name)
        self.report(f'Volume group "{self.name}" successfully removed')

    @staticmethod
    def _make_orphans(members: Sequence[PVDevice]) -> None:
        """Let the labels of PVs say that they belong to nobody, and forget the metadata on them.

        In this order: what a crash in between leaves is an outdated PV, which vgck clears. They are
        as large as their devices again.
        """
        for found in members:
            found.label.device_size = found.device.size
            set_used(found, False)
        flush_devices(found.device for found in members)
        for found in members:
            for mda in found.mdas:
                mda.initialize(ignored=mda.ignored)
            found.vg_name = found.vg_id = ""
        flush_devices(found.device for found in members)

    def update_metadata(self) -> None:
        """Write the metadata anew to every area, also damaged and outdated ones (vgck)."""
        with self.lock:
            self._check_writable()
            repaired = []
            for mda in (mda for pv in self.pvs for mda in pv.mdas if mda.bad):
                where = f"mda{mda.number}"
                if mda.bad & ~REPAIRABLE:
                    self.report(
                        f"WARNING: not repairing bad metadata ({mda.bad:#x}) for {where} on"
                        f" {mda.where}"
                    )
                else:
                    repaired.append(mda)
                    self.report(
                        f"WARNING: repairing bad metadata ({mda.bad:#x}) in {where} at {mda.start}"
                        f" on {mda.where}."
                    )
            self._wipe_outdated()
            self._commit(
                self.metadata.copy(), f"vgck --updatemetadata {self.name}", repaired=repaired
            )

    def _wipe_outdated(self) -> None:
        """Make orphans of the PVs that were removed from the VG while they were away."""
        for found in self._found.outdated:
            self.report(f"WARNING: wiping mda on outdated PV {found.path}")
            for mda in found.mdas:
                mda.initialize(ignored=mda.ignored)
            found.device.flush()
            self.report(f"WARNING: wiping header on outdated PV {found.path}")
            set_used(found, False)
            found.device.flush()
            found.vg_name = found.vg_id = ""
        self._found.outdated = []

    def backup(self) -> str:
        """Return the metadata as vgcfgbackup writes it."""
        return metadata_backup(self.metadata, self._command or f"vgcfgbackup {self.name}")

    def restore(self, text: str) -> None:
        """Make the metadata of a backup the next generation (vgcfgrestore)."""
        new = vg_from_text(parse(text))
        if new.name != self.name:
            raise LVMError(f"Backup of volume group {new.name} is not one of {self.name}.")
        if new.id != self.id:
            raise LVMError(f"Backup of volume group {new.name} has another uuid.")
        if wrong := reading_problems(new):
            raise MetadataError(wrong[0])
        with self.lock:
            self._check_writable()
            connect_pvs(new, self._findings.devices)
            refuse_change(new)
            self._commit(new, f"vgcfgrestore {self.name}")
        self.report(f"Restored volume group {self.name}.")

    # Its LVs.

    def create_lv(
        self,
        name: str | None = None,
        *,
        extents: int | None = None,
        size: int | None = None,
        **options: Any,  # noqa: ANN401
    ) -> LogicalVolume:
        """Make an LV of `extents` extents or `size` bytes; `options` are those of LVOptions."""
        with self.change(f"lvcreate {name or ''}".strip()) as new:
            count = self._extents(new, extents, size)
            lv = create.create_lv(new, name, count, create.LVOptions(**options), self.report)
        self.report(f'Logical volume "{lv.name}" created.')
        return lv

    def rename_lv(self, name: str, new_name: str) -> None:
        """Rename an LV."""
        with self.change(f"lvrename {self.name} {name} {new_name}") as new:
            edit.rename_lv(new, name, new_name)
        self.report(f'Renamed "{name}" to "{new_name}" in volume group "{self.name}"')

    def change_lv(self, name: str, **options: Any) -> None:  # noqa: ANN401
        """Change permission, tags, policy, read ahead or flags of an LV, see edit.change_lv."""
        with self.change(f"lvchange {self.name}/{name}") as new:
            edit.change_lv(new.lv(name), report=self.report, **options)
        self.report(f"Logical volume {self.name}/{name} changed.")
