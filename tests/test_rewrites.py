"""Rewrites of an origin whose chunks every snapshot has copied: nothing is copied twice, and what
changes the set of snapshots is noticed at once.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
from support import SECTOR, Rig, image, stamp

import cow


@pytest.fixture
def dm():
    with cow.Mapper(durability="process") as mapper:
        yield mapper


@pytest.fixture
def rig(dm, tmp_path):
    return Rig(dm, tmp_path)


def settle(rig: Rig, sector: int = 0, count: int = 64) -> None:
    """Write a range twice: the first write makes the copies, the second needs none."""
    rig.write("base", sector, count, tag=1)
    rig.write("base", sector, count, tag=2)


def test_a_rewrite_copies_nothing_more(rig):
    rig.snap("snap", "P 8")
    settle(rig)
    usage = rig.usage()
    rig.write("base", 0, 64, tag=3)
    rig.write("base", 3, 1, tag=4)
    assert rig.usage() == usage
    assert rig.read("snap") == rig.before


@pytest.mark.parametrize("words", ["P 8", "P 4", "N 1", "P 64"])
def test_a_snapshot_that_joins_later_gets_its_copies(rig, words):
    rig.snap("old", "P 8")
    settle(rig)
    moment = rig.read("base")
    rig.snap("new", words, cow_sectors=4096)
    rig.write("base", 0, 64, tag=3)
    assert rig.read("new") == moment
    assert rig.read("old") == rig.before


def test_a_snapshot_loaded_again_with_an_empty_store_gets_its_copies(rig):
    rig.snap("snap", "P 8")
    settle(rig)
    moment = rig.read("base")
    rig.cows["snap"] = image(rig.folder / "second.cow", 2048)
    rig.dm.suspend("base")
    rig.dm.load("snap", rig.line("snap"))
    rig.dm.resume("snap")
    rig.dm.resume("base")
    rig.write("base", 0, 64, tag=3)
    assert rig.read("snap") == moment


def test_rewrites_go_on_when_one_of_two_snapshots_is_removed(rig):
    rig.snap("one", "P 8")
    rig.snap("two", "P 16")
    settle(rig)
    rig.dm.remove("one")
    rig.write("base", 0, 128, tag=3)
    assert rig.read("two") == rig.before


def test_a_snapshot_shorter_than_the_origin_gets_copies_up_to_its_end(rig):
    path = image(rig.folder / "short.cow", 2048)
    rig.dm.suspend("base")
    rig.dm.create("short", f"0 20 snapshot base-real {path} P 16")
    rig.dm.resume("base")
    for tag in (1, 2, 3):
        rig.write("base", 24, 16, tag)  # from behind the end, inside the last chunk, on
        rig.write("base", 20, 4, tag)
    rig.write("base", 16, 8, tag=4)
    assert rig.read("short", 0, 20) == rig.before[: 20 * SECTOR]


def test_an_origin_that_gets_longer_is_copied_out_there_too(dm, tmp_path):
    path = image(tmp_path / "origin.img", stamp(0, 256, 0))
    cows = [image(tmp_path / f"{name}.cow", 2048) for name in "ab"]
    dm.create("real", f"0 128 linear {path} 0")
    dm.create("base", "0 128 snapshot-origin real")
    dm.create("a", f"0 128 snapshot real {cows[0]} P 8")
    device = dm.device("base")
    for tag in (1, 2):
        device.pwrite(stamp(0, 128, tag), 0)
    dm.suspend("base")
    dm.load("real", f"0 256 linear {path} 0")
    dm.resume("real")
    dm.load("base", "0 256 snapshot-origin real")
    dm.create("b", f"0 256 snapshot real {cows[1]} P 8")
    dm.resume("base")
    moment = device.pread(256 * SECTOR, 0)
    for tag in (3, 4):
        for sector in range(0, 256, 8):
            device.pwrite(stamp(sector, 8, tag), sector * SECTOR)
    assert dm.device("b").pread(256 * SECTOR, 0) == moment
    assert dm.device("a").pread(128 * SECTOR, 0) == stamp(0, 128, 0)


def test_batches_of_rewrites_and_first_writes_in_any_order_keep_every_moment(rig, seed):
    rng = random.Random(seed)
    moments = {}
    state = bytearray(rig.before)
    for number, words in enumerate(["P 8", "N 2", "PO 16", "P 1", "P 64"]):
        name = f"s{number}"
        rig.snap(name, words, cow_sectors=8192)
        moments[name] = bytes(state)
        for turn in range(6):
            size = rng.choice([1, 3, 8, 20])
            firsts = [rng.randrange(2048 - size) for _ in range(rng.randrange(1, 200))]
            blocks = [stamp(first, size, 100 * number + turn + 1) for first in firsts]
            data = np.frombuffer(b"".join(blocks), np.uint8).reshape(len(firsts), -1)
            rig.dm.device("base").write_many(np.array(firsts, np.uint64) * SECTOR, data)
            for first, block in zip(firsts, blocks, strict=True):
                state[first * SECTOR : first * SECTOR + len(block)] = block
    assert rig.read("base") == bytes(state)
    assert {name: rig.read(name) for name in moments} == moments
