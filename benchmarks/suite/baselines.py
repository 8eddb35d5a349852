"""The plain work that `cow` is measured against: numpy and the kernel's calls over mmap'd files.

Nothing here imports `cow`. Blocks are rows of bytes; chunk numbers are numpy arrays of uint64.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np

MADV_POPULATE_WRITE = 23  # mmap has no name for it before Python 3.13
RECORD_SIZE = 16
PIECE = 64 << 20


class MappedFile:
    """A file mapped shared and writable; `populate` faults all of it in at once.

    `bytes` is the mapping as uint8. The mapping ends when the last array over it is dropped.
    """

    def __init__(self, path: Path, *, populate: bool = True) -> None:
        flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if populate else 0)
        descriptor = os.open(path, os.O_RDWR)
        try:
            self._mapping = mmap.mmap(descriptor, 0, flags=flags)
        finally:
            os.close(descriptor)
        self.bytes = np.frombuffer(self._mapping, np.uint8)

    def blocks(self, size: int) -> np.ndarray:
        """Return the mapping as rows of `size` bytes; a short end is left out."""
        return self.bytes[: self.bytes.size // size * size].reshape(-1, size)

    def populate_write(self, length: int) -> None:
        """Make the pages of the first `length` bytes exist, writable, in one call."""
        self._mapping.madvise(MADV_POPULATE_WRITE, 0, length)


def make_file(path: Path, size: int) -> Path:
    """Create a file of `size` bytes that are all a hole."""
    with path.open("xb") as file:
        file.truncate(size)
    return path


def stamp(path: Path, first: int = 0) -> None:
    """Touch every page of a file: its 64-bit word i becomes first + i, so every block differs."""
    words = MappedFile(path, populate=False).bytes.view(np.uint64)
    step = PIECE // words.itemsize
    for start in range(0, words.size, step):
        stop = min(start + step, words.size)
        words[start:stop] = np.arange(first + start, first + stop, dtype=np.uint64)


def gather(blocks: np.ndarray, numbers: np.ndarray, out: np.ndarray) -> None:
    """Copy rows `numbers` of `blocks` to `out`, in order.

    With mode="raise", its default, take copies everything once more through a buffer of its own.
    """
    np.take(blocks, numbers, axis=0, out=out, mode="clip")


def scatter(blocks: np.ndarray, numbers: np.ndarray, data: np.ndarray) -> None:
    """Copy the rows of `data` to rows `numbers` of `blocks`."""
    blocks[numbers] = data


# ---------------------------------------------------------------- the persistent store in numpy


def exceptions_per_area(chunk_size: int) -> int:
    """Return how many records an area of `chunk_size` sectors has."""
    return chunk_size * 512 // RECORD_SIZE


def data_chunks(count: int, chunk_size: int) -> np.ndarray:
    """Return the store chunks of the first `count` exceptions, in the order they are given out."""
    numbers = np.arange(count, dtype=np.uint64)
    return numbers + np.uint64(2) + numbers // np.uint64(exceptions_per_area(chunk_size))


def store_size(count: int, chunk_size: int) -> int:
    """Return the bytes of a store with room for `count` exceptions."""
    areas = count // exceptions_per_area(chunk_size) + 1
    return (1 + areas + count + 1) * chunk_size * 512


def areas_of(store: MappedFile, count: int, chunk_size: int) -> np.ndarray:
    """Return the areas that hold `count` exceptions and the end as a view: areas x records x 2."""
    per_area = exceptions_per_area(chunk_size)
    chunk = chunk_size * 512
    records = store.bytes[chunk:].view("<u8")
    return np.lib.stride_tricks.as_strided(
        records,
        shape=(count // per_area + 1, per_area, 2),
        strides=((per_area + 1) * chunk, RECORD_SIZE, RECORD_SIZE // 2),
    )


def read_areas(store: MappedFile, count: int, chunk_size: int) -> np.ndarray:
    """Return the exceptions of a store, old and new chunk in a row, by copying its areas."""
    return areas_of(store, count, chunk_size).reshape(-1, 2)[:count]


def write_areas(store: MappedFile, old_chunks: np.ndarray, chunk_size: int) -> None:
    """Write the header and the areas of a store; its data chunks are left as they are."""
    count = old_chunks.size
    header = np.array([0x70416E53, 1, 1, chunk_size], "<u4")
    store.bytes[: header.nbytes] = header.view(np.uint8)
    areas = areas_of(store, count, chunk_size)
    per_area = exceptions_per_area(chunk_size)
    whole, rest = divmod(count, per_area)
    new_chunks = data_chunks(count, chunk_size)
    for field, values in enumerate((old_chunks, new_chunks)):
        areas[:whole, :, field] = values[: count - rest].reshape(whole, per_area)
        areas[whole, :rest, field] = values[count - rest :]
    areas[whole, rest:] = 0


def make_store(path: Path, old_chunks: np.ndarray, chunk_size: int) -> MappedFile:
    """Create a store whose k-th exception is that of `old_chunks[k]`; its data are holes."""
    make_file(path, store_size(old_chunks.size, chunk_size))
    store = MappedFile(path, populate=False)
    write_areas(store, old_chunks, chunk_size)
    return store
