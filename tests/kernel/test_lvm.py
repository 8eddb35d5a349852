"""Random commands of lvm: `cow lvm` does what the real lvm2 does; each goes on for the other."""

from __future__ import annotations

import random

import pytest

from . import lvm_judge
from .lvm_judge import Cow, Real
from .lvm_programs import VG, Author

FIXED = (2, 4, 3)
TURNS_FIXED = (77, 1)
FRESH = 2
STEPS = 20
TURNS = 4


@pytest.fixture
def folder(judge):
    """A folder with the same empty disks for both."""
    folder = judge.new_folder()
    for side in ("real", "cow"):
        lvm_judge.make_disks(folder / side)
    return folder


def check(judge, folder, number: int) -> None:
    author = Author(number)
    steps = author.begin() + author.write(STEPS)
    real, ours = Real(judge.running(), folder / "real"), Cow(folder / "cow")
    try:
        found = lvm_judge.difference(real, ours, steps)
    finally:
        real.close()
        ours.close()
    assert not found, f"program {number}: {found}\nsteps = [\n{listed(steps)}]"


def listed(steps) -> str:
    return "".join(f"    {step!r},\n" for step in steps)


@pytest.mark.parametrize("number", FIXED)
def test_commands_have_the_same_status_reports_tables_and_data(judge, folder, number):
    check(judge, folder, number)


@pytest.mark.parametrize("number", range(FRESH))
def test_new_commands_have_the_same_status_reports_tables_and_data(judge, folder, seed, number):
    check(judge, folder, (seed << 8) + number)


def take_turns(judge, folder, number: int) -> None:
    """Let both go on in turns with the disks that the other left."""
    dice = random.Random(number)
    author = Author(number)
    cow_first = dice.random() < 0.5
    written = author.begin()
    for turn in range(TURNS):
        written += author.write(7, look=100)
        ours = (turn % 2 == 0) == cow_first
        done, left = take_turn(judge, folder, written, ours)
        where = f"seed {number}, turn {turn} of {'cow' if ours else 'the real lvm2'}\n"
        where += listed(written)
        for name, (answers, contents) in looked(judge, folder, author.pvs).items():
            complaints = lvm_judge.complaints(answers)
            assert not complaints, f"{where}{name} complains: {complaints}"
            assert contents == left, f"{where}{name} reads other data, after {done}"
        written = []


@pytest.mark.parametrize("number", TURNS_FIXED)
def test_each_goes_on_with_the_disks_that_the_other_left(judge, folder, number):
    take_turns(judge, folder, number)


@pytest.mark.parametrize("number", range(FRESH))
def test_each_goes_on_with_new_commands(judge, folder, seed, number):
    take_turns(judge, folder, (seed << 8) + number)


def take_turn(judge, folder, steps, ours: bool):
    """Run steps on one side, on the disks in real/; return the answers and the data of the LVs."""
    side = Cow(folder / "real") if ours else Real(judge.running(), folder / "real")
    try:
        active = [["lvm", "vgchange", "-ay", VG], ["settle"]]
        # A merge that was put off is done before the other looks.
        done = side.steps([*active, *steps, ["lvm", "vgchange", "-an", VG], *active])
        contents = side.contents()
        assert side.lvm(["vgchange", "-an", VG])[0] == 0
    finally:
        side.close()
    return done, visible(contents)


def looked(judge, folder, pvs: int):
    """Return what either side's checks answer, and what it reads of every LV."""
    found = {}
    for name in ("real", "cow"):
        ours = name == "cow"
        side = Cow(folder / "real") if ours else Real(judge.running(), folder / "real")
        try:
            answers = side.steps([["check", pvs]])[0]
            answers += side.steps([["lvm", "vgchange", "-ay", VG], ["settle"]])[:1]
            contents = visible(side.contents())
            answers.append(side.lvm(["vgchange", "-an", VG]))
            found[name] = answers, contents
        finally:
            side.close()
    return found


def visible(contents):
    """Leave out the layers below snapshots."""
    layers = ("-real", "-cow", "_vorigin")
    return {name: data for name, data in contents.items() if not name.endswith(layers)}
