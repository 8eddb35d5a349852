"""Either is killed in the middle of its work; the other opens what it left, goes on and merges."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import count

import cow

from .sides import (
    GO_ON_MERGING,
    MERGE,
    MERGED,
    STACK,
    Contents,
    Ours,
    Theirs,
    Write,
    apply,
    check_merged,
    check_views,
    go_on,
    kernel_writes,
    make_images,
    nothing_written,
    random_writes,
)
from .uml import Kernel


@contextmanager
def victim(
    folder: Path,
    images: dict[str, Path],
    writes: list[Write],
    durability: str,
    merge_to: int | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """A process that works through cow; it is killed at the end of the block.

    Or it kills itself in the middle of a merge, when the store is down to `merge_to` sectors.
    """
    job = folder / "victim.json"
    paths = {name: str(path) for name, path in images.items()}
    job.write_text(
        json.dumps(
            {
                "paths": paths,
                "durability": durability,
                "steps": STACK,
                "writes": writes,
                "merge": [] if merge_to is None else MERGE,
                "left": merge_to,
            }
        )
    )
    places = [str(Path(__file__).parent.parent), *sys.path]
    with subprocess.Popen(
        [sys.executable, "-m", "kernel.victim", str(job)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def acknowledged(line: str) -> int:
    assert line.startswith("@did "), line
    return int(line.split()[1])


def allocated(before: Contents) -> int:
    """Return the sectors in use in the store of s0: a chunk is a sector, 32 make an area full."""
    exceptions = int((before["s0"] != before["base"]).any(axis=1).sum())
    return 2 + exceptions + exceptions // 32


def note_cut(whose: str, image: Path, before: Contents) -> None:
    """Note how far a merge had come when it was cut short."""
    records = cow.store.open(str(image)).nr_exceptions
    left = 2 + records + records // 32
    how = "over" if not records else "not begun" if left >= allocated(before) else "under way"
    count(f"merges of {whose} cut short: {how}")


@pytest.mark.parametrize("durability", ["process", "power"])
@pytest.mark.parametrize("number", range(6))
def test_the_kernel_goes_on_where_cow_was_killed(judge, seed, number, durability):
    rng = random.Random(f"{seed} {number} {durability}")
    folder = judge.new_folder()
    images = make_images(folder)
    writes = random_writes(rng, 1000)
    stop = rng.choice((rng.randrange(20), rng.randrange(600)))
    with victim(folder, images, writes, durability) as process:
        assert process.stdout is not None
        while acknowledged(process.stdout.readline()) < stop:
            pass
        time.sleep(rng.random() * 0.001)
        process.kill()
        done = max(map(acknowledged, process.stdout.readlines()), default=stop)
    count("kills of cow while it wrote")
    with Theirs(judge.running(), images, judge.folder) as kernel:
        kernel.run(STACK)
        go_on(kernel, rng, check_views(kernel.views(), writes, done))


@pytest.mark.parametrize("number", range(4))
def test_cow_goes_on_where_the_kernel_was_killed(judge, seed, number):
    rng = random.Random(f"{seed} {number}")
    folder = judge.new_folder()
    images = make_images(folder)
    writes = random_writes(rng, 1000)
    stop = rng.choice((rng.randrange(20), rng.randrange(600)))
    kernel = Kernel(judge.folder)
    kernel.start(images, [*STACK, ["work", kernel_writes(writes)]])
    done = -1
    while done < stop:
        done = acknowledged(kernel.hear("@did"))
    time.sleep(rng.random() * 0.001)
    kernel.kill()
    done = max([done, *map(acknowledged, kernel.heard())])
    count("plugs pulled while the kernel wrote")
    with Ours(images) as ours:
        ours.run(STACK)
        go_on(ours, rng, check_views(ours.views(), writes, done))


@pytest.mark.parametrize("number", range(12))
def test_the_kernel_ends_a_merge_that_cow_was_killed_in(judge, seed, number):
    rng = random.Random(f"{seed} {number}")
    folder = judge.new_folder()
    images = make_images(folder)
    writes = random_writes(rng, 400)
    before = apply(nothing_written(), writes)
    left = rng.randint(2, allocated(before))
    with victim(folder, images, writes, "process", left) as process:
        assert process.wait() == -signal.SIGKILL
    note_cut("cow", images["c0"], before)
    with Theirs(judge.running(), images, judge.folder) as kernel:
        kernel.run([*GO_ON_MERGING, MERGED])
        check_merged(kernel, before)


@pytest.mark.parametrize("number", range(4))
def test_cow_ends_a_merge_that_the_kernel_was_killed_in(judge, seed, number):
    rng = random.Random(f"{seed} {number}")
    folder = judge.new_folder()
    images = make_images(folder)
    writes = random_writes(rng, 400)
    before = apply(nothing_written(), writes)
    kernel = Kernel(judge.folder)
    wait = ["mergeto", "base", rng.randint(2, allocated(before))]
    kernel.start(images, [*STACK, ["work", kernel_writes(writes)], *MERGE, wait])
    kernel.hear("@merging")
    kernel.kill()
    note_cut("the kernel", images["c0"], before)
    with Ours(images) as ours:
        ours.run([*GO_ON_MERGING, MERGED])
        check_merged(ours, before)
