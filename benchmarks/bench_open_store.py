"""Opening a snapshot whose store has millions of exceptions: time, and memory for each."""

from __future__ import annotations

import numpy as np
import pytest
from suite.baselines import make_file, make_store, read_areas, store_size
from suite.devices import CHUNK_SIZE
from suite.race import limit

import cow

SECTION = "Creating, opening, merging, removing"


@pytest.mark.parametrize("order", ["ascending", "random"])
def test_open(race, note_figure, memory, tmp_images, scale, order):
    """Every chunk of the origin has an exception; the records are in `order` of old chunks."""
    count = scale.store_exceptions
    old_chunks = np.arange(count, dtype=np.uint64)
    if order == "random":
        np.random.default_rng(7).shuffle(old_chunks)
    origin = make_file(tmp_images / "origin.img", count * CHUNK_SIZE * 512)
    path = tmp_images / "snap.cow"
    store = make_store(path, old_chunks, CHUNK_SIZE)
    table = f"0 {count * CHUNK_SIZE} snapshot {origin} {path} P {CHUNK_SIZE}"
    with cow.Mapper(durability="process") as dm:

        def prepare() -> None:
            if dm.names():
                dm.remove("snap")

        race(
            f"open a store of many exceptions, {order}",
            lambda: dm.create("snap", table),
            limit("numpy reads the areas", lambda: read_areas(store, count, CHUNK_SIZE)),
            count=count,
            unit="exception",
            prepare=prepare,
        )
        allocated = (store_size(count, CHUNK_SIZE) // 4096 - 1) * CHUNK_SIZE
        assert dm.status("snap").split()[3].startswith(f"{allocated}/")
        prepare()
        before = memory()
        dm.create("snap", table)
        bytes_each = (memory() - before) / count
    note_figure(f"memory of an exception, {order}", bytes_each, "B each")
