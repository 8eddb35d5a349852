"""NBD as libnbd's Python binding, qemu, nbdkit and fio see it: each command, each flag, in a crowd.

The scripts run under Debian's own Python, for which the binding is packaged.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
from pathlib import Path

import pytest
from support import SECTOR, Rig, poll, stamp
from support.nbd import need, run

import cow
from cow.export.nbd import NbdServer

SECTORS = 8192
SIZE = SECTORS * SECTOR
PYTHON = "/usr/bin/python3"
ENVIRONMENT = {
    name: os.environ[name] for name in os.environ if name not in ("PYTHONPATH", "LD_PRELOAD")
}

PRELUDE = """
import errno, json, nbd, os, random, sys, threading

def connect(uri, strict=True, structured=True):
    h = nbd.NBD()
    h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.set_request_structured_replies(structured)
    if not strict:
        h.set_strict_mode(0)
    h.connect_uri(uri)
    return h

def fails(call, *args):
    try:
        call(*args)
    except nbd.Error as error:
        return getattr(errno, error.errno)
    raise AssertionError(f"{call.__name__}{args} went well")

def extents(h, count, offset, flags=0):
    found = []
    def extent(context, at, entries, error):
        assert (context, at) == ("base:allocation", offset)
        found.extend(zip(entries[::2], entries[1::2]))
    h.block_status(count, offset, extent, flags)
    return found

def wait(h, cookies):
    while cookies := [cookie for cookie in cookies if not h.aio_command_completed(cookie)]:
        h.poll(-1)

uris = sys.argv[1:]
"""


@functools.cache
def has_libnbd() -> bool:
    words = [PYTHON, "-c", "import nbd"]
    return not subprocess.run(words, capture_output=True, env=ENVIRONMENT, check=False).returncode


def libnbd(script: str, *args: str) -> str:
    """Run a script on libnbd, with URIs in `uris`; return what it prints."""
    if not has_libnbd():
        pytest.skip("not installed: python3-libnbd")
    return run(PYTHON, "-c", PRELUDE + script, *args, env=ENVIRONMENT)


def start_libnbd(script: str, *args: str) -> subprocess.Popen[str]:
    """Start a script that talks with the test over its stdin and stdout."""
    if not has_libnbd():
        pytest.skip("not installed: python3-libnbd")
    return subprocess.Popen(
        [PYTHON, "-c", PRELUDE + script, *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


@pytest.fixture
def rig(tmp_path):
    with cow.Mapper(durability="process") as dm:
        yield Rig(dm, tmp_path, SECTORS)


@pytest.fixture
def uri(rig, tmp_path):
    """A function that names a device for a client."""
    with NbdServer(rig.dm, f"unix:{tmp_path}/nbd.sock"):
        yield lambda name="base": f"nbd+unix:///{name}?socket={tmp_path}/nbd.sock"


# --- commands and flags ---------------------------------------------------------------------------


def test_reads_with_and_without_df(rig, uri):
    (rig.folder / "expected").write_bytes(rig.before)
    libnbd(
        """
h = connect(uris[0])
data = open(uris[1], "rb").read()
assert h.can_df()
for offset, count in ((0, 512), (1, 1), (511, 4097), (0, len(data)), (len(data) - 1, 1)):
    expected = data[offset : offset + count]
    assert h.pread(count, offset) == expected
    chunks = []
    def chunk(part, at, status, error):
        assert status == nbd.READ_DATA
        chunks.append((at, bytes(part)))
    assert h.pread_structured(count, offset, chunk, nbd.CMD_FLAG_DF) == expected
    assert chunks == [(offset, expected)]
h.shutdown()
""",
        uri(),
        f"{rig.folder}/expected",
    )


def test_every_write_of_libnbd(rig, uri):
    libnbd(
        """
