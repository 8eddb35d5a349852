"""NBD byte by byte, as proto.md has it: the handshake, structured replies, every request."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from pathlib import Path

import pytest
from support import SECTOR, Rig, image, stamp
from test_nbd import CACHE, FLUSH, READ, TRIM, WRITE, WRITE_ZEROES, Client

import cow
from cow.export.nbd import NbdServer

SECTORS = 4096
BLOCK_STATUS = 7
FUA, NO_HOLE, REQ_ONE, FAST_ZERO = 1, 2, 8, 16
EXPORT_NAME, ABORT, LIST, INFO, GO, STRUCTURED, LIST_META, SET_META = 1, 2, 3, 6, 7, 8, 9, 10
ACK, SERVER, REP_INFO, META = 1, 2, 3, 4
UNSUPPORTED, INVALID, UNKNOWN = (1 << 31 | code for code in (1, 3, 6))
ALLOCATION = b"base:allocation"


def text(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


class Peer(Client):
    """A client that can do all the protocol has."""

    def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; return the replies up to the one that ends them."""
        self.socket.sendall(b"IHAVEOPT" + struct.pack(">II", option, len(data)) + data)
        replies = []
        while True:
            magic, echo, kind, length = struct.unpack(">QIII", self.receive(20))
            assert (magic, echo) == (0x3E889045565A9, option)
            replies.append((kind, self.receive(length)))
            if kind == ACK or kind >> 31:
                return replies

    def kinds(self, option: int, data: bytes = b"") -> list[int]:
        return [kind for kind, _ in self.option(option, data)]

    def start(self, name: str = "base", allocation: bool = False) -> None:
        """Go on to transmission with structured replies."""
        self.greet()
        assert self.kinds(STRUCTURED) == [ACK]
        if allocation:
            query = text(name.encode()) + struct.pack(">I", 1) + text(ALLOCATION)
            assert self.kinds(SET_META, query) == [META, ACK]
        assert self.kinds(GO, text(name.encode()) + b"\0\0")[-1] == ACK

    def chunk(self) -> tuple[int, bytes]:
        """Return type and payload of one structured reply, which is the only one of its request."""
        magic, flags, kind, cookie, length = struct.unpack(">IHHQI", self.receive(20))
        assert (magic, flags, cookie) == (0x668E33EF, 1, 42)
        return kind, self.receive(length)

    def failure(self) -> int:
        """Return the error of a structured reply."""
        kind, payload = self.chunk()
        assert kind == 1 << 15 | 1
        error, length = struct.unpack(">IH", payload[:6])
        assert length == len(payload) - 6
        return error

    def extents(self, offset: int, length: int, flags: int = 0) -> list[tuple[int, int]]:
        self.send(BLOCK_STATUS, offset, length, flags=flags)
        kind, payload = self.chunk()
        assert kind == 5
        assert payload[:4] == struct.pack(">I", 1)
        numbers = struct.unpack(f">{len(payload) // 4 - 1}I", payload[4:])
        return list(zip(numbers[::2], numbers[1::2], strict=True))

    def is_closed(self) -> bool:
        """Whether the server hung up."""
        with contextlib.suppress(ConnectionResetError):
            return self.socket.recv(1) == b""
        return True


@pytest.fixture
def rig(tmp_path):
    with cow.Mapper(durability="process") as dm:
        yield Rig(dm, tmp_path, SECTORS)


@pytest.fixture
def peer(rig, tmp_path):
    """A function that connects a new client."""
    peers = []

    def connect() -> Peer:
        peers.append(Peer(tmp_path / "nbd.sock"))
        return peers[-1]

    with NbdServer(rig.dm, f"unix:{tmp_path}/nbd.sock"):
        yield connect
        for each in peers:
            each.close()


# --- the handshake ------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "zeros"), [(1, 124), (3, 0)])
def test_an_export_can_be_chosen_the_old_way(rig, peer, flags, zeros):
    client = peer()
    assert client.receive(16) == b"NBDMAGICIHAVEOPT"
    assert struct.unpack(">H", client.receive(2))[0] & 3 == 3
    client.socket.sendall(struct.pack(">I", flags))
    client.socket.sendall(b"IHAVEOPT" + struct.pack(">II", EXPORT_NAME, 4) + b"base")
    size, transmission = struct.unpack(">QH", client.receive(10))
    assert size == SECTORS * SECTOR
    assert transmission & 1
    assert client.receive(zeros) == bytes(zeros)
    assert client.ask(READ, 0, SECTOR) == (0, rig.before[:SECTOR])


