"""TLS for NBD: what a client is greeted with, and the pump between TLS and the core.

The core reads and writes a plain socket. After STARTTLS that is one end of a pair, and a thread
carries the bytes between the other end and OpenSSL. Files and modes are those of nbdkit-tls(1).
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import threading
from collections.abc import Iterator

from cow.errors import InvalidArgument

CA = "ca-cert.pem"
CERTIFICATE = "server-cert.pem"
KEY = "server-key.pem"
REVOKED = "ca-crl.pem"

BUFFER = 1 << 18
"""Bytes carried at most from one side before the other has taken them."""


class Tls:
    """The server's side of TLS, from a directory of PEM files.

    With `required` a client has to begin with it; one that comes over a network has to in any case.
    With `verify_peer` it has to show a certificate of the directory's authority, too.
    """

    def __init__(self, directory: str, *, required: bool = True, verify_peer: bool = False) -> None:
        self.directory = directory
        self.required = required
        self.verify_peer = verify_peer
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_2
        certificate, key = _file(directory, CERTIFICATE), _file(directory, KEY)
        with _said_plainly(f"{certificate}, {key}"):
            # An empty password: nobody is there to be asked for one.
            self._context.load_cert_chain(certificate, key, password="")
        if verify_peer:
            self._context.verify_mode = ssl.CERT_REQUIRED
            self._trust(_file(directory, CA))
            revoked = os.path.join(directory, REVOKED)
            if os.path.exists(revoked):
                self._trust(revoked)
                self._context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF

    def _trust(self, path: str) -> None:
        with _said_plainly(path):
            self._context.load_verify_locations(path)

    def wrap(self, connection: socket.socket) -> ssl.SSLSocket:
        """Return a connection whose next step is do_handshake(); the one given is used up."""
        return self._context.wrap_socket(
            connection, server_side=True, do_handshake_on_connect=False
        )


def _file(directory: str, name: str) -> str:
    path = os.path.join(directory, name)
    try:
        with open(path, "rb"):
            return path
    except OSError as error:
        raise InvalidArgument(f"{path}: {error.strerror}", error.errno) from error


@contextlib.contextmanager
def _said_plainly(path: str) -> Iterator[None]:
    try:
        yield
    except ssl.SSLError as error:
        raise InvalidArgument(f"{path}: {error.reason or error}") from error


class Pump(threading.Thread):
    """Carries what a client sends to the core and back, until both have hung up.

    One thread for both directions: OpenSSL is not to be used by two at once. It closes both
    sockets; what the core sent before it hung up still goes out.
    """

    def __init__(self, client: ssl.SSLSocket, core: socket.socket) -> None:
        super().__init__(name="cow-nbd-tls", daemon=True)
        self._client = client
        self._core = core
        self._stopping = False
        self._wake, self._woken = socket.socketpair()

    def stop(self) -> None:
        """Let the core find the end of its requests behind what has arrived.

        The client's socket is not to be shut down for that: to OpenSSL its end would be an attack.
        """
        self._stopping = True
        with contextlib.suppress(OSError):
            self._wake.send(b"\0")

    def run(self) -> None:
        """Carry; end when the core has hung up, or the client takes no more."""
        with self._client, self._core, self._wake, self._woken:
            self._client.setblocking(False)
            self._core.setblocking(False)
            self._carry()
            with contextlib.suppress(OSError, ValueError):
                self._client.unwrap()  # says goodbye, and does not wait for an answer

    def _carry(self) -> None:
        requests = _Flow(self._client, self._core)
        replies = _Flow(self._core, self._client)
        while not replies.ended:
            stopping = self._stopping
            waits = [flow.step() for flow in (requests, replies) if not flow.ended]
            if stopping and waits[0] is not None and requests.idle:
                requests.ended = True
            if requests.ended:
                with contextlib.suppress(OSError):
                    self._core.shutdown(socket.SHUT_WR)
            if None not in waits:
                wake = [] if stopping else [(self._woken.fileno(), select.POLLIN)]
                _poll(wake + [wait for wait in waits if wait is not None])


class _Flow:
    """One direction: bytes of one socket, until the other has taken them."""

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.ended = False
        self._source = source
        self._sink = sink
        self._buffer = memoryview(bytearray(BUFFER))
        self._held = self._buffer[:0]

    @property
    def idle(self) -> bool:
        """Whether all that was read is sent."""
        return not self._held

    def step(self) -> tuple[int, int] | None:
        """Carry a piece. Where that does not go now, return what to wait for: a file and events."""
        side, events = self._source, select.POLLIN
        try:
            if not self._held:
                self._held = self._buffer[: self._source.recv_into(self._buffer)]
                self.ended = not self._held
            if self._held:
                side, events = self._sink, select.POLLOUT
                self._held = self._held[self._sink.send(self._held) :]
        except ssl.SSLWantReadError:
            return side.fileno(), select.POLLIN
        except ssl.SSLWantWriteError:
            return side.fileno(), select.POLLOUT
        except BlockingIOError:
            return side.fileno(), events
        except OSError:
            self.ended = True
        return None


def _poll(waits: list[tuple[int, int]]) -> None:
    """Wait for one of several; only for those, as a poll for nothing still ends at a hang-up."""
    poll = select.poll()
    wanted: dict[int, int] = {}
    for file, events in waits:
        wanted[file] = wanted.get(file, 0) | events
    for file, mask in wanted.items():
        poll.register(file, mask)
    poll.poll()
