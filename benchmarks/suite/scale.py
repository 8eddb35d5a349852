"""How much of everything a run does."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40


@dataclass(frozen=True)
class Scale:
    """Sizes are in bytes, chunk sizes in sectors."""

    rounds: int
    space: int  # what must be free where the images lie
    peer_space: int  # the same for the peers

    image_size: int  # the origin of most races
    batch: int  # blocks in one read_many or write_many, exceptions of a merge
    some: int  # blocks where each of several stores gets all of them
    cached: int  # blocks that lie in the processor's cache
    calls: int  # calls timed together where one is too short
    lookups: int  # exceptions of the lookup races, and chunks looked up
    store_exceptions: int  # exceptions of the store that is opened
    huge_size: int  # the sparse image a snapshot is made of

    # How cost grows.
    snapshots: tuple[int, ...]
    chunk_sizes: tuple[int, ...]
    image_sizes: tuple[int, ...]
    exceptions: tuple[int, ...]
    runs: tuple[int, ...]  # chunks that lie side by side in the store

    # On a disk.
    disk_batch: int  # first writes with one pair of barriers
    disk_calls: int  # first writes with a pair each

    # Beside peers.
    peer_rounds: int
    served_size: int  # the image that servers serve
    job_seconds: float  # how long a job of reads or rewrites lasts
    sample: bool  # each server gets some of the jobs, all at once: nothing is measured
    file_size: int  # the image beside reflinks
    breaks: int  # first writes that break it to pieces
    kernel_size: int  # the image of the kernel
    kernel_snapshots: tuple[int, ...]


SCALES = {
    "full": Scale(
        rounds=9,
        space=6 * GIB,
        peer_space=12 * GIB,
        image_size=GIB,
        batch=65536,
        some=16384,
        cached=256,
        calls=2000,
        lookups=1 << 20,
        store_exceptions=10_000_000,
        huge_size=16 * TIB,
        snapshots=(0, 1, 2, 4, 8),
        chunk_sizes=(8, 32, 128, 1024),
        image_sizes=(GIB, 16 * GIB, 256 * GIB, 4 * TIB, 16 * TIB),
        exceptions=(1000, 10_000, 100_000, 1_000_000, 10_000_000),
        runs=(1, 4, 16, 64, 256),
        disk_batch=1024,
        disk_calls=64,
        peer_rounds=3,
        served_size=GIB,
        job_seconds=1.0,
        sample=False,
        file_size=GIB,
        breaks=65536,
        kernel_size=128 * MIB,
        kernel_snapshots=(0, 1, 2, 4, 8),
    ),
    "medium": Scale(
        rounds=5,
        space=2 * GIB,
        peer_space=5 * GIB,
        image_size=256 * MIB,
        batch=32768,
        some=8192,
        cached=256,
        calls=2000,
        lookups=1 << 18,
        store_exceptions=1_000_000,
        huge_size=16 * TIB,
        snapshots=(0, 1, 2, 4, 8),
        chunk_sizes=(8, 32, 128, 1024),
        image_sizes=(GIB, 256 * GIB, 16 * TIB),
        exceptions=(1000, 100_000, 1_000_000),
        runs=(1, 16, 256),
        disk_batch=1024,
        disk_calls=32,
        peer_rounds=3,
        served_size=512 * MIB,
        job_seconds=0.5,
        sample=False,
        file_size=256 * MIB,
        breaks=16384,
        kernel_size=64 * MIB,
        kernel_snapshots=(0, 1, 8),
    ),
    "small": Scale(
        rounds=2,
        space=64 * MIB,
        peer_space=128 * MIB,
        image_size=8 * MIB,
        batch=512,
        some=256,
        cached=16,
        calls=50,
        lookups=1 << 12,
        store_exceptions=10_000,
        huge_size=TIB,
        snapshots=(0, 1, 8),
        chunk_sizes=(8, 128),
        image_sizes=(8 * MIB, TIB),
        exceptions=(100, 1000),
        runs=(1, 16),
        disk_batch=64,
        disk_calls=4,
        peer_rounds=1,
        served_size=16 * MIB,
        job_seconds=0.03,
        sample=True,
        file_size=16 * MIB,
        breaks=256,
        kernel_size=8 * MIB,
        kernel_snapshots=(1,),
    ),
}


def amount(size: int) -> str:
    """Return bytes in the largest unit that they are a multiple of."""
    units = (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB))
    return next((f"{size // unit} {name}" for name, unit in units if not size % unit), f"{size} B")
