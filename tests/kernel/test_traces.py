"""Random traces: cow answers as the real kernel does, and leaves the same bytes."""

from __future__ import annotations

import pytest
from support import trace

from .author import Author
from .programs import Program

FIXED = 8  # groups of ten
FRESH = 12
STEPS = 60


def check_group(judge, first: int) -> None:
    """Check ten programs; the last of them has larger chunks than the dice give."""
    for number in range(first, first + 9):
        judge.check(Author(number).write(STEPS))
    largest = (512, 1024, 2048)[first // 10 % 3]
    judge.check(Author(first + 9, largest).write(STEPS // 2))


@pytest.mark.parametrize("group", range(FIXED))
def test_a_trace_has_the_same_answers_and_bytes(judge, group):
    check_group(judge, 10 * group)


@pytest.mark.parametrize("group", range(FRESH))
def test_a_new_trace_has_the_same_answers_and_bytes(judge, seed, group):
    check_group(judge, (seed << 10) + 10 * group)


@pytest.mark.parametrize("number", range(900, 905))
def test_a_trace_with_power_durability_has_the_same_answers_and_bytes(judge, number):
    judge.check(Author(number).write(STEPS), "power")


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
