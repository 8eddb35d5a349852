"""What systemd asks of a service: to say when it is ready, and to take over sockets.

sd_notify(3) and sd_listen_fds(3), without their library.
"""

from __future__ import annotations

import contextlib
import os
import socket

from cow.errors import InvalidArgument

FIRST = 3
"""The file descriptor of the first socket; the others follow."""


def notify(state: str) -> None:
    """Tell systemd, if it asked to be told."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)


def take_sockets() -> list[tuple[str, socket.socket]]:
    """Return the listening sockets that this process was started with, each with its name.

    They are taken once: children, and a second call, see none. A socket without a name has "".
    """
    process, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if process != str(os.getpid()):
        return []
    if not count.isdecimal():
        raise InvalidArgument(f"LISTEN_FDS={count}: not a number of sockets")
    names += [""] * int(count)
    return [(names[n], _socket(FIRST + n)) for n in range(int(count))]


def _socket(descriptor: int) -> socket.socket:
    try:
        os.set_inheritable(descriptor, False)
        found = socket.socket(fileno=descriptor)
    except OSError as error:
        raise InvalidArgument(f"LISTEN_FDS: {descriptor}: {error.strerror}", error.errno) from error
    if found.type == socket.SOCK_STREAM and found.getsockopt(
        socket.SOL_SOCKET, socket.SO_ACCEPTCONN
    ):
        return found
    found.close()
    raise InvalidArgument(f"LISTEN_FDS: {descriptor} is no stream socket that listens")
