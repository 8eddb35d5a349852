"""Constants and conversions: sectors, chunks, bytes.

A sector is 512 bytes everywhere, as in every dm table, whatever the disk below says.
"""

SECTOR_SHIFT = 9
SECTOR_SIZE = 1 << SECTOR_SHIFT

MAX_SECTORS = (1 << 63) // SECTOR_SIZE - 1
"""The largest device the kernel accepts, in sectors (2^63 - 1 bytes, rounded down)."""

DEFAULT_CHUNK_SIZE = 32
"""Chunk size in sectors where the table says 0 and the COW store is fresh."""

MAX_CHUNK_SIZE = 1 << 21
"""The largest chunk size in sectors (1 GiB)."""


def sectors(size: int) -> int:
    """Return how many whole sectors fit in `size` bytes."""
    return size >> SECTOR_SHIFT


def bytes_of(nr_sectors: int) -> int:
    """Return the bytes in `nr_sectors` sectors."""
    return nr_sectors << SECTOR_SHIFT


def is_power_of_2(number: int) -> bool:
    """Tell whether `number` is a power of two; 0 is not."""
    return number > 0 and number & (number - 1) == 0
