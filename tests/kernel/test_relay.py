"""What one of the two wrote the other opens, continues and merges, in turns.

A program in parts, with everything removed between two parts, runs on the kernel alone. Then cow
and the kernel take turns on one set of images: every answer and every byte stays what it was.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest
from support import count

from .author import Author
from .programs import Program
from .sides import (
    Ours,
    Theirs,
    apply,
    check_contents,
    go_on,
    make_images,
    nothing_written,
    random_writes,
    stack,
)
from .tally import crossings

PARTS = 4
FIXED = range(100, 112)


def written(seed: int) -> Program:
    return Author(seed, PARTS).write(30 * PARTS)


def check(judge, seed: int) -> None:
    program = written(seed)
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
    for what, number in crossings(program).items():
        count(f"stores of the other {what}, each way", number)


@pytest.mark.parametrize("number", FIXED)
def test_stores_go_from_one_to_the_other(judge, number):
    check(judge, number)


@pytest.mark.parametrize("number", range(12))
def test_stores_of_a_new_program_go_from_one_to_the_other(judge, seed, number):
    check(judge, (seed << 16) + 60000 + number)


def test_relayed_stores_are_opened_continued_and_merged():
    total = sum((crossings(written(seed)) for seed in FIXED), Counter())
    assert total.keys() == {"opened", "continued", "merged"}


@pytest.mark.parametrize("chunks", [(1, 4), (8, 1), (2, 32), (128, 16), (1024, 512)])
@pytest.mark.parametrize("direction", ["cow to kernel", "kernel to cow"])
def test_the_other_opens_continues_and_merges_a_store(judge, seed, direction, chunks):
    rng = random.Random(f"{seed} {direction} {chunks}")
    images = make_images(judge.new_folder(), 8192)
    sides = [Ours(images), Theirs(judge.running(), images, judge.folder)]
    first, second = sides if direction == "cow to kernel" else reversed(sides)
    writes = random_writes(rng, 100)
    with first as side:
        side.run(stack({"c0": f"P {chunks[0]}", "c1": f"PO {chunks[1]}"}))
        side.write(writes)
    with second as side:
        side.run(stack({"c0": "PO 0", "c1": "P 0"}))
        contents = apply(nothing_written(), writes)
        check_contents(side.views(), contents)
        go_on(side, rng, contents)
    count(f"stores opened, continued and merged, {direction}")
