"""How large a COW store may be, how full it is, and by how much it grows by itself.

Sizes are sectors, chunks or extents, as the names say; percentages are whole numbers or fractions.
(lib/metadata/snapshot_manip.c, lib/snapshot/snapshot.c, lib/metadata/lv_manip.c)
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from cow.lvm.errors import LVMError, RequestError
from cow.lvm.size import display_size
from cow.units import is_power_of_2

DEFAULT_CHUNK: Final = 8
MIN_CHUNK: Final = 8
MAX_CHUNK: Final = 1024
"""Sectors."""
MIN_CHUNKS: Final = 3
"""The header, one metadata area, one chunk of data."""
LOWEST_THRESHOLD: Final = 50
"""Percent: a lower threshold of autoextend is taken for this one."""


def check_chunk_size(chunk_size: int) -> None:
    """Refuse a chunk size (sectors) LVM gives no snapshot."""
    if not is_power_of_2(chunk_size) or not MIN_CHUNK <= chunk_size <= MAX_CHUNK:
        raise RequestError("Chunk size must be a power of 2 in the range 4K to 512K.")


def useful_sectors(origin_sectors: int, chunk_size: int) -> int:
    """Return the size of a store that holds every chunk of the origin: more is never used."""
    per_area = 32 * chunk_size
    chunks = -(-origin_sectors // chunk_size)
    return (1 + chunks + (chunks + per_area) // per_area) * chunk_size


def useful_extents(origin_extents: int, chunk_size: int, extent_size: int) -> int:
    """Return the same in extents, rounded up."""
    return -(-useful_sectors(origin_extents * extent_size, chunk_size) // extent_size)


def percent_of_origin(percent: int, origin_extents: int, chunk_size: int, extent_size: int) -> int:
    """Return the extents of `-l N%ORIGIN`: room for so much of the origin, and for the metadata."""
    overhead = useful_extents(origin_extents, chunk_size, extent_size) - origin_extents
    return overhead + -(-origin_extents * percent // 100)


def check_minimum(extents: int, chunk_size: int, extent_size: int) -> None:
    """Refuse a store without room for a single exception."""
    if extents * extent_size < MIN_CHUNKS * chunk_size:
        least = -(-MIN_CHUNKS * chunk_size // extent_size)
        raise LVMError(
            f"Snapshot volume cannot be smaller than {MIN_CHUNKS} chunks ({least} extents,"
            f" {display_size(least * extent_size)})."
        )


def cap_new(
    extents: int,
    origin_extents: int,
    chunk_size: int,
    extent_size: int,
    report: Callable[[str], None],
) -> int:
    """Return the extents of a new store: no more than useful, which `report` is told."""
    most = useful_extents(origin_extents, chunk_size, extent_size)
    if extents <= most:
        return extents
    report(
        f"Reducing COW size {display_size(extents * extent_size)} down to maximum usable size"
        f" {display_size(most * extent_size)}."
    )
    return most


def cap_extended(
    extents: int,
    origin_extents: int,
    chunk_size: int,
    extent_size: int,
    report: Callable[[str], None],
) -> int:
    """Return the extents of a store that is extended: no more than useful."""
    most = useful_extents(origin_extents, chunk_size, extent_size)
    if extents <= most:
        return extents
    report(f"Reached maximum COW size {display_size(most * extent_size)} ({most} extents).")
    return most


@dataclass(frozen=True)
class Usage:
    """What the status of a snapshot or a snapshot-merge target says; sizes are sectors."""

    allocated: int = 0
    total: int = 0
    metadata: int = 0
    problem: str = ""
    """"Invalid", "Merge failed", "Overflow", "Unknown"; "" if there are numbers."""

    @property
    def percent(self) -> Fraction:
        """How full the store is, in percent; one that is lost is full."""
        if self.problem:
            return Fraction(100)
        return usage_percent(self.allocated, self.total, self.metadata)

    @property
    def empty(self) -> bool:
        """Whether no exception is left."""
        return not self.problem and self.allocated == self.metadata

    @property
    def invalid(self) -> bool:
        """Whether the snapshot is lost."""
        return self.problem in ("Invalid", "Overflow")

    @property
    def merge_failed(self) -> bool:
        """Whether a merge came to an end before it was done."""
        return self.problem == "Merge failed"


def parse_usage(status: str) -> Usage:
    """Return what "24/32768 16", or a word in its place, says."""
    words = status.replace("/", " ").split()
    if len(words) == 3 and all(word.isdigit() for word in words):
        allocated, total, metadata = map(int, words)
        return Usage(allocated, total, metadata)
    return Usage(problem=status or "Unknown")


def usage_percent(allocated: int, total: int, metadata: int) -> Fraction:
    """Return how full a store is, in percent: 0 while it holds no exception.

    In whole millionths, rounded down after a division of doubles, as LVM counts (dm_make_percent).
    """
    if allocated == metadata:
        return Fraction(0)
    if not total:
        return Fraction(100)
    return Fraction(int(100_000_000 * (allocated / total)), 1_000_000)


def shown_percent(percent: Fraction) -> float:
    """Return what LVM shows: a float of 32 bits; 0 and 100 only where nothing or all is used.

    (dm_percent_to_round_float)
    """
    if percent in (0, 100):
        return float(percent)
    shown = _single(_single(int(percent * 1_000_000)) / 1_000_000)
    return min(max(shown, 0.01), 99.99)


def _single(value: float) -> float:
    (rounded,) = struct.unpack("f", struct.pack("f", value))
    return float(rounded)


def extend_percent(usage: Fraction, threshold: int, percent: int) -> int:
    """Return by how many percent of its size a store has to grow; 0: not yet.

    That much that usage falls to the threshold, and at least `percent`. A threshold of 100 turns
    autoextend off.
    """
    threshold = max(threshold, LOWEST_THRESHOLD)
    if threshold >= 100 or usage <= threshold:
        return 0
    return max(percent, -(-usage * 100 // threshold) - 100)


def low_water_mark(total: int, threshold: int) -> int:
    """Return the free sectors below which a store of `total` sectors is fuller than allowed."""
    threshold = max(threshold, LOWEST_THRESHOLD)
    return total - total * threshold // 100 if threshold < 100 else 0
