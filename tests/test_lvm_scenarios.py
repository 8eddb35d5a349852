"""What lvm2's own tests check of COW snapshots: each scenario with its figures, on image files.

The tests here are named after the scenario of lvm2's test/shell; the figures are those it expects.
"""

from __future__ import annotations

import random

import pytest
from support import fill, poll
from support.lvm import every_kind
from support.lvm_machine import Machine

from cow.errors import CowError
from cow.lvm.metadata_text import vg_from_text
from cow.lvm.names import dashed_id
from cow.lvm.text import parse

KIB = 1 << 10
MIB = 1 << 20


@pytest.fixture
def machine(tmp_path):
    found = Machine(tmp_path)
    yield found
    found.mapper.close()


@pytest.fixture
def small(machine):
    """A VG with extents of 4 KiB."""
    machine(f"vgcreate -s 4k vg {machine.disk('a.img', 16 * MIB)}")
    return machine


@pytest.fixture
def lvm(machine):
    """A VG with extents of 4 MiB on two PVs."""
    paths = [machine.disk(name, 96 * MIB) for name in ("a.img", "b.img")]
    machine(f"vgcreate vg {' '.join(paths)}")
    return machine


# --- snapshot-usage, snapshot-maxsize, lvcreate-small-snap ----------------------------------------


