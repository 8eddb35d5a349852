"""FUSE: devices as files, for programs that know nothing of devices."""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import errno
import os
import random
import signal
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from support import SECTOR, Rig, image, poll, refused, stamp, wait_merge
from support.crash import FLUSH, read_log
from support.fuse import fallocate, mounts, need_fuse, need_root
from support.libc_faults import MEMORY, LibcFaults
from support.nbd import READ, WRITE, Client, need, run

import cow
from cow.export import fusermount
from cow.export.fuse import THREADS, FuseMount, _Files
from cow.export.nbd import NbdServer

SECTORS = 16384
SIZE = SECTORS * SECTOR
SECONDS = 60

FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
FALLOC_FL_ZERO_RANGE = 16


@pytest.fixture
def rig(tmp_path):
    with cow.Mapper(durability="process") as dm:
        yield Rig(dm, tmp_path, SECTORS)


@pytest.fixture
def mounted(rig, tmp_path):
    """The directory with the devices."""
    need_fuse()
    directory = tmp_path / "mnt"
    directory.mkdir()
    with FuseMount(rig.dm, str(directory)):
        yield directory


@pytest.fixture
def opened():
    """A function that opens a file as os.open does; all are closed at the end."""
    files = []

    def start(path: Path, flags: int = os.O_RDWR) -> int:
        files.append(os.open(path, flags))
        return files[-1]

    yield start
    for file in files:
        with contextlib.suppress(OSError):
            os.close(file)


def beside(call, *args) -> threading.Thread:
    """Start a call in a thread of its own."""
    thread = threading.Thread(target=call, args=args, daemon=True)
    thread.start()
    return thread


def is_closed(dm: cow.Mapper, name: str) -> bool:
    """Whether nobody has the device open: the kernel closes a file a moment after close(2)."""
    return dm.info(name).open_count == 0


# --- names and attributes -------------------------------------------------------------------------


def test_a_device_is_a_file_of_its_size_and_mode(rig, mounted):
    rig.dm.create("ro", "0 8 linear base-real 0", readonly=True)
    for name, size, mode in (("base", SIZE, 0o600), ("ro", 4096, 0o400)):
        status = (mounted / name).stat()
        assert stat.S_ISREG(status.st_mode)
        assert stat.S_IMODE(status.st_mode) == mode
        assert (status.st_size, status.st_blocks) == (size, size // 512)
        assert (status.st_uid, status.st_gid) == (os.getuid(), os.getgid())


def test_devices_appear_are_renamed_and_vanish_at_once(rig, mounted):
    assert sorted(os.listdir(mounted)) == ["base", "base-real"]
    rig.dm.create("later", "0 8 zero")
    assert sorted(os.listdir(mounted)) == ["base", "base-real", "later"]
    assert (mounted / "later").read_bytes() == bytes(4096)
    poll(lambda: is_closed(rig.dm, "later"))
    rig.dm.rename("later", "sooner")
    assert not (mounted / "later").exists()
    assert (mounted / "sooner").stat().st_size == 4096
    rig.dm.remove("sooner")
    assert refused(os.stat, mounted / "sooner") == errno.ENOENT
    rig.dm.create("sooner", "0 16 zero")
    assert (mounted / "sooner").stat().st_size == 8192


def test_a_thousand_devices_are_listed_whole(rig, mounted):
    names = [f"device-{number:04d}-{'x' * 80}" for number in range(1000)]
    for name in names:
        rig.dm.create(name, "0 8 zero")
    assert sorted(os.listdir(mounted)) == sorted(["base", "base-real", *names])


@pytest.mark.parametrize("name", ["a b", "ü", "x" * 127, "-", "#x;,\\"])
def test_any_name_of_a_device_is_a_file(rig, mounted, name):
    rig.dm.create(name, "0 8 zero")
    assert name in os.listdir(mounted)
    assert (mounted / name).stat().st_size == 4096


def test_a_file_that_was_found_is_gone_with_its_device(rig, mounted, opened):
    rig.dm.create("dev", "0 8 zero")
    found = opened(mounted / "dev", os.O_PATH)
    assert os.fstat(found).st_size == 4096
    rig.dm.remove("dev")
    assert refused(os.fstat, found) == errno.ENXIO
    assert refused(os.open, f"/proc/self/fd/{found}", os.O_RDONLY) == errno.ENXIO


def test_names_that_no_device_has_are_not_found(mounted):
    for name in (b"nosuch", b"\xff\xfe", b"base/x", b"x" * 255):
        code = errno.ENOTDIR if b"/" in name else errno.ENOENT
        assert refused(os.stat, os.fsencode(mounted) + b"/" + name) == code


def test_a_new_table_changes_size_and_mode(rig, mounted, opened):
    file = opened(mounted / "base-real")
    rig.dm.create("dev", "0 8 linear base-real 0")
    file = opened(mounted / "dev")
    rig.dm.load("dev", "0 16 linear base-real 8", readonly=True)
    rig.dm.resume("dev")
    assert stat.S_IMODE((mounted / "dev").stat().st_mode) == 0o400
    assert os.lseek(file, 0, os.SEEK_END) == 8192
    assert os.pread(file, 8192, 0) == rig.before[4096 : 3 * 4096]
    assert refused(os.pwrite, file, b"x", 0) == errno.EPERM


def test_what_only_the_mapper_may_do_is_refused(mounted):
    base = mounted / "base"
    assert refused(base.unlink) in (errno.EPERM, errno.EACCES)
    assert refused(base.rename, mounted / "other") in (errno.EPERM, errno.EACCES)
    assert refused((mounted / "new").touch) in (errno.EPERM, errno.EACCES)
    assert refused((mounted / "new").mkdir) in (errno.EPERM, errno.EACCES)
    assert refused(os.link, base, mounted / "other") in (errno.EPERM, errno.EACCES)
    assert refused(os.symlink, "base", mounted / "other") in (errno.EPERM, errno.EACCES)
    assert refused(base.chmod, 0o644) == errno.EPERM
    assert refused(os.chown, base, 12345, -1) == errno.EPERM
    assert refused(os.truncate, base, 4096) == errno.EINVAL
    assert refused(mounted.chmod, 0o700) == errno.EPERM
    assert sorted(os.listdir(mounted)) == ["base", "base-real"]


def test_opening_with_o_trunc_changes_nothing(rig, mounted):
    with open(mounted / "base", "wb") as file:
        file.write(b"new")
    os.truncate(mounted / "base", SIZE)
    os.utime(mounted / "base")
    assert rig.dm.device("base").pread(SIZE, 0) == b"new" + rig.before[3:]


# --- programs -------------------------------------------------------------------------------------


def test_a_file_system_is_made_filled_checked_and_repaired(rig, mounted, tmp_path):
    need("mkfs.ext4", "e2fsck", "debugfs")
    (tmp_path / "letter").write_bytes(os.urandom(1 << 20))
    run("mkfs.ext4", "-q", str(mounted / "base"))
    rig.snap(cow_sectors=2 * SECTORS)
    run("debugfs", "-w", "-R", f"write {tmp_path}/letter letter", str(mounted / "base"))
    run("debugfs", "-R", f"dump letter {tmp_path}/copy", str(mounted / "base"))
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "letter").read_bytes()
    for name in ("base", "snap"):
        run("e2fsck", "-fn", str(mounted / name))
    assert "letter" not in run("debugfs", "-R", "ls", str(mounted / "snap"))
    run("debugfs", "-w", "-R", "clri letter", str(mounted / "base"))
    for words, found in (("-fn", 4), ("-fy", 1), ("-fn", 0)):
        check = subprocess.run(
            ["e2fsck", words, mounted / "base"], capture_output=True, check=False
        )
        assert check.returncode == found, check.stdout
    run("e2fsck", "-fn", str(mounted / "snap"))


