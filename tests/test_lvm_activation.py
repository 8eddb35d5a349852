"""Sample VGs of the real lvm2 as dm devices: names, uuids, tables, and every byte.

What is expected is worked out here from vgcfgbackup's text of the same VGs, by a small reader that
knows extents and COW stores and nothing else of the package.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import SECTOR, area_location, image, poll, stamp, store_bytes
from support.lvm import SAMPLES, backup_of, write_sample

import cow
from cow import lvm
from cow.lvm import tables
from cow.lvm.metadata_text import vg_from_text
from cow.lvm.text import parse

RUNNABLE = [name for name in SAMPLES if name != "f_thin"]


# --- the small reader ---------------------------------------------------------------------------


def read_text(text: str) -> dict[str, Any]:
    """Read the text of a backup into dicts, lists, strings and numbers."""
    words = re.findall(
        r'"(?:\\.|[^"\\])*"|[\w.+-]+|[={}\[\],]', re.sub(r"(?m)#[^\"\n]*$", "", text)
    )
    at = 0

    def value() -> Any:
        nonlocal at
        word = words[at]
        at += 1
        if word == "[":
            found = []
            while words[at] != "]":
                if words[at] == ",":
                    at += 1
                    continue
                found.append(value())
            at += 1
            return found
        return word[1:-1] if word.startswith('"') else int(word)

    def section() -> dict[str, Any]:
        nonlocal at
        found: dict[str, Any] = {}
        while at < len(words) and words[at] != "}":
            name = words[at]
            at += 2
            if words[at - 1] == "{":
                found[name] = section()
                at += 1
            else:
                found[name] = value()
        return found

    return section()


class Reader:
    """The LVs of a sample, read from its images extent by extent."""

    def __init__(self, sample: str, paths: list[str]) -> None:
        self.vg = read_text(backup_of(sample))[SAMPLES[sample][0]]
        self.extent = self.vg["extent_size"]
        self.lvs = self.vg["logical_volumes"]
        self.disks = {}
        for path in paths:
            data = Path(path).read_bytes()
            for label, pv in self.vg["physical_volumes"].items():
                if pv["id"].replace("-", "").encode() == data[544:576]:
                    self.disks[label] = path

    def segments(self, name: str) -> list[dict[str, Any]]:
        lv = self.lvs[name]
        return [lv[f"segment{n}"] for n in range(1, lv["segment_count"] + 1)]

    def runs(self, name: str) -> Iterator[tuple[str | None, int, int]]:
        """Yield (path, sector, count) for an LV, run by run; no path where there are zeros."""
        for segment in self.segments(name):
            length = segment["extent_count"] * self.extent
            if segment["type"] == "zero":
                yield None, 0, length
                continue
            legs = list(zip(segment["stripes"][::2], segment["stripes"][1::2], strict=True))
            chunk = segment.get("stripe_size", length)
            for number in range(length // chunk):
                label, extent = legs[number % len(legs)]
                start = self.vg["physical_volumes"][label]["pe_start"] + extent * self.extent
                yield self.disks[label], start + number // len(legs) * chunk, chunk

    def sectors(self, name: str) -> int:
        return sum(count for _, _, count in self.runs(name))

    def raw(self, name: str) -> bytes:
        """Return what is in the extents of an LV."""
        data = {path: Path(path).read_bytes() for path in self.disks.values()}
        return b"".join(
            data[path][start * SECTOR : (start + count) * SECTOR] if path else bytes(count * SECTOR)
            for path, start, count in self.runs(name)
        )

    def put(self, name: str, contents: bytes) -> None:
        """Write into the extents of an LV."""
        at = 0
        for path, start, count in self.runs(name):
            with open(path, "r+b") as file:
                file.seek(start * SECTOR)
                file.write(contents[at : at + count * SECTOR])
            at += count * SECTOR

    def records(self) -> list[dict[str, Any]]:
        """Return the snapshotN segments."""
        return [lv["segment1"] for lv in self.lvs.values() if lv["segment1"]["type"] == "snapshot"]

    def view(self, record: dict[str, Any]) -> bytes:
        """Return what a snapshot shows: its store over its origin."""
        data = bytearray(self.raw(record["origin"]))
        store = self.raw(record.get("cow_store") or record["merging_store"])
        size = record["chunk_size"] * SECTOR
        if store[:4] == b"SnAp":
            area, slot = 0, 0
            while True:
                at = area_location(area, record["chunk_size"]) * size + 16 * slot
                old, new = (int.from_bytes(store[at + i : at + i + 8], "little") for i in (0, 8))
                if new == 0:
                    break
                data[old * size : (old + 1) * size] = store[new * size : (new + 1) * size]
                slot += 1
                if slot == size // 16:
                    area, slot = area + 1, 0
        return bytes(data[: record["extent_count"] * self.extent * SECTOR])

    def views(self) -> dict[str, bytes]:
        """Return what LVM would give for every LV that users can open."""
        stores = {r.get("cow_store") or r.get("merging_store") for r in self.records()}
        merging = {r["origin"]: r for r in self.records() if "merging_store" in r}
        found = {}
        for name, lv in self.lvs.items():
            if name not in stores and "VISIBLE" in lv["status"] and "stripes" in lv["segment1"]:
                found[name] = self.view(merging[name]) if name in merging else self.raw(name)
        for record in self.records():
            if "cow_store" in record:
                found[record["cow_store"]] = self.view(record)
        return found


def fill(reader: Reader, rng: random.Random) -> None:
    """Put data into every LV, and exceptions into every COW store."""
    stores = {r.get("cow_store") or r.get("merging_store"): r for r in reader.records()}
    for number, (name, lv) in enumerate(reader.lvs.items()):
        if lv["segment1"]["type"] != "striped":
            continue
        sectors = reader.sectors(name)
        if name not in stores:
            reader.put(name, stamp(0, sectors, number + 1))
            continue
        chunk = stores[name]["chunk_size"]
        chunks = stores[name]["extent_count"] * reader.extent // chunk
        count = min(20, sectors // chunk - 2)
        records = [(old, 2 + n) for n, old in enumerate(rng.sample(range(chunks), count))]
        contents = store_bytes(records, chunk, size=sectors * SECTOR)
        for old, new in records:
            at = new * chunk * SECTOR
            contents[at : at + chunk * SECTOR] = stamp(old * chunk, chunk, 100 + number)
        reader.put(name, bytes(contents))


@pytest.fixture(params=RUNNABLE)
def sample(request, tmp_path, seed) -> tuple[list[str], Reader]:
    """A sample with data in it: its images, and what reads them."""
    paths = write_sample(request.param, tmp_path)
    reader = Reader(request.param, paths)
    fill(reader, random.Random(seed))
    return paths, reader


def contents(paths: list[str]) -> list[str]:
    return [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths]


# --- every byte ---------------------------------------------------------------------------------


def test_every_lv_reads_what_lvm_would_give(sample):
    paths, reader = sample
    expected = reader.views()
    with lvm.VolumeGroup.open(paths) as vg:
        vg.activate()
        names = sorted(lv.name for lv in vg.lvs())
        assert names == sorted(expected)
        for name, data in expected.items():
            device = vg.device(name)
            assert device.pread(device.size, 0) == data, name


def test_read_only_every_lv_reads_the_same_and_no_byte_changes(sample):
    paths, reader = sample
    expected = reader.views()
    before = contents(paths)
    with lvm.VolumeGroup.open(paths, readonly=True) as vg:
        vg.activate()
        for name, data in expected.items():
            device = vg.device(name)
            assert device.readonly
            assert device.pread(device.size, 0) == data, name
        vg.deactivate()
        assert vg.mapper.names() == []
    assert contents(paths) == before


@pytest.mark.parametrize("name", RUNNABLE)
def test_read_only_not_even_a_fresh_store_gets_a_header(name, tmp_path):
    paths = write_sample(name, tmp_path)
    reader = Reader(name, paths)
    for record in reader.records():
        reader.put(record.get("cow_store") or record["merging_store"], bytes(1 << 23))
    before = contents(paths)
    with lvm.VolumeGroup.open(paths, readonly=True) as vg:
        vg.activate()
        for lv in vg.lvs():
            assert vg.device(lv.name).pread(4096, 0) is not None
    assert contents(paths) == before


@pytest.mark.parametrize("name", [name for name in RUNNABLE if name != "e2_merge_pending"])
def test_written_bytes_land_where_the_extents_say(name, tmp_path, seed):
    paths = write_sample(name, tmp_path)
    reader = Reader(name, paths)
    fill(reader, random.Random(seed))
    expected = {}
    with lvm.VolumeGroup.open(paths) as vg:
        vg.activate()
        for number, lv in enumerate(vg.lvs()):
            device = vg.device(lv.name)
            data = bytearray(device.pread(device.size, 0))
            if not device.readonly:
                data[12345:99999] = bytes([number + 1]) * (99999 - 12345)
                device.pwrite(data[12345:99999], 12345)
            expected[lv.name] = bytes(data)
    assert reader.views() == expected


def test_a_pending_merge_runs_when_it_is_activated_and_is_finished(tmp_path, seed):
    paths = write_sample("e2_merge_pending", tmp_path)
    reader = Reader("e2_merge_pending", paths)
    fill(reader, random.Random(seed))
    expected = reader.views()["org"]
    with lvm.VolumeGroup.open(paths) as vg:
        vg.activate()
        poll(lambda: [lv.name for lv in vg.metadata.lvs] == ["org"])
        poll(lambda: vg.mapper.names() == ["vge2-org"])
        assert tables_of(vg) == {"vge2-org": "0 32768 linear pv0 2048"}
        assert vg.device("org").pread(len(expected), 0) == expected
    assert reader.raw("org") == expected


# --- names, uuids, tables -----------------------------------------------------------------------


def tables_of(vg: lvm.VolumeGroup) -> dict[str, str]:
    names = {str(pv.device): pv.label for pv in vg.pvs}
    found = {}
    for name in vg.mapper.names():
        table = vg.mapper.table(name)
        for path, label in names.items():
            table = table.replace(path, label)
        found[name] = table.rstrip()
    return found


EXPECTED = {
    "a_linear": {"vga-lin": "0 24576 linear pv0 2048"},
    "b_striped": {
        "vgb-str": "0 32768 striped 2 128 pv0 2048 pv1 2048",
        "vgb-lin": "0 16384 linear pv0 18432",
    },
    "c_noncontig": {
        "vgc-one": "0 16384 linear pv0 2048\n16384 16384 linear pv0 34816\n"
        "32768 32768 linear pv0 59392",
        "vgc-three": "0 8192 linear pv0 51200",
    },
    "d_hyphens_tags": {
        "my--vg--01-root--fs": "0 8192 linear pv0 2048",
        "my--vg--01-a----b.c_d+e": "0 8192 linear pv0 10240",
    },
    "e_snapshots": {
        "vge-org-real": "0 32768 linear pv0 2048",
        "vge-org": "0 32768 snapshot-origin vge-org-real",
        "vge-snap1-cow": "0 16384 linear pv0 34816",
        "vge-snap1": "0 32768 snapshot vge-org-real vge-snap1-cow P 8",
        "vge-snap2-cow": "0 16384 linear pv0 51200",
        "vge-snap2": "0 32768 snapshot vge-org-real vge-snap2-cow P 128",
        "vge-rosnap-cow": "0 8192 linear pv0 67584",
        "vge-rosnap": "0 32768 snapshot vge-org-real vge-rosnap-cow P 8",
    },
    "e2_merge_pending": {
        "vge2-org-real": "0 32768 linear pv0 2048",
        "vge2-org": "0 32768 snapshot-merge vge2-org-real vge2-snap1-cow P 8",
        "vge2-snap1-cow": "0 16384 linear pv0 34816",
        "vge2-snap1": "0 32768 error",
    },
    "e3_sparse_vorigin": {
        "vge3-sparse_vorigin-real": "0 204800 zero",
        "vge3-sparse_vorigin": "0 204800 snapshot-origin vge3-sparse_vorigin-real",
        "vge3-sparse-cow": "0 16384 linear pv0 2048",
        "vge3-sparse": "0 204800 snapshot vge3-sparse_vorigin-real vge3-sparse-cow P 8",
    },
}


@pytest.mark.parametrize("name", RUNNABLE)
def test_the_tables_are_those_lvm_loads(name, tmp_path):
    with lvm.VolumeGroup.open(write_sample(name, tmp_path), readonly=True) as vg:
        vg.activate()
        assert tables_of(vg) == EXPECTED[name]


def test_uuids_are_those_of_vg_and_lv_with_the_layer_behind(tmp_path):
    with lvm.VolumeGroup.open(write_sample("e_snapshots", tmp_path), readonly=True) as vg:
        vg.activate()
        lvid = {lv.name: f"LVM-{vg.id}{lv.id}" for lv in vg.lvs()}
        uuids = {name: vg.mapper.info(name).uuid for name in vg.mapper.names()}
        assert uuids["vge-org"] == lvid["org"]
        assert uuids["vge-org-real"] == lvid["org"] + "-real"
        assert uuids["vge-snap1"] == lvid["snap1"]
        assert uuids["vge-snap1-cow"] == lvid["snap1"] + "-cow"


def test_permissions_and_fixed_minors_are_those_of_the_lv(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "e").mkdir()
    with lvm.VolumeGroup.open(write_sample("d_hyphens_tags", tmp_path / "d")) as vg:
        vg.activate()
        fixed = next(lv for lv in vg.lvs() if lv.minor is not None)
        assert vg.device(fixed.name).minor == fixed.minor == 77
        assert {lv.name: vg.device(lv.name).readonly for lv in vg.lvs()} == {
            lv.name: not lv.writable for lv in vg.lvs()
        }
    with lvm.VolumeGroup.open(write_sample("e_snapshots", tmp_path / "e")) as vg:
        vg.activate()
        assert vg.device("rosnap").readonly
        assert not vg.mapper.device("vge-rosnap-cow").readonly
        assert not vg.device("snap1").readonly


# --- what may be activated ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pool", "th1", "th1snap", "cowofthin"])
def test_a_segment_type_that_cannot_be_run_is_refused_by_name(tmp_path, name):
    with lvm.VolumeGroup.open(write_sample("f_thin", tmp_path)) as vg:
        with pytest.raises(
            lvm.LVMError, match=r"segment type thin(-pool)? cannot be run"
        ) as caught:
            vg.activate(lvs=[name], ignore_skip=True)
        assert caught.value.errno == errno.EOPNOTSUPP
        assert vg.mapper.names() == []
        vg.deactivate()


def test_an_unknown_segment_type_is_refused(tmp_path):
    text = backup_of("a_linear").replace('type = "striped"', 'type = "strange"')
    vg = vg_from_text(parse(text))
    assert tables.why_not(vg.lv("lin")) == (
        "Refusing activation of LV vga/lin containing an unrecognised segment. (strange)"
    )


def test_what_can_be_activated_is_where_something_else_cannot(tmp_path):
    path = image(tmp_path / "pv.img", 65536)
    with lvm.create_vg("vg", [path]) as vg:
        vg.create_lv("good", extents=1)
        vg.create_lv("bad", extents=1)
        with vg.change("make it raid") as new:
            new.lv("bad").segments[0].type = "raid1"
            new.lv("bad").segments[0].areas = []
        with pytest.raises(lvm.LVMError, match="vg/bad: segment type raid1 cannot be run"):
            vg.activate()
        assert vg.mapper.names() == ["vg-good"]


def test_without_a_pv_only_what_is_not_on_it_is_activated(tmp_path):
    paths = write_sample("b_striped", tmp_path)
    second = Reader("b_striped", paths).disks["pv1"]
    with lvm.VolumeGroup.open([path for path in paths if path != second]) as vg:
        with pytest.raises(lvm.LVMError, match=r"Refusing activation of partial LV vgb/str\."):
            vg.activate()
        assert vg.mapper.names() == ["vgb-lin"]


def test_with_partial_what_is_missing_reads_as_an_error(tmp_path):
    paths = write_sample("b_striped", tmp_path)
    reader = Reader("b_striped", paths)
    fill(reader, random.Random(0))
    expected = reader.views()["str"]
    with lvm.VolumeGroup.open([reader.disks["pv0"]], partial=True) as vg:
        vg.activate()
        assert tables_of(vg)["vgb-str-missing_0_1"] == "0 16384 error"
        assert tables_of(vg)["vgb-str"] == "0 32768 striped 2 128 pv0 2048 vgb-str-missing_0_1 0"
        device = vg.device("str")
        assert device.pread(65536, 0) == expected[:65536]
        with pytest.raises(cow.DeviceIOError):
            device.pread(65536, 65536)
        vg.deactivate()
        assert vg.mapper.names() == []


def test_an_lv_that_is_to_be_skipped_is(tmp_path):
    path = image(tmp_path / "pv.img", 65536)
    with lvm.create_vg("vg", [path]) as vg:
        vg.create_lv("lv", extents=1, flags=["ACTIVATION_SKIP"])
        vg.activate()
        assert not vg.is_active("lv")
        said: list[str] = []
        vg.report = said.append
        vg.activate(lvs=["lv"])
        assert said == ["ACTIVATION_SKIP flag set for LV vg/lv, skipping activation."]
        vg.activate(ignore_skip=True)
        assert vg.is_active("lv")


def test_all_that_could_not_be_activated_is_told(tmp_path):
    with lvm.create_vg("vg", [image(tmp_path / "pv.img", 65536)]) as vg:
        for name in ("one", "two", "three"):
            vg.create_lv(name, extents=1)
        for name in ("vg-one", "vg-three"):
            vg.mapper.create(name, "0 8 zero")
        with pytest.raises(lvm.LVMError) as caught:
            vg.activate()
        first, second = caught.value.strerror.split("\n")
        assert first.startswith("Cannot activate vg/one: vg-one")
        assert second.startswith("Cannot activate vg/three: vg-three")
        assert vg.is_active("two")


@pytest.mark.parametrize("flag", ["LOCKED", "PVMOVE"])
def test_what_a_pvmove_holds_is_not_activated(flag):
    text = backup_of("a_linear").replace('"VISIBLE"', f'"VISIBLE", "{flag}"')
    vg = vg_from_text(parse(text))
    assert tables.why_not(vg.lv("lin")) == "Cannot activate vga/lin: a pvmove is in progress."


def test_an_lv_without_a_device_cannot_be_had(tmp_path):
    with lvm.VolumeGroup.open(write_sample("a_linear", tmp_path)) as vg:
        with pytest.raises(lvm.LVMError, match=r"Logical volume vga/lin is not active\."):
            vg.device("lin")
        vg.refresh_lv("lin")
        assert vg.mapper.names() == []


def test_a_family_is_activated_and_deactivated_by_any_of_its_names(tmp_path):
    with lvm.VolumeGroup.open(write_sample("e_snapshots", tmp_path)) as vg:
        vg.activate(lvs=["snap2"])
        assert len(vg.mapper.names()) == 8
        vg.deactivate(["snap1"])
        assert vg.mapper.names() == []


def test_what_is_open_stays_active(tmp_path):
    with lvm.VolumeGroup.open(write_sample("e_snapshots", tmp_path)) as vg:
        vg.activate()
        said: list[str] = []
        vg.report = said.append
        for name, text in (
            ("org", "Logical volume vge/org in use"),
            ("snap1", r"LV vge/org has open 1 snapshot\(s\)"),
        ):
            with vg.device(name).open(), pytest.raises(lvm.InUse, match=text):
                vg.deactivate(["org"])
        assert said == ["Logical volume vge/snap1 in use."]
        assert len(vg.mapper.names()) == 8


def test_what_failed_half_way_leaves_nothing(tmp_path):
    with lvm.VolumeGroup.open(write_sample("e_snapshots", tmp_path)) as vg:
        vg.mapper.create("vge-rosnap", "0 8 zero")
        with pytest.raises(lvm.LVMError, match="Cannot activate vge/rosnap: vge-rosnap"):
            vg.activate()
        assert vg.mapper.names() == ["vge-rosnap"]


def test_what_somebody_took_while_it_was_made_in_vain_stays(tmp_path, monkeypatch, caplog):
    with lvm.VolumeGroup.open(write_sample("e_snapshots", tmp_path)) as vg:
        resume, opened = vg.mapper.resume, []

        def fail(name: str) -> None:
            if name.endswith("vge-snap1"):
                opened.append(vg.mapper.device("vge-org-real").open())
                raise cow.DeviceIOError("not today")
            resume(name)

        monkeypatch.setattr(vg.mapper, "resume", fail)
        with pytest.raises(cow.DeviceIOError, match="not today"):
            vg.activate()
        monkeypatch.undo()
        assert vg.mapper.names() == ["vge-org-real"]
        assert "vge-org-real stays: " in caplog.text
        opened.pop().close()
        vg.mapper.remove("vge-org-real")
        vg.activate()
        assert len(vg.mapper.names()) == 8


def test_what_another_device_stands_on_stays_active(tmp_path):
    with lvm.VolumeGroup.open(write_sample("e_snapshots", tmp_path)) as vg:
        vg.activate()
        vg.mapper.create("mine", "0 8 linear vge-org-real 0")
        with pytest.raises(lvm.InUse, match="Unable to deactivate vge-org-real: "):
            vg.deactivate(["org"])
        assert "vge-org-real" in vg.mapper.names()
        vg.mapper.remove("mine")
        vg.deactivate(["org"])
        assert vg.mapper.names() == []


def test_a_store_that_is_damaged_is_named_and_nothing_stays(tmp_path):
    paths = write_sample("e_snapshots", tmp_path)
    Reader("e_snapshots", paths).put("snap1", b"garbage!" * 64)
    with lvm.VolumeGroup.open(paths) as vg:
        with pytest.raises(lvm.LVMError, match=r"Cannot activate vge/snap1: .*corrupt snapshot"):
            vg.activate()
        assert vg.mapper.names() == []


def test_an_invalid_snapshot_is_activated_and_stays_invalid(tmp_path):
    paths = write_sample("e_snapshots", tmp_path)
    Reader("e_snapshots", paths).put("snap1", bytes(store_bytes([], 8, size=4096, valid=0)))
    with lvm.VolumeGroup.open(paths) as vg:
        vg.activate()
        assert vg.mapper.status("vge-snap1") == "0 32768 snapshot Invalid"
        with pytest.raises(cow.DeviceIOError):
            vg.device("snap1").pread(512, 0)
        vg.device("org").pwrite(b"x" * 4096, 0)


def test_a_vg_moves_into_the_mapper_it_is_activated_in(tmp_path):
    with cow.Mapper() as dm, lvm.VolumeGroup.open(write_sample("a_linear", tmp_path)) as vg:
        vg.activate(dm)
        assert dm.names() == ["vga-lin"]
        assert vg.device("lin").size == 12 << 20


def test_a_vg_that_is_active_does_not_move(tmp_path):
    with cow.Mapper() as dm, lvm.VolumeGroup.open(write_sample("a_linear", tmp_path)) as vg:
        vg.activate()
        with pytest.raises(lvm.InUse, match="are in use in their mapper"):
            vg.activate(dm)
        assert (vg.mapper.names(), dm.names()) == (["vga-lin"], [])


def test_a_vg_does_not_move_into_a_mapper_that_cannot_have_its_images(tmp_path):
    paths = write_sample("b_striped", tmp_path)
    with cow.Mapper() as dm, cow.Mapper() as other, lvm.VolumeGroup.open(paths) as vg:
        os.rename(paths[1], tmp_path / "away.img")
        with pytest.raises(cow.ImageError, match="no such device or file"):
            vg.activate(dm)
        other.use(paths[0], readonly=False)
        assert dm.names() == []


def test_devices_outlive_the_vg_in_a_mapper_that_is_not_its_own(tmp_path):
    paths = write_sample("a_linear", tmp_path)
    with cow.Mapper() as dm:
        with lvm.VolumeGroup.open(paths, mapper=dm) as vg:
            vg.activate()
        assert dm.device("vga-lin").pread(512, 0) is not None
        with lvm.VolumeGroup.open(paths, mapper=dm) as vg:
            assert vg.is_active("lin")
            vg.deactivate()
        assert dm.names() == []


def test_a_mirror_is_activated_with_its_images_and_its_log(tmp_path):
    paths = [image(tmp_path / f"{n}.img", 65536) for n in range(3)]
    with lvm.create_vg("vg", paths) as vg:
        from test_lvm_order import Player

        Player.make_mirror(type("P", (), {"vg": vg})(), "m", log=True)
        vg.device("m").pwrite(b"x" * 5000, 3000)
        image_0 = vg.mapper.device("vg-m_mimage_0").pread(1 << 20, 0)
        assert image_0 == vg.mapper.device("vg-m_mimage_1").pread(1 << 20, 0)
        assert image_0[3000:8000] == b"x" * 5000
        assert vg.mapper.status("vg-m").split(" ", 3)[3] == (
            "2 vg-m_mimage_0 vg-m_mimage_1 16/16 1 AA 3 disk vg-m_mlog A"
        )
        vg.remove_lv("m")
        assert vg.metadata.lvs == []
