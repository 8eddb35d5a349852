"""VGs of many LVs: what one command does grows with their number, not with its square.

Calls of Python functions are counted, which is the same on every machine.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest

import cow
from cow import lvm
from cow.cli.main import main

MIB = 1 << 20
FEW, MANY = 40, 120
MOST = 1.6
"""How much more than MANY / FEW times the calls may be: some sort, and none looks at all pairs."""


def calls(work: Callable[[], object]) -> int:
    """Return how many Python functions some work calls."""
    count = 0

    def note(frame: FrameType, event: str, arg: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def make(path: Path, count: int) -> str:
    """Make a VG of `count` LVs, a quarter of them with a snapshot."""
    path.touch()
    os.truncate(path, 2048 * MIB)
    lvm.create_pv(str(path), metadata_size=8 * MIB)
    with (
        cow.Mapper(durability="process") as dm,
        lvm.create_vg("vg", [str(path)], mapper=dm) as vg,
    ):
        for number in range(count):
            vg.create_lv(f"a{number}", extents=1)
        for number in range(count // 4):
            vg.create_snapshot(f"a{number}", f"s{number}", extents=1)
        vg.deactivate()
    return str(path)


@pytest.fixture(scope="module")
def disks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    return [make(folder / f"{count}.img", count) for count in (FEW, MANY)]


def grown(disks: list[str], work: Callable[[lvm.VolumeGroup], object]) -> float:
    """Return how much more calls a piece of work takes in the larger VG, all of it active."""
    found = []
    for disk in disks:
        with (
            cow.Mapper(durability="process") as dm,
            lvm.VolumeGroup.open([disk], mapper=dm) as vg,
        ):
            vg.activate()
            found.append(calls(functools.partial(work, vg)))
    return found[1] / found[0]


def test_activation(disks):
    assert grown(disks, lambda vg: [vg.deactivate(), vg.activate()]) < MOST * MANY / FEW


def test_a_snapshot(disks):
    def take(vg: lvm.VolumeGroup) -> None:
        vg.create_snapshot("a0", "new", extents=1)
        vg.remove_lv("new")

    assert grown(disks, take) < MOST * MANY / FEW


@pytest.mark.parametrize("verb", ["lvs", "vgs", "pvs"])
def test_a_report(disks, verb):
    def report(disk: str) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main(["lvm", verb, "-a", "-o", "all", "--devices", disk]) == 0
        assert out.getvalue().count("\n") > 1

    report(disks[0])  # what is imported is not counted
    few, many = (calls(functools.partial(report, disk)) for disk in disks)
    assert many / few < MOST * MANY / FEW
