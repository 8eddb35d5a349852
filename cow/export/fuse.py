"""FUSE: every device of a mapper as a file in a directory.

The protocol of /dev/fuse is spoken here and in the core, with no library between: what moves bytes
is answered by threads of the core without Python, and what is about names, by one thread here.
Numbers and layouts are the kernel's (fuse(4), linux/fuse.h).

Nothing is cached. Every open file has FOPEN_DIRECT_IO, so that a read sees what was written
through another export, another device or a table swapped meanwhile; names and attributes are asked
for each time. What is mapped into memory is read when it is touched first after the mapping.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import itertools
import logging
import os
import signal
import stat
import struct
import threading
import time
from collections.abc import Callable
from typing import ClassVar

from cow import _core
from cow.device import MAX_NAME, Device, DeviceFile
from cow.errors import CowOSError
from cow.export import fusermount
from cow.export.fusermount import MountError
from cow.mapper import Mapper
from cow.units import SECTOR_SIZE

log = logging.getLogger("cow.fuse")

LOOKUP = 1
FORGET = 2
GETATTR = 3
SETATTR = 4
SYMLINK = 6
MKNOD = 8
MKDIR = 9
UNLINK = 10
RMDIR = 11
RENAME = 12
LINK = 13
OPEN = 14
STATFS = 17
RELEASE = 18
INIT = 26
OPENDIR = 27
READDIR = 28
RELEASEDIR = 29
CREATE = 35
INTERRUPT = 36
IOCTL = 39
BATCH_FORGET = 42
RENAME2 = 45
TMPFILE = 51

IN_HEADER = struct.Struct("=IIQQIIII")
OUT_HEADER = struct.Struct("=IiQ")
INIT_IN = struct.Struct("=IIII")
INIT_OUT = struct.Struct("=IIIIHHIIHHIIH22x")
ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
ENTRY_OUT = struct.Struct("=QQQQII")
ATTR_OUT = struct.Struct("=QII")
SETATTR_IN = struct.Struct("=I12xQ44xI4xII4x")
OPEN_OUT = struct.Struct("=QIi")
READ_IN = struct.Struct("=QQI")
DIRENT = struct.Struct("=QQII")
STATFS_OUT = struct.Struct("=QQQQQIIII24x")
FORGET_ONE = struct.Struct("=QQ")

MAJOR = 7
LEAST_MINOR = 28
"""Linux 4.20: the first that takes requests of 1 MiB."""
OUR_MINOR = 38

REFUSED = {
    **dict.fromkeys((SYMLINK, MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK), errno.EPERM),
    **dict.fromkeys((CREATE, RENAME2, TMPFILE), errno.EPERM),
    IOCTL: errno.ENOTTY,
}
"""Devices come and go by `cow dm`; what stands neither here nor in _Files is answered ENOSYS."""

INIT_FLAGS = {
    "ASYNC_READ": 1 << 0,
    "BIG_WRITES": 1 << 5,
    "ASYNC_DIO": 1 << 15,
    "PARALLEL_DIROPS": 1 << 18,
    "MAX_PAGES": 1 << 22,
    "INIT_EXT": 1 << 30,
    "DIRECT_IO_ALLOW_MMAP": 1 << 36,
}
FOPEN_DIRECT_IO = 1 << 0
FOPEN_NOFLUSH = 1 << 5
FOPEN_PARALLEL_DIRECT_WRITES = 1 << 6
OPENED = FOPEN_DIRECT_IO | FOPEN_NOFLUSH | FOPEN_PARALLEL_DIRECT_WRITES
"""A close has nothing to flush; were it told to us, a process that forks would wait for itself."""
FATTR_MODE = 1 << 0
FATTR_UID = 1 << 1
FATTR_GID = 1 << 2
FATTR_SIZE = 1 << 3

ROOT = 1
UNKNOWN = 0xFFFFFFFF
"""The inode number of a file that was not looked up yet."""
MAX_WRITE = 1 << 20
MAX_REQUEST = 1 << 17
"""Bytes that suffice for any request that carries no data."""
PAGE = 4096
MAX_BACKGROUND = 1024
"""Requests under way that nobody sleeps for: so many may wait for a suspended device before they
keep others from being sent."""
THREADS = 4
"""So many take requests from the kernel; more of them spend their time on waking each other."""
SLOW_THREADS = 4
"""So many wait for disks."""
INTERRUPT_SECONDS = 1.0
"""How often the kernel is asked whether a request that was interrupted is answered meanwhile."""

NOT_FATAL = sum(
    1 << number - 1
    for number in (
        *(signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH),
        *(signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU),
    )
)
"""Signals that end no process which neither catches nor ignores them (signal(7))."""


class _Refused(Exception):
    """The request fails with an errno."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.errno = code


