"""Rewrites of chunks that were copied long ago, and reads and writes mixed.

What they should cost is what they cost without a snapshot.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from suite.baselines import gather, scatter
from suite.devices import BLOCK, Stand, break_all, offsets
from suite.race import limit, other, together

import cow

SECTION = "Rewrites and mixed work"


@dataclass
class Images:
    """An origin with a snapshot that has some blocks of it in its store."""

    stand: Stand
    plain: np.ndarray
    numbers: np.ndarray  # these, in random order
    data: np.ndarray


@pytest.fixture(scope="module")
def images(folder, scale):
    numbers = np.random.default_rng(11).permutation(scale.image_size // BLOCK)[: scale.batch]
    data = np.full((scale.batch, BLOCK), 0x5A, np.uint8)
    with cow.Mapper(durability="process") as dm:
        stand = Stand(dm, folder, scale.image_size)
        stand.linear()
        stand.snapshot()
        break_all(stand.base, numbers, scale.batch)
        yield Images(stand, stand.blocks(), np.random.default_rng(12).permutation(numbers), data)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("device", ["base", "snap"])
def test_rewrite(race, images, device, threads):
    """`write_many` beside a scatter into an mmap, and beside a device without snapshots."""
    stand, data = images.stand, images.data
    parts = [
        slice(n * len(data) // threads, (n + 1) * len(data) // threads) for n in range(threads)
    ]

    def writes(name: str, part: slice):
        dev, at = stand.dm.device(name), offsets(images.numbers[part])
        return lambda: dev.write_many(at, data[part])

    def plainly(part: slice):
        return lambda: scatter(images.plain, images.numbers[part], data[part])

    whole = slice(0, len(data))
    without = together(*(writes("linear", part) for part in parts))
    others = [
        other("cow, no snapshot", without),
        limit("scatter", together(*map(plainly, parts))),
    ]
    if threads > 1:
        others.insert(0, other("cow, one thread", writes(device, whole)))
    by = " by two threads" if threads > 1 else ""
    usage = stand.dm.status("snap")
    race(
        f"rewrites 4 KiB {'on the origin' if device == 'base' else 'on the snapshot'}{by}",
        together(*(writes(device, part) for part in parts)),
        *others,
        count=data.nbytes,
    )
    assert stand.dm.status("snap") == usage


@pytest.mark.parametrize("device", ["base", "snap"])
def test_mixed(race, images, device):
    """Seven batches of random reads to three of rewrites, all within what was copied."""
    stand, plain, data = images.stand, images.plain, images.data
    parts = np.array_split(images.numbers, 10 * max(1, images.numbers.size // 640))
    kinds = [n % 10 in (2, 5, 8) for n in range(len(parts))]
    out = np.zeros((max(part.size for part in parts), BLOCK), np.uint8)

    def ours(name: str):
        dev = stand.dm.device(name)
        steps = [(writes, offsets(part)) for writes, part in zip(kinds, parts, strict=True)]

        def run() -> None:
            for writes, at in steps:
                if writes:
                    dev.write_many(at, data[: at.size])
                else:
                    dev.read_many(at, BLOCK, out=out[: at.size])

        return run

    def baseline() -> None:
        for writes, part in zip(kinds, parts, strict=True):
            if writes:
                scatter(plain, part, data[: part.size])
            else:
                gather(plain, part, out[: part.size])

    race(
        f"mixed 70/30 4 KiB {'on the origin' if device == 'base' else 'on the snapshot'}",
        ours(device),
        other("cow, no snapshot", ours("linear")),
        limit("take and scatter", baseline),
        count=images.numbers.size * BLOCK,
    )
