"""The least of an NBD client, which can also do wrong, and what the tests of NBD share."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = 1, 2, 4, 8, 16

OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_STARTTLS = 1, 2, 3, 5
OPT_INFO, OPT_GO, OPT_STRUCTURED_REPLY, OPT_LIST_META, OPT_SET_META = 6, 7, 8, 9, 10
REP_ACK, REP_SERVER, REP_INFO, REP_META_CONTEXT = 1, 2, 3, 4
ERR_UNSUP, ERR_INVALID, ERR_TLS_REQD, ERR_UNKNOWN = (1 << 31 | n for n in (1, 3, 5, 6))

CHUNK_NONE, CHUNK_DATA, CHUNK_STATUS, CHUNK_ERROR = 0, 1, 5, 32769


def need(*programs: str) -> None:
    """Skip the test where a program is not installed."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def run(*words: str, **options) -> str:
    """Run a client and return what it prints; a sanitizer that is preloaded here is not for it."""
    options = {"timeout": 120, **options}
    if words[0] != sys.executable and "env" not in options:
        options["env"] = {name: os.environ[name] for name in os.environ if name != "LD_PRELOAD"}
    done = subprocess.run(words, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def name_data(name: str) -> bytes:
    """Return a name as options have it, behind its length."""
    return struct.pack(">I", len(name)) + name.encode()


class Client:
    """A raw connection. Methods that wait give up after half a minute."""

    def __init__(self, path: Path | str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(str(path))
        self.socket.settimeout(30)

    def receive(self, size: int) -> bytes:
        """Return `size` bytes; EOFError where the server hangs up first."""
        data = b""
        while len(data) < size:
            part = self.socket.recv(size - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def is_closed(self) -> bool:
        """Wait for the server to hang up; False where it says something instead."""
        try:
            return not self.socket.recv(1)
        except ConnectionResetError:
            return True

    # The handshake.

    def greet(self, flags: int = 3) -> None:
        assert self.receive(16) == b"NBDMAGICIHAVEOPT"
        self.receive(2)
        self.socket.sendall(struct.pack(">I", flags))

    def send_option(self, option: int, data: bytes = b"") -> None:
        self.socket.sendall(b"IHAVEOPT" + struct.pack(">II", option, len(data)) + data)

    def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; return its replies, type and data each."""
        self.send_option(option, data)
        replies = []
        while not replies or not (replies[-1][0] == REP_ACK or replies[-1][0] >> 31):
            magic, answered, kind, length = struct.unpack(">QIII", self.receive(20))
            assert (magic, answered) == (0x3E889045565A9, option)
            replies.append((kind, self.receive(length)))
        return replies

    def go(self, name: str) -> int:
        """Greet and choose an export without structured replies; return its size."""
        self.greet()
        return self.choose(name)[0]

    def choose(self, name: str, option: int = OPT_GO) -> tuple[int, int]:
        """Choose an export, or look at it; return its size and flags."""
        *replies, (kind, _) = self.option(option, name_data(name) + struct.pack(">H", 0))
        if kind != REP_ACK:
            raise ConnectionRefusedError(kind)
        (export,) = (body for kind, body in replies if kind == REP_INFO and body[:2] == b"\0\0")
        return struct.unpack(">HQH", export)[1:]

    def negotiate(self, name: str) -> None:
        """Go to an export with structured replies and base:allocation."""
        self.greet()
        assert self.option(OPT_STRUCTURED_REPLY) == [(REP_ACK, b"")]
        query = struct.pack(">I", 1) + name_data("base:allocation")
        found, ack = self.option(OPT_SET_META, name_data(name) + query)
        assert (found[0], ack) == (REP_META_CONTEXT, (REP_ACK, b""))
        self.choose(name)

    # Transmission.

    def send(self, kind: int, offset: int, length: int, data: bytes = b"", flags: int = 0) -> None:
        head = struct.pack(">IHHQQI", 0x25609513, flags, kind, 42, offset, length)
        self.socket.sendall(head + data)

    def answer(self, size: int = 0) -> tuple[int, bytes]:
        """Return the error and the data of one simple reply."""
        magic, error, cookie = struct.unpack(">IIQ", self.receive(16))
        assert (magic, cookie) == (0x67446698, 42)
        return error, b"" if error else self.receive(size)

    def ask(self, kind: int, offset: int, length: int, data: bytes = b"", flags: int = 0):
        """Send a request and return its simple reply."""
        self.send(kind, offset, length, data, flags)
        return self.answer(length if kind == READ else 0)

    def chunk(self) -> tuple[int, bytes]:
        """Return type and data of a structured reply of one chunk."""
        magic, flags, kind, cookie, length = struct.unpack(">IHHQI", self.receive(20))
        assert (magic, flags, cookie) == (0x668E33EF, 1, 42)
        return kind, self.receive(length)

    def status(self, offset: int, length: int, flags: int = 0) -> list[tuple[int, int]]:
        """Return the extents (length, flags) of a range."""
        self.send(BLOCK_STATUS, offset, length, flags=flags)
        kind, data = self.chunk()
        assert kind == CHUNK_STATUS, (kind, data)
        words = struct.unpack(f">{len(data) // 4}I", data)
        return list(zip(words[1::2], words[2::2], strict=True))

    def close(self) -> None:
        self.socket.close()
