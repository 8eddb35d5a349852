"""Mounting and unmounting FUSE file systems as an ordinary user, with fusermount3(1).

fusermount3 opens /dev/fuse, mounts, and passes the descriptor back through a socket whose number
stands in _FUSE_COMMFD.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import stat
import subprocess
from typing import NamedTuple

from cow.errors import CowOSError, DeviceBusy

SUBTYPE = "cow"
OPTIONS = f"fsname=cow-dm,subtype={SUBTYPE},default_permissions,nosuid,nodev,noexec"
"""Nobody but the user who mounts gets in: there is no allow_other."""
FUSERMOUNT_SECONDS = 60


class MountError(CowOSError):
    """A file system cannot be mounted or unmounted."""


class Mount(NamedTuple):
    """A line of /proc/self/mountinfo, as far as it matters here."""

    directory: str
    device: int
    type: str
    options: list[str]


def mount(directory: str) -> int:
    """Mount a FUSE file system on a directory and return the descriptor of its requests."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours:
        with theirs:
            environment = {**os.environ, "_FUSE_COMMFD": str(theirs.fileno())}
            _fusermount(
                ["-o", OPTIONS, "--", directory],
                pass_fds=(theirs.fileno(),),
                env=environment,
            )
        ours.settimeout(FUSERMOUNT_SECONDS)
        files: list[int]
        _, files, _, _ = socket.recv_fds(ours, 1, 1, socket.MSG_CMSG_CLOEXEC)
    if not files:
        raise MountError(f"{directory}: fusermount3 sent no descriptor", errno.EIO)
    return files[0]


def unmount(directory: str) -> None:
    """Unmount, whoever still has files open there: they lose them when the server ends."""
    _fusermount(["-u", "-q", "-z", "--", directory])


def prepare(directory: str) -> bool:
    """Check that a directory can be mounted on, and unmount what a dead server left there.

    Return whether there was such a thing.
    """
    found = False
    while True:
        try:
            status = os.stat(directory)
        except OSError as error:
            if error.errno != errno.ENOTCONN or mounted(directory) is None:
                raise MountError(f"{directory}: {error.strerror}", error.errno) from error
            unmount(directory)
            found = True
            continue
        if not stat.S_ISDIR(status.st_mode):
            raise MountError(f"{directory}: not a directory", errno.ENOTDIR)
        if mounted(directory) is not None:
            raise DeviceBusy(f"{directory}: another server shows its devices there")
        return found


def mounted(directory: str) -> int | None:
    """Return the st_dev of a file system of ours, dead or alive, that is mounted on a directory.

    None where there is no mount, or the uppermost is of another kind or another user's.
    """
    mounts = [each for each in _mounts() if each.directory == directory]
    if not mounts or mounts[-1].type != f"fuse.{SUBTYPE}":
        return None
    return mounts[-1].device if f"user_id={os.getuid()}" in mounts[-1].options else None


def _mounts() -> list[Mount]:
    """Return all mounts, the later above the earlier (proc(5))."""
    mounts = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            before, _, after = line.rstrip("\n").partition(" - ")
            kind, _, options = after.split(" ", 2)
            _, _, device, _, directory, *_ = before.split(" ")
            major, minor = device.split(":")
            mounts.append(
                Mount(
                    re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), directory),
                    os.makedev(int(major), int(minor)),
                    kind,
                    options.split(","),
                )
            )
    return mounts


def _fusermount(words: list[str], **options: object) -> None:
    directory = words[-1]
    try:
        done = subprocess.run(
            ["fusermount3", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=FUSERMOUNT_SECONDS,
            **options,  # type: ignore[call-overload]
        )
    except FileNotFoundError as error:
        raise MountError(
            f"{directory}: needs the program fusermount3 (Debian's package fuse3)", errno.ENOENT
        ) from error
    except (OSError, subprocess.SubprocessError) as error:
        raise MountError(f"{directory}: fusermount3: {error}", errno.EIO) from error
    if done.returncode:
        text = done.stderr.strip().removeprefix("fusermount3: ") or f"status {done.returncode}"
        raise MountError(f"{directory}: fusermount3: {text}", _errno_of(text))


def _errno_of(text: str) -> int:
    """Find the error that ends a message; EIO where it names none."""
    reason = text.rpartition(": ")[2]
    with contextlib.suppress(StopIteration):
        return next(code for code in errno.errorcode if os.strerror(code) == reason)
    return errno.EIO
