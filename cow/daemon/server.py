"""The server of a control socket: one mapper for every program of its user, as the kernel is.

A thread for each connection; the mapper's own lock keeps verbs apart. A client that sends garbage,
too much or nothing loses its connection and disturbs nobody.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import select
import socket
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Protocol

from cow.daemon import protocol
from cow.daemon.protocol import MAX_REQUEST, ProtocolError
from cow.device import Device
from cow.errors import (
    CowError,
    DeviceBusy,
    DeviceNotFound,
    InvalidArgument,
    ResumeError,
    TableError,
)
from cow.export.listen import Listener
from cow.image import Image
from cow.mapper import DIRECTORY, MAJOR, Mapper
from cow.table import Table, quote_arg

log = logging.getLogger("cow.daemon")

MAX_CLIENTS = 64
REQUEST_SECONDS = 10.0
"""How long a request may take to arrive, and an answer to be taken."""
STOP_SECONDS = 30.0
"""How long the verbs under way, and each export, may take to end at a stop."""
DRIVER_VERSION = (4, 48, 0)
"""The ioctl interface that the verbs follow (DM_VERSION of the kernel)."""
WAIT_SECONDS = 0.2
"""How often a wait looks whether its client is still there."""


class Export(Protocol):
    """Another way to the devices: cow.export.nbd, cow.export.fuse."""

    def start(self) -> None:
        """Begin."""

    def stop(self) -> None:
        """Let requests under way finish, and end."""


class AlreadyServed(DeviceBusy):
    """Another process serves the socket; `pid` is its process, where known."""

    def __init__(self, text: str, pid: int | None) -> None:
        super().__init__(text)
        self.pid = pid


class Server:
    """Answers at a control socket, from start() to stop(); the mapper is the caller's.

    The socket is made at `path`, unless one that listens already is given as `listening`.
    `max_clients` is how many may be connected at once: one more takes the place of the client that
    has been idle for longest. A request has `request_seconds` to arrive once it has begun.
    """

    def __init__(
        self,
        mapper: Mapper,
        path: str | None = None,
        *,
        listening: socket.socket | None = None,
        max_clients: int = MAX_CLIENTS,
        request_seconds: float = REQUEST_SECONDS,
    ) -> None:
        self.mapper = mapper
        self.path = protocol.socket_path(path) if listening is None else _path_of(listening)
        self.request_seconds = request_seconds
        self.stopping = threading.Event()
        self.lvm_devices: list[str] = []
        """The images that LVM's commands have been given, for those that are given none."""
        self._max_clients = max_clients
        self._clients: set[_Client] = set()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._accept, name="cow-control", daemon=True)
        self._inherited = listening is not None
        self._prepare_directory()
        self._lock_file = self._take_lock()
        try:
            self._listener = Listener(self._listen() if listening is None else listening)
        except BaseException:
            os.close(self._lock_file)
            raise

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Answer what was asked, hang up, and give the socket up to another server."""
        if self.stopping.is_set():
            return
        self.stopping.set()
        self._listener.stop()
        if self._thread.ident is not None:
            self._thread.join()
        with self._lock:
            clients = list(self._clients)
        deadline = time.monotonic() + STOP_SECONDS
        for client in clients:
            client.stop()
        for client in clients:
            client.thread.join(max(0, deadline - time.monotonic()))
        if not self._inherited:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
        self._listener.close()
        os.close(self._lock_file)

    # The socket.

    def _prepare_directory(self) -> None:
        directory = os.path.dirname(os.path.abspath(self.path))
        with contextlib.suppress(FileExistsError):
            try:
                os.mkdir(directory, 0o700)
            except FileNotFoundError as error:
                raise InvalidArgument(f"{directory}: {error.strerror}", error.errno) from error
            except PermissionError as error:
                raise InvalidArgument(f"{directory}: {error.strerror}", error.errno) from error
        protocol.check_directory(directory)

    def _take_lock(self) -> int:
        """Lock a file beside the socket: a lock goes with its process, however that ends."""
        path = f"{self.path}.lock"
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise InvalidArgument(f"{path}: {error.strerror}", error.errno) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            held = os.pread(file, 20, 0).strip()
            os.close(file)
            pid = int(held) if held.isdigit() else None
            by = f"process {pid}" if pid else "another process"
            raise AlreadyServed(f"{self.path}: served already, by {by}", pid) from error
        os.ftruncate(file, 0)
        os.pwrite(file, b"%d\n" % os.getpid(), 0)
        return file

    def _listen(self) -> socket.socket:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.lstat(self.path).st_mode):
                raise InvalidArgument(f"{self.path}: is there already, and is no socket")
            os.unlink(self.path)  # its server is dead: the lock was free
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            with protocol.short_address(self.path) as address:
                listener.bind(address)
            listener.listen(self._max_clients)
        except OSError as error:
            listener.close()
            raise InvalidArgument(
                f"{self.path}: cannot listen: {error.strerror or error}", error.errno
            ) from error
        finally:
            os.umask(mask)
        return listener

    # Clients.

    def _accept(self) -> None:
        while not self.stopping.is_set():
            try:
                connection = self._listener.accept()
            except OSError as error:
                log.warning("accept: %s", error.strerror)
                self.stopping.wait(0.1)  # out of file descriptors, say
                continue
            if connection is not None:
                self._admit(connection)

    def _admit(self, connection: socket.socket) -> None:
        pid, uid = protocol.peer(connection)
        if uid != os.geteuid():
            log.warning("refused process %d of user %d", pid, uid)
            connection.close()
            return
        client = _Client(self, connection)
        with self._lock:
            if len(self._clients) >= self._max_clients and not self._evict():
                client.refuse(DeviceBusy(f"all {self._max_clients} connections are busy"))
                return
            self._clients.add(client)
        try:
            client.thread.start()
        except RuntimeError:  # no more threads
            self.forget(client)
            client.refuse(DeviceBusy("no thread for another connection"))

    def _evict(self) -> bool:
        """Hang up on the client that has asked nothing for longest. The lock is held."""
        idle = [client for client in self._clients if not client.busy]
        if not idle:
            return False
        client = min(idle, key=lambda client: client.since)
        self._clients.discard(client)
        client.stop()
        return True

    def forget(self, client: _Client) -> None:
        """Note that a client is gone."""
        with self._lock:
            self._clients.discard(client)


def _path_of(listening: socket.socket) -> str:
    """Return the path of a socket that was made by others."""
    name = listening.getsockname()
    if listening.family != socket.AF_UNIX or not isinstance(name, str) or not name:
        raise InvalidArgument(f"{name!r}: the control socket is a Unix socket with a path")
    return name


class _Hangup(Exception):
    """The connection ends; nothing is wrong with the server."""


class _Client:
    """One connection, in a thread of its own."""

    def __init__(self, server: Server, connection: socket.socket) -> None:
        self.server = server
        self.busy = False
        self.since = time.monotonic()
        self._socket = connection
        self._socket.settimeout(server.request_seconds)
        self._received = bytearray()
        self.thread = threading.Thread(target=self._serve, name="cow-client", daemon=True)

    def stop(self) -> None:
        """Read no more requests; the answer to the one under way still goes out."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)

    def refuse(self, error: CowError) -> None:
        """Say why, and hang up. Nothing runs for this client."""
        self._socket.setblocking(False)
        with contextlib.suppress(OSError):
            self._socket.send(protocol.encode({"error": protocol.describe_error(error)}))
        self._socket.close()

    def gone(self) -> bool:
        """Whether the client hung up."""
        if not self._readable(0):
            return False
        try:
            return not self._socket.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def _readable(self, seconds: float | None) -> bool:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(None if seconds is None else seconds * 1000))

    def _serve(self) -> None:
        try:
            with contextlib.suppress(_Hangup, OSError):
                while not self.server.stopping.is_set():
                    self._answer(self._next_line())
        finally:
            self.server.forget(self)
            self._socket.close()

    def _next_line(self) -> bytearray:
        """Return the next request; wait for its beginning as long as it takes."""
        self.since = time.monotonic()
        deadline: float | None = None
        searched = 0
        while True:
            end = self._received.find(b"\n", searched)
            if end >= 0:
                line = self._received[:end]
                del self._received[: end + 1]
                return line
            searched = len(self._received)
            if searched > MAX_REQUEST:
                self._hang_up(ProtocolError(f"a request of more than {MAX_REQUEST} bytes"))
            if self._received and deadline is None:
                deadline = time.monotonic() + self.server.request_seconds
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._readable(left):
                self._hang_up(
                    ProtocolError(f"a request took longer than {self.server.request_seconds:g} s")
                )
            data = self._socket.recv(1 << 16)
            if not data:
                raise _Hangup
            self._received += data

    def _hang_up(self, error: ProtocolError) -> None:
        self._send({"error": protocol.describe_error(error)})
        raise _Hangup

    def _answer(self, line: bytearray) -> None:
        self.busy = True
        answer: dict[str, Any]
        verb = ""
        try:
            verb, args = protocol.parse_request(line)
            answer = {"result": self._run(verb, args)}
        except (CowError, OSError) as error:
            answer = {"error": protocol.describe_error(error)}
            if verb == "create" and isinstance(error, TableError | ResumeError):
                answer["error"] |= _refused(self.server.mapper, args["minor"])
        except _Hangup:
            raise
        except Exception as error:  # a bug of ours: it costs this request, not the devices
            log.exception("a request failed")
            answer = {"error": protocol.describe_error(error)}
        self.since = time.monotonic()
        self.busy = False
        self._send(answer)

    def _send(self, message: dict[str, Any]) -> None:
        self._socket.sendall(protocol.encode(message))

    def _run(self, verb: str, args: dict[str, Any]) -> Any:  # noqa: ANN401
        if verb == "wait":
            return self._wait(**args)
        if verb == "lvm":
            return self._lvm(args)
        return _VERBS[verb](self.server.mapper, **args)

    def _lvm(self, args: dict[str, Any]) -> int:
        """Run a command line of LVM's; the answer before the result is a stream of messages."""
        from cow.daemon.lvm import Session

        server = self.server
        session = Session(
            server.mapper,
            server.lvm_devices,
            send=self._try_to_send,
            receive=self._next_answer,
            alive=lambda: not (server.stopping.is_set() or self.gone()),
        )
        return session.run(**args)

    def _try_to_send(self, message: dict[str, Any]) -> bool:
        try:
            self._send(message)
        except OSError:
            return False
        return True

    def _next_answer(self) -> dict[str, Any] | None:
        """Return the answer to a question. Who takes long over it may lose its place."""
        self.busy = False
        try:
            return protocol.decode(self._next_line())
        except (_Hangup, OSError):
            return None
        finally:
            self.busy = True

    def _wait(
        self,
        *,
        event_nr: int | None,
        timeout: float | None,
        **which: Any,  # noqa: ANN401
    ) -> int:
        """Wait for an event in slices, as long as the client is there and the server runs."""
        mapper = self.server.mapper
        device = mapper.device(_find(mapper, **which))
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = WAIT_SECONDS
            if deadline is not None:
                left = min(left, max(0.0, deadline - time.monotonic()))
            try:
                # By number: a rename is an event, and not the end of the device.
                return mapper.wait(f"{device.major}:{device.minor}", event_nr or 0, left)
            except TimeoutError:
                if deadline is not None and time.monotonic() >= deadline:
                    raise
            if self.server.stopping.is_set():
                raise DeviceNotFound("the server stops")
            if self.gone():
                raise _Hangup