h = connect(uris[0])
assert h.can_fua() and h.can_flush() and h.can_zero() and h.can_fast_zero() and h.can_cache()
assert h.can_trim() and not h.is_read_only()
h.pwrite(b"a" * 4096, 0)
h.pwrite(b"b" * 4096, 4096, nbd.CMD_FLAG_FUA)
h.zero(4096, 8192)
h.zero(4096, 12288, nbd.CMD_FLAG_NO_HOLE)
h.zero(4096, 16384, nbd.CMD_FLAG_FAST_ZERO)
h.zero(4096, 20480, nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_FAST_ZERO)
assert fails(h.zero, 4096, 24576, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE) == errno.ENOTSUP
h.trim(4096, 28672)
h.trim(4096, 32768, nbd.CMD_FLAG_FUA)
h.cache(len(uris) * 4096, 0)
h.flush()
h.shutdown()
""",
        uri("base-real"),
    )
    found = rig.read("base-real")
    assert found[:8192] == b"a" * 4096 + b"b" * 4096
    assert not any(found[8192:24576])
    assert found[24576:28672] == rig.before[24576:28672]
    assert not any(found[28672:36864])
    assert found[36864:] == rig.before[36864:]


def test_zeros_on_a_device_with_snapshots_are_not_fast_but_written(rig, uri):
    rig.snap()
    libnbd(
        """
h = connect(uris[0])
assert not h.can_trim()
assert fails(h.zero, 4096, 0, nbd.CMD_FLAG_FAST_ZERO) == errno.ENOTSUP
h.zero(65536, 512)
h.shutdown()
""",
        uri(),
    )
    assert rig.read("base") == rig.before[:512] + bytes(65536) + rig.before[66048:]
    assert rig.read("snap") == rig.before


def test_block_status_of_libnbd(rig, uri):
    rig.dm.create("half", "0 8 linear base-real 0\n8 8 zero\n16 8 linear base-real 0")
    libnbd(
        """
h = connect(uris[0])
assert h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
HOLE = nbd.STATE_HOLE | nbd.STATE_ZERO
assert extents(h, 12288, 0) == [(4096, 0), (4096, HOLE), (4096, 0)]
assert extents(h, 12288, 0, nbd.CMD_FLAG_REQ_ONE) == [(4096, 0)]
assert extents(h, 4096, 6144) == [(2048, HOLE), (2048, 0)]
assert extents(h, 1, 4096) == [(1, HOLE)]
h.shutdown()
plain = connect(uris[0], structured=False)
assert not plain.can_df() and not plain.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
assert plain.pread(12288, 0)[4096:8192] == bytes(4096)
plain.shutdown()
""",
        uri("half"),
    )


def test_requests_of_32_mib(rig, uri, tmp_path):
    with open(tmp_path / "big.img", "wb") as file:
        file.truncate(64 << 20)
    rig.dm.create("big", f"0 {1 << 17} linear {tmp_path}/big.img 0")
    rig.dm.create("big-base", f"0 {1 << 17} snapshot-origin big")
    (tmp_path / "big.cow").write_bytes(bytes(80 << 20))
    rig.dm.create("big-snap", f"0 {1 << 17} snapshot big {tmp_path}/big.cow P 8")
    libnbd(
        """
h = connect(uris[0], strict=False)
assert h.get_block_size(nbd.SIZE_MAXIMUM) == 1 << 25
data = random.Random(1).randbytes(1 << 25)
h.pwrite(data, 5)
assert h.pread(1 << 25, 5) == data
assert fails(h.pread, (1 << 25) + 1, 0) == errno.EINVAL
h.zero(1 << 26, 0)
assert h.pread(1 << 25, 5) == bytes(1 << 25)
h.shutdown()
""",
        uri("big-base"),
    )
    assert rig.dm.status("big-snap").split()[3].startswith(f"{131072 + 8 + 65 * 8}/")


def test_unaligned_requests_are_what_was_asked_for(rig, uri, seed):
    print("seed", seed)
    rig.snap(cow_sectors=2 * SECTORS)
    libnbd(
        """
h, dice = connect(uris[0]), random.Random(int(uris[1]))
size = h.get_size()
model = bytearray(h.pread(size, 0))
for _ in range(300):
    offset = dice.randrange(size)
    count = dice.randrange(1, min(70000, size - offset) + 1)
    what = dice.randrange(3)
    if what == 0:
        data = dice.randbytes(count)
        h.pwrite(data, offset, dice.choice([0, nbd.CMD_FLAG_FUA]))
        model[offset : offset + count] = data
    elif what == 1:
        h.zero(count, offset, dice.choice([0, nbd.CMD_FLAG_NO_HOLE]))
        model[offset : offset + count] = bytes(count)
    else:
        assert h.pread(count, offset) == model[offset : offset + count]
