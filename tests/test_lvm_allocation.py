"""Extents go where the real LVM2 puts them, and whatever is asked for, no extent is given twice.

tests/data/lvm/allocation.jsonl has sessions with lvm2 2.03.16, recorded by
tests/kernel/record_allocation.py.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from types import SimpleNamespace

import pytest
from support.lvm import DATA

from cow.lvm.allocation import POLICIES, PVRange, allocate, free_areas
from cow.lvm.check import problems
from cow.lvm.create import LVOptions, create_lv
from cow.lvm.edit import extend_lv, reduce_lv, remove_lv
from cow.lvm.errors import LVMError, NoSpaceError
from cow.lvm.metadata import LogicalVolume, PhysicalVolume, VolumeGroupMetadata
from cow.lvm.names import new_id

SESSIONS = [json.loads(line) for line in (DATA / "allocation.jsonl").read_text().splitlines()]


def make_vg(counts: list[int], extent_size: int = 2048) -> VolumeGroupMetadata:
    """Return a VG of PVs with so many extents; no device is behind it, which nobody sees."""
    vg = VolumeGroupMetadata("vg", new_id(), extent_size=extent_size)
    for number, count in enumerate(counts):
        pv = PhysicalVolume(f"pv{number}", new_id(), pe_start=2048, pe_count=count)
        pv.device = SimpleNamespace(size=(2048 + count * extent_size) * 512)
        vg.pvs.append(pv)
    return vg


def segments(lv: LogicalVolume) -> list:
    return [
        [s.extent_count, s.stripe_size, [[lv.vg.pvs.index(a.of), a.start] for a in s.areas]]
        for s in lv.segments
    ]


@pytest.mark.parametrize("number", range(len(SESSIONS)))
def test_a_session_with_the_real_lvm_goes_the_same_way(number):
    session = SESSIONS[number]
    counts = [(size * 2048 - 2048) // session["extent_size"] for size in session["sizes"]]
    vg = make_vg(counts, session["extent_size"])
    for index, step in enumerate(session["steps"]):
        where = f"step {index}: {step}"
        new = vg.copy()
        try:
            do(new, step)
            code = 0
        except LVMError as error:
            code = error.exit_code
        assert code == step["code"], where
        if code:
            continue
        assert problems(new) == []
        vg = new
        if "segments" in step:
            assert segments(vg.lv(step["name"])) == step["segments"], where


def do(vg: VolumeGroupMetadata, step: dict) -> None:
    ranges = [PVRange(vg.pvs[step["pv"]])] if "pv" in step else None
    name, extents = step["name"], step.get("extents", 0)
    if step["verb"] == "lvcreate":
        size = step["stripe_size"] if step["stripes"] > 1 else None
        options = LVOptions(
            stripes=step["stripes"], stripe_size=size, policy=step["policy"], ranges=ranges
        )
        create_lv(vg, name, extents, options)
    elif step["verb"] == "lvextend":
        extend_lv(vg.lv(name), extents, ranges=ranges)
    elif step["verb"] == "lvreduce":
        reduce_lv(vg.lv(name), extents)
    else:
        remove_lv(vg, vg.lv(name))


def test_random_requests_never_give_an_extent_twice(seed):
    rng = random.Random(seed)
    refused = Counter()
    for _ in range(40):
        vg = make_vg([rng.randrange(0, 40) for _ in range(rng.randrange(1, 5))])
        for index in range(40):
            new = vg.copy()
            lvs = [lv.name for lv in new.lvs]
            step = {
                "verb": rng.choice(["lvcreate", "lvextend", "lvremove", "lvreduce"])
                if lvs
                else "lvcreate",
                "name": f"l{index}",
                "extents": rng.randrange(1, 60),
                "stripes": rng.randrange(1, 5),
                "stripe_size": 8 << rng.randrange(5),
                "policy": rng.choice([None, *POLICIES]),
            }
            if step["verb"] != "lvcreate":
                step["name"] = rng.choice(lvs)
            try:
                do(new, step)
            except LVMError as error:
                refused[type(error).__name__] += 1
                continue
            vg = new
            wrong = problems(vg)
            assert not wrong, f"seed {seed}: {wrong}"
            used = sum(s.extent_count for lv in vg.lvs for s in lv.segments)
            assert vg.free_extents == vg.extent_count - used
            assert sum(area.count for area in free_areas(vg)) == vg.free_extents
    assert refused["NoSpaceError"]


@pytest.mark.parametrize("policy", [None, "cling", "normal", "anywhere"])
def test_every_free_extent_can_be_had(policy):
    vg = make_vg([10, 20, 5])
    create_lv(vg, "a", 7, LVOptions(ranges=[PVRange(vg.pvs[1], 3, 7)]))
    if policy == "cling":
        with pytest.raises(NoSpaceError, match="more required"):
            create_lv(vg, "b", 28, LVOptions(policy=policy))
    else:
        create_lv(vg, "b", 28, LVOptions(policy=policy))
        assert vg.free_extents == 0


def test_stripes_are_on_different_pvs_but_anywhere():
    vg = make_vg([4, 4])
    with pytest.raises(LVMError, match="must not exceed number of physical volumes"):
        create_lv(vg, "a", 3, LVOptions(stripes=3))
    create_lv(vg, "a", 3, LVOptions(stripes=3, policy="anywhere"))
    assert len({area.of for area in vg.lv("a").segments[0].areas}) == 2


def test_a_pv_that_is_not_allocatable_is_left_alone():
    vg = make_vg([10, 10])
    vg.pvs[0].status.clear()
    create_lv(vg, "a", 10)
    assert segments(vg.lv("a")) == [[10, 0, [[1, 0]]]]
    with pytest.raises(NoSpaceError, match="10 extents needed, but only 0 available"):
        create_lv(vg, "b", 10)


def test_extents_come_from_the_ranges_that_are_named():
    vg = make_vg([10, 10])
    ranges = [PVRange(vg.pvs[1], 2, 3), PVRange(vg.pvs[0], 8), PVRange(vg.pvs[1], 7, 1)]
    create_lv(vg, "a", 6, LVOptions(ranges=ranges))
    places = [(area.of.label, area.start) for s in vg.lv("a").segments for area in s.areas]
    assert sorted(places) == [("pv0", 8), ("pv1", 2), ("pv1", 7)]


def test_an_lv_grows_right_behind_itself_as_one_segment():
    vg = make_vg([10])
    lv = create_lv(vg, "a", 3)
    extend_lv(lv, 5)
    assert segments(lv) == [[5, 0, [[0, 0]]]]


def test_a_vast_striped_lv_is_placed_without_looking_at_every_extent():
    vg = make_vg([2**31, 2**31 - 7, 2**31 - 11])
    lv = vg.new_lv("a")
    allocate(lv, 3 * 2**30, stripes=3, stripe_size=8, policy="anywhere")
    assert lv.extent_count == 3 * 2**30