def test_a_file_system_is_mounted_by_the_kernel(rig, mounted, tmp_path):
    need_root("mount a loop device")
    need("mkfs.ext4", "mount", "umount")
    if not os.path.exists("/dev/loop-control"):
        pytest.skip("this kernel has no loop devices")
    run("mkfs.ext4", "-q", str(mounted / "base"))
    (tmp_path / "loop").mkdir()
    data = os.urandom(3 << 20)
    run("mount", "-o", "loop", str(mounted / "base"), str(tmp_path / "loop"))
    try:
        (tmp_path / "loop" / "file").write_bytes(data)
        with pytest.raises(cow.DeviceBusy):
            rig.dm.remove("base")
    finally:
        run("umount", str(tmp_path / "loop"))
    run("e2fsck", "-fn", str(mounted / "base"))
    run("debugfs", "-R", f"dump file {tmp_path}/copy", str(mounted / "base"))
    assert (tmp_path / "copy").read_bytes() == data


def test_dd_and_cp_copy_in_and_out(rig, mounted, tmp_path):
    data = stamp(0, SECTORS, 7)
    (tmp_path / "in").write_bytes(data)
    run("dd", f"if={tmp_path}/in", f"of={mounted}/base", "bs=20480", "conv=fsync")
    run("cp", str(mounted / "base"), str(tmp_path / "out"))
    assert (tmp_path / "out").read_bytes() == data
    run("cp", str(rig.folder / "out"), str(mounted / "base-real"))
    full = subprocess.run(
        ["dd", "if=/dev/zero", f"of={mounted}/base", "bs=1M"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "No space left on device" in full.stderr
    assert rig.read("base") == bytes(SIZE)


@pytest.mark.parametrize("engine", ["libaio", "psync", "mmap"])
def test_fio_verifies_what_it_wrote_and_the_snapshot_stays(rig, mounted, tmp_path, engine):
    need("fio")
    rig.snap(cow_sectors=3 * SECTORS)
    job = ["--name=j", f"--ioengine={engine}", f"--filename={mounted}/base", "--rw=randrw"]
    job += ["--bsrange=4k-128k", "--iodepth=32", f"--size={SIZE}", "--verify=crc32c", "--minimal"]
    job += [] if engine == "mmap" else ["--direct=1"]
    run("fio", *job, cwd=tmp_path)
    assert (mounted / "snap").read_bytes() == rig.before
    assert rig.read("snap") == rig.before


def test_first_writes_from_many_programs_cost_no_snapshot_a_byte(rig, mounted, tmp_path):
    need("fio")
    for name in ("one", "two"):
        rig.snap(name, cow_sectors=2 * SECTORS)
    job = ["--name=j", "--ioengine=libaio", f"--filename={mounted}/base", "--rw=randwrite"]
    job += ["--bs=4k", "--iodepth=16", "--numjobs=4", "--minimal", "--direct=1"]
    if os.environ.get("COW_BUILD") == "tsan":
        # Two writes of a sector at a time are a race of the programs' own making.
        job += [f"--size={SIZE // 4}", f"--offset_increment={SIZE // 4}"]
    else:
        job += [f"--size={SIZE}"]
    run("fio", *job, cwd=tmp_path)
    for name in ("one", "two"):
        assert (mounted / name).read_bytes() == rig.before
    assert (mounted / "base").read_bytes() == rig.read("base")


def test_qemu_img_reads_compares_and_converts(rig, mounted, tmp_path):
    need("qemu-img")
    rig.snap()
    rig.write("base", 8, 8)
    assert f"({SIZE} bytes)" in run("qemu-img", "info", str(mounted / "snap"))
    qcow = str(tmp_path / "q.qcow2")
    words = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(mounted / "snap"), qcow]
    run(*words)
    assert "identical" in run("qemu-img", "compare", "-F", "raw", qcow, str(mounted / "snap"))
    run("qemu-img", "convert", "-n", "-O", "raw", qcow, str(mounted / "base"))
    assert rig.read("base") == rig.before


def test_qemu_io_patterns_are_read_back(rig, mounted):
    need("qemu-io")
    commands = ["write -P 0x5a 4096 65536", "read -P 0x5a 4096 65536", "write -z 8k 4k", "flush"]
    commands += ["read -P 0 8k 4k", "write -f -P 0x77 1k 3k", "read -P 0x77 1k 3k"]
    commands += ["discard 4k 4k", "write -z -u 64k 4k", "read -P 0 64k 4k"]
    words = [word for command in commands for word in ("-c", command)]
    for name in ("base", "base-real"):
        assert "failed" not in run("qemu-io", "-f", "raw", *words, str(mounted / name))
        assert rig.dm.device(name).pread(3072, 1024) == b"\x77" * 3072
    assert rig.dm.device("base-real").pread(4096, 4096) == bytes(4096)


# --- data, call by call ---------------------------------------------------------------------------


def test_requests_of_any_size_and_place_are_what_was_asked_for(rig, mounted, opened, seed):
    print("seed", seed)
    dice = random.Random(seed)
    rig.snap(cow_sectors=3 * SECTORS)
    base, model = opened(mounted / "base"), bytearray(rig.before)
    for _ in range(400):
        offset = dice.randrange(SIZE + 1)
        length = dice.choice((dice.randrange(1, 5000), dice.randrange(1, 3 << 20)))
        length = min(length, SIZE - offset)
        action = dice.randrange(4)
        if action == 0 and length:
            assert fallocate(mounted / "base", "zero", offset, length) == ""
            model[offset : offset + length] = bytes(length)
        elif action == 1:
            data = dice.randbytes(length)
            assert os.pwrite(base, data, offset) == length
            model[offset : offset + length] = data
        else:
            assert os.pread(base, length + 9, offset)[:length] == model[offset : offset + length]
    assert rig.read("base") == bytes(model)
    assert rig.read("snap") == rig.before


def test_a_range_is_zeroed_only_on_a_writable_device(rig, mounted, opened):
    rig.dm.create("dev", "0 16 linear base-real 0")
    file = opened(mounted / "dev")
    rig.dm.load("dev", "0 8 linear base-real 0", readonly=True)
    rig.dm.resume("dev")
    libc = ctypes.CDLL(None, use_errno=True)
    for kind in (FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE):
        assert libc.fallocate(file, kind, ctypes.c_long(0), ctypes.c_long(512)) == -1
        assert ctypes.get_errno() == errno.EPERM
    rig.dm.load("dev", "0 8 linear base-real 0", readonly=False)
    rig.dm.resume("dev")
    assert libc.fallocate(file, FALLOC_FL_ZERO_RANGE, ctypes.c_long(4096), ctypes.c_long(1)) == -1
    assert ctypes.get_errno() == errno.EINVAL
    assert rig.read("base-real") == rig.before


def test_at_the_end_reads_are_short_and_writes_find_no_space(rig, mounted, opened):
    base = opened(mounted / "base")
    assert os.pread(base, 8192, SIZE - 4096) == rig.before[-4096:]
    assert os.pread(base, 4096, SIZE) == b""
    assert os.pread(base, 4096, SIZE + (1 << 40)) == b""
    assert os.pwrite(base, bytes(8192), SIZE - 4096) == 4096
    assert refused(os.pwrite, base, b"x", SIZE) == errno.ENOSPC
    assert refused(os.posix_fallocate, base, 0, SIZE + 1) in (errno.EOPNOTSUPP, errno.EINVAL)
    assert (mounted / "base").stat().st_size == SIZE


def test_a_write_through_one_way_is_seen_through_the_other_at_once(rig, mounted, opened, tmp_path):
    rig.snap(cow_sectors=2 * SECTORS)
    base, below, snap = (opened(mounted / name) for name in ("base", "base-real", "snap"))
    with NbdServer(rig.dm, f"unix:{tmp_path}/nbd.sock"):
        client = Client(tmp_path / "nbd.sock")
        client.go("base")
        for number in range(100):
            data = stamp(number, 1, number)
            assert os.pread(base, SECTOR, 0) == os.pread(below, SECTOR, 0)
            assert client.ask(WRITE, 0, SECTOR, data) == (0, b"")
            assert os.pread(base, SECTOR, 0) == os.pread(below, SECTOR, 0) == data
            os.pwrite(base, data, 4096)
            assert client.ask(READ, 4096, SECTOR) == (0, data)
            rig.dm.device("base").pwrite(data, 8192)
            assert os.pread(base, SECTOR, 8192) == data
        client.close()
    assert os.pread(snap, SIZE, 0) == rig.before


def test_a_swapped_table_and_a_merge_are_seen_through_an_open_file(rig, mounted, opened):
    rig.snap(cow_sectors=2 * SECTORS)
    file = opened(mounted / "base")
    os.pwrite(file, stamp(0, 64, 5), 0)
    assert (mounted / "base").read_bytes() != rig.before
    rig.dm.suspend("base")
    poll(lambda: is_closed(rig.dm, "snap"))
    rig.dm.remove("snap")
    rig.dm.load("base", rig.line("snap", kind="snapshot-merge"))
    rig.dm.resume("base")
    wait_merge(rig.dm, "base")
    assert os.pread(file, SIZE, 0) == rig.before
    rig.dm.load("base", f"0 {SECTORS} zero")
    rig.dm.resume("base")
    assert os.pread(file, SIZE, 0) == bytes(SIZE)


def mapped(path: Path, *lines: str) -> str:
    """Run lines of Python on `file`, a descriptor, and return what they print.

    In a process of their own: whoever touches mapped memory holds the interpreter up until the
    page is there.
    """
    head = ["import mmap, os, sys", f"file = os.open({str(path)!r}, os.O_RDWR)"]
    return run(sys.executable, "-c", "\n".join([*head, *lines]))


@pytest.mark.parametrize("kind", ["PRIVATE", "SHARED"])
def test_mapped_memory_shows_what_the_device_holds(rig, mounted, tmp_path, kind):
    if kind == "SHARED":
        need_shared_memory()
    rig.dm.device("base-real").pwrite(b"y" * 4096, 0)
    new = b"y" * 4096 + b"x" * 8192 + rig.before[12288:]
    (tmp_path / "before").write_bytes(b"y" * 4096 + rig.before[4096:])
    (tmp_path / "new").write_bytes(new)
    look = f"with mmap.mmap(file, {SIZE}, mmap.MAP_{kind}, mmap.PROT_READ) as memory:"
    mapped(
        mounted / "base",
        f"{look}\n    assert memory[:] == open('{tmp_path}/before', 'rb').read()",
        "os.pwrite(file, b'x' * 8192, 4096)",
        f"{look}\n    assert memory[:] == open('{tmp_path}/new', 'rb').read()",
    )
    assert rig.read("base") == new


def need_shared_memory() -> None:
    """Skip the test where the kernel maps no file shared that is not cached."""
    if tuple(map(int, os.uname().release.split(".")[:2])) < (6, 6):
        pytest.skip("Linux 6.6 is needed")


def test_memory_mapped_shared_is_written_to_the_device(rig, mounted):
    need_shared_memory()
    rig.snap(cow_sectors=2 * SECTORS)
    mapped(
        mounted / "base",
        f"memory = mmap.mmap(file, {SIZE})",
        "memory[5000:5003] = b'new'",
        "memory.flush()",
        "assert os.pread(file, 3, 5000) == b'new'",
    )
    assert rig.dm.device("base").pread(3, 5000) == b"new"
    assert rig.read("snap") == rig.before


def test_punched_holes_read_as_zeros_and_free_space(rig, mounted):
    origin = Path(rig.origin)
    before = origin.stat().st_blocks
    assert fallocate(mounted / "base-real", "punch", 1 << 20, 1 << 20) == ""
    assert rig.dm.device("base-real").pread(1 << 20, 1 << 20) == bytes(1 << 20)
    assert origin.stat().st_blocks <= before - 2048
    assert fallocate(mounted / "base-real", "punch", SIZE - 4096, 1 << 20) == ""
    assert origin.stat().st_size == SIZE


def test_a_hole_is_not_punched_where_a_snapshot_lies_below(rig, mounted):
    rig.snap(words="P 8 1 discard_zeroes_cow")
    for name in ("base", "snap"):
        assert "unsupported" in fallocate(mounted / name, "punch", 0, 4096)
    assert rig.read("base") == rig.read("snap") == rig.before


def test_a_zeroed_range_is_written_and_the_snapshot_keeps_what_was(rig, mounted):
    rig.snap(cow_sectors=2 * SECTORS)
    assert fallocate(mounted / "base", "zero", 1000, 3 << 20) == ""
    assert rig.dm.device("base").pread(3 << 20, 1000) == bytes(3 << 20)
    assert rig.read("snap") == rig.before
    assert "Invalid argument" in fallocate(mounted / "base", "zero", 0, SIZE + 1)


def test_data_and_holes_are_those_of_the_images(rig, mounted, opened, tmp_path):
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(64 << 20)
        for offset in (1 << 20, 33 << 20):
            file.seek(offset)
            file.write(b"x" * (1 << 20))
    rig.dm.create("dev", f"0 8192 zero\n8192 {(64 << 20) // SECTOR} linear {path} 0")
    file, size, zeros = opened(mounted / "dev"), 68 << 20, 4 << 20
    found, at = [], 0
    with contextlib.suppress(OSError):
        while True:
            data = os.lseek(file, at, os.SEEK_DATA)
            at = os.lseek(file, data, os.SEEK_HOLE)
            found.append((data, at - data))
    wanted = [
        (int(each["offset"]), int(each["length"]))
        for each in rig.dm.device("dev").extents()
        if not each["zero"]
    ]
    assert found == wanted == [(zeros + (n << 20), 1 << 20) for n in (1, 33)]
    assert os.lseek(file, 0, os.SEEK_HOLE) == 0
    assert os.lseek(file, size - 1, os.SEEK_HOLE) == size - 1
    for offset, whence in ((at, os.SEEK_DATA), (size, os.SEEK_HOLE), (size, os.SEEK_DATA)):
        assert refused(os.lseek, file, offset, whence) == errno.ENXIO
    base = opened(mounted / "base")
    assert os.lseek(base, 5, os.SEEK_DATA) == 5
    assert os.lseek(base, 5, os.SEEK_HOLE) == SIZE


def flushes(dm: cow.Mapper, log: str) -> int:
    """Remove the logged device and count the flushes."""
    poll(lambda: is_closed(dm, "dev"))
    dm.remove("dev")
    return sum(bool(entry.flags & FLUSH) for entry in read_log(log))


@pytest.mark.parametrize(("flags", "wanted"), [(0, 1), (os.O_DSYNC, 4), (os.O_SYNC, 4)])
def test_fsync_and_synchronous_writes_flush(rig, mounted, tmp_path, flags, wanted):
    disk, log = image(tmp_path / "disk", 64), image(tmp_path / "log", 8192)
    rig.dm.create("dev", f"0 64 log-writes {disk} {log}")
    file = os.open(mounted / "dev", os.O_RDWR | flags)
    for number in range(3):
        os.pwrite(file, b"x" * SECTOR, number * SECTOR)
    os.fsync(file)
    os.close(file)
    assert flushes(rig.dm, log) == wanted


# --- errors ---------------------------------------------------------------------------------------


def test_a_read_only_device_cannot_be_opened_for_writing(rig, mounted, opened):
    rig.dm.create("ro", "0 8 linear base-real 0", readonly=True)
    code = refused(os.open, mounted / "ro", os.O_RDWR)
    assert code == (errno.EROFS if os.geteuid() == 0 else errno.EACCES)
    file = opened(mounted / "ro", os.O_RDONLY)
    assert os.pread(file, 4096, 0) == rig.before[:4096]


def test_errors_of_a_device_are_those_of_the_file(rig, mounted, opened):
    rig.dm.create("bad", "0 8 error")
    bad = opened(mounted / "bad")
    assert refused(os.pread, bad, 512, 0) == errno.EIO
    assert refused(os.pwrite, bad, b"x" * 512, 0) == errno.EIO
    rig.snap(cow_sectors=64)
    snap = opened(mounted / "snap", os.O_RDONLY)
    os.pwrite(opened(mounted / "base"), bytes(1 << 20), 0)
    assert rig.dm.status("snap").endswith("Invalid")
    assert refused(os.pread, snap, 512, 0) == errno.EIO


def test_a_device_without_a_table_is_an_empty_file(rig, mounted, opened):
    rig.dm.create("empty")
    file = opened(mounted / "empty")
    assert os.fstat(file).st_size == 0
    assert os.read(file, 10) == b""
    assert refused(os.pwrite, file, b"x", 0) == errno.ENOSPC


def test_an_image_cannot_lie_on_the_mapper_s_own_files(rig, mounted):
    with pytest.raises(cow.CowError, match="name the device itself") as caught:
        rig.dm.create("loop", f"0 8 linear {mounted}/base 0")
    assert caught.value.errno == errno.ELOOP
    assert rig.dm.names() == ["base", "base-real"]


# --- open files -----------------------------------------------------------------------------------


def test_an_open_file_keeps_its_device(rig, mounted):
    rig.dm.create("dev", "0 8 linear base-real 0")
    first = os.open(mounted / "dev", os.O_RDONLY)
    second = os.open(mounted / "dev", os.O_RDWR)
    assert rig.dm.info("dev").open_count == 2
    with pytest.raises(cow.DeviceBusy, match="2 open files"):
        rig.dm.remove("dev")
    os.close(first)
    poll(lambda: rig.dm.info("dev").open_count == 1)
    assert os.pread(second, 4096, 0) == rig.before[:4096]
    os.close(second)
    poll(lambda: is_closed(rig.dm, "dev"))
    rig.dm.remove("dev")


def test_a_deferred_removal_is_done_at_the_last_close(rig, mounted):
    rig.dm.create("dev", "0 8 linear base-real 0")
    file = os.open(mounted / "dev", os.O_RDONLY)
    rig.dm.remove("dev", deferred=True)
    assert os.pread(file, 4096, 0) == rig.before[:4096]
    os.close(file)
    poll(lambda: "dev" not in rig.dm.names())
    assert not (mounted / "dev").exists()


@pytest.mark.skipif(
    os.environ.get("COW_BUILD") == "tsan",
    reason="the thread sanitizer does not survive a jump out of a SIGBUS",
)
def test_an_image_cut_while_it_is_mounted_fails_what_it_lost(rig, mounted, opened):
    rig.snap()
    base, snap = opened(mounted / "base"), opened(mounted / "snap")
    os.pwrite(base, b"x" * 4096, 0)
    os.truncate(rig.origin, SIZE // 2)
    for file in (base, snap):
        assert refused(os.pread, file, 4096, SIZE // 2) == errno.EIO
        assert os.pread(file, 4096, SIZE // 2 - 4096) == rig.before[SIZE // 2 - 4096 : SIZE // 2]
    assert os.pwrite(base, b"y" * 4096, 4096) == 4096
    assert os.pread(snap, 8192, 0) == rig.before[:8192]
    assert refused(os.pwrite, base, b"y" * 4096, SIZE // 2) == errno.EIO
    assert os.stat(rig.origin).st_size == SIZE // 2


def test_a_killed_program_lets_go_of_its_device(rig, mounted):
    rig.dm.create("dev", "0 8 zero")
    with open(mounted / "dev", "rb") as file:
        program = subprocess.Popen(["sleep", "1000"], stdin=file)
    assert rig.dm.info("dev").open_count > 0
    program.kill()
    program.wait()
    poll(lambda: is_closed(rig.dm, "dev"))


# --- suspended devices ----------------------------------------------------------------------------


def test_requests_on_a_suspended_device_wait_and_all_others_go_on(rig, mounted, opened):
    rig.dm.create("other", "0 8 zero")
    base, other = opened(mounted / "base"), opened(mounted / "other")
    rig.dm.suspend("base")
    writes = [
        beside(os.pwrite, base, stamp(number, 1, 3), number * SECTOR)
        for number in range(5 * THREADS)
    ]
    flush = beside(os.fsync, base)
    look = beside(os.lseek, base, 0, os.SEEK_HOLE)
    for _ in range(200):
        assert os.pread(other, 4096, 0) == bytes(4096)
        assert os.pwrite(other, b"x", 0) == 1
        os.fsync(other)
        assert (mounted / "base").stat().st_size == SIZE
    assert all(thread.is_alive() for thread in (*writes, flush, look))
    rig.cows["snap"] = image(rig.folder / "snap.cow", 2048)
    rig.dm.create("snap", rig.line("snap"))
    rig.dm.resume("base")
    for thread in (*writes, flush, look):
        thread.join(SECONDS)
        assert not thread.is_alive()
    assert os.pread(base, SIZE, 0) == stamp(0, 5 * THREADS, 3) + rig.before[5 * THREADS * SECTOR :]
    assert (mounted / "snap").read_bytes() == rig.before


@pytest.fixture
def reader(rig):
    """Start programs that read the first 4 KiB of a file, and have them all end."""
    started = []

    def start(path: Path) -> subprocess.Popen:
        words = ["dd", f"if={path}", "of=/dev/null", "bs=4k", "count=1"]
        started.append(subprocess.Popen(words, stderr=subprocess.PIPE))
        return started[-1]

    yield start
    for name in rig.dm.devices():
        rig.dm.resume(name)
    for program in started:
        program.communicate(timeout=SECONDS)


def test_a_killed_program_does_not_wait_for_a_suspended_device(rig, mounted, reader):
    rig.dm.suspend("base")
    program = reader(mounted / "base")
    poll(lambda: rig.dm.info("base").open_count == 1)
    with pytest.raises(subprocess.TimeoutExpired):
        program.wait(0.3)
    program.terminate()
    _, text = program.communicate(timeout=SECONDS)
    assert program.returncode == -signal.SIGTERM
    assert text == b""
    poll(lambda: is_closed(rig.dm, "base"))
    rig.dm.resume("base")


def test_a_program_is_killed_by_a_signal_after_one_that_did_not_kill(
    rig, mounted, reader, monkeypatch
):
    """The kernel tells of the first signal only, so it counts until the request is answered."""
    told = []
    real = _Files._forget_answered

    def forget_answered(files: _Files) -> None:
        real(files)
        told.append(list(files._interrupted))

    monkeypatch.setattr("cow.export.fuse.INTERRUPT_SECONDS", 0.0)
    monkeypatch.setattr(_Files, "_forget_answered", forget_answered)
    rig.dm.suspend("base")
    program = reader(mounted / "base")
    poll(lambda: rig.dm.info("base").open_count == 1)
    with pytest.raises(subprocess.TimeoutExpired):
        program.wait(0.3)
    program.send_signal(signal.SIGUSR1)
    poll(lambda: len(told) > 9)
    assert program.poll() is None
    assert all(each == told[0] for each in told)
    assert len(told[0]) == 1
    program.terminate()
    program.communicate(timeout=SECONDS)
    assert program.returncode == -signal.SIGTERM
    poll(lambda: told[-1] == [])
    rig.dm.resume("base")


def test_a_signal_that_does_not_kill_does_not_fail_a_request(rig, mounted):
    code = f"""
        import os, signal
        signal.signal(signal.SIGUSR1, lambda *_: None)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        file = os.open({str(mounted / "base")!r}, os.O_RDONLY)
        libc = __import__("ctypes").CDLL(None, use_errno=True)
        print("ready", flush=True)
        data = bytearray(4096)
        address = (__import__("ctypes").c_char * 4096).from_buffer(data)
        assert libc.pread(file, address, 4096, 0) == 4096
        os.write(1, data)
    """
    rig.dm.suspend("base")
    program = subprocess.Popen(
        [sys.executable, "-P", "-c", textwrap.dedent(code)], stdout=subprocess.PIPE
    )
    assert program.stdout is not None
    assert program.stdout.readline() == b"ready\n"
    for _ in range(5):
        with pytest.raises(subprocess.TimeoutExpired):
            program.wait(0.1)
        program.send_signal(signal.SIGUSR1)
    rig.dm.resume("base")
    data, _ = program.communicate(timeout=SECONDS)
    assert program.returncode == 0
    assert data == rig.before[:4096]


def test_a_consistent_snapshot_is_taken_while_programs_write(rig, mounted, opened, seed):
    print("seed", seed)
    dice = random.Random(seed)
    base, done = opened(mounted / "base"), threading.Event()
    latest = [0]

    def write() -> None:
        """Write sector 0 last in each round: all others are at least as new."""
        while not done.is_set():
            tag = latest[0] + 1
            for sector in dice.sample(range(8, SECTORS, 8), 20):
                os.pwrite(base, stamp(sector, 1, tag), sector * SECTOR)
            os.pwrite(base, stamp(0, 1, tag), 0)
            latest[0] = tag

    writer = beside(write)
    for number in range(8):
        name = f"snap{number}"
        poll(lambda seen=latest[0]: latest[0] > seen)
        rig.snap(name, cow_sectors=2 * SECTORS)
        frozen = (mounted / name).read_bytes()
        poll(lambda seen=latest[0]: latest[0] > seen + 1)
        assert (mounted / name).read_bytes() == frozen
        poll(lambda name=name: is_closed(rig.dm, name))
        rig.dm.remove(name)
    done.set()
    writer.join(SECONDS)
    assert not writer.is_alive()
    assert (mounted / "base").read_bytes() == rig.read("base")


def test_a_merge_loses_no_write_of_programs(rig, mounted, seed):
    print("seed", seed)
    rig.snap(cow_sectors=2 * SECTORS)
    merged = stamp(0, SECTORS, 5)
    (mounted / "snap").write_bytes(merged)
    poll(lambda: is_closed(rig.dm, "snap"))
    rig.dm.suspend("base")
    rig.dm.remove("snap")
    rig.dm.load("base", rig.line("snap", kind="snapshot-merge"))
    models = [bytearray(merged[n * SIZE // 4 : (n + 1) * SIZE // 4]) for n in range(4)]

    def write(number: int) -> None:
        """Write here and there in one quarter, and read it back."""
        dice = random.Random(f"{seed} {number}")
        model, first = models[number], number * SIZE // 4
        with open(mounted / "base", "r+b", buffering=0) as file:
            for _ in range(200):
                data = dice.randbytes(dice.randrange(1, 9000))
                at = dice.randrange(SIZE // 4 - len(data))
                assert os.pwrite(file.fileno(), data, first + at) == len(data)
                model[at : at + len(data)] = data
                at = dice.randrange(SIZE // 4 - 9000)
                assert os.pread(file.fileno(), 9000, first + at) == model[at : at + 9000]

    with concurrent.futures.ThreadPoolExecutor(4) as writers:
        done = [writers.submit(write, number) for number in range(4)]
        rig.dm.resume("base")
        wait_merge(rig.dm, "base")
        for each in done:
            each.result(SECONDS)
    assert rig.read("base") == b"".join(models)


# --- the mount ------------------------------------------------------------------------------------


def make_directory(tmp_path: Path) -> Path:
    need_fuse()
    directory = tmp_path / "a dir\\ectory"
    directory.mkdir()
    return directory


def test_stop_unmounts_and_leaves_no_threads_or_files(rig, tmp_path):
    directory = make_directory(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    mount = FuseMount(rig.dm, str(directory))
    assert os.listdir(directory) == []
    mount.start()
    assert sorted(os.listdir(directory)) == ["base", "base-real"]
    assert fusermount.mounted(str(directory)) == directory.stat().st_dev
    mount.stop()
    mount.stop()
    assert os.listdir(directory) == []
    assert fusermount.mounted(str(directory)) is None
    assert not [t for t in threading.enumerate() if t.name.startswith("cow-fuse")]
    assert len(os.listdir("/proc/self/fd")) == before


def test_stop_takes_the_devices_from_programs_that_have_them_open(rig, tmp_path, opened):
    directory = make_directory(tmp_path)
    with FuseMount(rig.dm, str(directory)):
        file = opened(directory / "base")
        waits = opened(directory / "base-real")
        rig.dm.suspend("base-real")
        failed = []
        waiting = beside(lambda: failed.append(refused(os.pread, waits, 512, 0)))
        poll(lambda: rig.dm.info("base").open_count == 1)
    waiting.join(SECONDS)
    assert failed == [errno.ECONNABORTED]
    assert refused(os.pread, file, 512, 0) == errno.ENOTCONN
    assert is_closed(rig.dm, "base")


def test_a_program_that_ends_unmounts(tmp_path):
    directory = make_directory(tmp_path)
    code = f"""
        import cow, os
        from cow.export.fuse import FuseMount

        dm = cow.Mapper()
        dm.create("dev", "0 8 zero")
        FuseMount(dm, {str(directory)!r}).start()
        assert os.listdir({str(directory)!r}) == ["dev"]
    """
    run(sys.executable, "-P", "-c", textwrap.dedent(code))
    assert fusermount.mounted(str(directory)) is None


def test_a_user_may_unmount_and_the_devices_are_let_go(rig, tmp_path, opened):
    directory = make_directory(tmp_path)
    with FuseMount(rig.dm, str(directory)):
        file = opened(directory / "base")
        rig.dm.suspend("base")
        waiting = beside(os.pread, file, 512, 0)
        run("fusermount3", "-u", "-z", str(directory))
        assert os.listdir(directory) == []
        rig.dm.resume("base")
        waiting.join(SECONDS)
        assert os.pread(file, 512, 0) == rig.before[:512]
        os.close(file)
        poll(lambda: is_closed(rig.dm, "base"))
    with FuseMount(rig.dm, str(directory)):
        assert (directory / "base").read_bytes() == rig.before


def test_one_mapper_is_shown_in_two_directories(rig, tmp_path):
    directory = make_directory(tmp_path)
    (tmp_path / "second").mkdir()
    with FuseMount(rig.dm, str(directory)), FuseMount(rig.dm, str(tmp_path / "second")):
        (directory / "base").write_bytes(b"new")
        assert (tmp_path / "second" / "base").read_bytes() == b"new" + rig.before[3:]


def test_a_directory_that_is_served_is_refused(rig, mounted):
    with pytest.raises(cow.DeviceBusy, match="another server"):
        FuseMount(rig.dm, str(mounted))


def test_what_is_no_directory_is_refused(rig, tmp_path):
    (tmp_path / "file").touch()
    for name, code in (("file", errno.ENOTDIR), ("nosuch", errno.ENOENT)):
        with pytest.raises(cow.CowError, match=name) as caught:
            FuseMount(rig.dm, str(tmp_path / name))
        assert caught.value.errno == code


def test_without_fusermount3_it_says_so(rig, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(cow.CowError, match="package fuse3"):
        FuseMount(rig.dm, str(tmp_path)).start()


@pytest.mark.parametrize(
    ("script", "text", "code"),
    [
        (
            "echo 'fusermount3: mount failed: Permission denied' >&2; exit 1",
            "mount failed: Permission denied",
            errno.EACCES,
        ),
        ("echo 'fusermount3: too many fuse mounts' >&2; exit 1", "too many fuse", errno.EIO),
        ("exit 3", "status 3", errno.EIO),
        ("exit 0", "sent no descriptor", errno.EIO),
    ],
)
def test_what_fusermount3_says_is_passed_on(rig, tmp_path, monkeypatch, script, text, code):
    program = tmp_path / "fusermount3"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(cow.CowError, match=text) as caught:
        FuseMount(rig.dm, str(tmp_path)).start()
    assert caught.value.errno == code


def test_a_fusermount3_that_cannot_be_run_is_an_error(rig, tmp_path, monkeypatch):
    (tmp_path / "fusermount3").write_text("")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(cow.CowError, match=r"fusermount3: .*Permission denied") as caught:
        FuseMount(rig.dm, str(tmp_path)).start()
    assert caught.value.errno == errno.EIO


def test_a_mount_that_cannot_be_undone_is_dead_and_the_next_one_takes_it_away(
    rig, tmp_path, monkeypatch, caplog
):
    directory = make_directory(tmp_path)
    mount = FuseMount(rig.dm, str(directory))
    mount.start()
    with monkeypatch.context() as without:
        without.setenv("PATH", str(tmp_path))
        mount.stop()
    assert "package fuse3" in caplog.text
    assert refused(os.listdir, directory) == errno.ENOTCONN
    with FuseMount(rig.dm, str(directory)):
        assert sorted(os.listdir(directory)) == ["base", "base-real"]
    assert fusermount.mounted(str(directory)) is None


# --- the n-th libc call of the core fails ---------------------------------------------------------


@pytest.fixture(scope="module")
def faults() -> LibcFaults:
    return LibcFaults()


class Shaken:
    """A mount that is used while calls fail."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.dm = cow.Mapper(durability="process")
        self.rig = Rig(self.dm, folder, 1024)
        self.rig.snap(cow_sectors=4096)
        self.directory = folder / "mnt"
        self.directory.mkdir()
        self.codes: set[int | None] = set()

    def attempt(self, call, *args):
        """Do what may fail with an error, and note which."""
        try:
            return call(*args)
        except OSError as error:
            self.codes.add(error.errno)

    def use(self) -> None:
        """Do something of each kind."""
        file = self.attempt(os.open, self.directory / "base", os.O_RDWR)
        if file is None:
            return
        self.attempt(os.pread, file, 4096, 0)
        self.attempt(os.pwrite, file, b"x" * 4096, 0)
        self.attempt(os.pwrite, file, b"x" * (1 << 17), 8192)
        self.attempt(os.fsync, file)
        self.attempt(os.lseek, file, 0, os.SEEK_HOLE)
        self.attempt(os.listdir, self.directory)
        self.attempt(os.close, file)

    def check(self) -> None:
        """All works in a new mount, and neither device has lost anything."""
        with FuseMount(self.dm, str(self.directory)):
            with open(self.directory / "base", "r+b", buffering=0) as file:
                assert file.write(b"y" * 512) == 512
            data = (self.directory / "base").read_bytes()
            assert data[:512] == b"y" * 512
            assert data[1 << 18 :] == self.rig.before[1 << 18 :]
            if not self.dm.status("snap").endswith("Invalid"):
                assert (self.directory / "snap").read_bytes() == self.rig.before
        self.dm.close()


@pytest.mark.parametrize(
    ("calls", "code", "allowed"),
    [
        (MEMORY, errno.ENOMEM, {errno.ENOMEM, errno.EIO}),
        ("eventfd epoll_create1", errno.EMFILE, set()),
        ("epoll_ctl", errno.ENOSPC, set()),
        ("read", errno.EINTR, None),
        ("read", errno.ENOENT, None),
        ("read", errno.EIO, set()),
    ],
)
def test_a_call_that_fails_ends_the_mount_at_most(faults, tmp_path, calls, code, allowed):
    need_fuse()
    # None: nothing fails. Otherwise the mount may end, and no program waits for ever.
    ended = {errno.ENOTCONN, errno.ECONNABORTED, errno.ENOENT, errno.ENODEV}
    for number, fault in enumerate(faults.each(calls, code)):
        shaken = Shaken(tmp_path / str(number))
        mount = FuseMount(shaken.dm, str(shaken.directory))
        with fault:
            try:
                mount.start()
            except (OSError, MemoryError):
                assert allowed is not None
            else:
                shaken.use()
                mount.stop()
        assert shaken.codes <= (set() if allowed is None else allowed | ended)
        shaken.check()


# --- cow serve --mount ----------------------------------------------------------------------------


@pytest.fixture
def serve(tmp_path):
    """A function that starts `cow serve --mount`; what still runs at the end is killed."""
    need_fuse()
    directory = tmp_path / "served"
    directory.mkdir()
    (tmp_path / "disk").write_bytes(stamp(0, 64, 1))
    (tmp_path / "tables").write_text(f"disk,,,rw,0 64 linear {tmp_path}/disk 0\n")
    words = [sys.executable, "-P", "-m", "cow", "serve", "--socket", str(tmp_path / "run" / "sock")]
    words += ["--mount", str(directory), "--tables", str(tmp_path / "tables")]
    started = []

    def start() -> tuple[subprocess.Popen, Path]:
        process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stderr is not None
        for line in process.stderr:
            if "serves" in line:
                return process, directory
        raise AssertionError("it did not start")

    yield start
    for process in started:
        process.kill()
        process.communicate()
    if mounts(directory):
        fusermount.unmount(str(directory))


def test_serve_mounts_and_unmounts(serve):
    process, directory = serve()
    assert mounts(directory) == ["fuse.cow"]
    assert (directory / "disk").read_bytes() == stamp(0, 64, 1)
    process.terminate()
    assert process.wait(SECONDS) == 0
    assert mounts(directory) == []
    assert os.listdir(directory) == []


def test_after_kill_a_new_server_takes_the_dead_mount_away(serve, opened):
    process, directory = serve()
    file = opened(directory / "disk")
    os.pwrite(file, b"kept", 0)
    process.kill()
    process.wait(SECONDS)
    assert refused(os.stat, directory) == errno.ENOTCONN
    assert refused(os.pread, file, 4, 0) == errno.ENOTCONN
    process, directory = serve()
    assert mounts(directory) == ["fuse.cow"]
    assert (directory / "disk").read_bytes()[:4] == b"kept"
    process.terminate()
    assert process.wait(SECONDS) == 0
    assert mounts(directory) == []


ORDINARY = """
import ctypes, os, subprocess, sys, tempfile
import cow, cow.export.nbd
from cow.export.fuse import FuseMount

cow.Mapper.targets()  # all modules are read before: the folder they are in may be root's own
folder = tempfile.mkdtemp()
if os.geteuid() == 0:
    # In a mount namespace of its own, /dev/fuse is everybody's, as udev makes it elsewhere.
    CLONE_NEWNS = 0x20000
    assert ctypes.CDLL(None).unshare(CLONE_NEWNS) == 0
    for words in (
        f"mount --make-rprivate /", f"mount -t tmpfs -o mode=755 cow {folder}",
        f"mknod -m 666 {folder}/fuse c 10 229", f"mount --bind {folder}/fuse /dev/fuse",
    ):
        subprocess.run(words.split(), check=True)
    os.mkdir(folder + "/own")
    folder += "/own"
    os.chown(folder, 65534, 65534)
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
os.chdir(folder)
os.mkdir("mnt")
with open("disk.img", "wb") as file:
    file.truncate(1 << 20)
with cow.Mapper(durability="process") as dm:
    dm.create("disk", "0 2048 linear disk.img 0")
    with FuseMount(dm, "mnt"):
        with open("mnt/disk", "r+b", buffering=0) as file:
            file.write(b"x" * 5000)
        with open("mnt/disk", "rb") as file:
            assert file.read() == b"x" * 5000 + bytes((1 << 20) - 5000)
        assert os.stat("mnt/disk").st_uid == os.getuid()
    assert os.listdir("mnt") == []
print("done as", "ordinary" if os.getuid() else "root")
"""


def test_an_ordinary_user_mounts(tmp_path):
    need_fuse()
    assert run(sys.executable, "-P", "-c", ORDINARY) == "done as ordinary\n"