@pytest.mark.parametrize("percent", [100, 50, 25])
def test_snapshot_usage_a_percentage_of_the_origin_holds_that_much(small, percent):
    small("lvcreate -L 1m -n org vg")
    before = fill(MIB, 9)
    small.mapper.device("vg-org").pwrite(before, 0)
    small(f"lvcreate -s -l {percent}%ORIGIN -n snap vg/org")
    small.write("org", MIB * percent // 100)
    assert small.field("vg/snap", "lv_snapshot_invalid") == ""
    assert float(small.field("vg/snap", "data_percent")) > 98
    assert small.read("snap") == before
    if percent < 100:
        small.write("org", MIB)
        assert small.field("vg/snap", "lv_snapshot_invalid") == "snapshot invalid"


def test_snapshot_usage_an_origin_of_one_extent_needs_12_kib(small):
    small("lvcreate -l 1 -n org vg")
    small("lvcreate -s -l 12 -n snap vg/org")
    assert small.field("vg/snap", "lv_size") == "12.00k"


def test_snapshot_usage_three_chunks_of_128_kib_are_384(small):
    small("lvcreate -l 1 -n org vg")
    small("lvcreate -s -l 128 -c 128k -n snap vg/org")
    assert small.field("vg/snap", "lv_size") == "384.00k"


def test_snapshot_usage_a_chunk_in_100_kib_is_12_percent(small):
    small("lvcreate -L 128k -n org vg")
    small("lvcreate -s -L 100k -n snap vg/org")
    small.write("org", 4 * KIB)
    assert small.field("vg/snap", "data_percent") == "12.00"


def test_snapshot_usage_a_full_store_grows_by_policy_and_no_further_than_is_of_use(small):
    small("lvcreate -l 5 -n org vg")
    small("lvcreate -s -l 3 -n snap vg/org")
    small.write("org", 4 * KIB)
    assert small.field("vg/snap", "data_percent") == "100.00"
    (small.folder / "lvm.conf").write_text(
        "activation { snapshot_autoextend_threshold=50 snapshot_autoextend_percent=20\n"
        "monitoring=0 }"
    )
    policy = "lvextend --use-policies vg/snap"
    small(policy)
    assert small.field("vg/snap", "data_percent,lv_size").split() == ["50.00", "24.00k"]
    small(policy)
    assert small.field("vg/snap", "lv_size") == "24.00k"
    small("lvextend -l +8 vg/snap")
    assert small.field("vg/snap", "lv_size") == "28.00k"


def test_snapshot_usage_percent_of_the_lv_is_refused(small):
    small("lvcreate -L 128k -n org vg")
    small.refused("lvcreate -s -l 100%LV -n snap vg/org")


def test_snapshot_usage_a_new_snapshot_has_nothing_of_an_old_store(small):
    small("lvcreate -L 128k -n org vg")
    for _ in range(3):
        small("lvcreate -s -pr -c 4k -l 3 -n snap vg/org")
        assert small.field("vg/snap", "data_percent") == "0.00"
        assert small.field("vg/snap", "lv_attr") == "sri-a-s---"
        small.write("org", 4 * KIB)
        assert small.field("vg/snap", "data_percent") == "100.00"
        small("lvremove -y vg/snap")


def test_snapshot_usage_a_busy_snapshot_is_not_removed(small):
    small("lvcreate -L 128k -n org vg")
    small("lvcreate -s -l 8 -n snap vg/org")
    with small.mapper.device("vg-snap").open():
        assert "Logical volume vg/snap in use." in small.refused("lvremove -f vg/snap")
        small.refused("lvremove -ff vg/org")
    small("lvremove -f vg/snap")
    assert small.names() == ["org"]


def test_snapshot_usage_a_sparse_lv_comes_and_goes(small):
    small("lvcreate --type snapshot -V 50 -L 10 -n snap vg")
    assert small.field("vg/snap", "origin_size") == "51200.00k"
    assert small.read("snap", 4 * KIB, 49 * MIB) == bytes(4 * KIB)
    small("lvremove -f vg/snap")
    assert small.names() == []
    assert small.mapper.names() == []


def test_snapshot_maxsize_a_store_of_full_size_takes_every_chunk(small):
    small("lvcreate -L 1m -n org vg")
    small("lvcreate -s -l 100%ORIGIN -n snap vg/org")
    small("lvcreate -s -L 16m -n most vg/org")
    assert small.field("vg/most", "lv_size") == small.field("vg/snap", "lv_size") == "1036.00k"
    small.write("snap", MIB, seed=3)
    small.write("org", MIB, seed=4)
    assert small.field("vg/snap", "lv_attr") == "swi-a-s---"
    assert small.read("snap") == fill(MIB, 3)
    assert small.read("most") == bytes(MIB)


@pytest.mark.parametrize("chunk", [4, 8])
def test_lvcreate_small_snap_two_chunks_are_too_few(small, chunk):
    small("lvcreate -L 128k -n org vg")
    extents = chunk // 4
    said = small.refused(f"lvcreate -s -c {chunk}k -l {2 * extents} -n snap vg/org")
    assert "smaller" in said
    small(f"lvcreate -s -c {chunk}k -l {3 * extents} -n snap vg/org")


# --- snapshot-usage-exa, lvcreate-large -----------------------------------------------------------


@pytest.mark.parametrize(("size", "half"), [("15p", "7.50p"), ("1024t", "512.00t")])
def test_snapshot_usage_exa_a_huge_sparse_lv_is_a_pv(lvm, size, half):
    lvm(f"lvcreate --type snapshot -V {size} -L 32m -n huge vg")
    lvm("vgcreate -s 4g big /dev/mapper/vg-huge")
    lvm("lvcreate -an -Zn -l 50%FREE -n org big")
    assert lvm("lvs --noheadings -o lv_size big/org").strip().lstrip("<") == half
    lvm("lvcreate -s -l 100%FREE -n snap big/org")
    shown = lvm("lvs --noheadings -o lv_size,origin_size big/snap").split()
    assert [each.lstrip("<") for each in shown] == [half, half]
    lvm("vgremove -ff big")
    lvm("lvremove -f vg/huge")
    assert lvm.names() == []


def test_snapshot_usage_exa_the_largest_virtual_size(lvm):
    lvm("lvcreate --type snapshot -V 15p -L 32m -n huge vg")
    lvm("vgcreate -s 4g big /dev/mapper/vg-huge")
    lvm("lvcreate --type snapshot -c 512k -V 8191p -L 4g -n most big")
    assert lvm("lvs --noheadings --units p -o origin_size big/most").strip() == "8191.00p"
    end = 8191 << 50
    lvm.mapper.device("big-most").pwrite(fill(MIB, 5), end - MIB)
    assert lvm.mapper.device("big-most").pread(MIB, end - MIB) == fill(MIB, 5)
    lvm("vgremove -ff big")


# --- snapshot-cow-reduce, lvextend-snapshot-policy, lvextend-snapshot-dmeventd --------------------


def test_snapshot_cow_reduce_is_refused_where_exceptions_could_be_lost(small):
    small("lvcreate -L 512k -n org vg")
    small("lvcreate -s -l 32 -n snap vg/org")
    small.write("org", 64 * KIB)
    small("vgchange -an vg")
    small.refused("lvreduce -f -l 30 vg/snap")
    small("vgchange -ay vg")
    assert small.field("vg/snap", "data_percent") == "56.25"
    small.refused("lvreduce -f -l 17 vg/snap")
    small("lvreduce -f -l 18 vg/snap")
    assert small.read("snap", 64 * KIB) == bytes(64 * KIB)
    small.write("org", 8 * KIB, offset=64 * KIB)
    assert small.field("vg/snap", "lv_snapshot_invalid") == "snapshot invalid"
    small.refused("lvreduce -f -l 10 vg/snap")


def test_lvextend_snapshot_policy_does_nothing_below_the_threshold(lvm):
    (lvm.folder / "lvm.conf").write_text(
        "activation { snapshot_autoextend_threshold=50 snapshot_autoextend_percent=20\n"
        "monitoring=0 }"
    )
    lvm("lvcreate -L 64m -n org vg")
    lvm("lvcreate -s -L 16m -n snap vg/org")
    lvm.write("org", 7 * MIB)
    lvm("lvextend --use-policies vg/snap")
    assert lvm.field("vg/snap", "lv_size") == "16384.00k"
    lvm.write("org", 2 * MIB, offset=8 * MIB)
    lvm("lvextend --use-policies vg/snap")
    assert lvm.field("vg/snap", "lv_size") == "20480.00k"


def test_lvextend_snapshot_dmeventd_a_store_grows_twice(lvm):
    (lvm.folder / "lvm.conf").write_text(
        "activation { snapshot_autoextend_threshold=50 snapshot_autoextend_percent=20 }"
    )
    lvm("lvcreate -L 64m -n org vg")
    lvm("lvcreate -s -L 16m -n snap vg/org")
    sizes = [16 * MIB]
    for offset, size in ((0, 9 * MIB), (16 * MIB, 4 * MIB)):
        lvm.write("org", size, offset=offset)
        assert poll(lambda: lvm.field("vg/snap", "lv_size") != f"{sizes[-1] / KIB:.2f}k")
        sizes.append(int(float(lvm.field("vg/snap", "lv_size")[:-1]) * KIB))
    assert sizes == sorted(set(sizes))
    assert float(lvm.field("vg/snap", "data_percent")) <= 50 + 20


def test_snapshot_autoumount_dmeventd_an_overfull_snapshot_is_told(lvm, caplog):
    (lvm.folder / "lvm.conf").write_text(
        "activation { snapshot_autoextend_threshold=70 snapshot_autoextend_percent=20 }"
    )
    lvm("lvcreate -L 160m -n org vg")
    lvm("lvcreate -s -L 8m -n snap vg/org")
    lvm.write("org", 100 * MIB)
    assert poll(lambda: "Snapshot vg/snap changed state to: Invalid" in caplog.text)
    assert lvm.field("vg/snap", "lv_attr") == "swi-I-s---"


# --- snapshot-reactivate, snapshot-rename, snapshot-cluster, snapshot-remove-dmsetup --------------


def test_snapshot_reactivate_the_same_bytes_are_read_after_every_activation(lvm):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    lvm("lvcreate -L 16m -n org vg")
    lvm.write("org", 16 * MIB, seed=seed)
    lvm("lvcreate -s -L 12m -n snap vg/org")
    lvm.write("org", 3 * MIB, offset=5 * MIB, seed=seed + 1)
    lvm.write("snap", 2 * MIB, offset=MIB, seed=seed + 2)
    expected = lvm.read("org"), lvm.read("snap")
    for _ in range(5):
        lvm("vgchange -an vg")
        assert lvm.mapper.names() == []
        lvm("vgchange -ay vg")
        assert (lvm.read("org"), lvm.read("snap")) == expected


def test_snapshot_rename_an_active_snapshot_and_its_origin_are_renamed(lvm):
    lvm("lvcreate -L 16m -n org vg")
    lvm("lvcreate -s -L 8m -n snap vg/org")
    lvm.write("org", 4 * MIB)
    lvm("lvrename vg/snap vg/snew")
    lvm("lvrename vg org onew")
    assert lvm.mapper.names() == ["vg-onew", "vg-onew-real", "vg-snew", "vg-snew-cow"]
    assert lvm.read("snew") == bytes(16 * MIB)
    lvm("lvremove -f vg/onew")
    assert lvm.names() == lvm.mapper.names() == []


def test_snapshot_remove_dmsetup_an_open_snapshot_is_replaced_by_an_error(lvm):
    lvm("lvcreate -L 16m -n org vg")
    lvm("lvcreate -s -L 8m -n snap vg/org")
    with lvm.mapper.device("vg-snap").open():
        lvm.mapper.suspend("vg-snap", noflush=True)
        with pytest.raises(CowError):
            lvm.mapper.remove("vg-snap", force=True)
        assert lvm.table("snap").split() == ["0", "32768", "error"]
        with pytest.raises(CowError):
            lvm.read("snap", 4 * KIB)
        lvm.write("org", MIB)
    lvm.mapper.remove("vg-snap")
    lvm("lvremove -f vg/snap")
    assert lvm.names() == ["org"]
    assert lvm.read("org", MIB) == fill(MIB, 1)


# --- snapshot-merge, snapshot-merge-stack ---------------------------------------------------------


def make_merge(lvm: Machine, *snapshots: str) -> bytes:
    """Make an origin and snapshots of it, change the origin, and return what it held."""
    lvm("lvcreate -L 16m -n org vg")
    lvm.write("org", 16 * MIB, seed=7)
    for name in snapshots:
        lvm(f"lvcreate -s -L 12m -n {name} vg/org")
    lvm.write("org", 5 * MIB, offset=2 * MIB, seed=8)
    return fill(16 * MIB, 7)


@pytest.mark.parametrize("option", ["--merge", "--mergesnapshot"])
def test_snapshot_merge_takes_the_origin_back(lvm, option):
    before = make_merge(lvm, "snap")
    lvm(f"lvconvert {option} vg/snap")
    assert lvm.read("org") == before
    assert lvm.names() == ["org"]
    assert lvm.mapper.names() == ["vg-org"]


def test_snapshot_merge_into_a_read_only_origin_is_refused(lvm):
    make_merge(lvm, "snap")
    lvm("lvchange -pr vg/org")
    assert "read-only origin" in lvm.refused("lvconvert --merge vg/snap")
    lvm("lvchange -prw vg/org")
    lvm("lvconvert --merge vg/snap")


def test_snapshot_merge_a_merging_snapshot_is_not_removed_but_its_origin_is(lvm):
    make_merge(lvm, "snap")
    with lvm.mapper.device("vg-org").open():
        lvm("lvconvert --merge vg/snap")
        lvm.refused("lvremove -f vg/snap")
    lvm("lvremove -f vg/org")
    assert lvm.names() == []


def test_snapshot_merge_waits_for_the_next_activation_of_an_open_origin(lvm):
    before = make_merge(lvm, "snap")
    with lvm.mapper.device("vg-org").open():
        assert "Delaying merge since origin is open." in lvm("lvconvert --merge vg/snap")
        lvm("lvchange --refresh vg/org")
        assert lvm.table("org").split()[2] == "snapshot-origin"
    lvm("lvchange --refresh vg/org")
    assert poll(lambda: lvm.names() == ["org"])
    assert lvm.read("org") == before


def test_snapshot_merge_several_snapshots_and_only_one_at_a_time(lvm):
    before = make_merge(lvm, "one", "two", "three")
    with lvm.mapper.device("vg-org").open():
        lvm("lvconvert --merge vg/two")
        lvm.refused("lvconvert --merge vg/one")
        lvm.refused("lvcreate -s -L 4m -n four vg/org")
    lvm("lvchange -an vg/org --yes")
    lvm("lvchange -ay vg/org")
    assert poll(lambda: "two" not in " ".join(lvm.names()))
    assert lvm.read("org") == lvm.read("one") == lvm.read("three") == before
    lvm("lvconvert --merge vg/one")
    assert lvm.names() == ["org", "three"]


def test_snapshot_merge_by_tag_merges_several_lvs(lvm):
    for number in (1, 2):
        lvm(f"lvcreate -L 8m -n org{number} vg")
        lvm(f"lvcreate -s -L 8m -n snap{number} --addtag this vg/org{number}")
        lvm.write(f"org{number}", 4 * MIB, seed=number)
    lvm("lvconvert --merge @this")
    assert lvm.names() == ["org1", "org2"]
    assert lvm.read("org1") == lvm.read("org2") == bytes(8 * MIB)


def test_snapshot_merge_stack_a_merge_that_failed_is_tried_again(lvm):
    """The store lies on a device that fails for a while."""
    image = lvm.mapper.image(lvm.disk("c.img", 64 * MIB))
    linear = f"0 131072 linear {image.path} 0"
    lvm.mapper.create("under", linear)
    lvm.devices.remove(str(image.path))
    lvm("vgextend vg /dev/mapper/under")
    lvm("lvcreate -L 16m -n org vg")
    before = fill(16 * MIB, 7)
    lvm.write("org", 16 * MIB, seed=7)
    lvm("lvcreate -s -L 12m -n snap vg/org /dev/mapper/under")
    lvm.write("org", 5 * MIB, offset=2 * MIB, seed=8)
    with lvm.mapper.device("vg-org").open():
        lvm("lvconvert --merge vg/snap")
    start = lvm.mapper.table("vg-snap-cow").split()[4]
    hole = int(start) + 3000  # between the second and the third metadata area
    lvm("vgchange -an vg")
    broken = (
        f"0 {hole} linear {image.path} 0\n{hole} 512 error\n"
        f"{hole + 512} {131072 - hole - 512} linear {image.path} {hole + 512}"
    )
    lvm.mapper.load("under", broken)
    lvm.mapper.resume("under")
    lvm("vgchange -ay vg")
    assert poll(lambda: lvm.field("vg/org", "lv_attr")[4] == "m")
    assert lvm.field("vg/snap", "lv_attr")[4] == "m"
    assert lvm.field("vg/snap", "lv_merge_failed") == "merge failed"
    lvm("vgchange -an vg")
    lvm.mapper.load("under", linear)
    lvm.mapper.resume("under")
    lvm("vgchange -ay vg")
    assert poll(lambda: lvm.names() == ["org"])
    assert lvm.read("org") == before


# --- lvconvert-snapshot and its kin ---------------------------------------------------------------


def test_lvconvert_snapshot_refuses_what_can_be_no_store(small):
    small("lvcreate -L 128k -n org vg")
    small("lvcreate -L 128k -n other vg")
    small("lvcreate -l 2 -n tiny vg")
    small("lvcreate -s -L 64k -n snap vg/org")
    small.refused("lvconvert -y -s vg/other vg/org")
    small.refused("lvconvert -y -s vg/org vg/org")
    small.refused("lvconvert -y -s vg/other vg/snap")
    small.refused("lvconvert -y -s vg/snap vg/other")
    assert "smaller" in small.refused("lvconvert -y -s vg/org vg/tiny")


def test_lvconvert_snapshot_a_striped_store_is_taken(lvm):
    lvm("lvcreate -L 16m -n org vg")
    lvm("lvcreate -i 2 -L 16m -n cow vg")
    lvm("lvconvert -y -s vg/org vg/cow")
    lvm.write("org", 6 * MIB)
    assert lvm.read("cow") == bytes(16 * MIB)
    assert lvm.field("vg/cow", "stripes,lv_attr").split()[-1] == "swi-a-s---"


@pytest.fixture
def kinds(machine):
    """A VG "w" with an LV of every kind there is."""
    text = every_kind()
    backup = machine.folder / "w.txt"
    backup.write_text(text)
    for number, pv in enumerate(vg_from_text(parse(text)).pvs):
        path = machine.disk(f"{number}.img", (pv.dev_size or 0) * 512)
        machine(f"pvcreate --uuid {dashed_id(pv.id)} --restorefile {backup} {path}")
    machine(f"vgcfgrestore -f {backup} w")
    return machine


PARTS = ["mir_mimage_0", "r1_rimage_0", "r0_rimage_1", "pool_tdata", "pool_tmeta", "cached_corig"]
"""Hidden LVs that others are made of: a mirror, raid1, raid0, a thin pool, a cached LV."""


@pytest.mark.parametrize("part", [*PARTS, "pool"])
@pytest.mark.parametrize("command", ["lvcreate -s -L 4m w/{}", "lvconvert -y -s w/{} w/lin2"])
def test_lvconvert_snapshot_mirror_raid_thin_cache_parts_are_no_origin(kinds, part, command):
    before = kinds.field("w", "vg_seqno", "vgs")
    assert kinds.run(command.format(part)) == 5
    assert kinds.said.strip()
    assert kinds.field("w", "vg_seqno", "vgs") == before


@pytest.mark.parametrize("store", [*PARTS, "pool", "r1", "thin", "cached"])
def test_lvconvert_snapshot_mirror_raid_thin_cache_are_no_store(kinds, store):
    before = kinds.field("w", "vg_seqno", "vgs")
    assert kinds.run(f"lvconvert -y -s w/lin2 w/{store}") == 5
    assert kinds.said.strip()
    assert kinds.field("w", "vg_seqno", "vgs") == before


@pytest.mark.parametrize("origin", ["thin", "r1", "cached"])
def test_snapshot_raid_thin_cache_what_cannot_run_is_no_origin(kinds, origin):
    """snapshot-raid, lvconvert-cache-snapshot, snapshot-merge-thin: the kinds that are not run."""
    before = kinds.field("w", "vg_seqno", "vgs")
    assert kinds.run(f"lvcreate -s -L 4m w/{origin}") == 5
    kind = {"r1": "raid1", "cached": "cache"}.get(origin, origin)
    assert kind in kinds.said
    assert kinds.field("w", "vg_seqno", "vgs") == before


def test_lvcreate_thin_snap_without_a_size_means_a_thin_one(kinds):
    assert kinds.run("lvcreate -s w/thin") == 5
    assert "thin" in kinds.said
    assert kinds.run("lvcreate -s w/lin2") == 5
    assert "Please specify either size or extents with snapshots." in kinds.said
