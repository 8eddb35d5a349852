"""FUSE: what Linux asks rarely, or only at a bad moment, asked by a kernel that is a socket."""

from __future__ import annotations

import collections
import contextlib
import errno
import functools
import os
import struct
import threading
from collections.abc import Callable, Iterator

import pytest
from support import SECTOR, Rig, image, poll, stamp
from support.fuse import (
    BATCH_FORGET,
    FALLOCATE_RANGE,
    GETATTR,
    LSEEK,
    RELEASE,
    ROOT,
    Kernel,
)

import cow
from cow import _core
from cow.export import fusermount
from cow.export.fuse import FuseMount, _Files
from cow.export.fusermount import MountError

SECTORS = 2048
KEEP_SIZE_AND_ZERO = 1 | 16
STATFS = 17


@pytest.fixture
def rig(tmp_path):
    with cow.Mapper(durability="process") as dm:
        yield Rig(dm, tmp_path, SECTORS)


@pytest.fixture
def kernel():
    made = Kernel()
    yield made
    made.close()
    with contextlib.suppress(OSError):
        os.close(made.served)


@pytest.fixture
def waiting(monkeypatch):
    """The numbers of requests that met a suspended device, of a mount that comes after."""
    numbers, real = set(), _Files.is_killed

    def is_killed(files: _Files, unique: int, thread: int) -> bool:
        numbers.add(unique)
        return real(files, unique, thread)

    monkeypatch.setattr(_Files, "is_killed", is_killed)
    return numbers


@pytest.fixture
def mount(rig, tmp_path, kernel, monkeypatch):
    """A mount that the kernel has just begun to speak to."""
    monkeypatch.setattr(fusermount, "mount", lambda directory: kernel.served)
    made = FuseMount(rig.dm, str(tmp_path))
    kernel.begin()
    made.start()
    assert kernel.answer()[1] == 0
    yield made
    made.stop()


@contextlib.contextmanager
def beside(*calls: Callable[[], None]) -> Iterator[None]:
    """Run each call in a thread; wait for all at the end."""
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.join()


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [{"minor": 27}, {"major": 6}, {"opcode": GETATTR}])
def test_a_kernel_that_is_too_old_is_refused(rig, tmp_path, kernel, monkeypatch, first):
    monkeypatch.setattr(fusermount, "mount", lambda directory: kernel.served)
    kernel.begin(**first)
    with pytest.raises(MountError, match=r"at least 7\.28 is needed") as caught:
        FuseMount(rig.dm, str(tmp_path)).start()
    assert caught.value.errno == errno.EPROTO
    with pytest.raises(EOFError):
        kernel.answer()


def forget(kernel: Kernel, *nodes: tuple[int, int]) -> None:
    """Tell of nodes, and how many lookups of each are forgotten.

    There is no answer, and another thread of the mount may take the next request before.
    """
    body = b"".join(struct.pack("=QQ", *each) for each in nodes)
    kernel.send(BATCH_FORGET, struct.pack("=II", len(nodes), 0) + body)


def test_a_file_is_known_until_each_of_its_lookups_is_forgotten(mount, kernel):
    base, other = kernel.lookup("base"), kernel.lookup("base-real")
    assert kernel.lookup("base") == base
    forget(kernel, (other, 1), (9999, 3), (base, 1))
    poll(lambda: kernel.ask(GETATTR, bytes(16), other)[0] == errno.ENXIO)
    assert kernel.ask(GETATTR, bytes(16), base)[0] == 0
    forget(kernel, (base, 1))
    poll(lambda: kernel.ask(GETATTR, bytes(16), base)[0] == errno.ENXIO)
    assert kernel.lookup("base") not in (base, other)


def test_a_request_that_makes_no_sense_is_an_error_and_the_next_is_answered(mount, kernel, caplog):
    assert kernel.ask(RELEASE, struct.pack("=QII8x", 12345, 0, 0), ROOT) == (errno.EIO, b"")
    assert f"request {RELEASE} failed" in caplog.text
    assert kernel.ask(STATFS, b"", ROOT)[0] == 0


def test_only_data_and_holes_are_sought(mount, kernel):
    handle = kernel.open("base-real")
    for whence, code in ((os.SEEK_SET, errno.EINVAL), (os.SEEK_DATA, 0)):
        assert kernel.ask(LSEEK, struct.pack("=QQII", handle, 0, whence, 0))[0] == code


# --- a server that comes to an end ----------------------------------------------------------------


def test_a_mount_whose_threads_cannot_all_be_started_ends(
    rig, tmp_path, kernel, monkeypatch, caplog
):
    real, left = threading.Thread.start, iter(range(5))

    def start(thread: threading.Thread) -> None:
        if thread.name == "cow-fuse" and next(left, None) is None:
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(fusermount, "mount", lambda directory: kernel.served)
    monkeypatch.setattr(threading.Thread, "start", start)
    kernel.begin()
    mount = FuseMount(rig.dm, str(tmp_path))
    mount.start()
    assert kernel.answer()[1] == 0
    with pytest.raises(EOFError):
        kernel.answer()
    mount.stop()
    assert "not served any more" in caplog.text
    assert not [each for each in threading.enumerate() if each.name == "cow-fuse"]


