"""Power cuts while a VG is changed: it is in the old or in the new generation, never in between.

Two PVs lie on one disk below a log-writes target, which records every write and every flush. Each
state that the disk may be in after a cut at any moment is built (support/crash.py), opened anew,
and compared with the generations there are; then it is changed once more, and everything has to
be in order.

COW_LONG=1: where very many states are possible between two barriers, all are visited as well.
"""

from __future__ import annotations

import os
import random
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import SECTOR, count
from support.crash import LONG, Cuts, Entry, read_log

import cow
from cow import lvm
from cow.lvm.check import problems
from cow.lvm.metadata_text import vg_section

MOST = 1 << 14 if LONG else 1 << 8
"""States between two barriers that are all visited; where there are more, so many are chosen."""
PV_SECTORS = 4096
LOG_BYTES = 8 << 20
NAMES = ["pv0", "pv1"]
SMALL = {"data_alignment": 4096, "metadata_size": 32768}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory, where there is one: the states are many, and nothing here is durable."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


def open_disk(dm: cow.Mapper, path: Path, log: Path | None = None) -> None:
    """Make the two PVs' devices, recorded where there is a log."""
    words = f"linear {path} 0" if log is None else f"log-writes {path} {log}"
    dm.create("disk", f"0 {2 * PV_SECTORS} {words}")
    for number, name in enumerate(NAMES):
        dm.create(name, f"0 {PV_SECTORS} linear disk {number * PV_SECTORS}")


def open_vg(dm: cow.Mapper) -> lvm.VolumeGroup:
    return lvm.VolumeGroup.open(NAMES, "vg", mapper=dm)


def make_vg(dm: cow.Mapper, names: list[str] = NAMES, **options) -> lvm.VolumeGroup:
    return lvm.create_vg("vg", names, mapper=dm, extent_size=8, **SMALL, **options)


def two_lvs(dm: cow.Mapper) -> None:
    """Make a VG with a plain and a striped LV."""
    with make_vg(dm) as vg:
        vg.create_lv("lv", extents=3, tags=["a" * 40])
        vg.create_lv("striped", extents=4, stripes=2, stripe_size=8)


def two_areas(dm: cow.Mapper) -> None:
    with make_vg(dm, metadata_copies=2) as vg:
        vg.create_lv("lv", extents=3)


def one_pv(dm: cow.Mapper) -> None:
    make_vg(dm, NAMES[:1]).close()


def near_the_end(dm: cow.Mapper) -> None:
    """Leave the ring so that the next text wraps."""
    with make_vg(dm) as vg:
        vg.create_lv("lv", extents=3)
        mda = vg.pvs[0].mdas[0]
        while not 0 < mda.size - mda.committed.offset - mda.committed.size < 1400:
            tag = "x" * (600 + 7 * vg.metadata.seqno)
            vg.change_lv("lv", add_tags=[tag], remove_tags=vg.lv("lv").tags)


def one_empty_pv(dm: cow.Mapper) -> None:
    """Make a VG with an LV on the first PV, and nothing on the second."""
    with make_vg(dm) as vg:
        vg.create_lv("lv", extents=3)


def stale(dm: cow.Mapper) -> None:
    """Leave one PV a generation behind."""
    two_lvs(dm)
    old = dm.device("pv1").pread(40960, 0)
    with open_vg(dm) as vg:
        vg.change_lv("lv", add_tags=["newer"])
    dm.device("pv1").pwrite(old, 0)


def with_lvs_change(change: Callable[[lvm.VolumeGroup], Any]) -> Callable[[cow.Mapper], None]:
    def program(dm: cow.Mapper) -> None:
        with open_vg(dm) as vg:
            change(vg)

    return program