assert h.pread(size, 0) == model
h.shutdown()
""",
        uri(),
        str(seed),
    )
    assert rig.read("snap") == rig.before


# --- errors ---------------------------------------------------------------------------------------


def test_requests_past_the_end_fail_alone(rig, uri):
    libnbd(
        """
h = connect(uris[0], strict=False)
size = h.get_size()
for offset, count in ((size, 1), (size - 1, 2), (1 << 62, 512), (0, size + 1)):
    assert fails(h.pread, count, offset) == errno.EINVAL
    assert fails(h.trim, count, offset) == errno.EINVAL
    assert fails(h.cache, count, offset) == errno.EINVAL
    assert fails(h.zero, count, offset) == errno.ENOSPC
    assert fails(h.block_status, count, offset, lambda *args: 0) == errno.EINVAL
    assert fails(h.pwrite, b"x" * count, offset) == errno.ENOSPC
    assert len(h.pread(512, size - 512)) == 512
h.shutdown()
""",
        uri("base-real"),
    )
    assert rig.read("base-real") == rig.before


def test_errors_of_a_device_come_back_and_the_connection_lives_on(rig, uri):
    rig.dm.create("bad", "0 8 linear base-real 0\n8 8 error\n16 8 linear base-real 16")
    libnbd(
        """
h = connect(uris[0])
for offset, count in ((4096, 4096), (0, 12288), (4095, 2), (8191, 2)):
    assert fails(h.pread, count, offset) == errno.EIO
    df = count, offset, lambda *args: 0, nbd.CMD_FLAG_DF
    assert fails(h.pread_structured, *df) == errno.EIO
    assert fails(h.pwrite, b"x" * count, offset) == errno.EIO
    assert fails(h.zero, count, offset) == errno.EIO
    assert fails(h.block_status, count, offset, lambda *args: 0) == errno.EIO
assert len(h.pread(4096, 0)) == len(h.pread(4096, 8192)) == 4096
h.shutdown()
""",
        uri("bad"),
    )


def test_a_snapshot_without_room_fails_and_its_origin_goes_on(rig, uri):
    rig.snap(cow_sectors=64)
    libnbd(
        """
base, snap = (connect(uri) for uri in uris)
size = base.get_size()
before = snap.pread(4096, 0)
for offset in range(0, size, 65536):
    base.pwrite(b"x" * 65536, offset)
assert base.pread(size, 0) == b"x" * size
assert fails(snap.pread, 4096, 0) == errno.EIO
assert fails(snap.pwrite, bytes(512), 0) == errno.EIO
base.pwrite(b"y", 0)
base.shutdown()
snap.shutdown()
""",
        uri(),
        uri("snap"),
    )
    assert rig.dm.status("snap").endswith("Invalid")


def test_a_device_that_is_removed_by_force_fails_and_its_clients_live_on(rig, uri):
    rig.dm.create("dev", "0 8 linear base-real 0")
    script = start_libnbd(
        """
h = connect(uris[0])
h.pread(512, 0)
print("open", flush=True)
input()
assert fails(h.pread, 512, 0) == errno.EIO
h.shutdown()
""",
        uri("dev"),
    )
    assert script.stdout.readline() == "open\n"
    with pytest.raises(cow.DeviceBusy):
        rig.dm.remove("dev", force=True)
    script.communicate("\n", timeout=60)
    assert script.returncode == 0
    poll(lambda: not rig.dm.info("dev").open_count)
    rig.dm.remove("dev")


# --- the handshake --------------------------------------------------------------------------------


def test_the_handshake_step_by_step(rig, uri):
    rig.dm.create("ro", "0 8 linear base-real 0", readonly=True)
    libnbd(
        """
h = nbd.NBD()
h.set_opt_mode(True)
h.set_full_info(True)
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.connect_uri(uris[0])
assert h.get_protocol() == "newstyle-fixed" and h.get_structured_replies_negotiated()
names = []
h.opt_list(lambda name, description: names.append(name))
assert names == ["base", "base-real", "ro"], names
contexts = []
h.set_export_name("base")
assert h.opt_list_meta_context(lambda name: contexts.append(name)) == 1
assert contexts == ["base:allocation"]
h.set_export_name("nosuch")
assert fails(h.opt_info) == errno.ENOENT
assert fails(h.opt_go) == errno.ENOENT
h.set_export_name("ro")
h.opt_info()
assert h.get_size() == 4096 and h.is_read_only() and h.can_multi_conn()
assert h.get_canonical_export_name() == "ro"
assert [h.get_block_size(n) for n in range(3)] == [1, 4096, 1 << 25]
h.opt_go()
assert fails(h.pwrite, b"x", 0) == errno.EPERM
h.shutdown()