def test_the_old_way_to_no_export_ends_the_connection(peer):
    client = peer()
    client.greet()
    client.socket.sendall(b"IHAVEOPT" + struct.pack(">II", EXPORT_NAME, 6) + b"nosuch")
    assert client.is_closed()


def test_the_empty_name_is_the_only_device_there_is(rig, peer):
    client = peer()
    client.greet()
    assert client.kinds(GO, text(b"") + b"\0\0") == [UNKNOWN]
    rig.dm.remove("base")
    assert client.kinds(GO, text(b"") + b"\0\0")[-1] == ACK
    assert client.ask(READ, 0, SECTOR) == (0, rig.before[:SECTOR])


def test_unknown_client_flags_end_the_connection(peer):
    client = peer()
    client.receive(18)
    client.socket.sendall(struct.pack(">I", 1 << 20))
    assert client.is_closed()


@pytest.mark.parametrize("head", [b"IHAVEOPX\0\0\0\3\0\0\0\0", b"IHAVEOPT\0\0\0\3\xff\0\0\0"])
def test_what_is_no_option_ends_the_connection(peer, head):
    client = peer()
    client.greet()
    client.socket.sendall(head)
    assert client.is_closed()


def test_an_abort_is_acknowledged_and_ends_the_connection(peer):
    client = peer()
    client.greet()
    assert client.kinds(ABORT) == [ACK]
    assert client.is_closed()


def test_options_that_are_wrong_are_refused_and_others_may_follow(peer):
    client = peer()
    client.greet()
    assert client.kinds(77) == [UNSUPPORTED]
    assert client.kinds(LIST, b"x") == [INVALID]
    assert client.kinds(STRUCTURED, b"x") == [INVALID]
    assert client.kinds(INFO, text(b"nosuch") + b"\0\0") == [UNKNOWN]
    for data in (b"", b"\0\0\0\x09base", text(b"base"), text(b"base") + b"\0\2\0\0"):
        assert client.kinds(INFO, data) == [INVALID]
    assert client.kinds(LIST) == [SERVER, SERVER, ACK]


def test_info_tells_name_size_and_blocks(peer):
    client = peer()
    client.greet()
    replies = client.option(INFO, text(b"base") + struct.pack(">HH", 1, 1))
    found = {struct.unpack(">H", data[:2])[0]: data[2:] for kind, data in replies if kind == 3}
    assert struct.unpack(">QH", found[0])[0] == SECTORS * SECTOR
    assert found[1] == b"base"
    least, preferred, most = struct.unpack(">III", found[3])
    assert least <= SECTOR <= preferred <= most
    assert replies[-1] == (ACK, b"")


def test_meta_contexts_come_after_structured_replies(peer):
    client = peer()
    client.greet()
    query = text(b"base") + struct.pack(">I", 1) + text(ALLOCATION)
    assert client.kinds(SET_META, query) == [INVALID]
    assert client.kinds(STRUCTURED) == [ACK]
    assert client.option(SET_META, query)[0][1][4:] == ALLOCATION
    assert client.kinds(SET_META, query[:-1]) == [INVALID]
    assert client.kinds(SET_META, text(b"nosuch") + bytes(4)) == [UNKNOWN]
    assert client.kinds(SET_META, text(b"base") + bytes(4)) == [ACK]


@pytest.mark.parametrize(
    ("queries", "found"),
    [([], True), ([b"base:"], True), ([ALLOCATION], True), ([b"qemu:"], False)],
)
def test_meta_contexts_are_listed(peer, queries, found):
    client = peer()
    client.greet()
    assert client.kinds(STRUCTURED) == [ACK]
    data = text(b"base") + struct.pack(">I", len(queries)) + b"".join(map(text, queries))
    replies = client.option(LIST_META, data)
    assert [data[4:] for kind, data in replies if kind == META] == [ALLOCATION] * found


