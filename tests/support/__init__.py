"""What the tests share: test patterns, a parser of stores written by hand, small waits."""

from __future__ import annotations

import functools
import struct
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SECTOR = 512
MASK = (1 << 64) - 1

COUNTED: Counter[str] = Counter()
"""What this run did, for the figures at its end."""


def count(what: str, number: int = 1) -> None:
    """Add to the figures at the end of the run."""
    COUNTED[what] += number


def _step(state: int) -> int:
    """Advance the xorshift generator of the kernel traces by one."""
    state ^= (state << 13) & MASK
    state ^= state >> 7
    return state ^ ((state << 17) & MASK)


def _tables(basis: np.ndarray) -> np.ndarray:
    """Tabulate a linear map of 64 bits by its input bytes, from the images of the single bits."""
    tables = np.zeros((8, 256), np.uint64)
    for byte in range(8):
        for bit in range(8):
            span = 1 << bit
            tables[byte, span : 2 * span] = tables[byte, :span] ^ basis[8 * byte + bit]
    return tables


def _apply(tables: np.ndarray, states: np.ndarray) -> np.ndarray:
    """Apply a tabulated linear map to every state."""
    parts = states.astype("<u8").view(np.uint8).reshape(-1, 8)
    result = np.zeros_like(states)
    for byte in range(8):
        result ^= tables[byte].take(parts[:, byte])
    return result


@functools.cache
def _steps(level: int) -> np.ndarray:
    """Tabulate 2^level steps of the generator."""
    if level == 0:
        return _tables(np.array([_step(1 << bit) for bit in range(64)], np.uint64))
    half = _steps(level - 1)
    return _tables(_apply(half, _apply(half, np.uint64(1) << np.arange(64, dtype=np.uint64))))


@functools.lru_cache(maxsize=32)
def _pattern(count: int, seed: int) -> bytes:
    """Return `count` words of the pattern for `seed`.

    The generator is linear, so the second half of the states is a linear map of the first half.
    """
    states = np.empty(count, np.uint64)
    states[0] = _step((seed * 0x9E3779B97F4A7C15 + 1) & MASK)
    done, level = 1, 0
    while done < count:
        more = min(done, count - done)
        states[done : done + more] = _apply(_steps(level), states[:more])
        done, level = 2 * done, level + 1
    return states.astype("<u8").tobytes()


