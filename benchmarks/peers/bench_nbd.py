"""Over NBD: the same fio jobs for every server of an image whose present state is kept.

Ours serves a snapshot that is written to, and beside it an origin that has one. nbdkit's cow filter
and qcow2 overlays are like the former, QEMU's copy-before-write filter is like the latter. All
serve the same image in memory over a Unix socket, through the page cache; servers and fio share two
cores.
"""

from __future__ import annotations

from suite.fio import Job
from suite.scale import MIB, Scale
from suite.servers import compete, nbd_servers

SECTION = "Over NBD"
WAYS = ((1, 1), (32, 1), (32, 4))  # depth, connections


def jobs(scale: Scale) -> list[Job]:
    """Return what is asked of a server, in an order in which each job finds what it needs.

    The image is cut into a half, of which half the blocks are written; a small part for writes at
    depth 1; a quarter that is written all over; and the rest for sequential work.
    """
    size, seconds = scale.served_size, scale.job_seconds
    half, small = (0, size // 2), (size // 2, size // 16)
    quarter, rest = (size * 9 // 16, size // 4), (size * 13 // 16, size * 3 // 16)
    blocks = {area: area[1] // 4096 for area in (half, small, quarter)}
    mib = {"block": MIB, "seconds": seconds}
    first = "first writes 4 KiB"
    return [
        *(
            Job("random 4 KiB reads, untouched", "randread", (0, size), 4096, *way, None, seconds)
            for way in WAYS
        ),
        Job("read 1 MiB, untouched", "read", rest, **mib),
        Job(first, "randwrite", small, depth=1, requests=blocks[small] // 2),
        Job(first, "randwrite", half, requests=blocks[half] // 2),
        Job(first, "randwrite", quarter, connections=4, requests=blocks[quarter]),
        *(Job("rewrites 4 KiB", "randwrite", quarter, 4096, *way, None, seconds) for way in WAYS),
        *(
            Job("random 4 KiB reads, half copied", "randread", half, 4096, *way, None, seconds)
            for way in WAYS
        ),
        Job("mixed 70/30 4 KiB", "randrw", half, seconds=seconds, read_share=70),
        Job("first write 1 MiB", "write", rest, MIB, requests=rest[1] // MIB),
        *(
            Job(what, rw, rest, depth=depth, **mib)
            for what, rw in (("rewrite 1 MiB", "write"), ("read 1 MiB, copied", "read"))
            for depth in (1, 32)
        ),
    ]


def test_nbd(record, new_folder, scale):
    """Every server in turn does a job, then the next job; each round on fresh images."""
    with new_folder() as folder:
        for job, figures in compete(nbd_servers(), jobs(scale), folder, scale).items():
            record(f"NBD: {job.title}", job.unit, figures)
