"""Whether file systems can be mounted here, and what the tests of FUSE share."""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import struct
import subprocess
from pathlib import Path

import pytest

FALLOCATE = {"punch": "-p", "zero": "-z"}

LOOKUP, GETATTR, OPEN, READ, WRITE, RELEASE, INIT = 1, 3, 14, 15, 16, 18, 26
BATCH_FORGET, FALLOCATE_RANGE, LSEEK = 42, 43, 46
ROOT = 1


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


class Kernel:
    """The other end of /dev/fuse, in place of Linux: asks what a mounted file system is asked.

    `served` is the descriptor that a server of the file system reads requests from. Numbers and
    layouts are those of linux/fuse.h. Methods that wait give up after half a minute.
    """

    def __init__(self) -> None:
        self._socket, served = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self._socket.settimeout(30)
        self.served = served.detach()
        self._numbers = itertools.count(2, 2)

    def send(self, opcode: int, body: bytes = b"", node: int = 0) -> int:
        """Send a request and return its number."""
        number = next(self._numbers)
        head = struct.pack("=IIQQIIII", 40 + len(body), opcode, number, node, 0, 0, os.getpid(), 0)
        self._socket.send(head + body)
        return number

    def answer(self) -> tuple[int, int, bytes]:
        """Return number, errno and data of an answer; EOFError once nobody serves any more."""
        message = self._socket.recv(1 << 21)
        if not message:
            raise EOFError
        length, error, number = struct.unpack_from("=IiQ", message)
        assert length == len(message)
        return number, -error, message[16:]

    def ask(self, opcode: int, body: bytes = b"", node: int = 0) -> tuple[int, bytes]:
        """Send a request and return errno and data of its answer."""
        number = self.send(opcode, body, node)
        answered, error, data = self.answer()
        assert answered == number
        return error, data

    def begin(self, major: int = 7, minor: int = 38, opcode: int = INIT) -> int:
        """Send the first request of all: INIT, with the version that is spoken here."""
        return self.send(opcode, struct.pack("=IIII", major, minor, 1 << 17, 0))

    def lookup(self, name: str) -> int:
        """Ask for a name in the directory; return the number of the file."""
        error, data = self.ask(LOOKUP, name.encode() + b"\0", ROOT)
        assert error == 0
        return int(struct.unpack_from("=Q", data)[0])

    def open(self, name: str, flags: int = os.O_RDWR) -> int:
        """Open a file; return its handle."""
        error, data = self.ask(OPEN, struct.pack("=II", flags, 0), self.lookup(name))
        assert error == 0
        return int(struct.unpack_from("=Q", data)[0])

    def write(self, handle: int, offset: int, data: bytes) -> int:
        """Send a WRITE and return its number."""
        return self.send(
            WRITE, struct.pack("=QQIIQII", handle, offset, len(data), 0, 0, 2, 0) + data
        )

    def read(self, handle: int, offset: int, size: int) -> int:
        """Send a READ and return its number."""
        return self.send(READ, struct.pack("=QQIIQII", handle, offset, size, 0, 0, 0, 0))

    def close(self) -> None:
        """Unmount."""
        self._socket.close()
