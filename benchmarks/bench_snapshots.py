"""Several snapshots of one origin: what each of them adds to a write.

With `count` snapshots a first write copies the old chunk `count` times; nothing else should grow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from suite.baselines import MappedFile, gather, make_file, scatter, stamp
from suite.devices import BLOCK, Stand, offsets
from suite.race import limit, other
from suite.results import Point

import cow

SECTION = "Several snapshots"


@dataclass
class Images:
    """An origin, blocks of it, and plain stores for as many snapshots as there may be."""

    stand: Stand
    plain: np.ndarray
    plain_stores: list[np.ndarray]
    numbers: np.ndarray
    data: np.ndarray
    reference: Stand  # with one snapshot that has all of the blocks

    def take(self, count: int) -> list[str]:
        """Replace all snapshots by `count` new ones, in stores whose pages exist."""
        names = [f"snap{n}" for n in range(count)]
        self.stand.drop(*(name for name in self.stand.dm.names() if name.startswith("snap")))
        for name in names:
            self.stand.used_snapshot(name, self.numbers.size)
        return names


@pytest.fixture(scope="module")
def images(folder, scale):
    numbers = np.random.default_rng(13).permutation(scale.image_size // BLOCK)[: scale.some]
    data = np.full((scale.some, BLOCK), 0x5A, np.uint8)
    plain_stores = []
    for n in range(max(scale.snapshots)):
        path = make_file(folder / f"plain{n}.cow", data.nbytes)
        stamp(path)
        plain_stores.append(MappedFile(path).blocks(BLOCK))
    (folder / "one").mkdir()
    with cow.Mapper(durability="process") as dm, cow.Mapper(durability="process") as second:
        stand = Stand(dm, folder, scale.image_size)
        stand.linear()
        reference = Stand(second, folder / "one", scale.image_size)
        reference.used_snapshot("snap", scale.some)
        reference.base.write_many(offsets(numbers), data)
        yield Images(stand, stand.blocks(), plain_stores, numbers, data, reference)


def of(count: int) -> str:
    return {0: "no snapshot", 1: "1 snapshot"}.get(count, f"{count} snapshots")


def test_first_writes(race, images, count):
    """First writes to the origin beside a gather for each snapshot and a scatter."""
    base, at = images.stand.base, offsets(images.numbers)

    def baseline() -> None:
        for store in images.plain_stores[:count]:
            gather(images.plain, images.numbers, store)
        scatter(images.plain, images.numbers, images.data)

    race(
        f"first writes 4 KiB on an origin with {of(count)}",
        lambda: base.write_many(at, images.data),
        limit(f"take × {count} + scatter" if count else "scatter", baseline),
        count=images.numbers.size,
        unit="/chunk",
        prepare=lambda: images.take(count),
        point=Point("snapshots", "first writes", count),
    )
    images.stand.check(images.numbers, *images.take(count))


def test_rewrites(race, images, count):
    """Rewrites of chunks that all snapshots have copied, beside none and one."""
    stand, at = images.stand, offsets(images.numbers)
    base, linear, with_one = stand.base, stand.dm.device("linear"), images.reference.base
    images.take(count)
    base.write_many(at, images.data)
    race(
        f"rewrites 4 KiB on an origin with {of(count)}",
        lambda: base.write_many(at, images.data),
        other("cow, no snapshot", lambda: linear.write_many(at, images.data)),
        other("cow, 1 snapshot", lambda: with_one.write_many(at, images.data)),
        limit("scatter", lambda: scatter(images.plain, images.numbers, images.data)),
        count=images.numbers.size,
        unit="/chunk",
        repeat=4,
        point=Point("snapshots", "rewrites", count),
    )
