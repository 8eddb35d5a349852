"""What is changed about a VG itself and its PVs, in its metadata alone."""

from __future__ import annotations

from collections.abc import Iterable

from cow.lvm import edit
from cow.lvm.errors import InUse, LVMError, PVNotFound
from cow.lvm.pv import check_pv_size, size_of
from cow.lvm.snapshots import SnapshottingVolumeGroup
from cow.units import sectors


class ChangingVolumeGroup(SnapshottingVolumeGroup):
    """The part of a VolumeGroup that changes properties of the VG and of its PVs."""

    def change_vg(
        self,
        *,
        add_tags: Iterable[str] = (),
        remove_tags: Iterable[str] = (),
        resizeable: bool | None = None,
        max_lv: int | None = None,
        max_pv: int | None = None,
        policy: str | None = None,
        flags: dict[str, bool] | None = None,
    ) -> None:
        """Change what vgchange changes in the metadata; flags such as NOAUTOACTIVATE on or off."""
        with self.change(f"vgchange {self.name}") as new:
            edit.change_vg(
                new,
                add_tags=add_tags,
                remove_tags=remove_tags,
                resizeable=resizeable,
                max_lv=max_lv,
                max_pv=max_pv,
                policy=policy,
                flags=flags,
            )
        self.report(f'Volume group "{self.name}" successfully changed')

    def remove_missing(self) -> None:
        """Take PVs out that are not there; InUse if an LV lies on one (vgreduce)."""
        if not self.metadata.missing_pvs:
            self.report(f'Volume group "{self.name}" is already consistent.')
            return
        with self.change(f"vgreduce --removemissing {self.name}", cures=True) as new:
            for pv in new.missing_pvs:
                edit.remove_pv(new, pv.id)
        self.report(f"Wrote out consistent volume group {self.name}.")

    def resize_pv(self, path: str, *, size: int | None = None) -> None:
        """Let a PV have the extents that fit on its device, or into `size` bytes of it.

        LVMError if others are in use. An image may have been made larger while LVs on it are used.
        """
        found = next((pv for pv in self.metadata.pvs if pv.path == path), None)
        if found is None or found.device is None:
            raise PVNotFound(f'Failed to find physical volume "{path}".')
        there = size_of(found.device)
        wanted = there if size is None else size
        if wanted > there:
            raise LVMError(f"{path}: {wanted} bytes are more than the device has.")
        check_pv_size(path, sectors(wanted))
        with self.change(f"pvresize {path}") as new:
            pv = new.pv_with_id(found.id)
            assert pv is not None
            edit.resize_pv(new, pv, sectors(wanted))
        self.report(f'Physical volume "{path}" changed')

    def export_vg(self) -> None:
        """Let nobody use the VG until it is imported. None of its LVs may be active."""
        if any(map(self.activation.is_active, self.metadata.lvs)):
            raise InUse(f'Volume group "{self.name}" has active logical volumes')
        with self.change(f"vgexport {self.name}") as new:
            edit.set_exported(new, True)
        self.report(f'Volume group "{self.name}" successfully exported')

    def import_vg(self) -> None:
        """Use a VG again that was exported."""
        with self.change(f"vgimport {self.name}", cures=True) as new:
            edit.set_exported(new, False)
        self.report(f'Volume group "{self.name}" successfully imported')
