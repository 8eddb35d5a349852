"""Random traces: cow answers as the real kernel does, and leaves the same bytes."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest
from support import trace

from .author import Author
from .programs import Program
from .tally import Tally

FIXED = range(200)
GROUP = 10


@functools.cache
def fixed_program(number: int) -> Program:
    return Author(number).write()


def groups(numbers: range) -> list[range]:
    return [numbers[at : at + GROUP] for at in range(0, len(numbers), GROUP)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make as many groups of new programs as are asked for."""
    option = metafunc.config.option
    if "new_group" in metafunc.fixturenames:
        first, count = option.seed << 16, option.programs
        if option.program is not None:
            first, count = option.program, 1
        new = groups(range(first, first + count))
        metafunc.parametrize("new_group", new, ids=map(str, range(len(new))))


def durability(number: int) -> str:
    return "process" if number % 8 else "power"


@pytest.mark.parametrize("group", groups(FIXED), ids=lambda group: str(group.start))
def test_a_trace_has_the_same_answers_and_bytes(judge, group):
    for number in group:
        judge.check(fixed_program(number), durability(number))


def test_a_new_trace_has_the_same_answers_and_bytes(judge, new_group):
    for number in new_group:
        judge.check(Author(number).write(), durability(number))


def test_a_seed_gives_the_same_program_in_every_process():
    """Fixed programs, written where strings are hashed with other seeds."""
    command = "from kernel.author import Author; print([Author(n).write() for n in range(5)])"
    places = os.pathsep.join(sys.path)
    written = {
        subprocess.run(
            [sys.executable, "-c", command],
            env=os.environ | {"PYTHONPATH": places, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert written == {f"{[fixed_program(number) for number in range(5)]}\n"}


def test_traces_make_everything_happen_and_go_on_after_it():
    tally = Tally()
    for number in FIXED:
        tally.watch(fixed_program(number))
    assert not tally.lacking(), "\n".join(tally.lines())


@pytest.mark.parametrize("name", [name for name in trace.names() if name != "bad_tables"])
def test_this_kernel_answers_a_recorded_trace_as_the_recorded_one(judge, name):
    golden = trace.load(name)
    folder = judge.new_folder()
    images = {image.removeprefix("cow_"): spec for image, spec in golden.images.items()}
    paths = judge.place(Program(0, images), folder)
    assert judge.ask(paths, golden.steps) == golden.answers
    trace.compare_final(
        golden,
        {image: paths[image.removeprefix("cow_")].read_bytes() for image in golden.images},
    )