def fill(size: int, seed: int) -> bytes:
    """Return `size` bytes of the pattern that the kernel traces write for `seed`.

    The words are made in powers of two, so that one pattern serves all sizes near it.
    """
    words = max(512, -(-size // 8))
    return _pattern(1 << (words - 1).bit_length(), seed)[:size]


def stamp(first: int, count: int, tag: int) -> bytes:
    """Return `count` sectors that each say their own number and `tag`, from sector `first` on."""
    words = np.empty((count, SECTOR // 16, 2), "<u8")
    words[:, :, 0] = np.arange(first, first + count, dtype=np.uint64)[:, None]
    words[:, :, 1] = tag
    return words.tobytes()


def stamps(data: bytes) -> list[tuple[int, int]]:
    """Return (sector number, tag) of every stamped sector; (-1, -1) for one that is torn."""
    words = np.frombuffer(data, "<u8").reshape(-1, SECTOR // 16, 2)
    torn = (words != words[:, :1, :]).any(axis=(1, 2))
    return [
        (-1, -1) if bad else (int(number), int(tag))
        for bad, (number, tag) in zip(torn, words[:, 0, :], strict=True)
    ]


def area_location(area: int, chunk_size: int) -> int:
    """Return the chunk that holds metadata area `area`, for chunks of `chunk_size` sectors."""
    return 1 + (32 * chunk_size + 1) * area


def header_bytes(
    chunk_size: int = 8, *, valid: int = 1, version: int = 1, magic: int = 0x70416E53
) -> bytes:
    """Return the 16 bytes a persistent store begins with."""
    return struct.pack("<IIII", magic, valid, version, chunk_size)


def store_bytes(
    records: list[tuple[int, int]],
    chunk_size: int = 8,
    *,
    size: int = 1 << 20,
    valid: int = 1,
    version: int = 1,
) -> bytearray:
    """Return a whole store of `size` bytes by hand: header, areas, zeros where the data is."""
    data = bytearray(size)
    data[:16] = header_bytes(chunk_size, valid=valid, version=version)
    per_area = 32 * chunk_size
    for index, record in enumerate(records):
        area, slot = divmod(index, per_area)
        at = area_location(area, chunk_size) * chunk_size * SECTOR + 16 * slot
        data[at : at + 16] = struct.pack("<QQ", *record)
    return data


def store_header(data: bytes) -> tuple[int, int, int, int]:
    """Return (magic, valid, version, chunk size) of the store in `data`."""
    return struct.unpack_from("<IIII", data)


def store_records(data: bytes) -> list[tuple[int, int]]:
    """Return the records (old, new) of the store in `data`, area after area, up to the end mark."""
    chunk_size = store_header(data)[3]
    records: list[tuple[int, int]] = []
    while True:
        area, slot = divmod(len(records), 32 * chunk_size)
        at = area_location(area, chunk_size) * chunk_size * SECTOR + 16 * slot
        if at + 16 > len(data):
            return records
        old, new = struct.unpack_from("<QQ", data, at)
        if new == 0:
            return records
        records.append((old, new))


def poll(done: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Return the first true answer of `done`; fail where none comes within `seconds`."""
    end = time.monotonic() + seconds
    while not (answer := done()):
        if time.monotonic() > end:
            raise AssertionError("what was waited for did not happen")
        time.sleep(0.0005)
    return answer


def refused(call: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Return the errno with which `call` fails; fail where it does not."""
    try:
        call(*args, **kwargs)
    except OSError as error:
        number = error.errno
    else:
        raise AssertionError("nothing was refused")
    assert number is not None
    return number


def merge_is_over(status: str) -> bool:
    """Tell from a status line whether its merge is done, failed or has nothing to do."""
    text = status.split(" ", 3)[3]
    if "/" not in text:
        return True
    used, metadata = text.split(" ")
    return used.split("/")[0] == metadata


def wait_merge(dm: Any, name: str) -> str:
    """Wait until the merge of `name` is over and return its status line."""
    return dm.wait_merge(name, timeout=60)


# --- images and an origin with its snapshots ----------------------------------------------------


def image(path: Path, contents: bytes | int) -> str:
    """Write an image, of `contents` or of that many zero sectors, and return its path."""
    path.write_bytes(bytes(contents * SECTOR) if isinstance(contents, int) else contents)
    return str(path)


class Rig:
    """An origin under snapshots, as LVM stacks it: base-real, base over it, snapshots beside it.

    Every sector of the origin image is stamped with its number and tag 0.
    """

    def __init__(self, dm: Any, folder: Path, sectors: int = 2048) -> None:
        self.dm = dm
        self.folder = folder
        self.sectors = sectors
        self.before = stamp(0, sectors, 0)
        self.origin = image(folder / "origin.img", self.before)
        self.cows: dict[str, str] = {}
        dm.create("base-real", f"0 {sectors} linear {self.origin} 0")
        dm.create("base", f"0 {sectors} snapshot-origin base-real")

    def line(self, name: str, words: str = "P 8", kind: str = "snapshot") -> str:
        """Return the table line of a snapshot whose COW image is that of `name`."""
        return f"0 {self.sectors} {kind} base-real {self.cows[name]} {words}"

    def snap(self, name: str = "snap", words: str = "P 8", cow_sectors: int = 2048) -> Any:
        """Create a snapshot on a fresh COW image, the origin suspended, and return its device."""
        self.cows[name] = image(self.folder / f"{name}.cow", cow_sectors)
        self.dm.suspend("base")
        self.dm.create(name, self.line(name, words))
        self.dm.resume("base")
        return self.dm.device(name)

    def write(self, name: str, sector: int, count: int = 8, tag: int = 1) -> bytes:
        """Write stamped sectors to a device and return them."""
        data = stamp(sector, count, tag)
        assert self.dm.device(name).pwrite(data, sector * SECTOR) == len(data)
        return data

    def read(self, name: str, sector: int = 0, count: int | None = None) -> bytes:
        """Read sectors of a device, all of them where no `count` is given."""
        count = self.sectors - sector if count is None else count
        return self.dm.device(name).pread(count * SECTOR, sector * SECTOR)

    def usage(self, name: str = "snap") -> str:
        """Return what the status line of a snapshot says after its type."""
        return self.dm.status(name).split(" ", 3)[3]

    def cow_bytes(self, name: str = "snap", sector: int = 0, count: int | None = None) -> bytes:
        """Return sectors of a COW image as they are on disk."""
        data = Path(self.cows[name]).read_bytes()[sector * SECTOR :]
        return data if count is None else data[: count * SECTOR]

    def records(self, name: str = "snap") -> list[tuple[int, int]]:
        """Return the exceptions on disk, in order."""
        return store_records(self.cow_bytes(name))

    def header(self, name: str = "snap") -> bytes:
        """Return the header on disk."""
        return self.cow_bytes(name)[:16]

    def merge(self, name: str = "snap") -> str:
        """Merge a snapshot into base, remove it, and return the status when all is done."""
        self.dm.suspend("base")
        self.dm.remove(name)
        self.dm.load("base", self.line(name, kind="snapshot-merge"))
        self.dm.resume("base")
        return wait_merge(self.dm, "base")