class _Node:
    """A device that the kernel knows by a number, and how often it was told of it."""

    def __init__(self, number: int, device: Device) -> None:
        self.number = number
        self.device = device
        self.lookups = 0


class FuseMount:
    """Shows the devices of a mapper as files in a directory, from start() to stop().

    The files have the size of their device and mode 0600, or 0400 where it is read-only; only the
    user who serves them gets in. An open file counts as open: its device cannot be removed. A
    request that meets a suspended device waits, and all others go on. A mount that a dead server
    left on the directory is taken away first.
    """

    def __init__(self, mapper: Mapper, directory: str, *, threads: int = THREADS) -> None:
        self.mapper = mapper
        self.directory = os.path.realpath(directory)
        self._readers = threads
        self._device = 0
        self._connection: _core.FuseConnection | None = None
        self._thread: threading.Thread | None = None
        if fusermount.prepare(self.directory):
            log.info("%s: unmounted what a dead server left", self.directory)

    def start(self) -> None:
        """Mount, and begin to answer."""
        file = fusermount.mount(self.directory)
        try:
            self._device = fusermount.mounted(self.directory) or 0
            _initialize(file)
            os.set_blocking(file, False)
            self._connection = _core.FuseConnection(file, self.mapper.gate)
        except BaseException:
            os.close(file)
            self._unmount()
            raise
        self.mapper.images.own_file_systems.add(self._device)
        self._thread = threading.Thread(
            target=self._run, args=(self._connection, file), name="cow-fuse", daemon=True
        )
        self._thread.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Unmount, let requests under way finish, and end; who has files open loses them."""
        if self._connection is None or self._thread is None:
            return
        atexit.unregister(self.stop)
        self._unmount()
        self._connection.stop()
        self._thread.join()
        self._connection = self._thread = None
        self.mapper.images.own_file_systems.discard(self._device)

    def _unmount(self) -> None:
        if self._device and fusermount.mounted(self.directory) == self._device:
            try:
                fusermount.unmount(self.directory)
            except MountError as error:
                log.warning("%s", error)

    def _run(self, connection: _core.FuseConnection, file: int) -> None:
        """Answer requests until stop(), or until somebody unmounts.

        Closing the descriptor ends all requests that are left, so that no program waits for ever.
        """
        files = _Files(self.mapper, connection, file)
        jobs = [connection.serve] * self._readers + [connection.work] * SLOW_THREADS
        jobs += [functools.partial(connection.retry, files.is_killed)]
        threads = [
            threading.Thread(target=self._do, args=(job, connection), name="cow-fuse", daemon=True)
            for job in jobs
        ]
        try:
            for thread in threads:
                thread.start()
            files.answer_all()
        except Exception:
            log.exception("%s: not served any more", self.directory)
        finally:
            connection.stop()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            files.close()
            os.close(file)

    def _do(self, job: Callable[[], None], connection: _core.FuseConnection) -> None:
        """Do a job until it ends. Whichever does first, as all do at an unmount, ends the rest."""
        try:
            job()
        except Exception:
            log.exception("%s: not served any more", self.directory)
        finally:
            connection.stop()

    def __enter__(self) -> FuseMount:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


def _initialize(file: int) -> None:
    """Agree on version and features: the first request is INIT."""
    request = os.read(file, MAX_REQUEST)
    _, opcode, unique, *_ = IN_HEADER.unpack_from(request)
    major, minor, max_readahead, flags = INIT_IN.unpack_from(request, IN_HEADER.size)
    wanted = sum(INIT_FLAGS.values())
    if flags & INIT_FLAGS["INIT_EXT"]:
        flags |= struct.unpack_from("=I", request, IN_HEADER.size + INIT_IN.size)[0] << 32
    if opcode != INIT or (major, minor) < (MAJOR, LEAST_MINOR):
        raise MountError(
            f"the kernel speaks version {major}.{minor} of FUSE, at least "
            f"{MAJOR}.{LEAST_MINOR} is needed (Linux 4.20)",
            errno.EPROTO,
        )
    agreed = flags & wanted
    body = INIT_OUT.pack(
        MAJOR,
        min(minor, OUR_MINOR),
        max_readahead,
        agreed & 0xFFFFFFFF,
        MAX_BACKGROUND,
        MAX_BACKGROUND,
        MAX_WRITE,
        1,
        MAX_WRITE // PAGE,
        0,
        agreed >> 32,
        0,
        0,
    )
    os.write(file, OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, unique) + body)


class _Files:
    """Answers what is asked about names, attributes and open files, in one thread."""

    def __init__(self, mapper: Mapper, connection: _core.FuseConnection, file: int) -> None:
        self.mapper = mapper
        self.connection = connection
        self.file = file
        self._owner = (os.getuid(), os.getgid())
        self._mounted_at = time.time_ns()
        self._numbers = itertools.count(ROOT + 1)
        self._nodes: dict[int, _Node] = {}
        self._node_of: dict[Device, _Node] = {}
        self._opened: dict[int, list[DeviceFile]] = {}
        self._listings: dict[int, list[tuple[int, int, bytes]]] = {}
        self._interrupted: dict[int, tuple[int, float]] = {}

    def answer_all(self) -> None:
        """Answer until the connection ends."""
        while not self.connection.stopped:
            request = self.connection.take(1000)
            if request is not None:
                self._answer(request)
            if self._interrupted:
                self._forget_answered()

    def close(self) -> None:
        """Let go of the devices that are open."""
        for files in self._opened.values():
            for file in files:
                _close(file)
        self._opened.clear()

    def _answer(self, request: bytes) -> None:
        _, opcode, unique, number, *_ = IN_HEADER.unpack_from(request)
        body = request[IN_HEADER.size :]
        if opcode in (FORGET, BATCH_FORGET):
            self._forget(opcode, number, body)
            return
        if opcode == INTERRUPT:
            (interrupted,) = struct.unpack_from("=Q", body)
            self._interrupted[interrupted] = (unique, time.monotonic())
            return
        code, answer = 0, b""
        try:
            if opcode not in self._ANSWERS:
                code = REFUSED.get(opcode, errno.ENOSYS)
            else:
                answer = self._ANSWERS[opcode](self, number, body)
        except (_Refused, CowOSError) as error:
            code = error.errno or errno.EIO
        except Exception:
            log.exception("request %d failed", opcode)
            code = errno.EIO
        self._reply(unique, code, answer)

    def _reply(self, unique: int, code: int, answer: bytes = b"") -> bool:
        """Answer a request; False where the kernel wants no answer to it any more."""
        head = OUT_HEADER.pack(OUT_HEADER.size + len(answer), -code, unique)
        try:
            os.write(self.file, head + answer)
        except OSError:  # unmounted, or its process is gone
            return False
        return True

    # Names.

    def _lookup(self, parent: int, body: bytes) -> bytes:
        try:
            device = self.mapper.devices().get(body.rstrip(b"\0").decode())
        except UnicodeDecodeError:
            device = None
        if parent != ROOT or device is None:
            raise _Refused(errno.ENOENT)
        node = self._node_of.get(device)
        if node is None:
            node = _Node(next(self._numbers), device)
            self._nodes[node.number] = self._node_of[device] = node
        node.lookups += 1
        return ENTRY_OUT.pack(node.number, 0, 0, 0, 0, 0) + self._attributes(node.number)

    def _forget(self, opcode: int, number: int, body: bytes) -> None:
        if opcode == FORGET:
            forgotten = [(number, *struct.unpack_from("=Q", body))]
        else:
            (count,) = struct.unpack_from("=I", body)
            forgotten = list(FORGET_ONE.iter_unpack(body[8 : 8 + count * FORGET_ONE.size]))
        for each, lookups in forgotten:
            node = self._nodes.get(each)
            if node is not None:
                node.lookups -= lookups
                if node.lookups <= 0:
                    del self._nodes[node.number], self._node_of[node.device]

    def _opendir(self, number: int, body: bytes) -> bytes:
        listing = next(self._numbers)
        self._listings[listing] = []
        return OPEN_OUT.pack(listing, 0, 0)

    def _readdir(self, number: int, body: bytes) -> bytes:
        """List from an offset on; the names are those at the time of offset 0."""
        listing, offset, size = READ_IN.unpack_from(body)
        if offset == 0:
            devices = sorted((name.encode(), each) for name, each in self.mapper.devices().items())
            known = {device: node.number for device, node in self._node_of.items()}
            self._listings[listing] = [
                (stat.S_IFDIR, ROOT, b"."),
                (stat.S_IFDIR, ROOT, b".."),
                *((stat.S_IFREG, known.get(device, UNKNOWN), name) for name, device in devices),
            ]
        answer = b""
        for kind, inode, name in self._listings[listing][offset:]:
            offset += 1
            entry = DIRENT.pack(inode, offset, len(name), kind >> 12) + name
            entry += bytes(-len(entry) % 8)
            if len(answer) + len(entry) > size:
                break
            answer += entry
        return answer

    def _releasedir(self, number: int, body: bytes) -> bytes:
        (listing,) = struct.unpack_from("=Q", body)
        self._listings.pop(listing, None)
        return b""

    # Attributes.

    def _device(self, number: int) -> Device:
        node = self._nodes.get(number)
        if node is None or node.device.removed:
            raise _Refused(errno.ENXIO)
        return node.device

    def _attributes(self, number: int) -> bytes:
        """Return the attributes of a file, or of the directory.

        Nobody notes when a device was written last, so it is now; ctime is when it was mounted.
        """
        size, mode = 0, stat.S_IFDIR | 0o500
        if number != ROOT:
            device = self._device(number)
            size, mode = device.size, stat.S_IFREG | (0o400 if device.readonly else 0o600)
        now, ns = divmod(time.time_ns(), 10**9)
        changed, changed_ns = divmod(self._mounted_at, 10**9)
        times = (now, now, changed, ns, ns, changed_ns)
        links = 2 if number == ROOT else 1
        return ATTR.pack(
            number, size, size // SECTOR_SIZE, *times, mode, links, *self._owner, 0, PAGE, 0
        )

    def _getattr(self, number: int, body: bytes) -> bytes:
        return ATTR_OUT.pack(0, 0, 0) + self._attributes(number)

    def _setattr(self, number: int, body: bytes) -> bytes:
        """Refuse what would change a device, but not O_TRUNC (a size of 0), nor times.

        Both change nothing, as on a block device.
        """
        valid, size, mode, uid, gid = SETATTR_IN.unpack_from(body)
        if number == ROOT:
            raise _Refused(errno.EPERM)
        device = self._device(number)
        if valid & FATTR_SIZE and size not in (0, device.size):
            raise _Refused(errno.EINVAL)
        now = ATTR.unpack(self._attributes(number))
        if valid & FATTR_MODE and stat.S_IMODE(mode) != stat.S_IMODE(now[9]):
            raise _Refused(errno.EPERM)
        if (valid & FATTR_UID and uid != now[11]) or (valid & FATTR_GID and gid != now[12]):
            raise _Refused(errno.EPERM)
        return self._getattr(number, body)

    def _statfs(self, number: int, body: bytes) -> bytes:
        return STATFS_OUT.pack(0, 0, 0, 0, 0, PAGE, MAX_NAME, PAGE, 0)

    # Open files.

    def _open(self, number: int, body: bytes) -> bytes:
        device = self._device(number)
        (flags,) = struct.unpack_from("=I", body)
        writing = flags & os.O_ACCMODE != os.O_RDONLY
        if writing and device.readonly:
            raise _Refused(errno.EROFS)
        handle = self.connection.handle(device)
        file = DeviceFile(device, writable=writing)
        self._opened.setdefault(handle, []).append(file)
        return OPEN_OUT.pack(handle, OPENED, 0)

    def _release(self, number: int, body: bytes) -> bytes:
        (handle,) = struct.unpack_from("=Q", body)
        files = self._opened[handle]
        _close(files.pop())
        if not files:
            del self._opened[handle]
        return b""

    # Requests that wait for a suspended device.

    def is_killed(self, unique: int, thread: int) -> bool:
        """Tell whether a request that waits for a suspended device is of a process that was killed.

        The kernel tells of any signal, once. Only one that kills counts: I/O on a device is not
        interrupted by others.
        """
        return unique in self._interrupted and _is_killed(thread)

    def _forget_answered(self) -> None:
        """Forget interrupts of requests that are answered.

        EAGAIN has the kernel repeat an INTERRUPT, and is refused where its request has ended.
        """
        now = time.monotonic()
        for interrupted, (unique, since) in list(self._interrupted.items()):
            if now > since + INTERRUPT_SECONDS:
                if self._reply(unique, errno.EAGAIN):
                    self._interrupted[interrupted] = (unique, now)
                else:
                    del self._interrupted[interrupted]

    _ANSWERS: ClassVar[dict[int, Callable[[_Files, int, bytes], bytes]]] = {
        LOOKUP: _lookup,
        GETATTR: _getattr,
        SETATTR: _setattr,
        OPEN: _open,
        RELEASE: _release,
        STATFS: _statfs,
        OPENDIR: _opendir,
        READDIR: _readdir,
        RELEASEDIR: _releasedir,
    }


def _is_killed(thread: int) -> bool:
    """Tell whether a signal is pending that ends a thread's process.

    It is SIGKILL for any that does, except where an earlier signal, which need not end it, is
    pending too. Source of the fields: proc_pid_status(5).
    """
    masks = dict.fromkeys(("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt"), 0)
    with contextlib.suppress(OSError), open(f"/proc/{thread}/status", encoding="ascii") as status:
        for line in status:
            name, _, value = line.partition(":")
            if name in masks:
                masks[name] = int(value, 16)
    pending = masks["SigPnd"] | masks["ShdPnd"]
    spared = masks["SigBlk"] | masks["SigIgn"] | masks["SigCgt"]
    return bool(pending & ~spared & ~NOT_FATAL)


def _close(file: DeviceFile) -> None:
    """Close a device's file; a deferred removal, which may have to wait for a verb, beside it."""
    if file.device.deferred_remove:
        threading.Thread(target=file.close, name="cow-fuse-close", daemon=True).start()
    else:
        file.close()
