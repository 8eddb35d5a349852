"""Over FUSE: a device as a file, beside the FUSE export of QEMU's storage daemon.

The same jobs as over NBD, past the page cache (O_DIRECT), so that every request reaches the server.
"""

from __future__ import annotations

import importlib
import os

import pytest
from suite.fio import Job
from suite.processes import own_mounts
from suite.scale import MIB, Scale
from suite.servers import compete, fuse_servers

SECTION = "Over FUSE"


def jobs(scale: Scale) -> list[Job]:
    """Return what is asked of a server; the first half is written, half of its blocks at first."""
    size, seconds = scale.served_size, scale.job_seconds
    half, rest = (0, size // 2), (size // 2, size // 4)
    return [
        *(
            Job("random 4 KiB reads, untouched", "randread", (0, size), 4096, d, 1, None, seconds)
            for d in (1, 32)
        ),
        Job("first writes 4 KiB", "randwrite", half, requests=half[1] // 4096 // 2),
        Job("random 4 KiB reads, half copied", "randread", half, seconds=seconds),
        Job("rewrites 4 KiB", "randwrite", half, seconds=seconds),
        Job("first write 1 MiB", "write", rest, MIB, requests=rest[1] // MIB),
        Job("rewrite 1 MiB", "write", rest, MIB, seconds=seconds),
        Job("read 1 MiB, copied", "read", rest, MIB, seconds=seconds),
    ]


@pytest.fixture(scope="module")
def missing() -> str:
    """Why nothing can be mounted here; empty if it can."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse may not be opened"
    return own_mounts()


def test_fuse(record, new_folder, scale, missing):
    """Every server in turn does a job, then the next job; each round on fresh images."""
    try:
        importlib.import_module("cow.export.fuse")
        ours = ""
    except ModuleNotFoundError as error:
        ours = f"no Python module {error.name}"
    with new_folder() as folder:
        servers = fuse_servers(missing, ours)
        for job, figures in compete(servers, jobs(scale), folder, scale).items():
            record(f"FUSE: {job.title}", job.unit, figures)
