"""NBD: devices reached by clients that were not written here, and by clients that misbehave."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import resource
import socket
import struct
import threading
from pathlib import Path

import pytest
from support import SECTOR, Rig, crash, image, poll, stamp
from support.nbd import (
    BLOCK_STATUS,
    CACHE,
    CHUNK_NONE,
    CHUNK_STATUS,
    DF,
    DISC,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    OPT_STRUCTURED_REPLY,
    READ,
    REQ_ONE,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Client,
    need,
    run,
)

import cow
from cow.errors import InvalidArgument
from cow.export.listen import Listener
from cow.export.nbd import NbdServer

SECTORS = 8192
SEND_DF = 1 << 7


@pytest.fixture
def rig(tmp_path):
    with cow.Mapper(durability="process") as dm:
        yield Rig(dm, tmp_path, SECTORS)


@pytest.fixture
def server(rig, tmp_path):
    with NbdServer(rig.dm, f"unix:{tmp_path}/nbd.sock") as server:
        yield server


@pytest.fixture
def uri(server, tmp_path):
    """A function that names a device for a client."""
    return lambda name: f"nbd+unix:///{name}?socket={tmp_path}/nbd.sock"


# --- clients of others ----------------------------------------------------------------------------


def test_nbdinfo_lists_every_device(rig, uri):
    need("nbdinfo")
    rig.snap()
    found = json.loads(run("nbdinfo", "--list", "--json", uri("")))
    exports = {export["export-name"]: export for export in found["exports"]}
    assert sorted(exports) == rig.dm.names()
    assert {export["export-size"] for export in exports.values()} == {SECTORS * SECTOR}
    assert not exports["base"]["can_trim"]
    assert exports["base-real"]["can_trim"]
    assert exports["snap"]["can_multi_conn"]


def test_a_new_device_is_an_export_at_once(rig, uri):
    need("nbdinfo")
    rig.dm.create("later", "0 8 zero")
    assert run("nbdinfo", "--size", uri("later")) == "4096\n"


def test_a_read_only_device_is_a_read_only_export(rig, uri):
    need("nbdinfo", "qemu-io")
    rig.dm.create("ro", "0 8 linear base-real 0", readonly=True)
    seen = json.loads(run("nbdinfo", "--json", "--no-content", uri("ro")))
    assert seen["exports"][0]["is_read_only"]


def test_nbdinfo_map_shows_zeros(rig, uri):
    need("nbdinfo")
    rig.dm.create("half", "0 8 linear base-real 0\n8 8 zero")
    extents = json.loads(run("nbdinfo", "--map", "--json", uri("half")))
    assert [(e["offset"], e["length"], e["type"]) for e in extents] == [
        (0, 4096, 0),
        (4096, 4096, 3),
    ]


def test_nbdcopy_reads_a_snapshot_while_the_origin_is_written(rig, uri, tmp_path):
    need("nbdcopy")
    rig.snap()
    rig.write("base", 0, 64)
    run("nbdcopy", uri("snap"), str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == rig.before


def test_nbdcopy_writes_a_device(rig, uri, tmp_path):
    need("nbdcopy")
    rig.snap(cow_sectors=2 * SECTORS)
    data = stamp(0, SECTORS, 9)
    (tmp_path / "new").write_bytes(data)
    run("nbdcopy", str(tmp_path / "new"), uri("base"))
    assert rig.read("base") == data
    assert rig.read("snap") == rig.before


def test_qemu_img_compares_and_converts(rig, uri, tmp_path):
    need("qemu-img")
    rig.snap()
    rig.write("base", 8, 8)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri("snap"), str(tmp_path / "q.qcow2"))
    out = run("qemu-img", "compare", "-F", "raw", str(tmp_path / "q.qcow2"), uri("snap"))
    assert "identical" in out
    with pytest.raises(AssertionError, match="Content mismatch at offset 4096"):
        run("qemu-img", "compare", "-F", "raw", str(tmp_path / "q.qcow2"), uri("base"))


def test_qemu_io_patterns_are_read_back(rig, uri):
    need("qemu-io")
    commands = ["write -P 0x5a 4096 65536", "read -P 0x5a 4096 65536", "write -z 8k 4k", "flush"]
    commands += ["read -P 0 8k 4k", "write -f -P 0x77 1k 3k", "read -P 0x77 1k 3k"]
    words = [word for command in commands for word in ("-c", command)]
    out = run("qemu-io", "-f", "raw", *words, uri("base"))
    assert "failed" not in out
    assert rig.dm.device("base").pread(3072, 1024) == b"\x77" * 3072


def test_fio_verifies_what_it_wrote(rig, uri, tmp_path):
    need("fio")
    rig.snap(cow_sectors=2 * SECTORS)
    job = ["--name=j", "--ioengine=nbd", f"--uri={uri('base')}", "--rw=randwrite", "--bs=4k"]
    job += ["--iodepth=32", f"--size={SECTORS * SECTOR}", "--verify=crc32c", "--minimal"]
    run("fio", *job, cwd=tmp_path)
    assert rig.read("snap") == rig.before


def test_nbdkits_client_serves_a_device_again(rig, uri, tmp_path):
    need("nbdkit", "nbdcopy")
    run(
        "nbdkit", "-U", "-", "nbd", f"uri={uri('base')}",
        "--run", f'nbdcopy "$uri" {tmp_path}/copy',
    )  # fmt: skip
    assert (tmp_path / "copy").read_bytes() == rig.before


# --- our own client, byte by byte -----------------------------------------------------------------


@pytest.fixture
def client(server, tmp_path):
    """A function that connects to a device."""
    clients = []

    def connect(name: str | None = "base") -> Client:
        clients.append(Client(tmp_path / "nbd.sock"))
        if name is not None:
            assert clients[-1].go(name) > 0
        return clients[-1]

    yield connect
    for each in clients:
        each.close()


def test_errors_come_back_and_the_connection_lives_on(rig, client):
    rig.dm.create("bad", "0 8 error")
    bad = client("bad")
    assert bad.ask(READ, 0, 512) == (errno.EIO, b"")
    assert bad.ask(WRITE, 0, 512, bytes(512)) == (errno.EIO, b"")
    assert bad.ask(WRITE, 4096, 512, bytes(512)) == (errno.ENOSPC, b"")
    assert bad.ask(READ, 4096, 1) == (errno.EINVAL, b"")
    assert bad.ask(99, 0, 0) == (errno.EINVAL, b"")
    assert bad.ask(FLUSH, 0, 0)[0] in (0, errno.EIO)
    assert bad.ask(READ, 0, 0) == (0, b"")


def test_a_read_only_export_refuses_writes(rig, client):
    rig.dm.create("ro", "0 8 linear base-real 0", readonly=True)
    ro = client("ro")
    for kind, data in ((WRITE, bytes(512)), (WRITE_ZEROES, b""), (TRIM, b"")):
        assert ro.ask(kind, 0, 512, data) == (errno.EPERM, b"")
    assert ro.ask(READ, 0, 512) == (0, rig.before[:512])


def test_the_largest_request_is_32_mib(rig, client):
    rig.dm.create("big", f"0 {1 << 17} zero")
    big = client("big")
    error, data = big.ask(READ, 0, 32 << 20)
    assert (error, len(data), any(data)) == (0, 32 << 20, False)
    assert big.ask(WRITE, 0, 32 << 20, bytes(32 << 20)) == (0, b"")
    big.send(READ, 0, (32 << 20) + 1)
    assert big.answer()[0] == errno.EINVAL


def test_requests_of_any_size_and_place_are_what_was_asked_for(rig, client, seed):
    print("seed", seed)
    dice = random.Random(seed)
    base, model = client("base"), bytearray(rig.before)
    for _ in range(300):
        offset = dice.randrange(SECTORS * SECTOR)
        length = dice.randrange(min(70000, SECTORS * SECTOR - offset) + 1)
        if dice.random() < 0.5:
            data = dice.randbytes(length)
            assert base.ask(WRITE, offset, length, data, flags=dice.choice([0, 1])) == (0, b"")
            model[offset : offset + length] = data
        else:
            assert base.ask(READ, offset, length) == (0, bytes(model[offset : offset + length]))


def test_many_requests_in_flight_are_all_answered(rig, client):
    base = client("base")

    def send() -> None:
        for sector in range(1000):
            base.send(READ, sector * SECTOR, SECTOR)

    sender = threading.Thread(target=send)
    sender.start()
    for sector in range(1000):
        assert base.answer(SECTOR) == (0, rig.before[sector * SECTOR : (sector + 1) * SECTOR])
    sender.join()


def test_writes_that_arrive_together_land_in_their_order(rig, client, seed):
    """Short ones are prepared together, long ones done in pieces; they overlap."""
    print("seed", seed)
    dice = random.Random(seed)
    rig.snap(cow_sectors=4 * SECTORS)
    for name in ("snap", "base"):
        dev, model = client(name), bytearray(rig.before)
        for _ in range(40):
            writes = [dice.choice((512, 4096, 8192, 600_000)) for _ in range(8)]
            for length in writes:
                offset, data = 512 * dice.randrange(2000), dice.randbytes(length)
                dev.send(WRITE, offset, length, data)
                model[offset : offset + length] = data
            assert [dev.answer()[0] for _ in writes] == [0] * 8
        assert dev.ask(READ, 0, len(model)) == (0, bytes(model))


def test_suspend_makes_requests_wait_and_not_fail(rig, client):
    base = client("base")
    rig.dm.suspend("base")
    base.send(WRITE, 0, 512, b"x" * 512)
    base.send(READ, 0, 512)
    rig.cows["snap"] = str(rig.folder / "snap.cow")
    Path(rig.cows["snap"]).write_bytes(bytes(1 << 20))
    rig.dm.create("snap", rig.line("snap"))
    rig.dm.resume("base")
    assert base.answer() == (0, b"")
    assert base.answer(512) == (0, b"x" * 512)
    assert rig.read("snap") == rig.before


def test_a_device_in_use_by_a_client_cannot_be_removed(rig, client):
    rig.dm.create("dev", "0 8 zero")
    dev = client("dev")
    with pytest.raises(cow.DeviceBusy):
        rig.dm.remove("dev")
    rig.dm.remove("dev", deferred=True)
    dev.send(DISC, 0, 0)
    with contextlib.suppress(EOFError):
        dev.receive(1)
    for thread in threading.enumerate():
        if thread.name == "cow-nbd-client":
            thread.join(30)
    assert "dev" not in rig.dm.names()


def test_a_client_killed_in_the_middle_of_a_write_harms_nobody(rig, client):
    other = client("base")
    victim = client("base")
    victim.socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, WRITE, 1, 0, 4096) + b"x" * 100)
    victim.close()
    assert other.ask(READ, 0, 4096) == (0, rig.before[:4096])


@pytest.mark.skipif(
    os.environ.get("COW_BUILD") == "tsan",
    reason="the thread sanitizer does not survive a jump out of a SIGBUS",
)
def test_an_image_cut_while_it_is_served_fails_what_it_lost(rig, client):
    rig.snap()
    other = client("snap")
    base = client("base")
    assert base.ask(WRITE, 0, 4096, b"x" * 4096) == (0, b"")
    os.truncate(rig.origin, SECTORS * SECTOR // 2)
    half = SECTORS * SECTOR // 2
    for each in (base, other):
        each.send(READ, half, 4096)
        assert each.answer(0) == (errno.EIO, b"")
        assert each.ask(READ, half - 4096, 4096) == (0, rig.before[half - 4096 : half])
    assert base.ask(WRITE, 4096, 4096, b"y" * 4096) == (0, b"")
    assert other.ask(READ, 0, 8192) == (0, rig.before[:8192])
    assert base.ask(WRITE, half, 4096, b"y" * 4096) == (errno.EIO, b"")
    assert os.stat(rig.origin).st_size == half


@pytest.mark.parametrize("step", ["flags", "option", "info", "transmission"])
def test_garbage_ends_that_connection_alone(rig, client, step, seed):
    print("seed", seed)
    dice = random.Random(f"{seed} {step}")
    for _ in range(20):
        bad = client(None if step != "transmission" else "base")
        if step in ("option", "info"):
            bad.greet()
        if step == "info":
            data = dice.randbytes(dice.randrange(64))
            option = dice.choice([1, 3, 6, 7, 8, 9, 10, 77])
            bad.socket.sendall(b"IHAVEOPT" + struct.pack(">II", option, len(data)) + data)
        with contextlib.suppress(OSError):
            bad.socket.sendall(dice.randbytes(dice.randrange(1, 200)))
        bad.close()
    assert client("base").ask(READ, 0, 512) == (0, rig.before[:512])


def test_an_unknown_export_is_refused_and_another_may_be_chosen(client):
    with pytest.raises(ConnectionRefusedError):
        client(None).go("nosuch")


def test_two_clients_see_each_others_writes(client):
    first, second = client("base"), client("base")
    assert first.ask(WRITE, 512, 512, b"1" * 512) == (0, b"")
    assert second.ask(READ, 512, 512) == (0, b"1" * 512)


def test_tcp_is_for_the_loopback_alone(rig):
    with pytest.raises(cow.InvalidArgument, match="loopback"):
        NbdServer(rig.dm, "tcp:0.0.0.0:0")
    with NbdServer(rig.dm, "tcp:127.0.0.1:0") as server:
        need("nbdinfo")
        size = run("nbdinfo", "--size", f"nbd://127.0.0.1:{server.port}/base")
    assert int(size) == SECTORS * SECTOR


@pytest.mark.parametrize(
    "address", ["", "unix:", "tcp:", "tcp:localhost", "udp:1:2", "tcp:::x", "tcp:127.0.0.1:65536"]
)
def test_an_address_that_is_none_is_refused(rig, address):
    with pytest.raises(cow.InvalidArgument, match=re.escape("neither unix:PATH nor tcp:")):
        NbdServer(rig.dm, address)


def test_a_path_that_fits_in_no_address_is_refused(rig, tmp_path):
    with pytest.raises(cow.InvalidArgument, match="too long"):
        NbdServer(rig.dm, f"unix:{tmp_path}/{'n' * 108}")


def test_an_address_that_is_taken_or_unknown_is_refused(rig):
    with (
        NbdServer(rig.dm, "tcp:127.0.0.1:0") as server,
        pytest.raises(cow.InvalidArgument, match="in use"),
    ):
        NbdServer(rig.dm, f"tcp:127.0.0.1:{server.port}")
    for address in ("tcp:no.such.host.invalid:10809", "tcp:192.0.2.1:10809"):
        with pytest.raises(cow.InvalidArgument, match=address):
            NbdServer(rig.dm, address)


def test_the_socket_is_its_owners_and_goes_with_the_server(rig, tmp_path):
    path = tmp_path / "own.sock"
    with NbdServer(rig.dm, f"unix:{path}"):
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(cow.InvalidArgument) as caught:
            NbdServer(rig.dm, f"unix:{path}")
        assert caught.value.errno == errno.EADDRINUSE
    assert not path.exists()


def test_a_socket_left_by_a_dead_server_is_replaced(rig, tmp_path):
    path = tmp_path / "left.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
    with NbdServer(rig.dm, f"unix:{path}"):
        client = Client(path)
        assert client.go("base") == SECTORS * SECTOR
        client.close()


def test_stop_disconnects_clients_and_leaves_no_threads_or_files(rig, tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    server = NbdServer(rig.dm, f"unix:{tmp_path}/stop.sock")
    server.start()
    client = Client(tmp_path / "stop.sock")
    client.go("base")
    server.stop()
    with pytest.raises((EOFError, OSError)):
        client.receive(1)
    client.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("cow-nbd")]
    assert len(os.listdir("/proc/self/fd")) == before


# --- the protocol's rules -------------------------------------------------------------------------


def test_df_is_offered_only_with_structured_replies(client):
    plain, structured = client(None), client(None)
    plain.greet()
    assert not plain.choose("base")[1] & SEND_DF
    structured.negotiate("base")
    other = client(None)
    other.greet()
    other.option(OPT_STRUCTURED_REPLY)
    assert other.choose("base")[1] & SEND_DF


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        (READ, NO_HOLE),
        (READ, DF),  # structured replies were not negotiated
        (WRITE, NO_HOLE),
        (WRITE, FAST_ZERO),
        (TRIM, NO_HOLE),
        (FLUSH, REQ_ONE),
        (CACHE, FAST_ZERO),
        (WRITE_ZEROES, REQ_ONE),
        (READ, 1 << 15),
    ],
)
def test_a_flag_that_the_command_does_not_know_is_invalid(rig, client, kind, flags):
    base = client("base")
    data = b"x" * 512 if kind == WRITE else b""
    length = 0 if kind == FLUSH else 512
    assert base.ask(kind, 0, length, data, flags) == (errno.EINVAL, b"")
    assert base.ask(READ, 0, 512) == (0, rig.before[:512])


@pytest.mark.parametrize("kind", [READ, FLUSH, CACHE, WRITE, TRIM, WRITE_ZEROES])
def test_fua_is_taken_with_every_command(rig, client, kind):
    real = client("base-real")
    data = b"x" * 512 if kind == WRITE else b""
    length = 0 if kind == FLUSH else 512
    assert real.ask(kind, 0, length, data, FUA)[0] == 0


@pytest.mark.parametrize("flags", [0, FUA])
@pytest.mark.parametrize(
    ("kind", "length"),
    [(WRITE, 512), (WRITE, 1 << 20), (WRITE_ZEROES, 4096), (TRIM, 4096), (FLUSH, 0)],
)
def test_fua_is_answered_when_all_before_it_is_flushed(rig, client, tmp_path, kind, length, flags):
    disk, log = image(tmp_path / "disk", SECTORS), image(tmp_path / "log", 4 * SECTORS)
    rig.dm.create("dev", f"0 {SECTORS} log-writes {disk} {log}")
    dev = client("dev")
    data = b"x" * length if kind == WRITE else b""
    assert dev.ask(kind, 0, length, data, flags) == (0, b"")
    dev.close()
    rig.dm.remove("dev", deferred=True)
    poll(lambda: "dev" not in rig.dm.names())
    done = [bool(entry.flags & crash.FLUSH) for entry in crash.read_log(log)]
    *rest, last, end = done  # the target marks its end
    wanted = kind == FLUSH or bool(flags)
    assert (last, end, any(rest)) == (wanted, False, False)


def test_a_read_of_nothing_has_no_data_chunk(client):
    base = client(None)
    base.negotiate("base")
    base.send(READ, 0, 0)
    assert base.chunk() == (CHUNK_NONE, b"")


def test_cache_is_for_what_is_there(client):
    base = client("base")
    assert base.ask(CACHE, 0, SECTORS * SECTOR) == (0, b"")
    assert base.ask(CACHE, 4096, SECTORS * SECTOR) == (errno.EINVAL, b"")


def test_requests_before_garbage_are_answered(rig, client):
    base = client("base")
    base.send(WRITE, 0, 512, b"w" * 512)
    base.send(READ, 0, 512)
    base.socket.sendall(bytes(28))
    assert base.answer() == (0, b"")
    assert base.answer(512) == (0, b"w" * 512)
    assert base.is_closed()


# --- block status ---------------------------------------------------------------------------------


def striped_status(rig, pieces: int) -> list[tuple[int, int]]:
    """Make a device `comb` of data and zeros by turns, a page each; return its extents."""
    lines = [
        f"{16 * n} 8 linear base-real {8 * n}\n{16 * n + 8} 8 zero" for n in range(pieces // 2)
    ]
    rig.dm.create("comb", "\n".join(lines))
    return [(4096, 3 * (n % 2)) for n in range(pieces)]


def test_block_status_tells_data_from_zeros(rig, client):
    expected = striped_status(rig, 100)
    comb = client(None)
    comb.negotiate("comb")
    assert comb.status(0, 100 * 4096) == expected
    assert comb.status(0, 100 * 4096, REQ_ONE) == expected[:1]
    assert comb.status(4096 + 512, 4096, REQ_ONE) == [(3584, 3)]
    assert comb.status(4096 + 512, 4096) == [(3584, 3), (512, 0)]


def test_block_status_of_many_extents_is_cut_off(rig, client):
    """One reply has at most 4096 of them; a client asks again from where it ends."""
    with open(rig.folder / "holes.img", "wb") as file:
        for page in range(0, 10000, 2):
            file.seek(page * 4096)
            file.write(b"x" * 4096)
        file.truncate(10000 * 4096)
    rig.dm.create("holes", f"0 80000 linear {rig.folder}/holes.img 0")
    holes = client(None)
    holes.negotiate("holes")
    found = []
    while (done := sum(length for length, _ in found)) < 10000 * 4096:
        part = holes.status(done, 10000 * 4096 - done)
        assert 0 < len(part) <= 4096
        found += part
    assert found == [(4096, 3 * (n % 2)) for n in range(10000)]


def test_what_a_snapshot_copied_is_data_as_what_it_did_not(rig, client):
    rig.snap()
    rig.write("base", 64, 8)
    snap = client(None)
    snap.negotiate("snap")
    assert snap.status(0, SECTORS * SECTOR) == [(SECTORS * SECTOR, 0)]


def test_block_status_starts_again_after_a_suspended_device(rig, client):
    """The first piece was looked at before the wait; it is not to be counted twice."""
    rig.dm.create("late", "0 8 zero")
    rig.dm.create("both", "0 8 linear base-real 0\n8 8 linear late 0")
    both = client(None)
    both.negotiate("both")
    rig.dm.suspend("late")
    both.send(BLOCK_STATUS, 0, 8192)
    both.socket.settimeout(0.3)
    with pytest.raises(TimeoutError):
        both.chunk()
    both.socket.settimeout(30)
    rig.dm.resume("late")
    kind, data = both.chunk()
    assert (kind, data[4:]) == (CHUNK_STATUS, struct.pack(">4I", 4096, 0, 4096, 3))


# --- the server -----------------------------------------------------------------------------------


def test_what_was_asked_before_a_stop_is_answered(rig, tmp_path):
    server = NbdServer(rig.dm, f"unix:{tmp_path}/stop.sock")
    server.start()
    client = Client(tmp_path / "stop.sock")
    client.go("base")
    for n in range(200):
        client.send(WRITE, n * SECTOR, SECTOR, bytes([n]) * SECTOR)
    server.stop()
    for _ in range(200):
        assert client.answer() == (0, b"")
    assert client.is_closed()
    client.close()
    assert rig.read("base", 0, 200) == b"".join(bytes([n]) * SECTOR for n in range(200))


def test_what_waits_for_a_suspended_device_at_a_stop_is_told(rig, tmp_path):
    server = NbdServer(rig.dm, f"unix:{tmp_path}/stop.sock")
    server.start()
    client = Client(tmp_path / "stop.sock")
    client.go("base")
    rig.dm.suspend("base")
    client.send(READ, 0, 512)
    server.stop()
    assert client.answer(512) == (errno.ESHUTDOWN, b"")
    rig.dm.resume("base")
    client.close()


def test_a_client_that_takes_no_answers_does_not_hold_up_a_stop(rig, tmp_path, monkeypatch):
    monkeypatch.setattr("cow.export.nbd.DRAIN_SECONDS", 0.2)
    server = NbdServer(rig.dm, f"unix:{tmp_path}/stop.sock")
    server.start()
    client = Client(tmp_path / "stop.sock")
    client.go("base")
    for _ in range(8):
        client.send(READ, 0, SECTORS * SECTOR)
    server.stop()
    client.close()


def test_a_server_without_threads_hangs_up_and_goes_on(rig, server, tmp_path, monkeypatch, caplog):
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name == "cow-nbd-client":
            raise RuntimeError("can't start new thread")
        real(thread)

    with monkeypatch.context() as without:
        without.setattr(threading.Thread, "start", start)
        refused = Client(tmp_path / "nbd.sock")
        assert refused.is_closed()
        refused.close()
    assert "can't start new thread" in caplog.text
    client = Client(tmp_path / "nbd.sock")
    client.go("base")
    assert client.ask(READ, 0, 512) == (0, rig.before[:512])
    client.close()


def test_a_connection_that_another_process_took_is_not_waited_for(tmp_path):
    path = str(tmp_path / "nbd.sock")
    other = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    taken = []

    class Shared(socket.socket):
        """What systemd listens at as well, which is faster with the first connection."""

        def accept(self):
            if not taken:
                taken.append(super().accept()[0])
                try:
                    return super().accept()
                finally:
                    other.connect(path)
            return super().accept()

    with Shared(socket.AF_UNIX, socket.SOCK_STREAM) as listening, other:
        listening.bind(path)
        listening.listen()
        listener = Listener(listening)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as first:
            first.connect(path)
            accepted = listener.accept()
        assert accepted is not None
        other.send(b"x")
        assert accepted.recv(1) == b"x"
        accepted.close()
        listener.stop()
        assert listener.accept() is None
        listener.close()
        taken[0].close()


@pytest.mark.parametrize(
    ("family", "host", "shown"),
    [(socket.AF_INET, "127.0.0.1", "tcp:127.0.0.1"), (socket.AF_INET6, "::1", "tcp:[::1]")],
)
def test_a_socket_of_the_loopback_that_others_made_is_served(rig, family, host, shown):
    listening = socket.create_server((host, 0), family=family)
    port = listening.getsockname()[1]
    with NbdServer(rig.dm, listening) as server:
        assert (server.address, server.port) == (f"{shown}:{port}", port)
        client = socket.create_connection((host, port), timeout=30)
        assert client.recv(8) == b"NBDMAGIC"
        client.close()


def test_a_socket_of_another_kind_is_not_local(rig):
    class Vsock(socket.socket):
        """A socket to virtual machines, which is not to be had everywhere."""

        family = socket.AF_VSOCK

        def getsockname(self):
            return (2, 10809)

    listening = Vsock(socket.AF_UNIX, socket.SOCK_STREAM)
    with pytest.raises(InvalidArgument, match=r"\(2, 10809\): not a loopback address"):
        NbdServer(rig.dm, listening)
    assert listening.fileno() == -1


def test_the_server_outlives_a_lack_of_file_descriptors(rig, tmp_path):
    """accept() fails with EMFILE for a while; the client in the queue is served afterwards."""
    with NbdServer(rig.dm, f"unix:{tmp_path}/full.sock"):
        client = Client(tmp_path / "full.sock")
        client.go("base")
        late = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        taken = []
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.dup(0))
            late.connect(str(tmp_path / "full.sock"))
            late.settimeout(0.3)
            with pytest.raises(TimeoutError):
                late.recv(1)
            assert client.ask(READ, 0, 512) == (0, rig.before[:512])
        finally:
            for each in taken:
                os.close(each)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        late.settimeout(30)
        assert late.recv(8) == b"NBDMAGIC"
        late.close()
        client.close()
