"""NBD's handshake: what a client and the server agree on before the first request.

Numbers and rules are those of the protocol's description (proto.md of the NetworkBlockDevice
project): fixed newstyle, options in any order until GO or EXPORT_NAME. Nobody is trusted yet: a
client has little time and little room.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from typing import TYPE_CHECKING, NamedTuple

from cow.device import Device, DeviceFile
from cow.errors import DeviceNotFound
from cow.mapper import Mapper

if TYPE_CHECKING:
    import ssl

    from cow.export.nbd_tls import Tls

MAGIC = b"NBDMAGIC"
IHAVEOPT = b"IHAVEOPT"
REPLY_MAGIC = 0x3E889045565A9
FLAG_FIXED_NEWSTYLE = 1
FLAG_NO_ZEROES = 2

OPT_EXPORT_NAME = 1
OPT_ABORT = 2
OPT_LIST = 3
OPT_STARTTLS = 5
OPT_INFO = 6
OPT_GO = 7
OPT_STRUCTURED_REPLY = 8
OPT_LIST_META_CONTEXT = 9
OPT_SET_META_CONTEXT = 10

REP_ACK = 1
REP_SERVER = 2
REP_INFO = 3
REP_META_CONTEXT = 4
REP_ERR_UNSUP = 1 << 31 | 1
REP_ERR_INVALID = 1 << 31 | 3
REP_ERR_TLS_REQD = 1 << 31 | 5
REP_ERR_UNKNOWN = 1 << 31 | 6

INFO_EXPORT = 0
INFO_NAME = 1
INFO_BLOCK_SIZE = 3

FLAGS = {
    "has_flags": 1 << 0,
    "read_only": 1 << 1,
    "send_flush": 1 << 2,
    "send_fua": 1 << 3,
    "send_trim": 1 << 5,
    "send_write_zeroes": 1 << 6,
    "send_df": 1 << 7,
    "can_multi_conn": 1 << 8,
    "send_cache": 1 << 10,
    "send_fast_zero": 1 << 11,
}

BASE_ALLOCATION = "base:allocation"
CONTEXT_ID = 1
MAX_OPTION = 1 << 16
"""Bytes of an option a client may send; names are at most 4096."""

MAX_SHOWN = 200
"""Characters of a name that is repeated in an error."""

PREFERRED_BLOCK = 4096
MAX_BLOCK = 1 << 25


class ProtocolError(Exception):
    """The client broke the rules, or took too long; the connection ends."""


class Reply(NamedTuple):
    """What an option is answered with: a type and its data."""

    type: int
    data: bytes = b""


class Handshake:
    """One client's handshake, from the greeting until it has chosen a device or given up.

    It has to be over within `seconds`. Afterwards `connection` is the socket to go on with, and
    `encrypted` the same if it uses TLS; `structured` and `context` tell what else was agreed on.
    """

    def __init__(
        self,
        mapper: Mapper,
        connection: socket.socket,
        *,
        tls: Tls | None = None,
        tls_required: bool = False,
        seconds: float,
    ) -> None:
        self.connection = connection
        self.over = False
        """The client is told that it has what it chose, or will be in a moment."""
        self.encrypted: ssl.SSLSocket | None = None
        self.structured = False
        self.context: Device | None = None
        """The device that base:allocation was negotiated for."""
        self._mapper = mapper
        self._tls = tls
        self._tls_required = tls_required
        self._no_zeroes = False
        self._stopping = False
        self._deadline = time.monotonic() + seconds

    def stop(self) -> None:
        """Let run() fail, from another thread."""
        self._stopping = True
        self.shut_down(socket.SHUT_RDWR)

    def shut_down(self, how: int) -> None:
        """Shut the socket down, which another thread uses; of an SSLSocket nothing but that."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.connection, how)

    def run(self) -> DeviceFile | None:
        """Return the device that the client chose, open; None where it wants none."""
        self._send(MAGIC + IHAVEOPT + struct.pack(">H", FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES))
        (flags,) = struct.unpack(">I", self._receive(4))
        if flags & ~(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES):
            raise ProtocolError(f"unknown client flags {flags:#x}")
        self._no_zeroes = bool(flags & FLAG_NO_ZEROES)
        while True:
            magic, option, length = struct.unpack(">8sII", self._receive(16))
            if magic != IHAVEOPT:
                raise ProtocolError(f"bad option magic {magic!r}")
            if length > MAX_OPTION:
                raise ProtocolError(f"option {option} of {length} bytes")
            data = self._receive(length)
            if option == OPT_ABORT:
                self._reply(option, [Reply(REP_ACK)])
                return None
            if option == OPT_EXPORT_NAME:
                return self._export_name(data)
            file = self._option(option, data)
            if file is not None:
                return file

    # The socket.

    def _hurry(self) -> None:
        """Give the next step the time that is left."""
        left = self._deadline - time.monotonic()
        if self._stopping or left <= 0:
            raise ProtocolError("the server stops" if self._stopping else "it took too long")
        self.connection.settimeout(left)

    def _receive(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._hurry()
            part = self.connection.recv(size - len(data))
            if not part:
                raise ProtocolError("it went away during the handshake")
            data += part
        return bytes(data)

    def _send(self, data: bytes) -> None:
        self._hurry()
        self.connection.sendall(data)

    def _reply(self, option: int, replies: list[Reply]) -> None:
        for reply in replies:
            head = struct.pack(">QIII", REPLY_MAGIC, option, reply.type, len(reply.data))
            self._send(head + reply.data)

    # The options.

    def _option(self, option: int, data: bytes) -> DeviceFile | None:
        """Answer one option; return the device where that ends the handshake."""
        file = None
        if option == OPT_STARTTLS:
            self._start_tls(data)
            return None
        if self._tls_required:
            replies = [Reply(REP_ERR_TLS_REQD, b"TLS comes first")]
        elif option == OPT_LIST:
            replies = self._list(data)
        elif option in (OPT_INFO, OPT_GO):
            replies, file = self._info(option, data)
        elif option == OPT_STRUCTURED_REPLY:
            self.structured = self.structured or not data
            replies = [Reply(REP_ERR_INVALID if data else REP_ACK)]
        elif option in (OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT):
            replies = self._meta_context(option, data)
        else:
            replies = [Reply(REP_ERR_UNSUP)]
        with contextlib.ExitStack() as stack:
            if file is not None:
                stack.enter_context(file)
                self.over = True
            self._reply(option, replies)
            stack.pop_all()
        return file

    def _start_tls(self, data: bytes) -> None:
        """Go on encrypted; whatever was agreed on in the clear is forgotten."""
        if self._tls is None:
            self._reply(OPT_STARTTLS, [Reply(REP_ERR_UNSUP)])
            return
        if data or self.encrypted:
            self._reply(OPT_STARTTLS, [Reply(REP_ERR_INVALID)])
            return
        self._reply(OPT_STARTTLS, [Reply(REP_ACK)])
        wrapped = self._tls.wrap(self.connection)
        self.connection = self.encrypted = wrapped
        self._hurry()
        wrapped.do_handshake()
        self._tls_required = False
        self.structured = False
        self.context = None

    def _find(self, name: str) -> Device:
        """Return the device of that name; the empty name is the only device there is."""
        names = self._mapper.names()
        if not name and len(names) == 1:
            name = names[0]
        if name not in names:
            raise DeviceNotFound(f"no device {name[:MAX_SHOWN]!r}")
        return self._mapper.device(name)

    def _export_name(self, data: bytes) -> DeviceFile:
        """Open the device; there is no other answer to a failure than to hang up."""
        if self._tls_required:
            raise ProtocolError("it chose an export without TLS")
        file = DeviceFile(self._find(_text(data)), writable=False)
        with contextlib.ExitStack() as stack:
            stack.enter_context(file)
            self.over = True
            flags = self._flags(file.device)
            zeros = b"" if self._no_zeroes else bytes(124)
            self._send(struct.pack(">QH", file.device.size, flags) + zeros)
            stack.pop_all()
        return file

    def _list(self, data: bytes) -> list[Reply]:
        if data:
            return [Reply(REP_ERR_INVALID)]
        names = [name.encode() for name in self._mapper.names()]
        servers = [Reply(REP_SERVER, struct.pack(">I", len(name)) + name) for name in names]
        return [*servers, Reply(REP_ACK)]

    def _info(self, option: int, data: bytes) -> tuple[list[Reply], DeviceFile | None]:
        """Describe a device; GO opens it, too."""
        try:
            name, rest = _take_text(data)
            (count,) = struct.unpack_from(">H", rest)
            wanted = struct.unpack(f">{count}H", rest[2:])
            device = self._find(name)
            file = DeviceFile(device, writable=False) if option == OPT_GO else None
        except struct.error:
            return [Reply(REP_ERR_INVALID, b"malformed request")], None
        except DeviceNotFound as error:
            return [_unknown(error)], None
        flags = self._flags(device)
        replies = [
            Reply(REP_INFO, struct.pack(">HQH", INFO_EXPORT, device.size, flags)),
            Reply(REP_INFO, struct.pack(">HIII", INFO_BLOCK_SIZE, 1, PREFERRED_BLOCK, MAX_BLOCK)),
        ]
        if INFO_NAME in wanted:
            replies.append(Reply(REP_INFO, struct.pack(">H", INFO_NAME) + device.name.encode()))
        return [*replies, Reply(REP_ACK)], file

    def _meta_context(self, option: int, data: bytes) -> list[Reply]:
        if option == OPT_SET_META_CONTEXT:
            self.context = None
        if not self.structured:
            return [Reply(REP_ERR_INVALID, b"structured replies come first")]
        try:
            name, rest = _take_text(data)
            (count,) = struct.unpack_from(">I", rest)
            rest = rest[4:]
            queries = []
            for _ in range(count):
                query, rest = _take_text(rest)
                queries.append(query)
            device = self._find(name)
        except struct.error:
            return [Reply(REP_ERR_INVALID, b"malformed request")]
        except DeviceNotFound as error:
            return [_unknown(error)]
        listing = option == OPT_LIST_META_CONTEXT
        found = BASE_ALLOCATION in queries or (listing and (not queries or "base:" in queries))
        if not found:
            return [Reply(REP_ACK)]
        if not listing:
            self.context = device
        context = struct.pack(">I", 0 if listing else CONTEXT_ID) + BASE_ALLOCATION.encode()
        return [Reply(REP_META_CONTEXT, context), Reply(REP_ACK)]

    def _flags(self, device: Device) -> int:
        """Return the transmission flags of a device."""
        names = ["has_flags", "send_flush", "send_fua", "send_write_zeroes"]
        names += ["can_multi_conn", "send_cache", "send_fast_zero"]
        if self.structured:
            names.append("send_df")
        if device.supports_discard:
            names.append("send_trim")
        if device.readonly:
            names.append("read_only")
        return sum(FLAGS[name] for name in names)


def _unknown(error: DeviceNotFound) -> Reply:
    return Reply(REP_ERR_UNKNOWN, (error.strerror or "").encode())


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _take_text(data: bytes) -> tuple[str, bytes]:
    """Split off a string behind its 32-bit length; struct.error if it does not fit the data."""
    (length,) = struct.unpack_from(">I", data)
    if length > len(data) - 4:
        raise struct.error("a string is longer than the option")
    return _text(data[4 : 4 + length]), data[4 + length :]
