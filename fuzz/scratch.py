"""What the harnesses share: a folder for images, and a mapper that leaves nothing behind."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

_folders: dict[int, Path] = {}


def folder() -> Path:
    """Return this process's folder for images, in memory where that can be had."""
    pid = os.getpid()
    if pid not in _folders:
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        _folders[pid] = Path(tempfile.mkdtemp(prefix="cow-fuzz-", dir=memory))
        atexit.register(shutil.rmtree, _folders[pid], ignore_errors=True)
    return _folders[pid]


def put(name: str, data: bytes) -> str:
    """Write an image and return its path."""
    path = folder() / name
    path.write_bytes(data)
    return str(path)