# ---- the verbs


def _find(mapper: Mapper, *, name: str | None, uuid: str | None, minor: int | None) -> str:
    """Return what the mapper calls a device; DeviceNotFound if there is none."""
    if [name, uuid, minor].count(None) != 2:
        raise ProtocolError("a device is given by name, uuid or minor, and by one of them")
    for each in _describe_all(mapper) if name is None else []:
        if minor == each["minor"] or (uuid and uuid == each["uuid"]):
            return _designator(each["name"])
    if name is not None and name in mapper.names():
        return _designator(name)
    what = name if name is not None else uuid if uuid is not None else f"{MAJOR}:{minor}"
    raise DeviceNotFound(f"{what}: no such device")


def _designator(name: str) -> str:
    """Return a name as the mapper takes it, also one that looks like a number."""
    return DIRECTORY + name if re.fullmatch(r"[0-9]+:[0-9]+", name) else name


def _version(mapper: Mapper) -> dict[str, Any]:
    return {
        "protocol": protocol.VERSION,
        "version": DRIVER_VERSION,
        "pid": os.getpid(),
        "durability": mapper.durability,
    }


def _targets(mapper: Mapper) -> list[dict[str, Any]]:
    return [{"name": name, "version": version} for name, version in mapper.targets()]


def _devices(mapper: Mapper, **which: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    """Describe one device, or all where none is given."""
    if all(value is None for value in which.values()):
        return _describe_all(mapper)
    return [_describe(mapper.device(_find(mapper, **which)))]


def _describe_all(mapper: Mapper) -> list[dict[str, Any]]:
    described = []
    for name in mapper.names():
        with contextlib.suppress(DeviceNotFound):  # removed in between
            described.append(_describe(mapper.device(_designator(name))))
    return described


def _describe(device: Device) -> dict[str, Any]:
    inactive = device.inactive
    return asdict(device.info()) | {
        "inactive_targets": len(inactive.targets) if inactive else 0,
        "inactive_readonly": inactive is not None and inactive.readonly,
        "sectors": device.sectors,
        "deps": _deps(device.live),
        "inactive_deps": _deps(inactive),
    }


def _deps(table: Table | None) -> list[dict[str, Any]]:
    """Describe what a table stands on, what was opened last first, as the kernel does."""
    below = [each for each in table.devices if isinstance(each, Device | Image)] if table else []
    return [
        {
            "name": quote_arg(str(each)),
            "dm": isinstance(each, Device),
            "major": each.major_minor[0],
            "minor": each.major_minor[1],
        }
        for each in reversed(below)
    ]


def _create(mapper: Mapper, *, name: str, **args: Any) -> dict[str, Any]:  # noqa: ANN401
    return _describe(mapper.create(name, **_given(args)))


def _refused(mapper: Mapper, minor: int | None) -> dict[str, Any]:
    """Return the number that a device had before its table was refused, as dmsetup names it."""
    taken = {each["minor"] for each in _describe_all(mapper)}
    free = next(n for n in range(len(taken) + 1) if n not in taken)
    return {"major": MAJOR, "minor": free if minor is None else minor}


def _remove_all(mapper: Mapper, *, deferred: bool | None) -> None:
    """Remove what is not in use; the kernel does not complain about the rest."""
    with contextlib.suppress(DeviceBusy):
        mapper.remove_all()
    for name in mapper.names() if deferred else ():
        mapper.remove(_designator(name), deferred=True)


def _given(args: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in args.items() if value is not None}


def _on_device(method: Callable[..., Any]) -> Callable[..., Any]:
    """Make a verb of a method of the mapper that takes a device first."""

    def verb(
        mapper: Mapper,
        *,
        name: str | None,
        uuid: str | None,
        minor: int | None,
        **args: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        found = _find(mapper, name=name, uuid=uuid, minor=minor)
        return method(mapper, found, **_given(args))

    return verb


def _set_uuid(mapper: Mapper, name: str, new_uuid: str) -> None:
    mapper.set_uuid(name, new_uuid)


_VERBS: dict[str, Callable[..., Any]] = {
    "version": _version,
    "targets": _targets,
    "names": Mapper.names,
    "devices": _devices,
    "table": _on_device(Mapper.table),
    "status": _on_device(Mapper.status),
    "create": _create,
    "load": _on_device(Mapper.load),
    "clear": _on_device(Mapper.clear),
    "suspend": _on_device(Mapper.suspend),
    "resume": _on_device(Mapper.resume),
    "remove": _on_device(Mapper.remove),
    "remove_all": _remove_all,
    "rename": _on_device(Mapper.rename),
    "set_uuid": _on_device(_set_uuid),
    "message": _on_device(Mapper.message),
}
