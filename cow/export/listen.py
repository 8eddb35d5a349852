"""Listening: the addresses `unix:PATH` and `tcp:HOST:PORT`, and sockets that others listen at."""

from __future__ import annotations

import errno
import ipaddress
import os
import select
import socket
import stat

from cow.errors import InvalidArgument


def listen(address: str) -> socket.socket:
    """Listen at `unix:PATH`, for its owner alone, or at `tcp:HOST:PORT`."""
    kind, _, rest = address.partition(":")
    if kind == "unix" and rest:
        return _listen_unix(rest)
    host, _, port = rest.rpartition(":")
    if kind != "tcp" or not host or not port.isdecimal() or int(port) >= 1 << 16:
        raise InvalidArgument(f"{address}: neither unix:PATH nor tcp:HOST:PORT")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        family, _, _, _, where = found[0]
        return socket.create_server(where[:2], family=family)
    except OSError as error:
        code = None if isinstance(error, socket.gaierror) else error.errno
        raise InvalidArgument(f"{address}: {error.strerror or error}", code) from error


class Listener:
    """A listening socket whose accept() another thread can end.

    It is not shut down for that: systemd may go on listening at the same one.
    """

    def __init__(self, listening: socket.socket) -> None:
        self._socket = listening
        self._socket.setblocking(False)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._wake, select.POLLIN)
        self._poll.register(self._socket, select.POLLIN)

    def accept(self) -> socket.socket | None:
        """Wait for a connection and return it; None after stop(). OSError where accept fails."""
        while True:
            if any(file == self._wake for file, _ in self._poll.poll()):
                return None
            try:
                return self._socket.accept()[0]
            except BlockingIOError:
                continue  # it went away again

    def stop(self) -> None:
        """End accept(), now and from now on."""
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Close the socket, when nobody is in accept() any more."""
        self._socket.close()
        os.close(self._wake)


def is_local(listener: socket.socket) -> bool:
    """Tell whether only programs of this machine can reach a listening socket."""
    if listener.family == socket.AF_UNIX:
        return True
    if listener.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def describe(listener: socket.socket) -> str:
    """Return the address of a listening socket as listen() takes it."""
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"unix:{os.fsdecode(name)}"
    if listener.family in (socket.AF_INET, socket.AF_INET6):
        return f"tcp:[{name[0]}]:{name[1]}" if ":" in name[0] else f"tcp:{name[0]}:{name[1]}"
    return str(name)


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
        raise InvalidArgument(f"unix:{path}: {error.strerror or error}", error.errno) from error
    finally:
        os.umask(mask)
    listener.listen(128)
    return listener


def _is_stale(path: str) -> bool:
    """Tell whether a path is a socket left over from a process that is gone."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False  # connecting to a file is refused too
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False
