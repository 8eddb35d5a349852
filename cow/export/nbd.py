"""NBD: every device of a mapper as an export by its dm name.

The handshake is here, one thread a connection; after it the core answers requests without Python.
Numbers and rules are those of the protocol's description (proto.md of the NetworkBlockDevice
project): fixed newstyle, options in any order until GO or EXPORT_NAME.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable
from typing import NamedTuple

from cow import _core
from cow.device import Device
from cow.errors import CowError, CowOSError, InvalidArgument
from cow.mapper import Mapper

log = logging.getLogger("cow.nbd")

MAGIC = b"NBDMAGIC"
IHAVEOPT = b"IHAVEOPT"
REPLY_MAGIC = 0x3E889045565A9
FLAG_FIXED_NEWSTYLE = 1
FLAG_NO_ZEROES = 2

OPT_EXPORT_NAME = 1
OPT_ABORT = 2
OPT_LIST = 3
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
REP_ERR_UNKNOWN = 1 << 31 | 6
REP_ERR_TOO_BIG = 1 << 31 | 9

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

PREFERRED_BLOCK = 4096
MAX_BLOCK = 1 << 25
HANDSHAKE_SECONDS = 30


class ProtocolError(Exception):
    """The client broke the rules; the connection ends."""


class _Reply(NamedTuple):
    """What an option is answered with: a type and its data."""

    type: int
    data: bytes = b""


class NbdServer:
    """Serves the devices of a mapper on one address, `unix:PATH` or `tcp:HOST:PORT`.

    TCP is for the loopback only. A device that a client has open counts as open: it cannot be
    removed. A client sees a new device as soon as it exists.
    """

    def __init__(self, mapper: Mapper, address: str) -> None:
        self.mapper = mapper
        self.address = address
        self._listener = _listen(address)
        self._clients: set[_Client] = set()
        self._lock = threading.Lock()
        self._stopping = False
        self._thread = threading.Thread(target=self._accept, name="cow-nbd", daemon=True)

    @property
    def port(self) -> int | None:
        """The TCP port, useful where 0 was asked for; None for a Unix socket."""
        name = self._listener.getsockname()
        return name[1] if isinstance(name, tuple) else None

    def start(self) -> None:
        """Begin to answer clients."""
        self._thread.start()

    def stop(self) -> None:
        """Let requests under way finish, disconnect every client, and give up the address."""
        with self._lock:
            self._stopping = True
            clients = list(self._clients)
        self._listener.shutdown(socket.SHUT_RDWR)
        for client in clients:
            client.stop()
        for client in clients:
            client.join()
        if self._thread.ident is not None:
            self._thread.join()
        self._listener.close()
        if self.address.startswith("unix:"):
            os.unlink(self.address.removeprefix("unix:"))

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._stopping:
                    return
                raise
            with self._lock:
                if self._stopping:
                    connection.close()
                    return
                client = _Client(self.mapper, connection, self._forget)
                self._clients.add(client)
                client.start()

    def _forget(self, client: _Client) -> None:
        with self._lock:
            self._clients.discard(client)

    def __enter__(self) -> NbdServer:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


class _Client(threading.Thread):
    """One connection: the handshake, then the core."""

    def __init__(
        self, mapper: Mapper, connection: socket.socket, forget: Callable[[_Client], None]
    ) -> None:
        super().__init__(name="cow-nbd-client", daemon=True)
        self._mapper = mapper
        self._socket = connection
        self._forget = forget
        self._transmission: _core.NbdConnection | None = None
        self._structured = False
        self._context: str | None = None
        """The export that base:allocation was negotiated for."""
        self._no_zeroes = False
        self._stopping = False
        self._opened = contextlib.ExitStack()
        """Holds the device open from the moment the client was told it has it."""

    def stop(self) -> None:
        """Disconnect after the request under way."""
        self._stopping = True
        if self._transmission is not None:
            self._transmission.stop()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def run(self) -> None:
        """Talk to the client until it goes."""
        try:
            with self._socket, self._opened:
                if self._socket.family != socket.AF_UNIX:
                    self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._socket.settimeout(HANDSHAKE_SECONDS)
                device = self._handshake()
                if device is not None:
                    self._serve(device)
        except (ProtocolError, CowError, OSError) as error:
            if not self._stopping:
                log.info("client dropped: %s", error)
        finally:
            self._forget(self)

    def _serve(self, device: Device) -> None:
        self._socket.settimeout(None)
        negotiated = self._structured and self._context == device.name
        self._transmission = _core.NbdConnection(
            self._socket.fileno(),
            device,
            structured=self._structured,
            context=CONTEXT_ID if negotiated else 0,
        )
        if not self._stopping:
            self._transmission.run()

    # The handshake.

    def _receive(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = self._socket.recv(size - len(data))
            if not part:
                raise ProtocolError("the client went away during the handshake")
            data += part
        return bytes(data)

    def _handshake(self) -> Device | None:
        """Negotiate; return the device to serve, None where the client wants none."""
        self._socket.sendall(
            MAGIC + IHAVEOPT + struct.pack(">H", FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)
        )
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
            if option == OPT_EXPORT_NAME:
                return self._export_name(data)
            if option == OPT_ABORT:
                self._reply(option, _Reply(REP_ACK))
                return None
            device = self._option(option, data)
            if device is not None:
                return device

    def _option(self, option: int, data: bytes) -> Device | None:
        """Answer one option; a device where that ends the handshake."""
        device = None
        if option == OPT_LIST:
            replies = self._list(data)
        elif option in (OPT_INFO, OPT_GO):
            replies, device = self._info(data)
            if device is not None and option == OPT_GO:
                self._opened.enter_context(device.open(buffering=0))
        elif option == OPT_STRUCTURED_REPLY:
            self._structured = self._structured or not data
            replies = [_Reply(REP_ERR_INVALID if data else REP_ACK)]
        elif option in (OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT):
            replies = self._meta_context(option, data)
        else:
            replies = [_Reply(REP_ERR_UNSUP)]
        for reply in replies:
            self._reply(option, reply)
        return device if option == OPT_GO else None

    def _reply(self, option: int, reply: _Reply) -> None:
        head = struct.pack(">QIII", REPLY_MAGIC, option, reply.type, len(reply.data))
        self._socket.sendall(head + reply.data)

    def _find(self, name: str) -> Device | None:
        """Return the device of that name; the empty name is the only device there is."""
        names = self._mapper.names()
        if not name and len(names) == 1:
            name = names[0]
        try:
            return self._mapper.device(name) if name in names else None
        except CowOSError:
            return None

    def _export_name(self, data: bytes) -> Device:
        device = self._find(_text(data))
        if device is None:
            raise ProtocolError(f"no device {_text(data)!r}")
        self._opened.enter_context(device.open(buffering=0))
        zeros = b"" if self._no_zeroes else bytes(124)
        self._socket.sendall(struct.pack(">QH", device.size, _flags(device)) + zeros)
        return device

    def _list(self, data: bytes) -> list[_Reply]:
        if data:
            return [_Reply(REP_ERR_INVALID)]
        names = [name.encode() for name in self._mapper.names()]
        servers = [_Reply(REP_SERVER, struct.pack(">I", len(name)) + name) for name in names]
        return [*servers, _Reply(REP_ACK)]

    def _info(self, data: bytes) -> tuple[list[_Reply], Device | None]:
        try:
            name, rest = _take_text(data)
            (count,) = struct.unpack_from(">H", rest)
            wanted = struct.unpack(f">{count}H", rest[2:])
        except struct.error:
            return [_Reply(REP_ERR_INVALID, b"malformed request")], None
        device = self._find(name)
        if device is None:
            return [_Reply(REP_ERR_UNKNOWN, f"no device {name!r}".encode())], None
        replies = [
            _Reply(REP_INFO, struct.pack(">HQH", INFO_EXPORT, device.size, _flags(device))),
            _Reply(REP_INFO, struct.pack(">HIII", INFO_BLOCK_SIZE, 1, PREFERRED_BLOCK, MAX_BLOCK)),
        ]
        if INFO_NAME in wanted:
            replies.append(_Reply(REP_INFO, struct.pack(">H", INFO_NAME) + device.name.encode()))
        return [*replies, _Reply(REP_ACK)], device

    def _meta_context(self, option: int, data: bytes) -> list[_Reply]:
        if option == OPT_SET_META_CONTEXT:
            self._context = None
        if not self._structured:
            return [_Reply(REP_ERR_INVALID, b"structured replies come first")]
        try:
            name, rest = _take_text(data)
            (count,) = struct.unpack_from(">I", rest)
            rest = rest[4:]
            queries = []
            for _ in range(count):
                query, rest = _take_text(rest)
                queries.append(query)
        except struct.error:
            return [_Reply(REP_ERR_INVALID, b"malformed request")]
        device = self._find(name)
        if device is None:
            return [_Reply(REP_ERR_UNKNOWN, f"no device {name!r}".encode())]
        listing = option == OPT_LIST_META_CONTEXT
        found = BASE_ALLOCATION in queries or (listing and (not queries or "base:" in queries))
        if not found:
            return [_Reply(REP_ACK)]
        if not listing:
            self._context = device.name
        context = struct.pack(">I", 0 if listing else CONTEXT_ID) + BASE_ALLOCATION.encode()
        return [_Reply(REP_META_CONTEXT, context), _Reply(REP_ACK)]


def _flags(device: Device) -> int:
    """Return the transmission flags of a device."""
    names = ["has_flags", "send_flush", "send_fua", "send_write_zeroes", "send_df"]
    names += ["can_multi_conn", "send_cache", "send_fast_zero"]
    if device.supports_discard:
        names.append("send_trim")
    if device.readonly:
        names.append("read_only")
    return sum(FLAGS[name] for name in names)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _take_text(data: bytes) -> tuple[str, bytes]:
    """Split off a string behind its 32-bit length; struct.error if it does not fit the data."""
    (length,) = struct.unpack_from(">I", data)
    if length > len(data) - 4:
        raise struct.error("a string is longer than the option")
    return _text(data[4 : 4 + length]), data[4 + length :]


def _listen(address: str) -> socket.socket:
    """Listen on `unix:PATH` (for its owner alone) or `tcp:HOST:PORT` (loopback only)."""
    kind, _, rest = address.partition(":")
    if kind == "unix" and rest:
        return _listen_unix(rest)
    host, _, port = rest.rpartition(":")
    if kind != "tcp" or not host or not port.isdecimal():
        raise InvalidArgument(f"{address}: neither unix:PATH nor tcp:HOST:PORT")
    host = host.strip("[]")
    family, _, _, _, where = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
    if not ipaddress.ip_address(where[0]).is_loopback:
        raise InvalidArgument(f"{address}: not a loopback address, and there is no TLS yet")
    return socket.create_server(where[:2], family=family)


def _listen_unix(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        try:
            listener.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_stale(path):
                raise
            os.unlink(path)
            listener.bind(path)
    except OSError as error:
        listener.close()
        raise InvalidArgument(f"unix:{path}: {error.strerror}", error.errno) from error
    finally:
        os.umask(mask)
    listener.listen(128)
    return listener


def _is_stale(path: str) -> bool:
    """Tell whether a socket is left over from a process that is gone."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False