CHANGES = {
    "lvcreate": (two_lvs, lambda vg: vg.create_lv("new", extents=2)),
    "lvremove": (two_lvs, lambda vg: vg.remove_lv("lv")),
    "lvrename": (two_lvs, lambda vg: vg.rename_lv("lv", "other")),
    "lvextend": (two_lvs, lambda vg: vg.extend_lv("striped", extents=8)),
    "lvreduce": (two_lvs, lambda vg: vg.reduce_lv("lv", extents=1)),
    "lvchange": (two_lvs, lambda vg: vg.change_lv("lv", permission="r", add_tags=["t"])),
    "vgrename and back": (two_lvs, lambda vg: (vg.rename("b"), vg.rename("vg"))),
    "pvresize": (two_lvs, lambda vg: vg.resize_pv("pv0")),
    "vgextend": (one_pv, lambda vg: vg.extend(["pv1"], **SMALL)),
    "vgreduce": (one_empty_pv, lambda vg: vg.reduce("pv1")),
    "vgexport and vgimport": (two_lvs, lambda vg: (vg.export_vg(), vg.import_vg())),
    "vgck --updatemetadata": (stale, lambda vg: vg.update_metadata()),
    "vgcfgrestore": (two_lvs, lambda vg: vg.restore(vg.backup())),
    "two areas on each PV": (two_areas, lambda vg: vg.create_lv("new", extents=2)),
    "a text that wraps": (near_the_end, lambda vg: vg.change_lv("lv", add_tags=["y" * 500])),
    "a stale copy": (stale, lambda vg: vg.create_lv("new", extents=2)),
    "two changes": (two_lvs, lambda vg: (vg.remove_lv("lv"), vg.create_lv("lv", extents=9))),
}


class Watch:
    """Notes each generation a VG has, and marks the log where one begins to count."""

    def __init__(self, dm: cow.Mapper) -> None:
        self.dm = dm
        self.generations: list[dict] = []

    def note(self, vg: lvm.VolumeGroup) -> None:
        self.generations.append(vg_section(vg.metadata))
        self.dm.message("disk", 0, f"mark {len(self.generations) - 1}")

    # The work for active devices: nothing but a look.

    def preload(self, old, new) -> None:
        self.dm.message("disk", 0, f"mark {len(self.generations) - 1}-next")
        self.generations.append(vg_section(new))

    def suspend(self, old, new) -> None:
        pass

    def resume(self, old, new) -> None:
        self.dm.message("disk", 0, f"mark {len(self.generations) - 1}")

    def revert(self, old, new) -> None:
        raise AssertionError("nothing fails here")


def record(folder: Path, before: Callable, program: Callable[[cow.Mapper], None]) -> tuple:
    """Run a program on recorded devices; return the disk before it and the log."""
    path, log = folder / "disk.img", folder / "disk.log"
    for each, size in ((path, 2 * PV_SECTORS * SECTOR), (log, LOG_BYTES)):
        each.write_bytes(b"")
        os.truncate(each, size)
    with cow.Mapper() as dm:
        open_disk(dm, path)
        before(dm)
    disk = path.read_bytes()
    with cow.Mapper() as dm:
        open_disk(dm, path, log)
        program(dm)
        assert "disabled" not in dm.status("disk")
    return disk, read_log(log)


def record_change(name: str, folder: Path) -> tuple[bytes, list[Entry], list[dict]]:
    """Run a change on recorded devices; return the disk before it, the log, the generations."""
    before, change = CHANGES[name]
    generations: list[dict] = []

    def program(dm: cow.Mapper) -> None:
        with open_vg(dm) as vg:
            watch = Watch(dm)
            watch.note(vg)
            vg.work = watch
            change(vg)
            generations.extend(watch.generations)

    return *record(folder, before, program), generations


def legal_generations(mark: str) -> list[int]:
    """Return which generations a cut may leave that comes after a mark."""
    number = int(mark.removesuffix("-next"))
    return [number, number + 1] if mark.endswith("-next") else [number]


@pytest.mark.parametrize("name", CHANGES)
def test_every_state_of(name, folder, seed):
    disk, entries, generations = record_change(name, folder)
    assert len(generations) > 1
    cuts = Cuts(MOST, random.Random(seed))
    path = folder / "state.img"
    reached = set()
    for mark, state in cuts.of(disk, entries):
        if not mark:
            continue
        legal = legal_generations(mark)
        path.write_bytes(state)
        with cow.Mapper() as dm:
            open_disk(dm, path)
            with lvm.VolumeGroup.open(NAMES, mapper=dm) as vg:
                found = vg_section(vg.metadata)
                which = [n for n in legal if generations[n] == found]
                assert which, f"after mark {mark}, state {cuts.visited}: {vg.warnings}"
                reached.update(which)
                assert problems(vg.metadata) == []
                assert not vg.metadata.missing_pvs
                if name == "vgextend" and len(vg.pvs) == 1:
                    vg.extend(["pv1"])
                elif "EXPORTED" in vg.metadata.status:
                    vg.import_vg()
                else:
                    vg.update_metadata()
            with lvm.VolumeGroup.open(NAMES, mapper=dm) as vg:
                assert vg.warnings == []
                assert vg.metadata.seqno == found["seqno"] + 1
    assert cuts.all_of_them or not LONG
    assert reached == set(range(len(generations)))
    count("disk states of LVM metadata after a power cut", cuts.visited)


