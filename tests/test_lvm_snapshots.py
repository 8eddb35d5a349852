"""Snapshots of LVs while they are in use: random programs against a model, writers that go on."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import itertools
import os
import random
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from support import image, poll, stamp

import cow
from cow import lvm
from cow.image import wait_for_lock
from cow.lvm import snapshot_record
from cow.lvm.activation import _Plan
from cow.lvm.allocation import PVRange
from cow.lvm.check import problems
from cow.lvm.command import Shell, run
from cow.lvm.group import _open_again
from cow.lvm.merge import usage_of
from cow.lvm.metadata import Area, Segment
from cow.lvm.metadata_text import vg_section
from cow.lvm.monitor import Monitor, _cannot_grow
from cow.lvm.report.live import Live
from cow.targets import snapshot_merge

EXTENT = 128
"""Sectors."""
BYTES = EXTENT * 512
CHUNK = 4096
FULL = 17
"""Extents of a store that holds all chunks of the origin."""


@pytest.fixture
def paths(tmp_path) -> list[str]:
    return [image(tmp_path / f"pv{n}.img", 49152) for n in range(2)]


@pytest.fixture
def vg(paths) -> Iterator[lvm.VolumeGroup]:
    """A VG with an active origin of 1 MiB, every sector stamped."""
    with lvm.create_vg("vg", paths, extent_size=EXTENT) as group:
        group.create_lv("org", extents=16)
        group.activate()
        group.device("org").pwrite(stamp(0, 2048, 0), 0)
        yield group


def said_by(vg: lvm.VolumeGroup) -> list[str]:
    said: list[str] = []
    vg.report = said.append
    return said


def content(vg: lvm.VolumeGroup, name: str) -> bytes:
    device = vg.device(name)
    return device.pread(device.size, 0)


# --- a model ------------------------------------------------------------------------------------


class Model:
    """An origin and its snapshots, chunk by chunk."""

    def __init__(self, data: bytes) -> None:
        self.origin = [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)]
        self.attached: dict[str, dict[int, bytes]] = {}
        self.split: dict[str, dict[int, bytes]] = {}
        self.merging = ""

    def write_origin(self, chunk: int, data: bytes) -> None:
        for exceptions in self.attached.values():
            exceptions.setdefault(chunk, self.origin[chunk])
        self.origin[chunk] = data

    def view(self, name: str) -> bytes:
        exceptions = self.attached[name]
        return b"".join(exceptions.get(n, old) for n, old in enumerate(self.origin))

    def merge(self, name: str) -> None:
        for chunk, data in self.attached.pop(name).items():
            self.write_origin(chunk, data)


class Program:
    """Random operations on a VG and on the model."""

    def __init__(self, paths: list[str], seed: int) -> None:
        self.paths = paths
        self.rng = random.Random(seed)
        self.vg = lvm.create_vg("vg", paths, extent_size=EXTENT)
        self.vg.create_lv("org", extents=16)
        self.vg.activate()
        self.vg.device("org").pwrite(stamp(0, 2048, 0), 0)
        self.model = Model(stamp(0, 2048, 0))
        self.origin = "org"
        self.names = iter(range(1000))

    def run(self, steps: int) -> None:
        operations = [
            *[self.write] * 6,
            *[self.create] * 3,
            *(self.remove, self.split, self.attach, self.merge, self.rename, self.extend),
            *(self.permission, self.reactivate, self.reopen, self.reduce, self.rename_vg),
        ]
        for number in range(steps):
            operation = self.rng.choice(operations)
            operation()
            self.check(f"step {number}, {operation.__name__}")
        self.vg.close()

    def check(self, where: str) -> None:
        assert problems(self.vg.metadata) == [], where
        assert content(self.vg, self.origin) == b"".join(self.model.origin), where
        for name in self.model.attached:
            assert content(self.vg, name) == self.model.view(name), f"{where}: {name}"
        names = {self.origin, *self.model.attached, *self.model.split}
        assert {lv.name for lv in self.vg.lvs()} == names, where

    def some(self, names) -> str | None:
        return self.rng.choice(sorted(names)) if names else None

    def write(self) -> None:
        name = self.some([self.origin, *self.model.attached])
        if self.vg.device(name).readonly:
            return
        for _ in range(self.rng.randrange(1, 30)):
            chunk, data = self.rng.randrange(256), self.rng.randbytes(16) * 256
            self.vg.device(name).pwrite(data, chunk * CHUNK)
            if name == self.origin:
                self.model.write_origin(chunk, data)
            else:
                self.model.attached[name][chunk] = data

    def create(self) -> None:
        if len(self.model.attached) + len(self.model.split) == 4:
            return
        name = f"s{next(self.names)}"
        permission = self.rng.choice(["rw", "rw", "r"])
        self.vg.create_snapshot(self.origin, name, extents=FULL, permission=permission)
        self.model.attached[name] = {}

    def remove(self) -> None:
        name = self.some([*self.model.attached, *self.model.split])
        if name:
            self.vg.remove_lv(name)
            self.model.attached.pop(name, None)
            self.model.split.pop(name, None)

    def split(self) -> None:
        name = self.some(self.model.attached)
        if name:
            self.vg.split_snapshot(name)
            self.model.split[name] = self.model.attached.pop(name)

    def attach(self) -> None:
        name = self.some(self.model.split)
        if name:
            zero = self.rng.random() < 0.3 and self.vg.lv(name).writable
            self.vg.attach_snapshot(self.origin, name, zero=zero)
            exceptions = self.model.split.pop(name)
            self.model.attached[name] = {} if zero else exceptions

    def merge(self) -> None:
        name = self.some(self.model.attached)
        if name is None:
            return
        if self.vg.device(self.origin).readonly:
            with pytest.raises(lvm.LVMError, match="into the read-only origin"):
                self.vg.merge(name)
            return
        how = self.rng.choice(["now", "background", "open", "inactive"])
        if how == "open":
            with self.vg.device(self.origin).open():
                self.vg.merge(name)
            assert content(self.vg, name) == self.model.view(name)
            self.vg.refresh_lv(self.origin)
        elif how == "inactive":
            self.vg.deactivate([self.origin])
            self.vg.merge(name)
            self.vg.activate(lvs=[self.origin])
        else:
            self.vg.merge(name, background=how == "background")
        poll(lambda: self.vg.lv(self.origin).merging_snapshot is None)
        poll(lambda: self.vg.metadata.find_lv(name) is None)
        self.model.merge(name)

    def rename(self) -> None:
        name = self.some([self.origin, *self.model.attached, *self.model.split])
        new = f"n{next(self.names)}"
        self.vg.rename_lv(name, new)
        if name == self.origin:
            self.origin = new
        for group in (self.model.attached, self.model.split):
            if name in group:
                group[new] = group.pop(name)

    def rename_vg(self) -> None:
        self.vg.rename(f"v{next(self.names)}")

    def extend(self) -> None:
        name = self.some(self.model.attached)
        if name and self.vg.lv(name).extent_count < FULL:
            self.vg.extend_lv(name, extents=FULL)

    def reduce(self) -> None:
        name = self.some(self.model.attached)
        if name is None:
            return
        used = int(self.vg.mapper.status(self.vg.device(name).name).split()[3].split("/")[0])
        least = -(-used // EXTENT)
        if least < FULL and len(self.model.attached[name]) < 100:
            self.vg.reduce_lv(name, extents=self.rng.randrange(least, FULL))
            self.vg.extend_lv(name, extents=FULL)

    def permission(self) -> None:
        name = self.some([self.origin, *self.model.attached])
        self.vg.change_lv(name, permission="r" if self.vg.lv(name).writable else "rw")

    def reactivate(self) -> None:
        self.vg.deactivate()
        self.vg.activate()

    def reopen(self) -> None:
        self.vg.close()
        self.vg = lvm.VolumeGroup.open(self.paths)
        self.vg.activate()


@pytest.mark.parametrize("number", range(4))
def test_a_random_program_keeps_every_byte(paths, seed, number):
    Program(paths, (seed << 2) + number).run(60)


# --- writers that go on -------------------------------------------------------------------------


class Writer:
    """Writes numbered blocks, one after the other, round and round, in a thread of its own."""

    BLOCKS = 256

    def __init__(self, device: cow.Device) -> None:
        self.device = device
        self.stopped = False
        self.count = 0
        self.thread = threading.Thread(target=self.run)

    def run(self) -> None:
        while not self.stopped:
            number = self.count + 1
            block = np.full(CHUNK // 8, number, "<u8").tobytes()
            self.device.pwrite(block, (number - 1) % self.BLOCKS * CHUNK)
            self.count = number

    def __enter__(self) -> Writer:
        self.thread.start()
        poll(lambda: self.count > self.BLOCKS)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stopped = True
        self.thread.join()

    def more(self) -> None:
        """Return when some more blocks are written."""
        seen = self.count
        poll(lambda: self.count > seen + 50)


def is_one_moment(data: bytes) -> bool:
    """Tell whether blocks are what a writer had written at one moment."""
    return is_one_moment_of_merge(data, None)


def is_one_moment_of_merge(data: bytes, merged: int | None) -> bool:
    """As is_one_moment(), but what was written last before some moment may be `merged` instead."""
    rows = np.frombuffer(data[: Writer.BLOCKS * CHUNK], "<u8").reshape(Writer.BLOCKS, -1)
    if (rows != rows[:, :1]).any():
        return False
    numbers = rows[:, 0]
    old = numbers == merged if merged is not None else np.zeros(Writer.BLOCKS, bool)
    last = int(numbers[~old].max(initial=0))
    newest = np.array([last - (last - 1 - block) % Writer.BLOCKS for block in range(Writer.BLOCKS)])
    begun = newest[old].max(initial=0)
    return bool((old == (newest <= begun)).all() and (numbers[~old] == newest[~old]).all())


def test_a_snapshot_made_under_a_writer_is_one_moment(vg):
    with Writer(vg.device("org")) as writer:
        for number in range(8):
            vg.create_snapshot("org", f"s{number}", extents=FULL)
            writer.more()
        views = [content(vg, f"s{number}") for number in range(8)]
        assert all(map(is_one_moment, views))
        writer.more()
        assert [content(vg, f"s{number}") for number in range(8)] == views


def test_what_is_done_to_a_family_holds_writers_up_and_nothing_else(vg):
    vg.create_snapshot("org", "kept", extents=FULL)
    before = content(vg, "kept")
    with Writer(vg.device("org")) as writer:
        names = ["org", "new"] * 4
        for origin, new in itertools.pairwise(names):
            vg.create_snapshot(origin, "s", extents=12)
            vg.extend_lv("s", extents=FULL)
            vg.rename_lv("s", "r")
            writer.more()
            vg.split_snapshot("r")
            vg.attach_snapshot(origin, "r", zero=True)
            vg.remove_lv("r")
            vg.rename_lv(origin, new)
            vg.rename(f"vg-{new}")
            writer.more()
    last = writer.count
    assert content(vg, "kept") == before
    data = content(vg, "new")
    assert is_one_moment(data)
    assert np.frombuffer(data, "<u8").max() == last


def test_a_merge_under_a_writer_keeps_what_the_writer_wrote(vg):
    vg.create_snapshot("org", "s", extents=FULL)
    vg.create_snapshot("org", "sibling", extents=FULL)
    vg.device("s").pwrite(b"m" * (1 << 20), 0)
    before = content(vg, "sibling")
    with Writer(vg.device("org")) as writer:
        vg.merge("s")
        writer.more()
    last = writer.count
    assert [lv.name for lv in vg.lvs()] == ["org", "sibling"]
    assert content(vg, "sibling") == before
    data = content(vg, "org")
    assert is_one_moment_of_merge(data, int.from_bytes(b"m" * 8, "little"))
    assert last.to_bytes(8, "little") * (CHUNK // 8) in data


def test_changes_of_several_threads_come_one_after_the_other(vg, paths):
    failed: list[BaseException] = []

    def work(name: str) -> None:
        try:
            with lvm.VolumeGroup.open(paths, mapper=vg.mapper) as own:
                for _ in range(10):
                    own.create_snapshot("org", name, extents=4)
                    own.remove_lv(name)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(f"t{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert [lv.name for lv in vg.lvs()] == ["org"]
    assert vg.metadata.seqno >= 4 * 10 * 4
    assert vg.mapper.names() == ["vg-org"]


# --- merges -------------------------------------------------------------------------------------


def test_a_merge_says_what_lvm_says(vg):
    vg.create_snapshot("org", "s", extents=FULL)
    vg.device("s").pwrite(b"m" * 100_000, 5000)
    expected = content(vg, "s")
    said = said_by(vg)
    vg.merge("s")
    assert said == [
        "Merging of volume vg/s started.",
        "vg/org: Merged: 100.00%",
        "Merge of snapshot into logical volume vg/org has finished.",
        'Logical volume "s" successfully removed.',
    ]
    assert content(vg, "org") == expected
    vg.wait_merge("org")  # there is none any more
    assert len(said) == 4


@pytest.mark.parametrize(("opened", "what"), [("org", "origin"), ("s", "snapshot")])
def test_a_merge_of_what_is_open_waits(vg, opened, what):
    vg.create_snapshot("org", "s", extents=FULL)
    vg.device("s").pwrite(b"m" * 100_000, 5000)
    expected = content(vg, "s")
    said = said_by(vg)
    with vg.device(opened).open():
        vg.merge("s")
        assert said == [
            f"Delaying merge since {what} is open.",
            "Merging of snapshot vg/s will occur on next activation of vg/org.",
        ]
        vg.refresh_lv("org")
        assert vg.mapper.table("vg-org") == "0 2048 snapshot-origin vg-org-real"
    vg.refresh_lv("org")
    poll(lambda: vg.metadata.find_lv("s") is None)
    assert content(vg, "org") == expected


def test_a_merge_interrupted_by_a_deactivation_goes_on(vg, paths, monkeypatch):
    vg.create_snapshot("org", "s", extents=FULL)
    vg.device("s").pwrite(b"m" * 500_000, 5000)
    expected = content(vg, "s")
    run = snapshot_merge._Worker._run
    monkeypatch.setattr(snapshot_merge._Worker, "_run", lambda worker: worker._stop.wait())
    vg.merge("s", background=True)
    assert vg.mapper.table("vg-org").startswith("0 2048 snapshot-merge")
    with pytest.raises(lvm.LVMError, match="Can't remove merging snapshot logical volume vg/s"):
        vg.remove_lv("s")
    vg.deactivate()
    vg.close()
    monkeypatch.setattr(snapshot_merge._Worker, "_run", run)
    with lvm.VolumeGroup.open(paths) as again:
        again.activate()
        again.wait_merge("org")
        assert content(again, "org") == expected
        assert [lv.name for lv in again.lvs()] == ["org"]


def test_a_merge_that_fails_is_told_and_keeps_the_snapshot(tmp_path):
    origin, rest = image(tmp_path / "a.img", 32768), image(tmp_path / "b.img", 32768)
    with cow.Mapper() as dm:
        dm.create("a", f"0 32768 linear {origin} 0")
        with lvm.create_vg("vg", ["a", rest], mapper=dm, extent_size=EXTENT) as vg:
            pv = vg.pvs[0]
            vg.create_lv("org", extents=16)
            assert vg.lv("org").segments[0].areas[0].of.label == pv.label
            vg.activate()
            vg.create_snapshot("org", "s", extents=FULL, ranges=[PVRange(vg.pvs[1])])
            vg.device("s").pwrite(b"m" * 100_000, 0)
            start = pv.pe_start
            dm.load("a", f"0 {start} linear {origin} 0\n{start} {32768 - start} error")
            dm.suspend("a")
            dm.resume("a")
            with pytest.raises(
                lvm.LVMError, match=r"vg/org: Merge failed\. Retry merge or inspect"
            ):
                vg.merge("s")
            dm.load("a", f"0 32768 linear {origin} 0")
            dm.suspend("a")
            dm.resume("a")
            vg.deactivate()
            vg.activate()
            vg.wait_merge("org")
            assert content(vg, "org")[:100_000] == b"m" * 100_000


def test_a_merge_that_takes_long_tells_how_far_it_is(vg, monkeypatch):
    vg.create_snapshot("org", "s", extents=FULL)
    vg.device("s").pwrite(b"m" * 100_000, 0)
    run, begins = snapshot_merge._Worker._run, threading.Event()

    def run_late(worker: snapshot_merge._Worker) -> None:
        begins.wait()
        run(worker)

    said: list[str] = []

    def report(text: str) -> None:
        said.append(text)
        if "Merged" in text:
            begins.set()

    monkeypatch.setattr(snapshot_merge._Worker, "_run", run_late)
    vg.report = report
    vg.merge("s", interval=0.001)
    merged = [text for text in said if "Merged" in text]
    assert merged[0] != merged[-1] == "vg/org: Merged: 100.00%"
    assert content(vg, "org")[:100_000] == b"m" * 100_000


def test_who_waits_for_a_merge_is_told_that_it_was_stopped(vg, monkeypatch):
    vg.create_snapshot("org", "s", extents=FULL)
    vg.device("s").pwrite(b"m" * 100_000, 0)
    monkeypatch.setattr(snapshot_merge._Worker, "_run", lambda worker: worker._stop.wait())
    vg.merge("s", background=True)
    vg.deactivate()
    with pytest.raises(lvm.LVMError, match="the merge was stopped: vg/org is not active"):
        vg.wait_merge("org")


def test_a_merge_whose_snapshot_became_invalid_is_told(vg):
    vg.create_snapshot("org", "s", extents=1)
    with vg.device("org").open():
        vg.merge("s")
    fill(vg, "s")
    vg.deactivate()
    vg.activate()
    assert vg.mapper.status("vg-org").endswith("snapshot-merge Invalid")
    with pytest.raises(lvm.LVMError, match=r"vg/org: Merging snapshot invalidated\. Aborting"):
        vg.wait_merge("org")
    assert content(vg, "org") == b"x" * len(content(vg, "org"))


def test_a_device_that_goes_while_it_is_looked_at_tells_nothing(vg, monkeypatch):
    vg.create_snapshot("org", "s", extents=4)
    status = vg.mapper.status

    def too_late(name: str) -> str:
        vg.deactivate()
        return status(name)

    assert usage_of(vg.activation, vg.lv("s")) is not None
    assert usage_of(vg.activation, vg.lv("org")) is None
    monkeypatch.setattr(vg.mapper, "status", too_late)
    assert usage_of(vg.activation, vg.lv("s")) is None


def fill(vg: lvm.VolumeGroup, name: str) -> None:
    """Write the origin until a snapshot has no room."""
    for chunk in range(256):
        vg.device("org").pwrite(b"x" * CHUNK, chunk * CHUNK)
    assert vg.mapper.status(f"vg-{name}").endswith("Invalid")


def test_an_invalid_snapshot_can_only_be_removed(vg):
    vg.create_snapshot("org", "s", extents=1)
    fill(vg, "s")
    with pytest.raises(lvm.LVMError, match="Unable to merge invalidated snapshot LV vg/s"):
        vg.merge("s")
    with pytest.raises(lvm.LVMError, match="Cannot reduce snapshot vg/s: Invalid"):
        vg.reduce_lv("s", extents=1)
    vg.extend_lv("s", extents=2)
    vg.deactivate()
    with pytest.raises(lvm.LVMError, match="Unable to merge invalidated snapshot LV vg/s"):
        vg.merge("s")
    vg.activate()
    vg.remove_lv("s")
    assert vg.mapper.names() == ["vg-org"]


def test_a_damaged_store_is_not_merged_while_it_is_not_active(vg):
    vg.create_snapshot("org", "s", extents=4)
    vg.deactivate()
    area = vg.lv("s").segments[0].areas[0]
    start = (area.of.pe_start + area.start * EXTENT) * 512
    area.of.device.pwrite(b"garbage!" * 64, start)
    seqno = vg.metadata.seqno
    with pytest.raises(lvm.LVMError, match="Unable to merge invalidated snapshot LV vg/s"):
        vg.merge("s")
    assert vg.metadata.seqno == seqno


def test_a_mirror_becomes_no_store_but_one_that_is_there_is_merged(vg):
    """The real LVM refuses it too: "does not accept LV type mirror"."""
    with vg.change("lvcreate --type mirror") as new:
        mirror = new.new_lv("s")
        segment = Segment(0, 4, "mirror", region_size=128)
        for number in range(2):
            leg = new.new_lv(f"s_mimage_{number}", status=["READ", "WRITE"])
            leg.segments.append(Segment(0, 4, "striped", areas=[Area(new.pvs[number], 100)]))
            segment.areas.append(Area(leg, 0))
        mirror.segments.append(segment)
    with pytest.raises(lvm.LVMError, match="vg/s does not accept LV type mirror"):
        vg.attach_snapshot("org", "s")
    vg.deactivate()
    with vg.change("by another program") as new:
        snapshot_record.attach(new.lv("org"), new.lv("s"), 8)
    vg.activate()
    vg.device("s").pwrite(b"m" * 10_000, 0)
    vg.deactivate()
    said = said_by(vg)
    vg.merge("s")
    assert said == ["Merging of snapshot vg/s will occur on next activation of vg/org."]
    vg.activate()
    vg.wait_merge("org")
    assert content(vg, "org")[:10_000] == b"m" * 10_000
    assert [lv.name for lv in vg.metadata.lvs] == ["org"]
    assert vg.mapper.names() == ["vg-org"]


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("do", "text"),
    [
        (lambda vg: vg.create_snapshot("s", "t", extents=4), "Snapshots of snapshots are not"),
        (
            lambda vg: vg.create_snapshot("nope", "t", extents=4),
            "Snapshot origin LV nope not found",
        ),
        (lambda vg: vg.create_snapshot("org", "t"), "Please specify either size or extents with"),
        (
            lambda vg: vg.create_snapshot("org", "s", extents=4),
            '"s" already exists in volume group',
        ),
        (lambda vg: vg.create_snapshot("org", "snapshot1", extents=4), 'Names starting "snapshot"'),
        (
            lambda vg: vg.create_snapshot("org", "t", extents=1, chunk_size=64),
            "cannot be smaller than 3 chunks",
        ),
        (lambda vg: vg.extend_lv("org", extents=20), "can be resized only while inactive"),
        (lambda vg: vg.reduce_lv("org", extents=2), "origin volumes cannot be reduced in size yet"),
        (lambda vg: vg.merge("org"), "vg/org does not accept LV type linear"),
        (lambda vg: vg.split_snapshot("org"), "vg/org does not accept LV type linear"),
        (lambda vg: vg.split_snapshot("thin"), "Unable to split off snapshot vg/thin with virtual"),
        (lambda vg: vg.merge("thin"), "into the read-only origin vg/thin_vorigin"),
        (
            lambda vg: vg.remove_lv("thin_vorigin"),
            'Failed to find logical volume "vg/thin_vorigin"',
        ),
        (lambda vg: vg.attach_snapshot("org", "org"), "vg/org as both snapshot and origin"),
        (lambda vg: vg.attach_snapshot("org", "s"), "vg/s does not accept LV type snapshot"),
        (lambda vg: vg.attach_snapshot("s", "plain"), "Snapshots of snapshots are not supported"),
        (lambda vg: vg.remove_lv("snapshot0"), "record of a snapshot"),
    ],
)
def test_what_lvm_refuses_is_refused_and_changes_nothing(vg, do, text):
    vg.create_snapshot("org", "s", extents=4)
    vg.create_sparse("thin", virtual_extents=100, extents=4)
    vg.create_lv("plain", extents=4)
    before = (vg_section(vg.metadata), vg.mapper.table())
    with pytest.raises(lvm.LVMError, match=text):
        do(vg)
    assert (vg_section(vg.metadata), vg.mapper.table()) == before


@pytest.mark.parametrize(
    ("do", "question"),
    [
        (lambda vg: vg.remove_lv("s"), "Do you really want to remove active logical volume vg/s?"),
        (
            lambda vg: vg.remove_lv("org"),
            "Do you really want to remove active origin logical volume vg/org with 1 snapshots(s)?",
        ),
        (
            lambda vg: vg.split_snapshot("s"),
            "Do you really want to split off active logical volume",
        ),
        (lambda vg: vg.attach_snapshot("org", "plain"), "Do you really want to convert vg/plain?"),
    ],
)
def test_who_says_no_is_heard(vg, do, question):
    vg.create_snapshot("org", "s", extents=4)
    vg.create_lv("plain", extents=4)
    seqno = vg.metadata.seqno
    asked: list[str] = []
    vg.confirm = lambda text: bool(asked.append(text))
    with pytest.raises(lvm.LVMError, match=r"not removed\.|not split\.|Conversion aborted\."):
        do(vg)
    assert asked[0].startswith(question)
    assert vg.metadata.seqno == seqno


@pytest.mark.parametrize("name", ["s", "org"])
def test_what_is_open_is_not_removed(vg, name):
    vg.create_snapshot("org", "s", extents=4)
    with vg.device("s").open(), pytest.raises(lvm.InUse):
        vg.remove_lv(name)
    assert len(vg.mapper.names()) == 4


@pytest.mark.parametrize(
    ("name", "text"),
    [("s", "Logical volume vg/s is no snapshot any more"), ("plain", "is not there any more")],
)
def test_what_somebody_else_did_while_it_was_asked_is_seen(vg, name, text):
    vg.create_snapshot("org", "s", extents=4)
    vg.create_lv("plain", extents=4)
    vg.activate(lvs=["plain"])

    def meanwhile(question: str) -> bool:
        if other.lv(name).is_cow:
            other.split_snapshot(name)
        else:
            other.remove_lv(name)
        return True

    with vg._opener()(vg.mapper) as other:
        vg.confirm = meanwhile
        with pytest.raises(lvm.LVMError, match=text):
            vg.remove_lv(name)
    assert problems(vg.metadata) == []
    assert not vg.metadata.snapshot_records or name == "plain"


@pytest.mark.parametrize(
    ("do", "text"),
    [
        (lambda vg: vg.create_snapshot("org", "t", extents=4), "Snapshots of locked volumes"),
        (lambda vg: vg.merge("s"), "Unable to merge locked logical volume vg/s"),
    ],
)
def test_a_locked_lv_is_left_alone(vg, do, text):
    vg.create_snapshot("org", "s", extents=4)
    vg.deactivate()
    with vg.change("lock") as new:
        for name in ("org", "s"):
            new.lv(name).set_status("LOCKED", True)
    seqno = vg.metadata.seqno
    with pytest.raises(lvm.LVMError, match=text):
        do(vg)
    assert [lv.name for lv in vg.metadata.visible_lvs()] == ["org", "s"]
    assert not vg.lv("org").merging_snapshot
    assert vg.metadata.seqno == seqno


def test_a_store_is_not_reduced_below_what_is_written_meanwhile(vg, monkeypatch):
    vg.create_snapshot("org", "s", extents=10)
    preload = _Plan.preload

    def write_late(plan: _Plan) -> None:
        preload(plan)
        vg.device("s").pwrite(b"x" * 5 * BYTES, 0)

    monkeypatch.setattr(_Plan, "preload", write_late)
    before = vg.mapper.table()
    with pytest.raises(lvm.LVMError, match=r"Cannot reduce active snapshot vg/s: \d+ sectors"):
        vg.reduce_lv("s", extents=5)
    assert vg.lv("s").extent_count == 10
    assert vg.mapper.table() == before
    assert content(vg, "s")[: 5 * BYTES] == b"x" * 5 * BYTES


def test_a_store_is_not_reduced_below_what_it_uses(vg):
    vg.create_snapshot("org", "s", extents=10)
    vg.device("s").pwrite(b"x" * 5 * BYTES, 0)
    with pytest.raises(lvm.LVMError, match="Cannot reduce snapshot vg/s below"):
        vg.reduce_lv("s", extents=5)
    vg.deactivate()
    with pytest.raises(lvm.LVMError, match="Cannot reduce inactive snapshot vg/s"):
        vg.reduce_lv("s", extents=8)


def _no_commit(*args: object) -> None:
    raise OSError(5, "no commit today")


def test_where_the_commit_fails_the_old_tables_stay(vg, monkeypatch):
    vg.create_snapshot("org", "s", extents=4)
    before = vg.mapper.table()
    expected = content(vg, "org")

    monkeypatch.setattr("cow.lvm.mda.MetadataArea.commit", _no_commit)
    for do in (
        lambda: vg.create_snapshot("org", "t", extents=4),
        lambda: vg.extend_lv("s", extents=6),
        lambda: vg.remove_lv("s"),
        lambda: vg.split_snapshot("s"),
        lambda: vg.merge("s"),
        lambda: vg.rename_lv("org", "other"),
        lambda: vg.rename("other"),
    ):
        with pytest.raises(lvm.LVMError, match="no commit today"):
            do()
        assert vg.mapper.table() == before
        assert content(vg, "org") == content(vg, "s") == expected
        assert not any(vg.mapper.info(name).suspended for name in vg.mapper.names())
        assert not any(vg.mapper.info(name).inactive for name in vg.mapper.names())


def failing(vg: lvm.VolumeGroup, verb: str, name: str, monkeypatch) -> None:
    """Let a verb of the mapper fail for one device."""
    real = getattr(vg.mapper, verb)

    def fail(path: str, *args: object, **options: object) -> object:
        if path.endswith(f"/{name}"):
            raise cow.DeviceIOError(f"no {verb} today")
        return real(path, *args, **options)

    monkeypatch.setattr(vg.mapper, verb, fail)


def test_where_the_old_tables_cannot_be_had_back_for_one_the_others_have_them(
    vg, monkeypatch, caplog
):
    vg.create_snapshot("org", "s", extents=4)
    before = vg.mapper.table()
    monkeypatch.setattr("cow.lvm.mda.MetadataArea.commit", _no_commit)
    failing(vg, "resume", "vg-s", monkeypatch)
    with pytest.raises(lvm.LVMError, match="no commit today"):
        vg.rename_lv("org", "other")
    monkeypatch.undo()
    assert "no resume today" in caplog.text
    assert [name for name in vg.mapper.names() if vg.mapper.info(name).suspended] == ["vg-s"]
    vg.mapper.resume("vg-s")
    assert vg.mapper.table() == before


def test_a_device_that_is_not_resumed_is_told_when_all_others_are(vg, monkeypatch, caplog):
    vg.create_snapshot("org", "s", extents=4)
    failing(vg, "resume", "vg-s", monkeypatch)
    with pytest.raises(
        lvm.LVMError, match="Failed to resume after a change of VG vg: no resume today"
    ):
        vg.extend_lv("s", extents=6)
    monkeypatch.undo()
    assert "vg-s is not resumed" in caplog.text
    assert vg.lv("s").extent_count == 6
    assert [name for name in vg.mapper.names() if vg.mapper.info(name).suspended] == ["vg-s"]
    vg.mapper.resume("vg-s")
    assert content(vg, "s") == content(vg, "org")


def test_a_layer_that_somebody_uses_is_told_when_it_cannot_go(vg):
    vg.create_snapshot("org", "s", extents=4)
    vg.mapper.create("mine", "0 8 linear vg-org-real 0")
    with pytest.raises(lvm.LVMError, match=r"Failed to resume .*/vg-org-real: in use, .*: mine"):
        vg.remove_lv("s")
    assert content(vg, "org") == stamp(0, 2048, 0)
    assert [lv.name for lv in vg.lvs()] == ["org", "s"]
    vg.remove_lv("s")
    vg.mapper.remove("mine")
    assert [lv.name for lv in vg.lvs()] == ["org"]


def test_a_refresh_that_fails_leaves_the_tables_as_they_are(vg, monkeypatch):
    vg.create_snapshot("org", "s", extents=FULL)
    vg.device("s").pwrite(b"m" * 100_000, 5000)
    with vg.device("s").open():
        vg.merge("s")
    before = vg.mapper.table()
    failing(vg, "load", "vg-org", monkeypatch)
    with pytest.raises(lvm.LVMError, match="no load today"):
        vg.refresh_lv("org")
    monkeypatch.undo()
    assert vg.mapper.table() == before
    for name in vg.mapper.names():
        assert not vg.mapper.info(name).suspended
        assert not vg.mapper.info(name).inactive
    vg.refresh_lv("org")
    vg.wait_merge("org")
    assert content(vg, "org")[5000:105_000] == b"m" * 100_000


def test_a_snapshot_whose_second_generation_fails_is_taken_back(vg, monkeypatch):
    def fail(*args: object) -> None:
        raise lvm.LVMError("no record today")

    monkeypatch.setattr(snapshot_record, "attach", fail)
    with pytest.raises(lvm.LVMError, match="no record today"):
        vg.create_snapshot("org", "s", extents=4)
    assert [lv.name for lv in vg.metadata.lvs] == ["org"]
    assert vg.mapper.names() == ["vg-org"]


# --- stores that grow ---------------------------------------------------------------------------


def chunks_until(vg: lvm.VolumeGroup, extents: int, chunk: int) -> int:
    """Write chunk after chunk of the origin until the store of s has so many extents.

    Wait for it to grow where it is full enough: nobody holds up a writer that is too fast.
    """
    while (now := vg.lv("s").extent_count) < extents:
        used, rest = vg.mapper.status(vg.device("s").name).split(" ")[3].split("/")
        if 100 * int(used) > 70 * int(rest):
            poll(functools.partial(has_grown, vg, now))
            continue
        assert chunk < 256
        vg.device("org").pwrite(b"x" * CHUNK, chunk * CHUNK)
        chunk += 1
    return chunk


def has_grown(vg: lvm.VolumeGroup, extents: int) -> bool:
    return vg.lv("s").extent_count > extents


def test_a_store_grows_when_it_is_fuller_than_the_threshold(vg):
    vg.create_snapshot("org", "s", extents=2)
    before = content(vg, "s")
    monitor = vg.monitor(threshold=70, percent=20)
    chunk = chunks_until(vg, 6, 0)
    assert content(vg, "s") == before
    assert vg.device("org").pread(CHUNK, (chunk - 1) * CHUNK) == b"x" * CHUNK
    assert vg.mapper.device("vg-s-cow").sectors == vg.lv("s").sectors
    monitor.stop()


def test_a_store_grows_in_a_vg_that_was_renamed(vg):
    vg.create_snapshot("org", "s", extents=2)
    monitor = vg.monitor(threshold=70, percent=20)
    vg.rename("other")
    chunks_until(vg, 3, 0)
    monitor.stop()
    assert vg.mapper.device("other-s-cow").sectors == vg.lv("s").sectors


def test_a_store_that_can_hold_everything_grows_no_more(vg, caplog):
    vg.create_snapshot("org", "s", extents=2)
    monitor = vg.monitor(threshold=50, percent=100)
    chunks_until(vg, FULL, 0)
    for chunk in range(256):
        vg.device("org").pwrite(b"y" * CHUNK, chunk * CHUNK)
    assert vg.lv("s").extent_count == FULL
    assert not vg.mapper.status("vg-s").endswith("Invalid")
    monitor.stop()
    assert caplog.records == []


def test_a_store_of_the_useful_size_is_extended_by_nothing_which_is_no_failure(vg):
    vg.create_snapshot("org", "s", extents=FULL)
    seqno = vg.metadata.seqno
    said = said_by(vg)
    vg.extend_lv("s", extents=FULL + 3)
    assert said == [
        "Reached maximum COW size 1.06 MiB (17 extents).",
        "Size of logical volume vg/s unchanged from 1.06 MiB (17 extents).",
        "Logical volume vg/s successfully resized.",
    ]
    assert (vg.lv("s").extent_count, vg.metadata.seqno) == (FULL, seqno)


def test_the_layer_of_a_store_that_was_split_off_goes_when_its_own_table_changes(vg):
    vg.create_snapshot("org", "s", extents=4)
    vg.split_snapshot("s")
    vg.change_lv("org", add_tags=["other"])
    assert vg.mapper.table("vg-s-cow") == vg.mapper.table("vg-s")
    before = content(vg, "s")
    vg.extend_lv("s", extents=6)
    assert sorted(vg.mapper.names()) == ["vg-org", "vg-s"]
    assert content(vg, "s")[: len(before)] == before


def test_a_full_vg_is_told_once_and_the_snapshot_lives_as_long_as_it_has_room(vg, caplog):
    vg.create_snapshot("org", "s", extents=2)
    vg.create_lv("rest", extents=vg.metadata.free_extents)
    monitor = vg.monitor(threshold=50, percent=20)
    for chunk in range(20):
        vg.device("org").pwrite(b"x" * CHUNK, chunk * CHUNK)
    poll(
        lambda: [
            r
            for r in caplog.records
            if "insufficient free space" in r.getMessage()
            or "Insufficient free space" in r.getMessage()
        ]
    )
    fill(vg, "s")
    poll(lambda: [r for r in caplog.records if "changed state to: Invalid" in r.getMessage()])
    monitor.stop()
    texts = [record.getMessage() for record in caplog.records if record.name == "cow.lvm"]
    assert len(texts) == len(set(texts))


def test_the_monitor_looks_only_when_something_happens(vg, monkeypatch):
    looks: list[int] = []
    look = Monitor._look

    def counted(monitor: Monitor) -> bool:
        looks.append(vg.mapper.event_nr)
        return look(monitor)

    monkeypatch.setattr(Monitor, "_look", counted)
    vg.create_snapshot("org", "s", extents=10)
    monitor = vg.monitor(threshold=50, percent=20)
    poll(lambda: looks)
    for chunk in range(50):
        vg.device("org").pwrite(b"x" * CHUNK, chunk * CHUNK)
    monitor.stop()
    assert len(looks) == len(set(looks))
    assert len(looks) <= 4


def test_the_monitor_changes_nothing_while_a_command_runs(vg, paths):
    free: list[bool] = []

    def out(text: str) -> None:
        def take() -> None:
            free.append(vg.lock.acquire(blocking=False))

        thread = threading.Thread(target=take)
        thread.start()
        thread.join()

    shell = Shell(out, out, vg.mapper, environ={"COW_LVM_DEVICES": ",".join(paths)})
    assert run(["lvs"], shell) == 0
    assert free
    assert not any(free)


@pytest.fixture
def idle(tmp_path):
    """A mapper with a VG on two PVs, of which the second has nothing active on it; the paths."""
    paths = [image(tmp_path / f"idle{n}.img", 49152) for n in range(2)]
    with cow.Mapper(durability="process") as dm:
        with lvm.create_vg("vg", paths, mapper=dm, extent_size=EXTENT) as vg:
            vg.create_lv("org", extents=20)
            vg.activate()
        yield dm, paths


def count_looks(monkeypatch) -> list[int]:
    """Note the event after which each look of a monitor began, when it is over."""
    looks: list[int] = []
    look = Monitor._look

    def counted(monitor: Monitor) -> bool:
        seen = monitor._gate.event_nr
        found = look(monitor)
        looks.append(seen)
        return found

    monkeypatch.setattr(Monitor, "_look", counted)
    return looks


def test_a_monitor_goes_on_when_a_reader_gives_the_images_back(idle, monkeypatch):
    dm, paths = idle
    looks = count_looks(monkeypatch)
    with lvm.VolumeGroup.open(paths, readonly=True, mapper=dm) as reader:
        monitor = Monitor(dm, reader._opener())
        monitor.set_policy(70, 20)
        poll(lambda: looks)
    poll(lambda: len(looks) > 1)
    monitor.stop()
    assert len(looks) <= 3  # one of them for set_policy()


def test_a_monitor_is_not_put_off_for_ever_by_a_reader_that_is_done_too_early(idle, monkeypatch):
    """The images are given back between the look that cannot have them and the wait for that."""
    dm, paths = idle
    looks = count_looks(monkeypatch)
    reader = lvm.VolumeGroup.open(paths, readonly=True, mapper=dm)
    say = Monitor._say_unless_held

    def say_late(monitor: Monitor, error: cow.CowError) -> None:
        reader.close()
        say(monitor, error)

    monkeypatch.setattr(Monitor, "_say_unless_held", say_late)
    monitor = Monitor(dm, reader._opener())
    monitor.set_policy(70, 20)
    poll(lambda: len(looks) > 1)
    monitor.stop()


def test_a_monitor_goes_on_when_another_process_lets_go_of_an_image(idle, monkeypatch):
    dm, paths = idle
    looks = count_looks(monkeypatch)
    had: list[str] = []
    with open(paths[1], "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        with lvm.VolumeGroup.open(paths[:1], mapper=dm) as part:
            again = functools.partial(_open_again, paths, part.id)

        @contextlib.contextmanager
        def opener(mapper: cow.Mapper) -> Iterator[lvm.VolumeGroup]:
            with again(mapper) as group:
                had.append(group.name)
                yield group

        monitor = Monitor(dm, opener)
        monitor.set_policy(70, 20)
        # It looks for set_policy(), and once more if that was called before it had begun.
        poll(lambda: looks and looks[-1] == dm.gate.event_nr)
        assert had == []
    poll(lambda: had)
    monitor.stop()
    assert len(looks) <= 3  # one of them for set_policy()


def test_a_monitor_says_once_what_is_wrong_and_goes_on(idle, monkeypatch, caplog):
    dm, paths = idle
    looks = count_looks(monkeypatch)
    errors = [lvm.MetadataError("damaged"), cow.ImageError("no image", errno.ENOENT)] * 2

    @contextlib.contextmanager
    def opener(mapper: cow.Mapper) -> Iterator[lvm.VolumeGroup]:
        if errors:
            raise errors.pop(0)
        with lvm.VolumeGroup.open(paths, mapper=mapper) as group:
            yield group

    monitor = Monitor(dm, opener)
    for number in range(1, 6):
        monitor.wake()
        poll(lambda: len(looks) >= number)  # noqa: B023
    assert monitor.running
    monitor.stop()
    assert errors == []
    assert (caplog.text.count("damaged"), caplog.text.count("no image")) == (1, 1)


def test_a_monitor_whose_mapper_closes_under_it_ends_and_says_nothing(tmp_path, caplog):
    dm = cow.Mapper()

    def opener(mapper: cow.Mapper) -> contextlib.AbstractContextManager[lvm.VolumeGroup]:
        mapper.close()
        raise cow.ImageError("no mapper", errno.ENODEV)

    monitor = Monitor(dm, opener)
    monitor.wake()
    poll(lambda: not monitor.running)
    assert "no mapper" not in caplog.text


def test_a_monitor_says_which_image_it_cannot_wait_for(idle, monkeypatch, caplog):
    dm, paths = idle
    looks = count_looks(monkeypatch)

    def too_late(path: str) -> None:
        os.unlink(path)
        wait_for_lock(path)

    monkeypatch.setattr("cow.lvm.monitor.wait_for_lock", too_late)
    with open(paths[1], "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        with lvm.VolumeGroup.open(paths[:1], mapper=dm) as part:
            opener = functools.partial(_open_again, paths, part.id)
        monitor = Monitor(dm, opener)
        monitor.wake()
        poll(lambda: f"{paths[1]}: No such file or directory" in caplog.text)
        poll(lambda: looks)
    assert monitor.running
    monitor.stop()


def test_a_monitor_leaves_alone_what_is_not_active_and_what_is_no_snapshot(vg, monkeypatch, caplog):
    looks = count_looks(monkeypatch)
    vg.create_snapshot("org", "s", extents=2)
    vg.deactivate()
    monitor = vg.monitor(threshold=70, percent=20)
    poll(lambda: looks)
    monitor.stop()
    assert caplog.text == ""
    assert vg.lv("s").extent_count == 2
    assert _cannot_grow(vg.lv("org"))
    assert not _cannot_grow(vg.lv("s"))


def test_reports_tell_which_stores_grow_by_themselves(vg):
    vg.create_snapshot("org", "s", extents=2)
    live = Live(vg.mapper)
    assert live.monitored(vg.lv("s")) == ""
    monitor = vg.monitor(threshold=70)
    assert live.monitored(vg.lv("s")) == "monitored"
    assert live.monitored(vg.lv("org")) == ""
    vg.monitor(threshold=100)
    assert live.monitored(vg.lv("s")) == "not monitored"
    monitor.stop()
    assert live.monitored(vg.lv("s")) == ""


def test_new_snapshots_are_watched_too(vg):
    monitor = vg.monitor(threshold=70, percent=20)
    vg.create_snapshot("org", "s", extents=2)
    chunks_until(vg, 4, 0)
    monitor.stop()


def test_extending_by_policy_does_what_the_threshold_asks(vg):
    vg.create_snapshot("org", "s", extents=10)
    vg.extend_by_policy("s", threshold=70, percent=20)
    assert vg.lv("s").extent_count == 10
    vg.device("s").pwrite(b"x" * 8 * BYTES, 0)
    vg.extend_by_policy("s", threshold=100, percent=20)
    assert vg.lv("s").extent_count == 10
    with pytest.raises(lvm.LVMError, match="autoextend percent set to 0%"):
        vg.extend_by_policy("s", threshold=70, percent=0)
    vg.extend_by_policy("s", threshold=70, percent=20)
    assert vg.lv("s").extent_count == 12
    vg.deactivate()
    with pytest.raises(lvm.LVMError, match="Cannot tell how full snapshot vg/s is"):
        vg.extend_by_policy("s", threshold=70, percent=20)


def test_a_monitor_ends_with_its_mapper(tmp_path):
    path = image(tmp_path / "pv.img", 49152)
    with cow.Mapper() as dm:
        with lvm.create_vg("vg", [path], mapper=dm, extent_size=EXTENT) as vg:
            monitor = vg.monitor(threshold=70)
        assert monitor.running
    poll(lambda: not monitor.running)


def test_what_another_volume_group_object_commits_is_seen(vg, paths):
    with lvm.VolumeGroup.open(paths, mapper=vg.mapper) as other:
        other.create_snapshot("org", "s", extents=4)
        assert [lv.name for lv in vg.lvs()] == ["org", "s"]
        vg.remove_lv("s")
        assert [lv.name for lv in other.lvs()] == ["org"]


def test_the_record_is_what_lvm_writes(vg):
    vg.create_snapshot("org", "s", extents=4, permission="r", chunk_size=16)
    text = vg.backup()
    assert 'status = ["READ"]' in text
    record = text[text.index("snapshot0 {") :]
    assert 'status = ["READ", "WRITE", "VISIBLE"]' in record
    for line in (
        'type = "snapshot"',
        "chunk_size = 16",
        'origin = "org"',
        'cow_store = "s"',
        "extent_count = 16",
    ):
        assert line in record
    with vg.device("org").open():
        vg.change_lv("s", permission="rw")
        vg.merge("s")
    record = vg.backup()
    record = record[record.index("snapshot0 {") :]
    assert 'merging_store = "s"' in record
    assert "VISIBLE" not in record[: record.index("segment1")]


def test_lvm_conf_makes_stores_of_served_snapshots_grow(tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "lvm.conf").write_text(
        "activation { snapshot_autoextend_threshold = 70 snapshot_autoextend_percent = 20 }"
    )
    path = image(tmp_path / "pv.img", 131072)
    with cow.Mapper(durability="process") as dm:

        def command(line: str) -> None:
            environ = {"LVM_SYSTEM_DIR": str(tmp_path / "etc"), "COW_LVM_DEVICES": path}
            said: list[str] = []
            shell = Shell(said.append, said.append, dm, environ=environ)
            assert run(line.split(), shell) == 0, said

        command(f"vgcreate -s 64k vg {path}")
        command("lvcreate -y -l 16 -n org vg")
        command("lvcreate -s -l 2 -n s vg/org")
        with lvm.VolumeGroup.open([path], mapper=dm) as vg:
            chunk = chunks_until(vg, 4, 0)
            command("lvchange --monitor n vg/s")
            while not dm.status("vg-s").endswith("Invalid"):
                vg.device("org").pwrite(b"x" * CHUNK, chunk * CHUNK)
                chunk += 1
