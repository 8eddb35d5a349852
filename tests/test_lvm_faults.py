"""Full disks and failing requests below a VG: it is in the old generation or in the new one.

What fails says so. What is left can be opened, has no problems, and can be changed; LVs that are
active go on. The programs are those of the power cuts.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_lvm_power
import test_lvm_snapshot_power
from support import SECTOR, count
from support.crash import PAGE
from support.faults import Failing, Fault
from test_lvm_power import NAMES, PV_SECTORS, SMALL, folder, open_disk, open_vg  # noqa: F401
from test_lvm_snapshot_power import ORIGIN, expected

import cow
from cow import lvm
from cow.lvm.check import problems
from cow.lvm.metadata_text import vg_section

PLAIN = test_lvm_power.CHANGES
ACTIVE = {
    name: test_lvm_snapshot_power.CHANGES[name]
    for name in ("create the first", "create the second", "remove one of two", "extend the store")
}
ABANDONED = "Manual intervention may be required to remove abandoned LV(s) before retrying."


class Watch:
    """Notes each generation there may be, and passes on the work for active devices."""

    def __init__(self, vg: lvm.VolumeGroup, work: Any = None) -> None:
        self.generations = [vg_section(vg.metadata)]
        self.work = work

    def preload(self, old, new) -> None:
        self.generations.append(vg_section(new))
        if self.work:
            self.work.preload(old, new)

    def suspend(self, old, new) -> None:
        if self.work:
            self.work.suspend(old, new)

    def resume(self, old, new) -> None:
        if self.work:
            self.work.resume(old, new)

    def revert(self, old, new) -> None:
        if self.work:
            self.work.revert(old, new)


def disk_before(path: Path, before: Callable[[cow.Mapper], None]) -> bytes:
    """Return the two PVs that a program begins with."""
    path.write_bytes(b"")
    os.truncate(path, 2 * PV_SECTORS * SECTOR)
    with cow.Mapper(durability="process") as dm:
        open_disk(dm, path)
        before(dm)
    return path.read_bytes()


def changed(path: Path, change: Callable, fault: Fault, *, active: bool) -> list[dict]:
    """Change the VG while a request fails; return the generations it may be in."""
    with cow.Mapper(durability="process") as dm:
        dm.create("disk", f"0 {2 * PV_SECTORS} failing {path} 0")
        for number, name in enumerate(NAMES):
            dm.create(name, f"0 {PV_SECTORS} linear disk {number * PV_SECTORS}")
        with open_vg(dm) as vg:
            if active:
                vg.activate()
            vg.work = watch = Watch(vg, vg.activation if active else None)
            Failing.fault = fault
            refused = False
            try:
                change(vg)
            except cow.CowError:
                refused = True
            Failing.fault = None
            if active:
                check_contents(vg)
    assert fault.fired or not refused
    return watch.generations if refused else watch.generations[-1:]


def check_contents(vg: lvm.VolumeGroup) -> None:
    """Check what active LVs show; a snapshot may be lost, but says so."""
    for lv in vg.lvs():
        wanted = expected(vg, lv.name, merged=False)
        if not vg.activation.is_active(lv) or wanted is None:
            continue
        if lv.is_cow and "Invalid" in vg.mapper.status(f"vg-{lv.name}"):
            continue
        assert vg.device(lv.name).pread(len(wanted), 0) == wanted, lv.name


def check_left(path: Path, legal: list[dict], *, active: bool) -> None:
    with cow.Mapper(durability="process") as dm:
        open_disk(dm, path)
        with lvm.VolumeGroup.open(NAMES, mapper=dm) as vg:
            assert vg_section(vg.metadata) in legal
            assert problems(vg.metadata) == []
            if active:
                vg.activate()
                check_contents(vg)
            if "EXPORTED" in vg.metadata.status:
                vg.import_vg()
            vg.update_metadata()
            vg.change_vg(add_tags=["after"])
        with lvm.VolumeGroup.open(NAMES, mapper=dm) as vg:
            # A PV that is not yet in the VG may be marked as in use, as with LVM.
            assert vg.warnings == [] or len(vg.pvs) < len(NAMES)
            assert vg.metadata.tags == ["after"]


@pytest.mark.parametrize("op", ["read", "write", "flush"])
@pytest.mark.parametrize("name", [*PLAIN, *ACTIVE])
def test_the_nth_failing_request_leaves_a_generation(name, op, folder, failing):  # noqa: F811
    active = name in ACTIVE
    before, change = ACTIVE[name] if active else PLAIN[name]
    path = folder / "disk.img"
    content = disk_before(path, before)
    for n in range(1, 1000):
        path.write_bytes(content)
        fault = Fault(op, n)
        legal = changed(path, change, fault, active=active)
        check_left(path, legal, active=active)
        if not fault.fired:
            count("requests made to fail", n - 1)
            return
    pytest.fail("no run was clean")


def test_a_vg_on_a_full_disk_says_so_and_stays_as_it_was(disk):
    """The PV is a sparse file, so each new part of its metadata area takes room."""
    done = refused = 0
    for free in range(disk.pages):
        count("runs on a full disk")
        disk.clear()
        path = disk.sparse("pv.img", PV_SECTORS)
        with lvm.create_vg("vg", [path], extent_size=8, **SMALL) as vg:
            vg.create_lv("org", extents=4)
            before = vg_section(vg.metadata)
        disk.fill(free)
        with lvm.VolumeGroup.open([path]) as vg:
            assert vg_section(vg.metadata) == before
            generations = [before]
            code = 0
            try:
                for number in range(8):
                    vg.create_lv(f"lv{number}", extents=1, tags=["t" * 200])
                    generations.append(vg_section(vg.metadata))
            except lvm.LVMError as error:
                code = error.errno
            assert code in (0, errno.ENOSPC)
            done += not code
            refused += bool(code)
            assert vg_section(vg.metadata) == generations[-1]
        with lvm.VolumeGroup.open([path]) as vg:
            assert vg_section(vg.metadata) == generations[-1]
            assert vg.warnings == problems(vg.metadata) == []
        if done:
            assert refused > 2
            return
    pytest.fail("no run was clean")


def test_a_snapshot_of_an_lv_on_a_full_disk_costs_no_more_than_itself(disk):
    done = 0
    for free in range(disk.pages):
        count("runs on a full disk")
        disk.clear()
        path = disk.sparse("pv.img", PV_SECTORS)
        with lvm.create_vg("vg", [path], extent_size=8, **SMALL) as vg:
            vg.create_lv("org", extents=4)
            vg.activate()
            vg.device("org").pwrite(ORIGIN, 0)
        disk.fill(free)
        shown = bytearray(ORIGIN)
        with lvm.VolumeGroup.open([path]) as vg:
            vg.activate()
            said: list[str] = []
            vg.report = said.append
            code = 0
            try:
                vg.create_snapshot("org", "s1", extents=6)
            except cow.CowError as error:
                code = error.errno
            assert code in (0, errno.ENOSPC)
            if code:
                # With no room for another generation the LV that was made for it stays.
                left = [lv.name for lv in vg.lvs()] == ["org", "s1"]
                assert left == (ABANDONED in said)
            for at in range(0, len(ORIGIN), PAGE):
                vg.device("org").pwrite(b"n" * PAGE, at)
                shown[at : at + PAGE] = b"n" * PAGE
            assert vg.device("org").pread(len(ORIGIN), 0) == shown
            names = [lv.name for lv in vg.lvs()]
            valid = "s1" in names and vg.lv("s1").is_cow
            valid = valid and "Invalid" not in vg.mapper.status("vg-s1")
            if valid:
                assert vg.device("s1").pread(len(ORIGIN), 0) == ORIGIN
        disk.fill(disk.pages)
        (disk.folder / "ballast").unlink()
        with lvm.VolumeGroup.open([path]) as vg:
            assert [lv.name for lv in vg.lvs()] == names
            vg.activate()
            assert vg.device("org").pread(len(ORIGIN), 0) == shown
            if "s1" in names and vg.lv("s1").is_cow:
                assert ("Invalid" not in vg.mapper.status("vg-s1")) == valid
            if valid:
                assert vg.device("s1").pread(len(ORIGIN), 0) == ORIGIN
        done += valid
        if done:
            assert free > 2
            return
    pytest.fail("no run was clean")
