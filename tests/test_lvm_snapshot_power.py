"""Power cuts while snapshots are made, removed, merged: a legal generation, and no byte lost.

As tests/test_lvm_power.py, with the LVs active. The free extents are full of old COW stores: one
that was not wiped would be believed. In every state that the disk may be in after a cut, every
snapshot shows what it showed, and so does the origin; or the origin shows what the merge gives.

COW_LONG=1: more states, where there are very many.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import SECTOR, poll, store_bytes
from support.crash import LONG, Cuts, Entry
from test_lvm_power import (  # noqa: F401
    NAMES,
    folder,
    legal_generations,
    make_vg,
    open_disk,
    open_vg,
    record,
)

import cow
from cow import lvm
from cow.lvm.activation import Activation
from cow.lvm.check import problems
from cow.lvm.metadata_text import vg_section

MOST = 1 << 12 if LONG else 1 << 4
EXTENT = 4096
ORIGIN = b"".join(bytes([65 + n]) * EXTENT for n in range(4))
CHANGED = ORIGIN[:EXTENT] + b"s" * EXTENT + ORIGIN[2 * EXTENT :]
STALE = bytes(store_bytes([(1, 2), (0, 3)], size=6 * EXTENT))


def origin(dm: cow.Mapper) -> None:
    """Make an origin; what is free behind it looks like COW stores."""
    with make_vg(dm) as vg:
        vg.create_lv("rest", extents=vg.metadata.free_extents)
        vg.activate()
        device = vg.device("rest")
        for at in range(0, device.size, EXTENT):
            device.pwrite(STALE[:EXTENT], at)
        vg.remove_lv("rest")
        vg.create_lv("org", extents=4)
        vg.activate()
        vg.device("org").pwrite(ORIGIN, 0)
        vg.device("org").flush()


def snapshot(dm: cow.Mapper) -> None:
    """Make a snapshot with a changed chunk."""
    origin(dm)
    with open_vg(dm) as vg:
        vg.create_snapshot("org", "s1", extents=5)
        vg.device("s1").pwrite(CHANGED[EXTENT : 2 * EXTENT], EXTENT)
        vg.device("s1").flush()


def two_snapshots(dm: cow.Mapper) -> None:
    """Make another one, without changes."""
    snapshot(dm)
    with open_vg(dm) as vg:
        vg.create_snapshot("org", "s2", extents=6, chunk_size=8)


def waiting(dm: cow.Mapper) -> None:
    """Make a snapshot that is to be merged."""
    two_snapshots(dm)
    with open_vg(dm) as vg:
        vg.deactivate()
        vg.merge("s1")


def split(dm: cow.Mapper) -> None:
    snapshot(dm)
    with open_vg(dm) as vg:
        vg.split_snapshot("s1")


def sparse(dm: cow.Mapper) -> None:
    origin(dm)
    with open_vg(dm) as vg:
        vg.create_sparse("s1", virtual_extents=4, extents=6, activate=True)


CHANGES: dict[str, tuple[Callable, Callable[[lvm.VolumeGroup], Any]]] = {
    "create the first": (origin, lambda vg: vg.create_snapshot("org", "s2", extents=6)),
    "create the second": (snapshot, lambda vg: vg.create_snapshot("org", "s2", extents=6)),
    "create a sparse one": (
        origin,
        lambda vg: vg.create_sparse("s0", virtual_extents=4, extents=6, activate=True),
    ),
    "remove the last": (snapshot, lambda vg: vg.remove_lv("s1")),
    "remove one of two": (two_snapshots, lambda vg: vg.remove_lv("s2")),
    "remove the origin": (two_snapshots, lambda vg: vg.remove_lv("org")),
    "remove a sparse one": (sparse, lambda vg: vg.remove_lv("s1")),
    "extend the store": (snapshot, lambda vg: vg.extend_lv("s1", extents=6)),
    "reduce the store": (snapshot, lambda vg: vg.reduce_lv("s1", extents=4)),
    "split": (two_snapshots, lambda vg: vg.split_snapshot("s1")),
    "attach": (split, lambda vg: vg.attach_snapshot("org", "s1", zero=False)),
    "attach wiped": (split, lambda vg: vg.attach_snapshot("org", "s1")),
    "rename the origin": (two_snapshots, lambda vg: vg.rename_lv("org", "other")),
    "rename a snapshot": (two_snapshots, lambda vg: vg.rename_lv("s1", "other")),
    "rename the VG": (two_snapshots, lambda vg: vg.rename("other")),
    "make a snapshot read-only": (two_snapshots, lambda vg: vg.change_lv("s1", permission="r")),
    "merge the last": (snapshot, lambda vg: vg.merge("s1")),
    "merge one of two": (two_snapshots, lambda vg: vg.merge("s1")),
    "ask for a merge": (two_snapshots, lambda vg: (vg.deactivate(), vg.merge("s1"))),
    "a merge that waited": (
        waiting,
        lambda vg: (vg.activation.activate(vg.lv("org")), vg.wait_merge("org")),
    ),
}


class Watch:
    """Notes each generation a VG has, and marks the log where one begins to count."""

    def __init__(self, dm: cow.Mapper, vg: lvm.VolumeGroup) -> None:
        self.dm = dm
        self.work: Activation = vg.activation
        self.generations = [vg_section(vg.metadata)]
        self.mark("")

    def mark(self, suffix: str) -> None:
        self.dm.message("disk", 0, f"mark {len(self.generations) - 1}{suffix}")

    def preload(self, old, new) -> None:
        self.mark("-next")
        self.generations.append(vg_section(new))
        self.work.preload(old, new)

    def suspend(self, old, new) -> None:
        self.work.suspend(old, new)

    def resume(self, old, new) -> None:
        self.mark("")
        self.work.resume(old, new)

    def revert(self, old, new) -> None:
        raise AssertionError("nothing fails here")


def expected(vg: lvm.VolumeGroup, name: str, *, merged: bool) -> bytes | None:
    """Return what an LV has to show; None if it may show anything."""
    lv = vg.lv(name)
    if lv.merging_snapshot is not None or (merged and not lv.is_cow):
        return CHANGED if name in ("org", "other") else None
    if not lv.is_cow:
        return ORIGIN if lv.segments[0].type == "striped" and lv.extent_count == 4 else None
    held = lv.snapshot.segments[0].origin
    if held.is_virtual_origin:
        return bytes(4 * EXTENT)
    if any(tag == "wiped" for tag in vg.metadata.tags) or name == "s2":
        return ORIGIN
    return CHANGED


def check_contents(vg: lvm.VolumeGroup, *, merged: bool) -> None:
    for lv in vg.lvs():
        wanted = expected(vg, lv.name, merged=merged)
        if wanted is not None:
            assert vg.device(lv.name).pread(len(wanted), 0) == wanted, lv.name


def record_change(name: str, folder: Path) -> tuple[bytes, list[Entry], list[dict]]:  # noqa: F811
    """Run a change on recorded devices; return the disk before it, the log, the generations."""
    before, change = CHANGES[name]
    generations: list[dict] = []

    def prepare(dm: cow.Mapper) -> None:
        before(dm)
        if name == "attach wiped":
            with open_vg(dm) as vg:
                vg.change_vg(add_tags=["wiped"])

    def program(dm: cow.Mapper) -> None:
        with open_vg(dm) as vg:
            if name != "a merge that waited":
                vg.activate()
            vg.work = watch = Watch(dm, vg)
            change(vg)
            generations.extend(watch.generations)
            vg.deactivate()

    return *record(folder, prepare, program), generations


def first_merged(generations: list[dict]) -> int:
    """Return the first generation in which nothing is left to merge."""
    started = [n for n, each in enumerate(generations) if "merging_store" in str(each)]
    return max(started) + 1 if started else len(generations)


@pytest.mark.parametrize("name", CHANGES)
def test_every_state_of(name, folder, seed):  # noqa: F811
    disk, entries, generations = record_change(name, folder)
    merged = first_merged(generations)
    cuts = Cuts(MOST, random.Random(seed))
    path = folder / "state.img"
    reached = set()
    for mark, state in cuts.of(disk, entries):
        if not mark:
            continue
        legal = legal_generations(mark)
        path.write_bytes(state)
        reached.add(check_state(path, [generations[n] for n in legal], legal, merged, mark))
    assert cuts.all_of_them or not LONG
    assert reached >= set(range(len(generations) - 1))
    print(cuts.visited, "states", "of all" if cuts.all_of_them else "chosen")


def check_state(path: Path, legal: list[dict], numbers: list[int], merged: int, mark: str) -> int:
    """Look without writing, then with; return which generation was found."""
    before = path.read_bytes()
    with cow.Mapper(durability="process") as dm:
        dm.image(str(path), readonly=True)
        dm.create("disk", f"0 {len(before) // SECTOR} linear {path} 0", readonly=True)
        for number, name in enumerate(NAMES):
            dm.create(name, f"0 4096 linear disk {4096 * number}", readonly=True)
        with lvm.VolumeGroup.open(NAMES, mapper=dm, readonly=True) as vg:
            found = vg_section(vg.metadata)
            which = [n for n, each in zip(numbers, legal, strict=True) if each == found]
            assert which, f"after mark {mark}: {vg.warnings}"
            assert problems(vg.metadata) == []
            vg.activate()
            check_contents(vg, merged=which[0] >= merged)
    assert path.read_bytes() == before
    with cow.Mapper(durability="process") as dm:
        open_disk(dm, path)
        with lvm.VolumeGroup.open(NAMES, mapper=dm) as vg:
            merging = any(lv.merging_snapshot for lv in vg.metadata.lvs)
            vg.activate()
            check_contents(vg, merged=which[0] >= merged)
            if merging:
                poll(lambda: not any(lv.merging_snapshot for lv in vg.metadata.lvs))
                check_contents(vg, merged=True)
            vg.update_metadata()
            check_contents(vg, merged=merging or which[0] >= merged)
    return which[0]
