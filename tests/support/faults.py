"""Faults from below: a disk that gets full, a target whose n-th request fails."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from cow import _core
from cow.target import NameOf, Target, TargetContext, open_device, parse_number

from . import SECTOR
from .crash import PAGE


class SmallDisk:
    """A file system in memory of `pages` pages."""

    def __init__(self, folder: Path, pages: int) -> None:
        self.folder = folder
        self.pages = pages

    def fill(self, free: int) -> None:
        """Take all pages but `free` of them."""
        with open(self.folder / "ballast", "wb") as ballast:
            status = os.statvfs(self.folder)
            rest = status.f_bavail * status.f_frsize // PAGE - free
            if rest > 0:
                os.posix_fallocate(ballast.fileno(), 0, rest * PAGE)

    def clear(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()

    def sparse(self, name: str, sectors: int, contents: bytes = b"") -> str:
        """Make a sparse file that begins with `contents`."""
        path = self.folder / name
        path.write_bytes(contents)
        os.truncate(path, sectors * SECTOR)
        return str(path)


@pytest.fixture(scope="module")
def disk(tmp_path_factory) -> Iterator[SmallDisk]:
    folder = tmp_path_factory.mktemp("small")
    pages = 160
    options = f"size={pages * PAGE}"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs takes root")
    try:
        yield SmallDisk(folder, pages)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


class Fault:
    """Fails the n-th request of one kind; `fired` once it did, at byte `offset`."""

    def __init__(self, op: str, n: int) -> None:
        self.op = op
        self.left = n
        self.fired = False
        self.offset = self.length = -1
        self.lock = threading.Lock()

    def meet(self, op: str, offset: int, length: int) -> None:
        with self.lock:
            if op == self.op:
                self.left -= 1
            if op == self.op and self.left == 0:
                self.fired, self.offset, self.length = True, offset, length
                raise OSError(errno.EIO, "the n-th request")


class Failing(Target):
    """`failing <dev> <start>`: linear, and every request meets `fault` first."""

    name = "failing"
    version = (1, 0, 0)
    fault: Fault | None = None

    def __init__(self, context: TargetContext, start: int, length: int, args: list[str]) -> None:
        self.dev = open_device(context, args[0], "Device lookup failed", writable=True)
        self.dev_start = parse_number(args[1], "Invalid device sector")
        self.map = _Failing(start, length, self.dev, self.dev_start)

    def table_args(self, name_of: NameOf) -> str:
        return f"{name_of(self.dev)} {self.dev_start}"


class _Failing(_core.FilterTarget):
    def start(self, op: str, offset: int, length: int) -> int:
        if Failing.fault is not None:
            Failing.fault.meet(op, offset, length)
        return self.PASS


@pytest.fixture
def failing(monkeypatch):
    """Let tables name the type `failing`."""
    module = types.ModuleType("cow.targets.failing")
    module.Failing = Failing
    monkeypatch.setitem(sys.modules, "cow.targets.failing", module)
    yield
    Failing.fault = None