h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(uris[0])
h.opt_abort()
""",
        uri(""),
    )


def test_the_only_device_is_the_one_without_a_name(tmp_path):
    with cow.Mapper() as dm:
        dm.create("lonely", "0 8 zero")
        with NbdServer(dm, f"unix:{tmp_path}/one.sock"):
            where = f"nbd+unix:///?socket={tmp_path}/one.sock"
            libnbd("assert connect(uris[0]).get_size() == 4096", where)
            dm.create("second", "0 8 zero")
            libnbd("assert fails(nbd.NBD().connect_uri, uris[0]) == errno.ENOENT", where)


# --- several at once ------------------------------------------------------------------------------


def test_what_one_connection_flushed_another_reads(rig, uri):
    libnbd(
        """
first, second, third = (connect(uris[0]) for _ in range(3))
assert first.can_multi_conn()
for n in range(100):
    first.pwrite(bytes([n]) * 4096, 0)
    second.flush()
    assert third.pread(4096, 0) == bytes([n]) * 4096
    third.pwrite(bytes([n + 1]) * 4096, 4096, nbd.CMD_FLAG_FUA)
    assert first.pread(4096, 4096) == bytes([n + 1]) * 4096
""",
        uri(),
    )


def test_many_requests_on_many_connections(rig, uri, seed):
    print("seed", seed)
    rig.snap(cow_sectors=2 * SECTORS)
    libnbd(
        """
size = 8192 * 512
model = bytearray(connect(uris[0]).pread(size, 0))

