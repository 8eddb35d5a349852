"""Reads: one block at a time through Python, and a batch of random blocks of a snapshot."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from baselines import MappedFile, gather, make_file, stamp, store_size

import cow

BLOCK = 4096
CHUNK_SIZE = 8
HOT_BLOCKS = 256


@dataclass
class Images:
    """An origin with a snapshot that has half of the origin's chunks in its store."""

    dm: cow.Mapper
    origin: Path
    stored: np.ndarray  # these chunks are in the store
    shared: np.ndarray  # these are not


@pytest.fixture(scope="module")
def images(folder, scale):
    origin = make_file(folder / "origin.img", scale.image_size)
    stamp(origin)
    blocks = scale.image_size // BLOCK
    store = make_file(folder / "snap.cow", store_size(blocks, CHUNK_SIZE))
    sectors = scale.image_size // 512
    order = np.random.default_rng(1).permutation(blocks)
    stored, shared = order[: blocks // 2], order[blocks // 2 :]
    with cow.Mapper(durability="process") as dm:
        dm.create("linear", f"0 {sectors} linear {origin} 0")
        dm.create("base", f"0 {sectors} snapshot-origin {origin}")
        dm.suspend("base")
        dm.create("snap", f"0 {sectors} snapshot {origin} {store} P {CHUNK_SIZE}")
        dm.resume("base")
        base = dm.device("base")
        for numbers in np.array_split(stored, max(1, stored.size // scale.batch)):
            data = base.read_many(numbers.astype(np.uint64) * BLOCK, BLOCK)
            base.write_many(numbers.astype(np.uint64) * BLOCK, ~data)
        yield Images(dm, origin, stored, shared)


@pytest.mark.parametrize("device", ["linear", "base", "snap"])
def test_one_block(race, images, scale, device):
    """One `preadinto` of 4 KiB beside one `os.preadv` of the same block of the same file."""
    blocks = images.shared[:HOT_BLOCKS]
    offsets = [int(block) * BLOCK for block in np.resize(blocks, scale.calls)]
    ours, theirs = bytearray(BLOCK), bytearray(BLOCK)
    preadinto = images.dm.device(device).preadinto
    preadv, buffers = os.preadv, [theirs]
    descriptor = os.open(images.origin, os.O_RDONLY)

    def run() -> None:
        for offset in offsets:
            preadinto(ours, offset)

    def baseline() -> None:
        for offset in offsets:
            preadv(descriptor, buffers, offset)

    target = {"linear": "linear", "base": "snapshot-origin", "snap": "snapshot"}[device]
    try:
        race(
            f"preadinto 4 KiB, {target}",
            run,
            ("os.preadv", baseline),
            count=len(offsets),
            unit="",
            rounds=20,
            speed=1 / 0.7,
            within=1e-6,
        )
        baseline()
    finally:
        os.close(descriptor)
    run()
    assert ours == theirs


def test_random_blocks(race, images, scale):
    """`read_many` of a snapshot with half its chunks in the store beside `numpy.take`."""
    blocks = images.stored.size + images.shared.size
    numbers = np.random.default_rng(2).integers(0, blocks, scale.batch)
    offsets = numbers.astype(np.uint64) * BLOCK
    out = np.zeros((scale.batch, BLOCK), np.uint8)
    plain = MappedFile(images.origin).blocks(BLOCK)
    snap = images.dm.device("snap")
    race(
        "read_many random 4 KiB, half in the store",
        lambda: snap.read_many(offsets, BLOCK, out=out),
        ("numpy.take", lambda: gather(plain, numbers, out)),
        count=out.nbytes,
        speed=0.9,
    )
    snap.read_many(offsets, BLOCK, out=out)
    words = BLOCK // 8
    assert np.array_equal(out.view(np.uint64)[:, 0], numbers.astype(np.uint64) * words)
    assert np.array_equal(out.view(np.uint64)[:, -1], numbers.astype(np.uint64) * words + words - 1)
