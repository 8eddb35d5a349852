"""Random traces: cow answers as the real kernel does, and leaves the same bytes."""

from __future__ import annotations

import functools

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


def groups(count: int) -> list[range]:
    return [range(first, first + GROUP) for first in range(0, count, GROUP)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make as many groups of new programs as are asked for."""
    if "new_group" in metafunc.fixturenames:
        count = metafunc.config.getoption("programs")
        metafunc.parametrize("new_group", groups(count), ids=lambda group: str(group.start))


def durability(number: int) -> str:
    return "process" if number % 8 else "power"


@pytest.mark.parametrize("group", groups(len(FIXED)), ids=lambda group: str(group.start))
def test_a_trace_has_the_same_answers_and_bytes(judge, group):
    for number in group:
        judge.check(fixed_program(number), durability(number))


def test_a_new_trace_has_the_same_answers_and_bytes(judge, seed, new_group):
    for number in new_group:
        judge.check(Author((seed << 16) + number).write(), durability(number))


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
