"""What one of the two wrote the other opens, continues and merges, in turns.

A program in parts, with everything removed between two parts, runs on the kernel alone. Then cow
and the kernel take turns on one set of images: every answer and every byte stays what it was.
"""

from __future__ import annotations

import pytest

from .author import Author


def check(judge, seed: int, parts: int = 4) -> None:
    program = Author(seed, parts=parts).write(30 * parts)
    alone = judge.place(program, judge.new_folder())
    answers = [judge.ask(alone, part) for part in program.parts()]
    for first in (0, 1):
        turns = judge.place(program, judge.new_folder())
        for number, (part, expected) in enumerate(zip(program.parts(), answers, strict=True)):
            if number % 2 == first:
                judge.replay(program, part, expected, turns)
            else:
                assert judge.ask(turns, part) == expected, f"seed {seed}, part {number}"
        judge.compare_images(program, alone, turns)


@pytest.mark.parametrize("number", range(6))
def test_stores_go_from_one_to_the_other(judge, number):
    check(judge, 100 + number)


@pytest.mark.parametrize("number", range(8))
def test_stores_of_a_new_program_go_from_one_to_the_other(judge, seed, number):
    check(judge, (seed << 10) + 900 + number)
