"""NBD over TLS: with clients that were not written here, and what is refused."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import socket
import ssl
import struct
import subprocess
import termios
import threading
import time
from pathlib import Path

import pytest
from support import SECTOR, Rig, poll, stamp
from support.certificates import make_all, make_authority, make_certificate, make_revoked
from support.nbd import (
    DISC,
    ERR_INVALID,
    ERR_TLS_REQD,
    ERR_UNSUP,
    OPT_ABORT,
    OPT_EXPORT_NAME,
    OPT_GO,
    OPT_LIST,
    OPT_SET_META,
    OPT_STARTTLS,
    OPT_STRUCTURED_REPLY,
    READ,
    REP_ACK,
    WRITE,
    Client,
    name_data,
    need,
    run,
)

import cow
from cow import _core
from cow.export.nbd import NbdServer
from cow.export.nbd_tls import Tls

SECTORS = 8192


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A folder with the files of a server and of a client."""
    need("openssl")
    return make_all(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def rig(tmp_path):
    with cow.Mapper(durability="process") as dm:
        yield Rig(dm, tmp_path, SECTORS)


@pytest.fixture
def serve(rig, certificates):
    """A function that serves the devices with TLS, at a free port of the loopback."""
    servers = []

    def start(address: str = "tcp:127.0.0.1:0", **settings) -> NbdServer:
        servers.append(NbdServer(rig.dm, address, tls=Tls(str(certificates), **settings)))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def nbds(server: NbdServer, name: str, folder: Path) -> str:
    """Return what libnbd's programs call a device."""
    return f"nbds://localhost:{server.port}/{name}?tls-certificates={folder}"


def qemu(server: NbdServer, name: str, folder: Path) -> list[str]:
    """Return the words that name a device to qemu's programs."""
    host = f"server.type=inet,server.host=localhost,server.port={server.port}"
    return [
        *("--object", f"tls-creds-x509,id=tls0,dir={folder},endpoint=client"),
        *("--image-opts", f"driver=nbd,{host},export={name},tls-creds=tls0"),
    ]


class TlsClient(Client):
    """A raw client on TCP that can change to TLS."""

    def __init__(self, server: NbdServer, folder: Path | None = None) -> None:
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=30)
        self.folder = folder

    def upgrade(self) -> None:
        """Send STARTTLS, and go on encrypted."""
        assert self.option(OPT_STARTTLS) == [(REP_ACK, b"")]
        context = ssl.create_default_context(cafile=f"{self.folder}/ca-cert.pem")
        self.socket = context.wrap_socket(self.socket, server_hostname="localhost")

    def wait_until_arrived(self) -> None:
        """Wait until all that was sent is with the server's system, which a full window delays."""
        deadline = time.monotonic() + 30
        while any(fcntl.ioctl(self.socket, termios.TIOCOUTQ, bytes(4))):
            assert time.monotonic() < deadline, "the server takes nothing more"
            time.sleep(0.001)


@pytest.fixture
def connect(certificates):
    """A function that makes a raw client of a server."""
    clients = []

    def make(server: NbdServer) -> TlsClient:
        clients.append(TlsClient(server, certificates))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


# --- clients of others ----------------------------------------------------------------------------


def test_nbdinfo_lists_devices_over_tls(rig, serve, certificates):
    need("nbdinfo")
    out = run("nbdinfo", "--list", nbds(serve(), "", certificates))
    assert 'export="base":' in out
    assert "with TLS" in out


def test_nbdcopy_goes_both_ways_over_tls(rig, serve, certificates, tmp_path):
    need("nbdcopy")
    server = serve()
    rig.snap(cow_sectors=2 * SECTORS)
    (tmp_path / "new").write_bytes(stamp(0, SECTORS, 9))
    run("nbdcopy", str(tmp_path / "new"), nbds(server, "base", certificates))
    run("nbdcopy", nbds(server, "snap", certificates), str(tmp_path / "old"))
    assert rig.read("base") == stamp(0, SECTORS, 9)
    assert (tmp_path / "old").read_bytes() == rig.before