def states_of(folder: Path, seed: int, before: Callable, program: Callable) -> Iterator[lvm.Scan]:
    """Yield a scan of every state of a program that makes or unmakes PVs and VGs."""
    disk, entries = record(folder, before, program)
    cuts = Cuts(MOST, random.Random(seed))
    path = folder / "state.img"
    for _, state in cuts.of(disk, entries):
        path.write_bytes(state)
        with cow.Mapper() as dm:
            open_disk(dm, path)
            with lvm.scan(NAMES, mapper=dm) as found:
                yield found
    assert cuts.all_of_them
    count("disk states of LVM metadata after a power cut", cuts.visited)


def nothing(dm: cow.Mapper) -> None:
    pass


def test_every_state_of_pvcreate_is_a_whole_pv_or_none(folder, seed):
    def program(dm: cow.Mapper) -> None:
        lvm.create_pv("pv0", mapper=dm, **SMALL)

    counts = set()
    for found in states_of(folder, seed, nothing, program):
        counts.add(len(found.pvs))
        assert not found.warnings
        assert not any(mda.bad for pv in found.pvs for mda in pv.mdas)
    assert counts == {0, 1}


def test_every_state_of_pvremove_is_a_whole_pv_or_none(folder, seed):
    def before(dm: cow.Mapper) -> None:
        lvm.create_pv("pv0", mapper=dm, **SMALL)

    counts = set()
    for found in states_of(folder, seed, before, lambda dm: lvm.remove_pv("pv0", mapper=dm)):
        counts.add(len(found.pvs))
        assert not found.warnings
    assert counts == {0, 1}


def test_every_state_of_vgcreate_has_the_vg_or_not(folder, seed):
    def program(dm: cow.Mapper) -> None:
        make_vg(dm).close()

    counts = set()
    for found in states_of(folder, seed, nothing, program):
        counts.add(len(found.vgs))
        for vg in found.vgs:
            assert vg.metadata.seqno == 1
            assert not vg.metadata.missing_pvs
            vg.create_lv("lv", extents=1)
    assert counts == {0, 1}


def test_every_state_of_vgremove_has_the_last_generation_or_no_vg(folder, seed):
    def program(dm: cow.Mapper) -> None:
        with open_vg(dm) as vg:
            vg.remove()

    seen = set()
    for found in states_of(folder, seed, two_lvs, program):
        assert len(found.pvs) == 2
        if not found.vgs:
            seen.add("gone")
            continue
        (vg,) = found.vgs
        assert not vg.metadata.missing_pvs
        seen.add(" ".join(lv.name for lv in vg.lvs()))
        vg.create_lv("again", extents=1)
    assert seen == {"lv striped", "striped", "", "gone"}


def test_a_disk_that_forgets_its_flushes_is_found_out(folder, seed):
    """The test of the test: without the barriers there are states that are neither."""

    def program(dm: cow.Mapper) -> None:
        with open_vg(dm) as vg:
            vg.create_lv("new", extents=2)

    disk, entries = record(folder, two_lvs, program)
    entries = [entry for entry in entries if not entry.flags & 1]
    cuts = Cuts(MOST, random.Random(seed))
    path = folder / "state.img"
    bad = 0
    for _, state in cuts.of(disk, entries):
        path.write_bytes(state)
        with cow.Mapper() as dm:
            open_disk(dm, path)
            with lvm.scan(NAMES, mapper=dm) as found:
                bad += not found.vgs
    assert bad


def test_the_log_has_the_headers_last(folder):
    """What the states are made of: a header is one sector, and no text follows it."""
    _, entries = record(folder, two_lvs, with_lvs_change(lambda vg: vg.remove_lv("lv")))
    headers = [
        number
        for number, entry in enumerate(entries)
        if entry.data[4:20] == bytes.fromhex("204c564d3220785b35412572304e2a3e")
    ]
    assert len(headers) == 4
    texts = [n for n, e in enumerate(entries) if e.data.startswith(b"vg {")]
    assert max(texts) < min(headers)
    for number in headers:
        assert len(entries[number].data) == SECTOR
        start = struct.unpack_from("<Q", entries[number].data, 24)[0]
        assert entries[number].sector % PV_SECTORS * SECTOR == start
