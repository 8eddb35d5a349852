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
    CHUNKS,
    GO_ON_MERGING,
    MERGE,
    MERGED,
    STACK,
    Ours,
    Step,
    Theirs,
    Write,
    apply,
    check_merged,
    check_views,
    go_on,
    kernel_writes,
    make_images,
    nothing_written,
    random_stack,
    random_writes,
)
from .uml import Kernel


@contextmanager
def victim(
    folder: Path,
    images: dict[str, Path],
    stack: list[Step],
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
                "steps": stack,
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


def allocated(writes: list[Write], chunk: int) -> int:
    """Return the sectors that writes take in the store of s0; one record is 16 bytes."""
    chunks = {
        number
        for name, first, count, _ in writes
        for number in range(first // chunk, (first + count - 1) // chunk + 1)
        if name in ("base", "s0")
    }
    return in_use(len(chunks), chunk)


def in_use(exceptions: int, chunk: int) -> int:
    return (2 + exceptions + exceptions // (32 * chunk)) * chunk


def note_cut(whose: str, image: Path, began: int) -> None:
    """Note how far a merge of a store with so many sectors had come when it was cut short."""
    store = cow.store.open(str(image))
    left = in_use(store.nr_exceptions, store.chunk_size)
    how = "over" if not store.nr_exceptions else "not begun" if left >= began else "under way"
    count(f"merges of {whose} cut short: {how}")


@pytest.mark.parametrize("durability", ["process", "power"])
@pytest.mark.parametrize("number", range(6))
def test_the_kernel_goes_on_where_cow_was_killed(judge, seed, number, durability):
    rng = random.Random(f"{seed} {number} {durability}")
    folder = judge.new_folder()
    images = make_images(folder)
    writes = random_writes(rng, 1000)
    stop = rng.choice((rng.randrange(20), rng.randrange(600)))
    with victim(folder, images, random_stack(rng), writes, durability) as process:
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
    kernel.start(images, [*random_stack(rng), ["work", kernel_writes(writes)]])
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
    chunk = rng.choice(CHUNKS)
    began = allocated(writes, chunk)
    left = rng.randint(2 * chunk, began)
    with victim(folder, images, random_stack(rng, chunk), writes, "process", left) as process:
        assert process.wait() == -signal.SIGKILL
    note_cut("cow", images["c0"], began)
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
    chunk = rng.choice(CHUNKS)
    began = allocated(writes, chunk)
    wait = ["mergeto", "base", rng.randint(2 * chunk, began)]
    steps = [*random_stack(rng, chunk), ["work", kernel_writes(writes)], *MERGE, wait]
    kernel.start(images, steps)
    kernel.hear("@merging")
    kernel.kill()
    note_cut("the kernel", images["c0"], began)
    with Ours(images) as ours:
        ours.run([*GO_ON_MERGING, MERGED])
        check_merged(ours, before)