def test_qemu_reads_and_writes_over_tls(rig, serve, certificates, tmp_path):
    need("qemu-img", "qemu-io")
    base = qemu(serve(verify_peer=True), "base", certificates)
    out = run(
        "qemu-io", *base, "-c", "write -P 0x5a 4k 1M", "-c", "flush", "-c", "read -P 0x5a 4k 1M"
    )
    assert "failed" not in out
    assert rig.read("base", 8, 2048) == b"\x5a" * (1 << 20)
    run("qemu-img", "convert", "-O", "raw", *base, str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == rig.read("base")


def test_a_client_with_a_certificate_gets_in(rig, serve, certificates):
    need("nbdinfo")
    server = serve(verify_peer=True)
    assert run("nbdinfo", "--size", nbds(server, "base", certificates)) == f"{SECTORS * SECTOR}\n"


def fails(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0, done.stdout
    return done.stderr


def test_a_client_without_a_certificate_is_kept_out_where_one_is_asked_for(
    serve, certificates, tmp_path
):
    need("nbdinfo")
    shutil.copy(certificates / "ca-cert.pem", tmp_path)
    server = serve(verify_peer=True)
    assert fails("nbdinfo", "--size", nbds(server, "base", tmp_path))


def test_a_client_of_another_authority_is_kept_out(serve, tmp_path):
    need("nbdinfo")
    make_all(tmp_path / "theirs")
    server = serve(verify_peer=True)
    shutil.copy(Path(server.tls.directory) / "ca-cert.pem", tmp_path / "theirs")
    assert fails("nbdinfo", "--size", nbds(server, "base", tmp_path / "theirs"))


def test_a_revoked_client_is_kept_out(rig, certificates, tmp_path):
    need("nbdinfo")
    folder = shutil.copytree(certificates, tmp_path / "revoked")
    make_revoked(folder)
    tls = Tls(str(folder), verify_peer=True)
    with NbdServer(rig.dm, "tcp:127.0.0.1:0", tls=tls) as server:
        assert fails("nbdinfo", "--size", nbds(server, "base", folder))


def test_a_client_that_does_not_know_our_authority_does_not_come_in(rig, serve, tmp_path):
    need("nbdinfo")
    make_authority(tmp_path / "other")
    server = serve()
    assert "certificate" in fails("nbdinfo", "--size", nbds(server, "base", tmp_path / "other"))


def test_a_client_without_tls_is_kept_out_where_it_is_required(serve):
    need("nbdinfo")
    assert "TLS" in fails("nbdinfo", "--size", f"nbd://localhost:{serve().port}/base")


def test_where_tls_is_offered_a_local_client_may_do_without(serve, certificates):
    need("nbdinfo")
    server = serve(required=False)
    for uri in (f"nbd://localhost:{server.port}/base", nbds(server, "base", certificates)):
        assert run("nbdinfo", "--size", uri) == f"{SECTORS * SECTOR}\n"


def test_tls_goes_over_a_unix_socket_too(rig, serve, certificates, tmp_path):
    need("nbdinfo")
    serve(f"unix:{tmp_path}/tls.sock")
    where = f"socket={tmp_path}/tls.sock&tls-certificates={certificates}&tls-hostname=localhost"
    # libnbd 1.14 has no tls-hostname: the name it checks is that of the URI.
    assert run("nbdinfo", "--size", f"nbds+unix://localhost/base?{where}")


# --- our own client -------------------------------------------------------------------------------


def test_nothing_goes_before_tls_where_it_is_required(serve, connect):
    client = connect(serve())
    client.greet()
    for option in (OPT_LIST, OPT_GO, OPT_STRUCTURED_REPLY, 77):
        ((kind, _),) = client.option(option)
        assert kind == ERR_TLS_REQD
    assert client.option(OPT_ABORT) == [(REP_ACK, b"")]
    assert client.is_closed()


def test_an_export_name_before_tls_ends_the_connection(serve, connect):
    client = connect(serve())
    client.greet()
    client.send_option(OPT_EXPORT_NAME, b"base")
    assert client.is_closed()


def test_requests_go_over_tls_as_they_do_without(rig, serve, connect, seed):
    print("seed", seed)
    dice = random.Random(seed)
    client, model = connect(serve()), bytearray(rig.before)
    client.greet()
    client.upgrade()
    client.choose("base")
    for _ in range(100):
        offset = dice.randrange(SECTORS * SECTOR)
        length = dice.randrange(min(1 << 20, SECTORS * SECTOR - offset) + 1)
        if dice.random() < 0.5:
            data = dice.randbytes(length)
            assert client.ask(WRITE, offset, length, data) == (0, b"")
            model[offset : offset + length] = data
        else:
            assert client.ask(READ, offset, length) == (0, bytes(model[offset : offset + length]))


def test_requests_do_not_wait_for_answers_to_be_taken(rig, serve, connect):
    """32 MiB are asked for before the first answer is received."""
    client = connect(serve())
    client.greet()
    client.upgrade()
    client.choose("base")
    for _ in range(8):
        client.send(READ, 0, SECTORS * SECTOR)
    assert [client.answer(SECTORS * SECTOR) for _ in range(8)] == [(0, rig.before)] * 8


def test_what_was_agreed_on_in_the_clear_is_forgotten(serve, connect):
    client = connect(serve(required=False))
    client.greet()
    assert client.option(OPT_STRUCTURED_REPLY) == [(REP_ACK, b"")]
    client.upgrade()
    query = name_data("base") + struct.pack(">I", 1) + name_data("base:allocation")
    ((kind, _),) = client.option(OPT_SET_META, query)
    assert kind == ERR_INVALID
    client.choose("base")
    assert client.ask(READ, 0, 512)[0] == 0  # a simple reply


def test_starttls_twice_or_with_data_is_invalid(serve, connect):
    client = connect(serve())
    client.greet()
    assert client.option(OPT_STARTTLS, b"x") == [(ERR_INVALID, b"")]
    client.upgrade()
    assert client.option(OPT_STARTTLS) == [(ERR_INVALID, b"")]
    assert client.choose("base")[0] == SECTORS * SECTOR


def test_without_certificates_there_is_no_starttls(rig, connect):
    with NbdServer(rig.dm, "tcp:127.0.0.1:0") as server:
        client = connect(server)
        client.greet()
        assert client.option(OPT_STARTTLS) == [(ERR_UNSUP, b"")]
        assert client.choose("base")[0] == SECTORS * SECTOR


def test_garbage_instead_of_tls_ends_that_connection_alone(rig, serve, connect, seed):
    print("seed", seed)
    dice = random.Random(seed)
    server = serve()
    for _ in range(20):
        bad = connect(server)
        bad.greet()
        assert bad.option(OPT_STARTTLS) == [(REP_ACK, b"")]
        bad.socket.sendall(dice.randbytes(dice.randrange(1, 2000)))
        bad.close()
    client = connect(server)
    client.greet()
    client.upgrade()
    client.choose("base")
    assert client.ask(READ, 0, 512) == (0, rig.before[:512])


def threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("cow-nbd")]


@pytest.mark.parametrize("how", ["DISC", "hang up", "cut off", "take no more", "stop"])
def test_a_connection_leaves_nothing_behind(rig, certificates, connect, how):
    before = len(os.listdir("/proc/self/fd"))
    server = NbdServer(rig.dm, "tcp:127.0.0.1:0", tls=Tls(str(certificates)))
    server.start()
    client = connect(server)
    client.greet()
    client.upgrade()
    client.choose("base")
    assert client.ask(READ, 0, 512)[0] == 0
    if how == "DISC":
        client.send(DISC, 0, 0)
        assert client.is_closed()
    elif how == "hang up":
        client.socket.unwrap()
        client.close()
    elif how in ("cut off", "take no more"):
        for _ in range(8 if how == "take no more" else 0):
            client.send(READ, 0, SECTORS * SECTOR)
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    if how != "stop":
        poll(lambda: threads() == ["cow-nbd"])
    server.stop()
    client.close()
    assert threads() == []
    assert len(os.listdir("/proc/self/fd")) == before
    rig.dm.remove("base")


def test_what_was_asked_before_a_stop_is_answered_over_tls(rig, serve, connect):
    server = serve()
    client = connect(server)
    client.greet()
    client.upgrade()
    client.choose("base")
    for n in range(200):
        client.send(WRITE, n * SECTOR, SECTOR, bytes([n]) * SECTOR)
    client.wait_until_arrived()
    server.stop()
    for _ in range(200):
        assert client.answer() == (0, b"")
    assert client.is_closed()
    assert rig.read("base", 0, 200) == b"".join(bytes([n]) * SECTOR for n in range(200))


# --- addresses and files --------------------------------------------------------------------------


def test_a_stop_between_handshake_and_requests_is_not_missed(rig, serve, connect, monkeypatch):
    monkeypatch.setattr("cow.export.nbd.DRAIN_SECONDS", 3600)
    server = serve()
    stop = threading.Thread(target=server.stop)
    make = _core.NbdConnection

    def begin(*args, **settings):
        (client,) = server._clients
        stop.start()
        poll(lambda: client._stopping)
        return make(*args, **settings)

    monkeypatch.setattr(_core, "NbdConnection", begin)
    client = connect(server)
    client.greet()
    client.upgrade()
    client.choose("base")
    assert client.is_closed()
    stop.join(30)
    assert not stop.is_alive()


def test_a_network_is_for_tls(rig, certificates):
    with pytest.raises(cow.InvalidArgument, match="not a loopback address"):
        NbdServer(rig.dm, "tcp:0.0.0.0:0")
    tls = Tls(str(certificates), required=False)
    with NbdServer(rig.dm, "tcp:0.0.0.0:0", tls=tls) as server:
        client = TlsClient(server)
        client.greet()
        assert client.option(OPT_LIST)[0][0] == ERR_TLS_REQD
        client.close()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda folder: (folder / "server-cert.pem").unlink(), "server-cert.pem: No such file"),
        (lambda folder: (folder / "server-key.pem").unlink(), "server-key.pem: No such file"),
        (lambda folder: (folder / "ca-cert.pem").unlink(), "ca-cert.pem: No such file"),
        (lambda folder: (folder / "server-cert.pem").write_text("x"), "server-cert.pem"),
        (lambda folder: (folder / "ca-cert.pem").write_text("x"), "ca-cert.pem"),
        (lambda folder: make_certificate(folder, "other"), None),
        (
            lambda folder: shutil.copy(folder / "client-key.pem", folder / "server-key.pem"),
            "KEY_VALUES_MISMATCH",
        ),
    ],
)
def test_files_that_are_no_good_are_named(certificates, tmp_path, change, text):
    folder = shutil.copytree(certificates, tmp_path / "files")
    change(folder)
    if text is None:
        Tls(str(folder), verify_peer=True)
        return
    with pytest.raises(cow.InvalidArgument, match=text):
        Tls(str(folder), verify_peer=True)