def work(number):
    '''Write every fourth block, 32 requests in flight, in an order of its own.'''
    h, dice = connect(uris[0]), random.Random(f"{uris[1]} {number}")
    blocks = list(range(number, size // 4096, 4)) * 2
    dice.shuffle(blocks)
    for start in range(0, len(blocks), 32):
        written, cookies = {}, []
        for block in blocks[start : start + 32]:
            if block not in written:
                written[block] = dice.randbytes(4096)
                cookies.append(h.aio_pwrite(written[block], block * 4096))
        wait(h, cookies)
        for block, data in written.items():
            model[block * 4096 : block * 4096 + 4096] = data
    h.shutdown()

threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert connect(uris[0]).pread(size, 0) == model
""",
        uri(),
        str(seed),
    )
    assert rig.read("snap") == rig.before


def test_a_client_that_dies_in_the_middle_of_a_request_harms_nobody(rig, uri):
    """32 MiB are on their way when it goes; what is written is whole sectors of it, or nothing."""
    rig.snap(cow_sectors=2 * SECTORS)
    witness = start_libnbd(
        """
h = connect(uris[0])
print("open", flush=True)
for line in sys.stdin:
    print(json.dumps(h.pread(512, 0).hex()), flush=True)
""",
        uri("snap"),
    )
    assert witness.stdout.readline() == "open\n"
    for n in range(10):
        libnbd(
            """
h = connect(uris[0])
for _ in range(8):
    h.aio_pwrite(bytes([int(uris[1])]) * h.get_size(), 0)
os._exit(0)
""",
            uri(),
            str(n),
        )
        witness.stdin.write("\n")
        witness.stdin.flush()
        assert bytes.fromhex(json.loads(witness.stdout.readline())) == rig.before[:512]
    witness.communicate(timeout=60)
    assert rig.read("snap") == rig.before
    poll(lambda: not rig.dm.device("base").files)


def test_suspend_lets_requests_of_all_clients_wait(rig, uri):
    waiting = """
h = connect(uris[0])
print("open", flush=True)
input()
data = bytearray(4096)
cookies = [
    h.aio_pwrite(b"w" * 4096, 4096),
    h.aio_zero(4096, 8192),
    h.aio_flush(),
    h.aio_block_status(4096, 0, lambda *args: 0),
]
while h.aio_in_flight() and h.aio_get_direction() & nbd.AIO_DIRECTION_WRITE:
    h.poll(100)
assert h.poll(300) == 0 and h.aio_in_flight() == 4
print("waits", flush=True)
wait(h, cookies)
assert h.pread(4096, 4096) == b"w" * 4096
print("done", flush=True)
h.shutdown()
"""
    clients = [start_libnbd(waiting, uri()) for _ in range(3)]
    for client in clients:
        assert client.stdout.readline() == "open\n"
    rig.dm.suspend("base")
    for client in clients:
        client.stdin.write("\n")
        client.stdin.flush()
    for client in clients:
        assert client.stdout.readline() == "waits\n"
    rig.cows["snap"] = str(rig.folder / "snap.cow")
    Path(rig.cows["snap"]).write_bytes(bytes(1 << 20))
    rig.dm.create("snap", rig.line("snap"))
    assert rig.read("snap") == rig.before
    rig.dm.resume("base")
    for client in clients:
        assert client.communicate(timeout=60)[0] == "done\n"
        assert client.returncode == 0
    assert rig.read("base", 8, 8) == b"w" * 4096
    assert rig.read("snap") == rig.before


def test_a_table_is_swapped_under_a_connection(rig, uri):
    """The next request goes where the new table says; what no longer fits is refused."""
    rig.dm.create("dev", f"0 {SECTORS} linear base-real 0")
    script = start_libnbd(
        """
h = connect(uris[0])
size = h.get_size()
assert any(h.pread(4096, 0))
print("open", flush=True)
input()
assert not any(h.pread(4096, 0))
assert fails(h.pread, 512, size - 512) == errno.EINVAL
h.shutdown()
""",
        uri("dev"),
    )
    assert script.stdout.readline() == "open\n"
    rig.dm.load("dev", "0 8 zero")
    rig.dm.resume("dev")
    script.communicate("\n", timeout=60)
    assert script.returncode == 0


# --- the programs of others -----------------------------------------------------------------------


def test_nbdsh_speaks_to_a_device(rig, uri):
    if not has_libnbd():
        pytest.skip("not installed: python3-libnbd")
    need("nbdsh")
    environment = {**ENVIRONMENT, "PATH": "/usr/bin:/bin"}
    command = [
        "nbdsh",
        "-u",
        uri(),
        "-c",
        "h.pwrite(b'nbdsh', 0)",
        "-c",
        "print(h.pread(5, 0).decode())",
    ]
    assert run(*command, env=environment) == "nbdsh\n"


def test_qemu_img_knows_size_and_format(rig, uri):
    need("qemu-img")
    info = json.loads(run("qemu-img", "info", "--output=json", "-f", "raw", uri()))
    assert (info["virtual-size"], info["format"]) == (SIZE, "raw")


def test_qemu_img_maps_data_and_zeros(rig, uri):
    need("qemu-img")
    rig.dm.create("half", "0 128 linear base-real 0\n128 128 zero\n256 128 linear base-real 0")
    found = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", uri("half")))
    assert [(each["start"], each["length"], each["zero"]) for each in found] == [
        (0, 65536, False),
        (65536, 65536, True),
        (131072, 65536, False),
    ]


@pytest.mark.parametrize("more", [[], ["-w"], ["-w", "--flush-interval=64"]])
def test_qemu_img_bench_runs_through(rig, uri, more):
    need("qemu-img")
    rig.snap(cow_sectors=2 * SECTORS)
    bench = ["qemu-img", "bench", "-f", "raw", "-c", "2000", "-d", "32", "-s", "4096", *more]
    assert "Run completed" in run(*bench, uri())
    assert rig.read("snap") == rig.before


def test_nbdcopy_copies_from_device_to_device(rig, uri, tmp_path):
    need("nbdcopy")
    (tmp_path / "other.img").write_bytes(stamp(0, SECTORS, 5))
    rig.dm.create("other", f"0 {SECTORS} linear {tmp_path}/other.img 0")
    rig.snap()
    rig.write("base", 0, 64)
    run("nbdcopy", "--connections=4", uri("snap"), uri("other"))
    assert rig.read("other") == rig.before


def test_nbdcopy_leaves_holes_out_and_makes_them(rig, uri, tmp_path):
    need("nbdcopy")
    for name in ("from", "to"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(64 << 20)
        rig.dm.create(name, f"0 {1 << 17} linear {tmp_path}/{name} 0")
    rig.dm.device("from").pwrite(stamp(0, 2048, 3), 16 << 20)
    rig.dm.device("to").pwrite(stamp(0, 2048, 4), 32 << 20)
    run("nbdcopy", uri("from"), uri("to"))
    assert rig.dm.device("to").pread(64 << 20, 0) == rig.dm.device("from").pread(64 << 20, 0)
    rig.dm.device("to").flush()
    assert os.stat(tmp_path / "to").st_blocks * SECTOR <= 2 << 20


def test_nbdkit_is_a_client_with_several_connections(rig, uri, tmp_path):
    need("nbdkit", "nbdcopy")
    data = stamp(0, SECTORS, 7)
    (tmp_path / "new").write_bytes(data)
    run(
        *("nbdkit", "-U", "-", "nbd", f"uri={uri()}", "shared=true"),
        *("--run", f'nbdcopy {tmp_path}/new "$uri" && nbdcopy "$uri" {tmp_path}/copy'),
    )
    assert rig.read("base") == (tmp_path / "copy").read_bytes() == data


def fio(folder: Path, name: str, uri: str, *more: str) -> list[str]:
    """Return the words that let fio write and verify a device over NBD."""
    job = ["fio", f"--name={name}", "--ioengine=nbd", f"--uri={uri}", f"--size={SIZE}"]
    return [*job, "--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--minimal", *more]


@pytest.mark.parametrize(
    "more",
    [
        ["--rw=randwrite", "--bs=512-64k", "--bs_unaligned=0"],
        ["--rw=randrw", "--bs=4k", "--fsync=16"],
        ["--rw=write", "--bs=1m", "--loops=3"],
        ["--rw=randwrite", "--bs=4k", "--numjobs=1", "--verify_backlog=64"],
    ],
)
def test_fio_verifies_an_origin_and_its_snapshot_at_once(rig, uri, tmp_path, more):
    need("fio")
    rig.snap(cow_sectors=4 * SECTORS)
    jobs = [
        subprocess.Popen(
            fio(tmp_path, name, uri(name), *more),
            cwd=tmp_path,
            env=ENVIRONMENT,
            stdout=-1,
            stderr=-2,
        )
        for name in ("base", "snap")
    ]
    for job in jobs:
        out, _ = job.communicate(timeout=120)
        assert job.returncode == 0, out.decode()


def test_clients_that_are_killed_harm_nobody(rig, uri, tmp_path):
    need("fio", "nbdcopy")
    rig.snap(cow_sectors=4 * SECTORS)
    for _ in range(5):
        endless = ["--rw=randrw", "--bs=64k", "--time_based", "--runtime=60", "--thread"]
        victim = subprocess.Popen(
            fio(tmp_path, "victim", uri(), *endless),
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
        )
        poll(lambda: rig.dm.device("base").files)
        copier = subprocess.Popen(["nbdcopy", uri("snap"), "null:"])
        victim.kill()
        victim.wait(60)
        copier.kill()
        copier.wait(60)
    run("nbdcopy", uri("snap"), str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == rig.before
    poll(lambda: not rig.dm.device("base").files)
    poll(lambda: not rig.dm.device("snap").files)


def test_a_reader_of_the_old_state_and_writers_of_the_new(rig, uri, tmp_path):
    """nbdcopy takes the snapshot while fio, qemu-io and libnbd write the origin."""
    need("fio", "nbdcopy", "qemu-io")
    rig.snap(cow_sectors=4 * SECTORS)
    writers = [
        subprocess.Popen(words, cwd=tmp_path, env=ENVIRONMENT, stdout=-1, stderr=-2)
        for words in (
            fio(tmp_path, "low", uri(), "--rw=randwrite", "--bs=4k", f"--size={SIZE // 2}"),
            ["qemu-io", "-f", "raw", "-c", f"write -P 7 {SIZE // 2} {SIZE // 4}", uri()],
        )
    ]
    for _ in range(3):
        run("nbdcopy", uri("snap"), str(tmp_path / "copy"))
        assert (tmp_path / "copy").read_bytes() == rig.before
    for writer in writers:
        out, _ = writer.communicate(timeout=120)
        assert writer.returncode == 0, out.decode()
    assert rig.read("base", SECTORS // 2, SECTORS // 4) == b"\7" * (SIZE // 4)
    assert rig.read("snap") == rig.before
