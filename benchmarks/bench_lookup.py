"""Exception lookup: from an origin's chunk to the store's, many in a batch."""

from __future__ import annotations

import numpy as np
import pytest
from suite.baselines import MappedFile, data_chunks, gather, make_file, make_store, stamp
from suite.devices import CHUNK_SIZE, SECTOR
from suite.race import limit

import cow

SECTION = "Lookups and extents"
SPREADS = [4, 256]  # chunks of the origin for each exception


def take_snapshot(dm: cow.Mapper, folder, old_chunks: np.ndarray, chunks: int, chunk_size: int):
    """Create "snap", whose store has `old_chunks`, over a sparse origin of `chunks`."""
    origin = make_file(folder / "origin.img", chunks * chunk_size * SECTOR)
    make_store(folder / "snap.cow", old_chunks, chunk_size)
    table = f"0 {chunks * chunk_size} snapshot {origin} {folder / 'snap.cow'} P {chunk_size}"
    dm.create("snap", table)
    return dm.device("snap")


@pytest.mark.parametrize("spread", SPREADS)
def test_lookup(race, tmp_images, scale, spread):
    """Random exceptions, looked up in random order; half of the chunks asked for have none."""
    rng = np.random.default_rng(4)
    count, chunks = scale.lookups, scale.lookups * spread
    old_chunks = rng.permutation(chunks)[:count].astype(np.uint64)
    table = np.zeros(chunks, np.uint64)
    table[old_chunks] = data_chunks(count, CHUNK_SIZE)
    asked = rng.integers(0, chunks, count).astype(np.uint64)
    asked[::2] = rng.choice(old_chunks, asked[::2].size)
    found = np.zeros(count, np.uint64)
    with cow.Mapper(durability="process") as dm:
        snap = take_snapshot(dm, tmp_images, old_chunks, chunks, CHUNK_SIZE)
        target = snap.live.targets[0].map
        race(
            f"exception lookup, one in {spread} chunks",
            lambda: target.lookup_many(asked),
            limit("numpy.take of a plain array", lambda: gather(table, asked, found)),
            count=count,
            unit="/chunk",
        )
        stored = table[asked] != 0
        assert np.array_equal(target.lookup_many(asked)[stored], table[asked][stored])


def test_read_sectors(race, tmp_images, scale):
    """`read_many` of single sectors with chunks of one sector: the most lookups for the bytes."""
    rng = np.random.default_rng(5)
    count = scale.lookups
    chunks = 2 * count
    old_chunks = rng.permutation(chunks)[:count].astype(np.uint64)
    asked = rng.integers(0, chunks, count)
    out = np.zeros((count, SECTOR), np.uint8)
    with cow.Mapper(durability="process") as dm:
        snap = take_snapshot(dm, tmp_images, old_chunks, chunks, 1)
        origin = tmp_images / "origin.img"
        stamp(origin)
        plain = MappedFile(origin).blocks(SECTOR)
        store = MappedFile(tmp_images / "snap.cow").blocks(SECTOR)
        store[data_chunks(count, 1)] = ~plain[old_chunks]
        offsets = asked.astype(np.uint64) * SECTOR
        race(
            "read_many random sectors, chunks of one",
            lambda: snap.read_many(offsets, SECTOR, out=out),
            limit("numpy.take", lambda: gather(plain, asked, out)),
            count=count,
            unit="/chunk",
        )
        snap.read_many(offsets, SECTOR, out=out)
        stored = np.zeros(chunks, bool)
        stored[old_chunks] = True
        first_words = plain[asked].view(np.uint64)[:, 0]
        expected = np.where(stored[asked], ~first_words, first_words)
        assert np.array_equal(out.view(np.uint64)[:, 0], expected)


def test_extents(race, tmp_images, scale):
    """`extents` of a whole snapshot beside the same question asked of a plain array."""
    rng = np.random.default_rng(6)
    chunks = 4 * scale.lookups
    old_chunks = rng.permutation(chunks)[: scale.lookups].astype(np.uint64)
    in_store = np.zeros(chunks, np.uint8)
    in_store[old_chunks] = 1
    with cow.Mapper(durability="process") as dm:
        snap = take_snapshot(dm, tmp_images, old_chunks, chunks, CHUNK_SIZE)
        race(
            "extents, one in 4 chunks in the store",
            lambda: snap.extents(),
            limit("numpy.diff of a plain array", lambda: np.flatnonzero(np.diff(in_store))),
            count=chunks,
            unit="/chunk",
        )
        extents = snap.extents()
    stored = extents["length"][extents["source"] == cow.COW].sum()
    assert stored == scale.lookups * CHUNK_SIZE * SECTOR
    assert extents["length"].sum() == chunks * CHUNK_SIZE * SECTOR
