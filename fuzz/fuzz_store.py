"""Bytes → a COW store → looked at, loaded, read, written, merged, repaired; or refused unchanged.

4 bytes choose sizes and what is done, 12 more are four requests; the rest is the store: as it is,
or packed, two bytes a record.
"""

from __future__ import annotations

from pathlib import Path

import scratch
from fuzz_program import Pair
from support import SECTOR, area_location, fill, header_bytes
from test_model import World, outcome, same, same_bytes

import cow
import cow.store

MAX_LEN = 1200
ODD = (1 << 32, 1 << 63, (1 << 64) - 1, (1 << 62) - 1, 1 << 60, 1 << 52)
HARMLESS = {"tail"}


def run(data: bytes) -> None:
    knobs, requests, rest = data[:4].ljust(4, b"\0"), data[4:16].ljust(12, b"\0"), data[16:]
    size = (1 + knobs[1]) * 2 * SECTOR
    sectors = 16 + knobs[2] % 64
    content = packed(rest, size) if knobs[0] & 1 else rest[:size].ljust(size, b"\0")
    chunk = (0, 1, 2, 4, 8, 16, 64, 512)[knobs[3] & 7]
    letter = "PO" if knobs[3] & 8 else "P"
    world = Pair(scratch.folder(), {"b": (sectors * SECTOR, 1), "c": (size, 0)}, "process")
    try:
        path = world.paths["c"]
        with open(path, "wb") as file:
            file.write(content.rstrip(b"\0") if knobs[0] & 4 else content)
            file.truncate(size)
        world.model.images[path].data[:] = content
        # The header is read in chunks of the table, 32 sectors where it does not say.
        damaged = (chunk or 32) * SECTOR > size or is_damaged(path, sectors * SECTOR)
        check_repair(path)
        for op in (
            ("create", "base-real", f"0 {sectors} linear @b 0"),
            ("create", "base", f"0 {sectors} snapshot-origin base-real"),
        ):
            world.model_do(*op)
            world.engine_do(*op)
        op = ("create", "s", f"0 {sectors} snapshot base-real @c {letter} {chunk}")
        answer = outcome(lambda: world.engine_do(*op))
        if damaged:
            assert answer is not None, "a damaged store was loaded"
        if answer is not None:
            assert damaged or outcome(lambda: world.model_do(*op)) is not None, answer
            same_bytes("refused", "the store", Path(path).read_bytes(), bytes(content))
            same("refused", "names", world.dm.names(), ["base", "base-real"])
            return
        world.model_do(*op)
        if any(finding.kind == "tail" for finding in cow.store.check(path)):
            # The engine clears what stands behind the last record before it adds one.
            world.model.images[path].known = 16
            store = world.model.devices["s"].live[0].store
            end = 16 * store.committed
            store.buffer[end:] = bytes(len(store.buffer) - end)
        world.compare("loaded")
        use(world, requests, sectors * SECTOR, merge=bool(knobs[0] & 2))
        check_closed(world, path)
    finally:
        world.close()


def packed(data: bytes, size: int) -> bytes:
    """Build a store from a byte for the header, 16 more where it is odd, and two bytes a record."""
    flags, data = (data[0], data[1:]) if data else (0, b"")
    chunk = 1 << (flags >> 1 & 3)
    content = bytearray(fill(size, 3))
    content[: chunk * SECTOR] = bytes(min(size, chunk * SECTOR))
    header = header_bytes(chunk, valid=int(flags & 8 == 0))
    if flags & 1:
        header, data = data[:16].ljust(16, b"\0"), data[16:]
    content[:16] = header
    per_area = 32 * chunk
    records = [(data[at], data[at + 1]) for at in range(0, len(data) - 1, 2)]
    for area in range(len(records) // per_area + 2):
        at = area_location(area, chunk) * chunk * SECTOR
        block = b"".join(
            number(value).to_bytes(8, "little")
            for record in records[area * per_area : (area + 1) * per_area]
            for value in record
        )
        content[at : at + chunk * SECTOR] = block.ljust(chunk * SECTOR, b"\0")
    return bytes(content[:size])


def number(byte: int) -> int:
    """Return the number a byte stands for: itself, or one at an edge."""
    return byte if byte < 250 else ODD[byte - 250]


def is_damaged(path: str, origin_size: int) -> bool:
    """Tell from what `check` finds whether a store must be refused."""
    findings = {finding.kind for finding in cow.store.check(path)}
    try:
        store = cow.store.open(path)
    except cow.StoreError as error:
        assert findings == {"header"}, findings
        return "magic 0" not in str(error)
    if not store.valid:
        return False
    unit = store.chunk_size * SECTOR
    past = any(int(old) * unit >= origin_size for old, _ in store.exceptions)
    return past or not findings <= HARMLESS


def check_repair(path: str) -> None:
    """Check that a repaired store is sound and has what was sound before."""
    output = Path(path).with_name("repaired")
    output.unlink(missing_ok=True)
    try:
        done = cow.store.repair(path, output, force=True)
    except cow.StoreError:
        assert not output.exists()
        return
    assert cow.store.check(output) == []
    mine, repaired = cow.store.open(path), cow.store.open(output)
    assert len(repaired.exceptions) == done.kept
    before = {int(old): int(new) for old, new in mine.exceptions[::-1]}
    unit = mine.chunk_size * SECTOR
    damaged, sound = Path(path).read_bytes(), output.read_bytes()
    for old, new in repaired.exceptions.tolist():
        place = before[old] * unit
        assert damaged[place : place + unit] == sound[new * unit : (new + 1) * unit]


def use(world: World, requests: bytes, size: int, *, merge: bool) -> None:
    """Write to the snapshot and to the origin, and merge what is valid; so does the model."""
    for at in range(0, len(requests), 3):
        what, where, length = requests[at : at + 3]
        if not what:
            continue
        name = ("s", "base")[what & 1]
        offset = where * size // 256 // SECTOR * SECTOR
        length = min((length % 24 + 1) * SECTOR, size - offset)
        world.run([("write", name, offset, length, what)])
    if not merge or world.model.status("s").endswith("Invalid"):
        return
    table = world.model.table("s").replace(" snapshot ", " snapshot-merge ")
    for op in (
        ("suspend", "base"),
        ("remove", "s"),
        ("load", "base", table),
        ("resume", "base"),
    ):
        world.run([op])


def check_closed(world: World, path: str) -> None:
    """Check that what is left on disk is sound, and is loaded as it was left."""
    left = {name: world.dm.status(name) for name in world.dm.names()}
    world.dm.close()
    kinds = {finding.kind for finding in cow.store.check(path)}
    try:
        valid = cow.store.open(path).valid
    except cow.StoreError as error:
        raise AssertionError(f"{error} after {left}") from error
    assert kinds <= HARMLESS or not valid, f"{kinds} after {left}"
