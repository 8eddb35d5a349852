"""NBD clients that send garbage, too much, too little, or nothing: it costs them their connection.

A witness has a connection of its own all the time, and must not notice.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import struct
import threading
import time
from pathlib import Path

import pytest
from support import SECTOR, Rig, poll
from support.nbd import (
    BLOCK_STATUS,
    CACHE,
    CHUNK_DATA,
    CHUNK_ERROR,
    CHUNK_NONE,
    CHUNK_STATUS,
    DF,
    DISC,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    OPT_EXPORT_NAME,
    OPT_GO,
    OPT_INFO,
    OPT_LIST,
    OPT_LIST_META,
    OPT_SET_META,
    OPT_STRUCTURED_REPLY,
    READ,
    REQ_ONE,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Client,
    name_data,
)

import cow
from cow.export.nbd import NbdServer

SECTORS = 2048
VICTIM = 64 * SECTOR
MIB = 1 << 20


@pytest.fixture
def rig(tmp_path):
    with cow.Mapper(durability="process") as dm:
        rig = Rig(dm, tmp_path, SECTORS)
        (tmp_path / "victim.img").write_bytes(bytes(VICTIM))
        dm.create("victim", f"0 64 linear {tmp_path}/victim.img 0")
        yield rig


class Scene:
    """A server with a witness, who reads `base` and finds it unchanged."""

    def __init__(self, rig: Rig, path: Path, **settings) -> None:
        self.rig = rig
        self.path = path
        self.server = NbdServer(rig.dm, f"unix:{path}", **settings)
        self.server.start()
        self.witness = Client(path)
        self.witness.go("base")
        self.threads = self.count_threads()
        self.files = count_files()

    @staticmethod
    def count_threads() -> int:
        return sum(thread.name.startswith("cow-nbd") for thread in threading.enumerate())

    def look(self) -> None:
        """Let the witness read."""
        offset = SECTOR * random.randrange(SECTORS - 8)
        expected = self.rig.before[offset : offset + 4096]
        assert self.witness.ask(READ, offset, 4096) == (0, expected)

    def end(self) -> None:
        """Check that bad clients left neither threads nor files, and that nothing changed."""
        poll(lambda: self.count_threads() == self.threads)
        poll(lambda: count_files() == self.files)
        assert self.rig.dm.device("victim").files == 0
        self.look()
        self.witness.close()
        self.server.stop()
        assert self.count_threads() == 0
        assert self.rig.read("base") == self.rig.before


def count_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def memory() -> int:
    """Return how many bytes of this process are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.fixture
def scene(rig, tmp_path):
    """A function that starts a server; at the end it has to be as it was at the beginning."""
    scenes = []

    def start(**settings) -> Scene:
        scenes.append(Scene(rig, tmp_path / "nbd.sock", **settings))
        return scenes[-1]

    yield start
    for each in scenes:
        each.end()


# --- whole conversations, with something wrong in them --------------------------------------------


def option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def request(kind: int, offset: int, length: int, data: bytes = b"", flags: int = 0) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, flags, kind, 42, offset, length) + data


META = name_data("victim") + struct.pack(">I", 1) + name_data("base:allocation")
CONVERSATIONS = [
    [
        struct.pack(">I", 3),
        option(OPT_STRUCTURED_REPLY),
        option(OPT_LIST),
        option(OPT_LIST_META, name_data("victim") + struct.pack(">I", 0)),
        option(OPT_SET_META, META),
        option(OPT_INFO, name_data("victim") + struct.pack(">HH", 1, 3)),
        option(OPT_GO, name_data("victim") + struct.pack(">HHH", 2, 1, 3)),
        request(WRITE, 0, 4096, b"w" * 4096, FUA),
        request(READ, 0, 4096, flags=DF),
        request(BLOCK_STATUS, 0, VICTIM),
        request(WRITE_ZEROES, 0, 8192, flags=FAST_ZERO),
        request(TRIM, 4096, 4096),
        request(FLUSH, 0, 0),
        request(CACHE, 0, VICTIM),
        request(DISC, 0, 0),
    ],
    [
        struct.pack(">I", 1),
        option(OPT_EXPORT_NAME, b"victim"),
        request(WRITE, 512, 512, b"x" * 512),
        request(READ, 0, VICTIM),
        request(DISC, 0, 0),
    ],
]
NUMBERS = [0, 1, 15, 1 << 16, (1 << 16) + 1, 1 << 25, (1 << 25) + 1, 1 << 31, (1 << 32) - 1]


