"""Reads: one block at a time through Python, and batches of random blocks."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import pytest
from suite.baselines import gather
from suite.devices import BLOCK, Stand, break_all, offsets
from suite.race import Beside, limit, other, together

import cow

SECTION = "Reads"
TARGETS = {"linear": "linear", "base": "snapshot-origin", "untouched": "snapshot"}
DEVICES = {
    "base": "of the origin",
    "untouched": "of a snapshot, untouched",
    "half": "of a snapshot, half of it in the store",
}


@dataclass
class Images:
    """An origin with two snapshots: one of before half of its chunks changed, one of after."""

    stand: Stand
    plain: np.ndarray
    stored: np.ndarray  # these chunks are in the older one's store
    shared: np.ndarray  # these are not


@pytest.fixture(scope="module")
def images(folder, scale):
    order = np.random.default_rng(1).permutation(scale.image_size // BLOCK)
    stored, shared = np.array_split(order, 2)
    with cow.Mapper(durability="process") as dm:
        stand = Stand(dm, folder, scale.image_size)
        stand.linear()
        stand.snapshot("half")
        break_all(stand.base, stored, scale.batch)
        stand.snapshot("untouched")
        yield Images(stand, stand.blocks(), stored, shared)


@pytest.mark.parametrize("device", TARGETS)
def test_one_block(race, images, scale, device):
    """One `preadinto` of 4 KiB beside one `os.preadv` of the same block of the same file."""
    at = [int(block) * BLOCK for block in np.resize(images.shared[: scale.cached], scale.calls)]
    ours, theirs = bytearray(BLOCK), bytearray(BLOCK)
    preadinto = images.stand.dm.device(device).preadinto
    preadv, buffers = os.preadv, [theirs]
    descriptor = os.open(images.stand.image, os.O_RDONLY)

    def run() -> None:
        for offset in at:
            preadinto(ours, offset)

    def baseline() -> None:
        for offset in at:
            preadv(descriptor, buffers, offset)

    try:
        race(
            f"preadinto 4 KiB, {TARGETS[device]}",
            run,
            limit("os.preadv", baseline),
            count=len(at),
            unit="",
            repeat=20,
        )
        baseline()
    finally:
        os.close(descriptor)
    run()
    assert ours == theirs


@pytest.mark.parametrize("device", DEVICES)
def test_random_blocks(race, images, scale, device):
    """`read_many` beside `numpy.take` on an mmap of the origin."""
    blocks = images.plain.shape[0]
    numbers = np.random.default_rng(2).integers(0, blocks, scale.batch)
    out = np.zeros((scale.batch, BLOCK), np.uint8)
    dev, at = images.stand.dm.device(device), offsets(numbers)
    race(
        f"random 4 KiB reads {DEVICES[device]}",
        lambda: dev.read_many(at, BLOCK, out=out),
        limit("numpy.take", lambda: gather(images.plain, numbers, out)),
        count=out.nbytes,
    )
    dev.read_many(at, BLOCK, out=out)
    expected = images.plain[numbers].view(np.uint64)[:, 0]
    if device == "half":
        changed = np.zeros(blocks, bool)
        changed[images.stored] = True
        expected = np.where(changed[numbers], ~expected, expected)
    assert np.array_equal(out.view(np.uint64)[:, 0], expected)


@pytest.mark.parametrize("where", ["memory", "cache"])
def test_two_readers(race, images, scale, where):
    """Two threads with half of the blocks each beside one with all of them.

    What memory gives to two threads is the machine's: numpy.take shows it. In the cache there is
    enough for both.
    """
    blocks, size, repeat = images.plain.shape[0], scale.batch, 1
    if where == "cache":
        blocks = size = scale.cached
        repeat = 4 * scale.batch // size
    rng = np.random.default_rng(2)
    snap = images.stand.dm.device("half")
    halves = [rng.integers(0, blocks, size // 2) for _ in range(2)]
    outs = [np.zeros((size // 2, BLOCK), np.uint8) for _ in range(2)]

    def ours(numbers: np.ndarray, out: np.ndarray):
        at = offsets(numbers)
        return lambda: [snap.read_many(at, BLOCK, out=out) for _ in range(repeat)]

    def theirs(numbers: np.ndarray, out: np.ndarray):
        return lambda: [gather(images.plain, numbers, out) for _ in range(repeat)]

    read = [ours(*pair) for pair in zip(halves, outs, strict=True)]
    take = [theirs(*pair) for pair in zip(halves, outs, strict=True)]
    race(
        f"random 4 KiB reads by two threads, in {where}",
        together(*read),
        other("cow, one thread", lambda: [run() for run in read]),
        limit("numpy.take, two threads", together(*take)),
        limit("numpy.take, one thread", lambda: [run() for run in take]),
        count=2 * outs[0].nbytes * repeat,
    )


def test_reader_beside_writer(race, images, scale):
    """Random reads of the origin while another thread breaks its chunks for a fresh snapshot."""
    stand, plain = images.stand, images.plain
    numbers = np.random.default_rng(2).integers(0, plain.shape[0], scale.batch)
    at, out = offsets(numbers), np.zeros((scale.batch, BLOCK), np.uint8)
    order = np.random.default_rng(3).permutation(plain.shape[0])
    pieces = np.array_split(order, max(1, order.size // 512))
    data = np.full((max(piece.size for piece in pieces), BLOCK), 0x5A, np.uint8)
    copies = np.zeros_like(data)
    left: list[np.ndarray] = []

    def break_some() -> bool:
        piece = left.pop()
        stand.base.write_many(offsets(piece), data[: piece.size])
        return bool(left)

    def plain_some() -> bool:
        piece = left.pop()
        gather(plain, piece, copies[: piece.size])
        plain[piece] = data[: piece.size]
        return bool(left)

    breaking, plainly = Beside(break_some), Beside(plain_some)
    done: list[int] = []

    def prepare(beside: Beside) -> None:
        stand.forget("fresh")
        if beside is breaking:
            stand.snapshot("fresh")
        left[:] = pieces
        beside.start()

    def read() -> None:
        stand.base.read_many(at, BLOCK, out=out)
        done.append(breaking.stop())

    def take() -> None:
        gather(plain, numbers, out)
        plainly.stop()

    race(
        "random 4 KiB reads beside a thread that breaks chunks",
        read,
        other("cow, alone", lambda: stand.base.read_many(at, BLOCK, out=out)),
        limit("numpy.take beside take + scatter", take, lambda: prepare(plainly)),
        limit("numpy.take, alone", lambda: gather(plain, numbers, out)),
        count=out.nbytes,
        prepare=lambda: prepare(breaking),
    )
    assert any(done)
    stand.forget("fresh")
