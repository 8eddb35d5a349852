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

import numpy as np
import pytest
from support import count

import cow

from .sides import (
    CHUNKS,
    GO_ON_MERGING,
    MERGE,
    MERGED,
    SLOWLY,
    STACK,
    Contents,
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
    words,
)
from .uml import Kernel


@contextmanager
def victim(
    folder: Path,
    images: dict[str, Path],
    stack: list[Step],
    writes: list[Write],
    durability: str,
    after: float | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """A process that works through cow; it is killed at the end of the block.

    Or it kills itself `after` so many seconds of a merge.
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
                "merge": [] if after is None else [*SLOWLY, *MERGE],
                "after": after,
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


def chunks_of_s0(writes: list[Write], chunk: int) -> int:
    """Count the chunks that writes put into the store of s0."""
    return len(
        {
            number
            for name, first, count, _ in writes
            for number in range(first // chunk, (first + count - 1) // chunk + 1)
            if name in ("base", "s0")
        }
    )


def note_cut(whose: str, images: dict[str, Path], before: Contents) -> None:
    """Note how far a merge had come when it was cut short."""
    if np.array_equal(words(images["b"].read_bytes()), before["base"]):
        how = "not begun"
    else:
        how = "under way" if cow.store.open(str(images["c0"])).nr_exceptions else "over"
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
    done = -1
    with Kernel(judge.folder) as kernel:
        kernel.start(images, [*random_stack(rng), ["work", kernel_writes(writes)]])
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
    after = rng.random() * 0.0007 * chunks_of_s0(writes, chunk)
    with victim(folder, images, random_stack(rng, chunk), writes, "process", after) as process:
        assert process.wait() == -signal.SIGKILL
    note_cut("cow", images, before)
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
    chunk = rng.choice(CHUNKS)
    chunks = rng.randint(2, 2 + chunks_of_s0(writes, chunk))
    wait = ["mergeto", "base", chunks * chunk]
    steps = [*random_stack(rng, chunk), ["work", kernel_writes(writes)], *MERGE, wait]
    with Kernel(judge.folder) as kernel:
        kernel.start(images, steps)
        kernel.hear("@merging")
        kernel.kill()
    note_cut("the kernel", images, before)
    with Ours(images) as ours:
        ours.run([*GO_ON_MERGING, MERGED])
        check_merged(ours, before)
