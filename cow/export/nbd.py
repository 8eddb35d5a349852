"""NBD: every device of a mapper as an export by its dm name.

One thread a connection. Python does the handshake (cow.export.nbd_handshake), the core answers the
requests without it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cow import _core
from cow.device import Device, DeviceFile
from cow.errors import CowError, InvalidArgument
from cow.export.listen import Listener, describe, is_local, listen
from cow.export.nbd_handshake import CONTEXT_ID, Handshake, ProtocolError
from cow.mapper import Mapper

if TYPE_CHECKING:
    from cow.export.nbd_tls import Pump, Tls

log = logging.getLogger("cow.nbd")

MAX_CLIENTS = 256
"""Connections at once. One more takes the place of the oldest that still negotiates."""

HANDSHAKE_SECONDS = 30.0
"""How long a client may take until it has chosen an export."""

DRAIN_SECONDS = 5.0
"""How long clients may take at a stop to receive what they are answered."""

SEND_BUFFER = 1 << 20
"""Bytes on their way to a local client: a long reply in few pieces. The system may allow fewer."""

RETRY_SECONDS = 0.1
"""How long nobody is let in after accept() failed."""


class NbdServer:
    """Serves the devices of a mapper at `unix:PATH`, `tcp:HOST:PORT`, or a socket that listens.

    With `tls` clients may use TLS, and have to where it says so or where they come over a network;
    without it a network is refused. A device that a client has open counts as open: it cannot be
    removed. A client sees a new device as soon as it exists.
    """

    def __init__(
        self,
        mapper: Mapper,
        address: str | socket.socket,
        *,
        tls: Tls | None = None,
        max_clients: int = MAX_CLIENTS,
        handshake_seconds: float = HANDSHAKE_SECONDS,
    ) -> None:
        self.mapper = mapper
        self.tls = tls
        self.handshake_seconds = handshake_seconds
        self._max_clients = max_clients
        self._inherited = not isinstance(address, str)
        self._socket = listen(address) if isinstance(address, str) else address
        self.address = address if isinstance(address, str) else describe(address)
        local = is_local(self._socket)
        if tls is None and not local:
            self._socket.close()
            raise InvalidArgument(f"{self.address}: not a loopback address, and without TLS")
        if tls is not None and not tls.verify_peer and not local:
            log.warning("%s: everybody who can connect gets in (--tls-verify-peer)", self.address)
        self.tls_required = tls is not None and (tls.required or not local)
        self._listener = Listener(self._socket)
        self._clients: set[_Client] = set()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._accept, name="cow-nbd", daemon=True)

    @property
    def port(self) -> int | None:
        """The TCP port, useful where 0 was asked for; None for a Unix socket."""
        name = self._socket.getsockname()
        return name[1] if isinstance(name, tuple) else None

    def start(self) -> None:
        """Begin to answer clients."""
        self._thread.start()

    def stop(self) -> None:
        """Answer what was asked, disconnect every client, and give up the address."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._listener.stop()
        if self._thread.ident is not None:
            self._thread.join()
        with self._lock:
            clients = list(self._clients)
        deadline = time.monotonic() + DRAIN_SECONDS
        for client in clients:
            client.stop()
        for client in clients:
            client.thread.join(max(0, deadline - time.monotonic()))
        for client in clients:
            client.cut_off()
            client.thread.join()
        self._listener.close()
        if self.address.startswith("unix:") and not self._inherited:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.address.removeprefix("unix:"))

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                connection = self._listener.accept()
            except OSError as error:
                log.warning("%s: accept: %s", self.address, error.strerror)
                self._stopping.wait(RETRY_SECONDS)  # out of file descriptors, say
                continue
            if connection is not None:
                self._admit(_Client(self, connection))

    def _admit(self, client: _Client) -> None:
        with self._lock:
            if len(self._clients) >= self._max_clients and not self._evict():
                log.warning("%s: all %d connections are in use", self.address, self._max_clients)
                client.connection.close()
                return
            self._clients.add(client)
        try:
            client.thread.start()
        except RuntimeError as error:
            log.warning("%s: %s", self.address, error)
            self.forget(client)
            client.connection.close()

    def _evict(self) -> bool:
        """Cut off the client that has negotiated for longest. The lock is held."""
        negotiating = [client for client in self._clients if client.negotiating]
        if not negotiating:
            return False
        client = min(negotiating, key=lambda client: client.since)
        self._clients.discard(client)
        client.stop()
        return True

    def forget(self, client: _Client) -> None:
        """Note that a client is gone."""
        with self._lock:
            self._clients.discard(client)

    def __enter__(self) -> NbdServer:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


class _Client:
    """One connection, in a thread of its own: the handshake, then the core."""

    def __init__(self, server: NbdServer, connection: socket.socket) -> None:
        self.since = time.monotonic()
        self.thread = threading.Thread(target=self._run, name="cow-nbd-client", daemon=True)
        self._server = server
        self._handshake = Handshake(
            server.mapper,
            connection,
            tls=server.tls,
            tls_required=server.tls_required,
            seconds=server.handshake_seconds,
        )
        self._transmission: _core.NbdConnection | None = None
        self._pump: Pump | None = None
        self._stopping = False

    @property
    def connection(self) -> socket.socket:
        """The socket to the client, an SSLSocket once it uses TLS."""
        return self._handshake.connection

    @property
    def negotiating(self) -> bool:
        """Whether the client has chosen no export yet."""
        return not self._handshake.over

    def stop(self) -> None:
        """Answer what has arrived, and hang up. A handshake ends at once."""
        self._stopping = True
        if self.negotiating:
            self._handshake.stop()
            return
        if self._transmission is not None:
            self._transmission.stop()
        if self._pump is not None:
            self._pump.stop()
        elif self._handshake.encrypted is None:
            self._handshake.shut_down(socket.SHUT_RD)

    def cut_off(self) -> None:
        """Hang up though the client has not taken all its answers."""
        self._handshake.shut_down(socket.SHUT_RDWR)

    def _run(self) -> None:
        try:
            file = self._negotiate()
            if file is not None:
                with file:
                    self._serve(file.device)
        except (ProtocolError, CowError, OSError) as error:
            if not self._stopping:
                log.info("%s: a client was dropped: %s", self._server.address, error)
        finally:
            self.connection.close()
            self._server.forget(self)

    def _negotiate(self) -> DeviceFile | None:
        if self.connection.family in (socket.AF_INET, socket.AF_INET6):
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        else:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        return self._handshake.run()

    def _serve(self, device: Device) -> None:
        self.connection.settimeout(None)
        with self._plain_socket() as plain:
            self._transmission = _core.NbdConnection(
                plain.fileno(),
                device,
                structured=self._handshake.structured,
                context=CONTEXT_ID if self._handshake.context is device else 0,
            )
            if self._stopping:
                self.stop()
            self._transmission.run()

    @contextlib.contextmanager
    def _plain_socket(self) -> Iterator[socket.socket]:
        """Yield what the core talks to: with TLS one end of a pair, the other one is pumped."""
        encrypted = self._handshake.encrypted
        if encrypted is None:
            yield self.connection
            return
        from cow.export.nbd_tls import Pump

        plain, other = socket.socketpair()
        self._pump = Pump(encrypted, other)
        self._pump.start()
        try:
            with plain:
                yield plain
        finally:
            self._pump.join()