def spoil(dice: random.Random, steps: list[bytes]) -> bytes:
    """Return a conversation with one thing wrong."""
    at = dice.randrange(len(steps))
    before, step, after = b"".join(steps[:at]), steps[at], b"".join(steps[at + 1 :])
    match dice.randrange(6):
        case 0:  # truncated
            return before + step[: dice.randrange(len(step))]
        case 1:  # a number in it is another
            where = 4 * dice.randrange(max(1, len(step[:64]) // 4))
            step = step[:where] + struct.pack(">I", dice.choice(NUMBERS)) + step[where + 4 :]
        case 2:  # bytes are changed
            changed = bytearray(step)
            for _ in range(dice.randrange(1, 9)):
                changed[dice.randrange(len(changed))] = dice.randrange(256)
            step = bytes(changed)
        case 3:  # something is in between
            step = dice.randbytes(dice.randrange(1, 100)) + step
        case 4:  # it is said twice
            step += step
        case 5:  # it is left out
            step = b""
    return before + step + after


def converse(path: Path, said: bytes, dice: random.Random) -> None:
    """Say all of it, take what is answered or not, and go in one way or another."""
    client = Client(path)
    client.socket.settimeout(0.005)
    with contextlib.suppress(OSError):
        for start in range(0, len(said), size := dice.choice([1, 7, 100, 1 << 20])):
            client.socket.sendall(said[start : start + size])
            if size == 1 and start > 300:
                client.socket.sendall(said[start + 1 :])
                break
    match dice.randrange(4):
        case 0:  # says no more, and listens
            with contextlib.suppress(OSError):
                client.socket.shutdown(socket.SHUT_WR)
                client.socket.settimeout(30)
                while client.socket.recv(1 << 16):
                    pass
        case 1:  # goes without having listened
            pass
        case 2:
            with contextlib.suppress(OSError):
                client.socket.recv(dice.randrange(1, 1000))
        case 3:
            client.socket.shutdown(socket.SHUT_RDWR)
    client.close()


@pytest.mark.parametrize("steps", CONVERSATIONS, ids=["options", "export name"])
def test_a_conversation_that_goes_wrong_is_nobody_elses_business(scene, steps, seed):
    print("seed", seed)
    dice = random.Random(f"{seed} {len(steps)}")
    here = scene()
    converse(here.path, b"".join(steps), random.Random(0))
    for _ in range(200):
        converse(here.path, spoil(dice, steps), dice)
        here.look()


def test_conversations_that_go_wrong_at_the_same_time(scene, seed):
    print("seed", seed)
    here = scene()

    def misbehave(number: int) -> None:
        dice = random.Random(f"{seed} {number}")
        for _ in range(50):
            converse(here.path, spoil(dice, dice.choice(CONVERSATIONS)), dice)

    bad = [threading.Thread(target=misbehave, args=(number,)) for number in range(8)]
    for thread in bad:
        thread.start()
    while any(thread.is_alive() for thread in bad):
        here.look()


@pytest.mark.parametrize("steps", CONVERSATIONS, ids=["options", "export name"])
def test_a_client_may_go_after_any_byte(scene, steps):
    here = scene()
    said = b"".join(step[:100] if step[:4] != b"IHAV" else step for step in steps)
    for end in range(0, len(said), 3):
        client = Client(here.path)
        with contextlib.suppress(OSError):
            client.socket.sendall(said[:end])
        client.close()
    here.look()


# --- requests that are no garbage, but strange ----------------------------------------------------


def expected(kind: int, flags: int, offset: int, length: int, structured: bool) -> int:
    """Return the error that the protocol wants for a request on `victim`."""
    known = {
        READ: FUA | (DF if structured else 0),
        WRITE_ZEROES: FUA | NO_HOLE | FAST_ZERO,
        BLOCK_STATUS: FUA | REQ_ONE,
    }.get(kind, FUA)
    if flags & ~known or kind not in (
        *(READ, WRITE, FLUSH, TRIM, CACHE, WRITE_ZEROES),
        *((BLOCK_STATUS,) if structured else ()),
    ):
        return errno.EINVAL
    if kind != FLUSH and offset + length > VICTIM:
        return errno.ENOSPC if kind in (WRITE, WRITE_ZEROES) else errno.EINVAL
    if kind == BLOCK_STATUS and length == 0:
        return errno.EINVAL
    if kind == WRITE_ZEROES and flags & NO_HOLE and flags & FAST_ZERO:
        return errno.EOPNOTSUPP
    return 0


OFFSETS = [0, 1, 512, VICTIM - 1, VICTIM, VICTIM + 1, 1 << 63, (1 << 64) - 1, (1 << 64) - 512]
LENGTHS = [0, 1, 511, 512, VICTIM - 1, VICTIM, VICTIM + 1, 1 << 25, (1 << 25) + 1, (1 << 32) - 1]


@pytest.mark.parametrize("structured", [False, True])
def test_every_request_has_the_answer_that_the_protocol_wants(scene, structured, seed):
    print("seed", seed)
    dice = random.Random(f"{seed} {structured}")
    here = scene()
    client = Client(here.path)
    if structured:
        client.negotiate("victim")
    else:
        client.go("victim")
    for _ in range(1000):
        kind = (
            dice.choice([*range(10), 1 << 15]) if dice.random() < 0.9 else dice.randrange(1 << 16)
        )
        flags = dice.choice([0, 0, FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, NO_HOLE | FAST_ZERO])
        offset, length = dice.choice(OFFSETS), dice.choice(LENGTHS)
        if kind == DISC:
            continue
        if kind == WRITE:
            length = min(length, VICTIM + 1)
        client.send(kind, offset, length, bytes(length) if kind == WRITE else b"", flags)
        what = (kind, flags, offset, length)
        error = expected(*what, structured)
        if not structured or kind not in (READ, BLOCK_STATUS):
            assert client.answer(length if kind == READ else 0)[0] == error, what
            continue
        chunk, data = client.chunk()
        if error:
            assert (chunk, struct.unpack(">IH", data)) == (CHUNK_ERROR, (error, 0)), what
        elif kind == READ and length:
            assert (chunk, len(data)) == (CHUNK_DATA, 8 + length), what
        else:
            assert chunk == (CHUNK_STATUS if kind == BLOCK_STATUS else CHUNK_NONE), what
    client.close()


def test_a_write_that_is_too_large_ends_the_connection(scene):
    here = scene()
    client = Client(here.path)
    client.go("victim")
    client.send(WRITE, 0, (1 << 25) + 1)
    assert client.is_closed()
    client.close()


# --- too long, too much ---------------------------------------------------------------------------


def test_a_handshake_that_is_spun_out_is_cut_off(scene):
    """A byte now and then is not enough to stay."""
    here = scene(handshake_seconds=0.5)
    client = Client(here.path)
    started = time.monotonic()
    with contextlib.suppress(OSError):
        for byte in struct.pack(">I", 3) + option(77, bytes(1 << 16)):
            client.socket.sendall(bytes([byte]))
            assert time.monotonic() < started + 30
            time.sleep(0.02)
    client.close()


def test_a_handshake_that_never_ends_is_cut_off(scene):
    """Neither are good options, one after the other."""
    here = scene(handshake_seconds=0.5)
    client = Client(here.path)
    client.greet()
    started = time.monotonic()
    with contextlib.suppress(OSError, EOFError):
        while time.monotonic() < started + 30:
            client.option(OPT_LIST)
    assert time.monotonic() < started + 30
    client.close()


def test_a_handshake_whose_answers_nobody_takes_is_cut_off(scene):
    here = scene(handshake_seconds=0.5)
    client = Client(here.path)
    client.greet()
    client.socket.settimeout(0.2)
    started = time.monotonic()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        while time.monotonic() < started + 30:
            with contextlib.suppress(TimeoutError):
                client.socket.sendall(option(OPT_LIST))
    assert time.monotonic() < started + 30
    client.close()


def test_a_client_that_says_nothing_is_cut_off(scene):
    here = scene(handshake_seconds=0.2)
    client = Client(here.path)
    client.receive(18)
    assert client.is_closed()
    client.close()


def test_a_client_in_transmission_may_be_silent(scene):
    here = scene(handshake_seconds=0.2)
    time.sleep(0.5)
    here.look()


def test_one_more_takes_the_place_of_the_oldest_handshake(scene):
    here = scene(max_clients=3)
    silent = [Client(here.path) for _ in range(2)]
    for each in silent:
        each.receive(18)
    late = Client(here.path)
    assert late.go("victim") == VICTIM
    assert silent[0].is_closed()
    late.send(READ, 0, 512)
    assert late.answer(512)[0] == 0
    for each in (*silent, late):
        each.close()


def test_where_all_are_at_work_one_more_is_turned_away(scene):
    here = scene(max_clients=2)
    second = Client(here.path)
    second.go("victim")
    third = Client(here.path)
    assert third.is_closed()
    assert second.ask(READ, 0, 512)[0] == 0
    second.close()
    third.close()


def test_what_is_announced_takes_no_memory(scene):
    """Options of 4 GiB, contexts by the billion, writes of 32 MiB: nothing of it is sent."""
    here = scene(max_clients=200)
    before = memory()
    clients = []
    for announced in (
        b"IHAVEOPT" + struct.pack(">II", OPT_GO, (1 << 32) - 1),
        b"IHAVEOPT" + struct.pack(">II", 77, 1 << 16),
        option(OPT_SET_META, name_data("victim") + struct.pack(">I", (1 << 32) - 1)),
        option(OPT_GO, struct.pack(">IH", (1 << 32) - 1, 0)),
        option(OPT_GO, name_data("victim") + struct.pack(">H", (1 << 16) - 1)),
    ):
        for _ in range(20):
            clients.append(Client(here.path))
            clients[-1].greet()
            clients[-1].option(OPT_STRUCTURED_REPLY)
            clients[-1].socket.sendall(announced)
    for _ in range(50):
        clients.append(Client(here.path))
        clients[-1].go("victim")
        clients[-1].send(WRITE, 0, 1 << 25)
        clients[-1].socket.sendall(bytes(1000))
    here.look()
    assert memory() < before + 512 * MIB  # most of which only a sanitizer needs
    for each in clients:
        each.close()
