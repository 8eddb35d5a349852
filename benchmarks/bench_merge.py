"""Merging a snapshot of random exceptions back into its origin."""

from __future__ import annotations

import time

import numpy as np
from suite.baselines import (
    MappedFile,
    data_chunks,
    gather,
    make_file,
    make_store,
    scatter,
    stamp,
    write_areas,
)
from suite.devices import BLOCK, CHUNK_SIZE
from suite.race import limit

import cow

SECTION = "Creating, opening, merging, removing"
SECONDS_MAX = 60


def wait_for_merge(dm: cow.Mapper, name: str) -> None:
    """Return when the status of a snapshot-merge says that nothing is left."""
    deadline = time.monotonic() + SECONDS_MAX
    while True:
        status = dm.status(name)
        used, metadata = status.split()[3:5]
        if used.partition("/")[0] == metadata:
            return
        assert time.monotonic() < deadline, status
        time.sleep(0.0005)


def test_merge(race, tmp_images, scale):
    """From the resume that starts the merge to the status that ends it."""
    size = scale.image_size
    rng = np.random.default_rng(8)
    old_chunks = rng.permutation(size // BLOCK)[: scale.batch].astype(np.uint64)
    new_chunks = data_chunks(scale.batch, CHUNK_SIZE)
    origin = make_file(tmp_images / "origin.img", size)
    stamp(origin)
    path = tmp_images / "snap.cow"
    store = make_store(path, old_chunks, CHUNK_SIZE)
    plain, plain_store = MappedFile(origin).blocks(BLOCK), store.blocks(BLOCK)
    plain_store[new_chunks] = ~plain[old_chunks]
    buffer = np.zeros((scale.batch, BLOCK), np.uint8)
    with cow.Mapper(durability="process") as dm:
        kept_mapped = [dm.image(origin), dm.image(path)]
        table = f"0 {size // 512} snapshot-merge {origin} {path} P {CHUNK_SIZE}"

        def prepare() -> None:
            if dm.names():
                dm.remove("base")
            write_areas(store, old_chunks, CHUNK_SIZE)
            plain[old_chunks[:64]] = 0
            dm.create("base")
            dm.load("base", table)

        def merge() -> None:
            dm.resume("base")
            wait_for_merge(dm, "base")

        def baseline() -> None:
            gather(plain_store, new_chunks, buffer)
            scatter(plain, old_chunks, buffer)

        race(
            "merge random 4 KiB exceptions",
            merge,
            limit("take + scatter", baseline),
            count=buffer.nbytes,
            prepare=prepare,
        )
        assert np.array_equal(plain[old_chunks[:64]], plain_store[new_chunks[:64]])
        assert not store.bytes[BLOCK : 2 * BLOCK].any()
        del kept_mapped