# --- suspended devices ----------------------------------------------------------------------------


@pytest.fixture
def connection(rig, kernel):
    """The core of a mount, with a thread for new requests and none for those that wait."""
    made = _core.FuseConnection(kernel.served, rig.dm.gate)
    os.set_blocking(kernel.served, False)
    with beside(made.serve):
        yield made
        made.stop()


def test_any_of_the_requests_that_wait_can_be_given_up(rig, kernel, connection):
    handle = connection.handle(rig.dm.device("base"))
    rig.dm.suspend("base")
    asked, unwanted = collections.Counter(), set()

    def given_up(unique: int, thread: int) -> bool:
        assert thread == os.getpid()
        asked[unique] += 1
        return unique in unwanted

    with beside(connection.work, functools.partial(connection.retry, given_up)):
        first, second, third = (kernel.read(handle, n * SECTOR, SECTOR) for n in range(3))
        poll(lambda: asked[first] > 1 and asked[second] > 1 and asked[third] > 1)
        for number in (second, third):
            unwanted.add(number)
            assert kernel.answer() == (number, errno.EINTR, b"")
        fourth = kernel.read(handle, 3 * SECTOR, SECTOR)
        poll(lambda: asked[fourth] > 1)
        rig.dm.resume("base")
        answers = {kernel.answer() for _ in range(2)}
        connection.stop()
    assert answers == {(first, 0, stamp(0, 1, 0)), (fourth, 0, stamp(3, 1, 0))}


def test_no_attempt_passes_unasked(rig, kernel, connection):
    """However long an attempt takes: nobody who looks at other times could miss a request."""
    handle = connection.handle(rig.dm.device("base"))
    rig.dm.suspend("base")
    number, asked = kernel.read(handle, 0, SECTOR), []

    def given_up(unique: int, thread: int) -> bool:
        asked.append(unique)
        return len(asked) == 2

    with beside(functools.partial(connection.retry, given_up)):
        poll(lambda: asked)
        with beside(connection.work):
            assert kernel.answer() == (number, errno.EINTR, b"")
            connection.stop()


def test_a_request_is_tried_again_where_asking_fails(rig, kernel, connection):
    handle = connection.handle(rig.dm.device("base"))
    rig.dm.suspend("base")
    number = kernel.read(handle, 0, SECTOR)
    with pytest.raises(ZeroDivisionError):
        connection.retry(lambda unique, thread: 1 // 0)
    rig.dm.resume("base")
    with beside(connection.work):
        assert kernel.answer() == (number, 0, stamp(0, 1, 0))
        connection.stop()


def test_a_long_write_waits_for_the_store_of_a_snapshot(rig, waiting, mount, kernel):
    store = image(rig.folder / "store.img", 2 * SECTORS)
    rig.dm.create("store", f"0 {2 * SECTORS} linear {store} 0")
    rig.dm.suspend("base")
    snap = rig.dm.create("snap", f"0 {SECTORS} snapshot base-real store P 8")
    rig.dm.resume("base")
    base, other = kernel.open("base"), kernel.open("base-real")
    rig.dm.suspend("store")
    data = stamp(0, 256, 5)
    number = kernel.write(base, 0, data)
    poll(lambda: number in waiting)
    second = kernel.read(other, 1024 * SECTOR, SECTOR)
    assert kernel.answer() == (second, 0, stamp(1024, 1, 0))
    rig.dm.resume("store")
    assert kernel.answer() == (number, 0, struct.pack("=II", len(data), 0))
    assert rig.read("base") == data + rig.before[len(data) :]
    assert snap.pread(len(rig.before), 0) == rig.before


def test_a_write_across_the_end_leaves_the_snapshot_what_it_shared(rig, mount, kernel):
    snap = rig.snap(cow_sectors=4096)
    handle = kernel.open("base")
    last = (SECTORS - 8) * SECTOR
    number = kernel.write(handle, last, stamp(0, 16, 7))
    assert kernel.answer() == (number, 0, struct.pack("=II", 8 * SECTOR, 0))
    assert rig.read("base", SECTORS - 8) == stamp(0, 8, 7)
    assert snap.pread(len(rig.before), 0) == rig.before


def test_a_range_that_waits_is_zeroed_as_far_as_the_device_then_reaches(
    rig, waiting, mount, kernel
):
    rig.dm.create("low", "0 8 linear base-real 0")
    rig.dm.create("high", "0 8 linear base-real 8")
    rig.dm.create("x", "0 8 linear low 0\n8 8 linear high 0")
    handle = kernel.open("x")
    rig.dm.suspend("high")
    body = struct.pack("=QQQII", handle, 0, 16 * SECTOR, KEEP_SIZE_AND_ZERO, 0)
    number = kernel.send(FALLOCATE_RANGE, body)
    poll(lambda: number in waiting)
    assert rig.read("low") == bytes(8 * SECTOR)
    rig.dm.load("x", "0 4 linear low 0")
    rig.dm.resume("x")
    rig.dm.resume("high")
    assert kernel.answer() == (number, 0, b"")
    assert rig.read("base-real", 8) == rig.before[8 * SECTOR :]