# --- structured replies ---------------------------------------------------------------------------


def test_structured_replies_carry_the_offset(peer):
    client = peer()
    client.start()
    client.send(READ, 3 * SECTOR, SECTOR)
    assert client.chunk() == (1, struct.pack(">Q", 3 * SECTOR) + stamp(3, 1, 0))


def test_what_can_have_no_data_gets_a_simple_reply(rig, peer):
    """Structured replies are a must for reads; a client reads the other ones in one piece."""
    client = peer()
    client.start()
    client.send(WRITE, 0, SECTOR, b"x" * SECTOR)
    assert client.answer() == (0, b"")
    assert rig.read("base", 0, 1) == b"x" * SECTOR
    client.send(WRITE, rig.dm.device("base").size, SECTOR, bytes(SECTOR))
    assert client.answer() == (errno.ENOSPC, b"")


def test_structured_errors(rig, peer):
    rig.dm.create("bad", "0 8 error\n8 8 zero")
    client = peer()
    client.start("bad", allocation=True)
    for kind, offset, error in (
        (READ, 0, errno.EIO),
        (READ, 16 * SECTOR, errno.EINVAL),
        (BLOCK_STATUS, 0, errno.EIO),
        (BLOCK_STATUS, 16 * SECTOR, errno.EINVAL),
    ):
        client.send(kind, offset, SECTOR)
        assert client.failure() == error, (kind, offset)
    client.send(READ, 8 * SECTOR, SECTOR)
    assert client.chunk()[1][8:] == bytes(SECTOR)


def test_block_status_wants_the_context(peer):
    client = peer()
    client.start()
    client.send(BLOCK_STATUS, 0, SECTOR)
    assert client.failure() == errno.EINVAL


