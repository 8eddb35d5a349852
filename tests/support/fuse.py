"""Whether file systems can be mounted here, and what the tests of FUSE share."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

FALLOCATE = {"punch": "-p", "zero": "-z"}


def need_fuse() -> None:
    """Skip the test where /dev/fuse cannot be opened, or fusermount3 is missing."""
    if shutil.which("fusermount3") is None:
        pytest.skip("not installed: fusermount3")
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        pytest.skip(f"/dev/fuse cannot be opened: {error.strerror}")


def need_root(why: str) -> None:
    """Skip the test for an ordinary user."""
    if os.geteuid() != 0:
        pytest.skip(f"only root can {why}")


def mounts(directory: Path | str) -> list[str]:
    """Return the types of what is mounted on a directory, as /proc/self/mounts has them."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [line.split()[2] for line in lines if line.split()[1] == str(directory)]


def fallocate(path: Path, kind: str, offset: int, length: int) -> str:
    """Punch a hole, or zero a range; return what fallocate(1) says of it."""
    words = ["fallocate", FALLOCATE[kind], "-o", str(offset), "-l", str(length), str(path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode == 0) == (not done.stderr)
    return done.stderr.strip()