def test_block_status_tells_zeros_from_data(rig, peer):
    lines = [f"{8 * i} 8 {['zero', f'linear base-real {8 * i}'][i % 2]}" for i in range(16)]
    rig.dm.create("mixed", "\n".join(lines))
    client = peer()
    client.start("mixed", allocation=True)
    piece = 8 * SECTOR
    assert client.extents(0, 16 * piece) == [(piece, 3), (piece, 0)] * 8
    assert client.extents(piece // 2, piece) == [(piece // 2, 3), (piece // 2, 0)]
    assert client.extents(0, 4 * piece, REQ_ONE) == [(piece, 3)]


def test_block_status_of_too_many_extents_tells_the_first_of_them(rig, peer):
    lines = [f"{i} 1 {['zero', f'linear base-real {i % SECTORS}'][i % 2]}" for i in range(10000)]
    rig.dm.create("mixed", "\n".join(lines))
    client = peer()
    client.start("mixed", allocation=True)
    found = client.extents(0, 10000 * SECTOR)
    assert 1000 <= len(found) < 10000
    assert found == [(SECTOR, 3), (SECTOR, 0)] * (len(found) // 2)


# --- requests -------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [0, FUA])
def test_a_trim_reads_as_zeros(rig, peer, flags):
    client = peer()
    client.go("base-real")
    assert client.ask(TRIM, 8 * SECTOR, 8 * SECTOR, flags=flags) == (0, b"")
    assert client.ask(TRIM, 0, 0, flags=flags) == (0, b"")
    assert client.ask(READ, 0, 32 * SECTOR) == (
        0,
        rig.before[: 8 * SECTOR] + bytes(8 * SECTOR) + rig.before[16 * SECTOR : 32 * SECTOR],
    )


@pytest.mark.parametrize("kind", ["snapshot-origin", "snapshot", "snapshot-merge"])
def test_a_trim_of_what_takes_none_is_refused(rig, peer, kind):
    rig.snap("snap", "P 8")
    name = "snap" if kind == "snapshot" else "base"
    if kind == "snapshot-merge":
        rig.dm.remove("snap")
        rig.dm.load("base", rig.line("snap", kind=kind))
        rig.dm.resume("base")
    client = peer()
    client.go(name)
    assert client.ask(TRIM, 0, 8 * SECTOR) == (95, b"")
    assert client.ask(READ, 0, SECTOR) == (0, rig.before[:SECTOR])


@pytest.mark.parametrize("flags", [0, FUA, NO_HOLE, FAST_ZERO])
def test_zeros_are_written(rig, peer, flags):
    client = peer()
    client.go("base-real")
    assert client.ask(WRITE_ZEROES, 8 * SECTOR, 8 * SECTOR, flags=flags) == (0, b"")
    assert client.ask(WRITE_ZEROES, 0, 0, flags=flags) == (0, b"")
    assert client.ask(READ, 8 * SECTOR, 8 * SECTOR) == (0, bytes(8 * SECTOR))
    allocated = Path(rig.origin).stat().st_blocks * SECTOR
    assert (allocated < SECTORS * SECTOR) == (flags != NO_HOLE)


def test_zeros_that_are_not_faster_than_a_write_are_refused_to_who_wants_them_fast(rig, peer):
    client = peer()
    client.go("base")
    assert client.ask(WRITE_ZEROES, 0, SECTOR, flags=FAST_ZERO) == (95, b"")
    assert client.ask(WRITE_ZEROES, 0, SECTOR) == (0, b"")
    assert client.ask(READ, 0, 2 * SECTOR) == (0, bytes(SECTOR) + stamp(1, 1, 0))


def test_cache_and_flush_do_no_harm(rig, peer):
    client = peer()
    client.go("base")
    assert client.ask(CACHE, 0, SECTORS * SECTOR) == (0, b"")
    assert client.ask(FLUSH, 0, 0) == (0, b"")


def test_what_is_no_request_ends_the_connection(peer):
    client = peer()
    client.go("base")
    client.socket.sendall(b"x" * 28)
    assert client.is_closed()


def test_a_write_longer_than_any_may_be_ends_the_connection(peer):
    client = peer()
    client.go("base")
    client.send(WRITE, 0, (32 << 20) + 1)
    assert client.is_closed()


def test_requests_that_arrive_in_any_pieces_are_answered(rig, peer):
    """The buffer of what has arrived is moved and made larger with a part of a request in it."""
    client = peer()
    client.go("base")
    requests = b"".join(
        struct.pack(">IHHQQI", 0x25609513, 0, WRITE, 42, at * SECTOR, count * SECTOR)
        + stamp(at, count, 5)
        for at, count in ((0, 3), (3, 400), (403, 1), (500, 700), (1200, 2))
    )
    cut = len(requests) - 700
    for start, end in ((0, 40), (40, 5000), (5000, cut), (cut, len(requests))):
        client.socket.sendall(requests[start:end])
        if end < len(requests):
            # The server has taken what was sent when it answers another client.
            other = peer()
            other.go("base")
            other.close()
    for _ in range(5):
        assert client.answer() == (0, b"")
    assert rig.read("base", 0, 404) == stamp(0, 404, 5)
    assert rig.read("base", 500, 702) == stamp(500, 702, 5)


def test_a_write_that_finds_no_room_is_an_error_and_the_others_are_done(rig, peer):
    rig.snap("snap", "PO 8", cow_sectors=32)
    client = peer()
    client.go("snap")
    for sector in (0, 8, 16, 24):
        client.send(WRITE, sector * SECTOR, 8 * SECTOR, stamp(sector, 8, 3))
    assert [client.answer()[0] for _ in range(4)] == [0, 0, errno.EIO, errno.EIO]
    assert client.ask(READ, 0, 32 * SECTOR) == (
        0,
        stamp(0, 16, 3) + rig.before[16 * SECTOR : 32 * SECTOR],
    )


# --- sockets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["file", "socket"])
def test_a_path_that_is_no_stale_stream_socket_is_left_alone(rig, tmp_path, target):
    path = str(tmp_path / "path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        if target == "socket":
            other.bind(path)
        else:
            image(Path(path), stamp(0, 1, 1))
        with pytest.raises(cow.InvalidArgument) as caught:
            NbdServer(rig.dm, f"unix:{path}")
        assert caught.value.errno == errno.EADDRINUSE
        assert Path(path).is_socket() == (target == "socket")
        assert target == "socket" or Path(path).read_bytes() == stamp(0, 1, 1)
