"""`cow serve` started by a connection: with sockets from libnbd, from systemd, and from nobody."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import poll
from support.certificates import make_all
from support.nbd import Client as NbdClient
from support.nbd import need, run

from cow.daemon import systemd
from cow.daemon.client import Client, NotServed
from cow.daemon.server import Server
from cow.errors import CowOSError, InvalidArgument
from cow.mapper import Mapper

SECONDS = 30
PASSED_ON = ("PYTHONPATH", "COVERAGE_FILE", "COVERAGE_PROCESS_START")
COW = [sys.executable, "-P", "-m", "cow", "serve"]


def captive(folder: Path) -> list[str]:
    """Return the words by which libnbd's programs start a server of one device, `a`."""
    (folder / "disk.img").write_bytes(b"disk" * 1024)
    (folder / "tables").write_text("a,,,,0 8 linear disk.img 0\n")
    return [
        "--",
        "[",
        *COW,
        "--socket",
        f"{folder}/control.sock",
        "--tables",
        f"{folder}/tables",
        "]",
    ]


def test_libnbd_starts_a_server_for_itself(tmp_path):
    need("nbdinfo")
    assert run("nbdinfo", "--size", *captive(tmp_path), cwd=tmp_path) == "4096\n"


def test_nbdcopy_reads_from_a_server_it_started(tmp_path):
    need("nbdcopy")
    run("nbdcopy", *captive(tmp_path), str(tmp_path / "copy"), cwd=tmp_path)
    assert (tmp_path / "copy").read_bytes() == b"disk" * 1024


def listens(path: str) -> bool:
    """Tell whether somebody listens at a Unix socket, without connecting to it (proc_net(5))."""
    with open("/proc/net/unix", encoding="utf-8") as sockets:
        rows = [line.split() for line in sockets]
    return any(row[-1] == path and int(row[3], 16) & 0x10000 for row in rows[1:])


class Activated:
    """A `cow serve` behind systemd-socket-activate, which listens at control.sock and nbd.sock."""

    def __init__(self, folder: Path, names: str, *args: str) -> None:
        self.control = str(folder / "control.sock")
        self.nbd = str(folder / "nbd.sock")
        listen = ["-l", self.control, "-l", self.nbd, f"--fdname={names}"]
        listen += [f"--setenv={name}" for name in PASSED_ON if name in os.environ]
        self.process = subprocess.Popen(
            ["systemd-socket-activate", *listen, *COW, *args],
            stderr=subprocess.PIPE,
            cwd=folder,
        )
        poll(lambda: listens(self.control) and listens(self.nbd))

    def end(self, number: int | None = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal, or none; return the exit status and what was logged."""
        if self.process.poll() is None and number is not None:
            self.process.send_signal(number)
        _, logged = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, logged.decode()


@pytest.fixture
def activated(tmp_path):
    """A function that starts one, and ends it."""
    need("systemd-socket-activate")
    started = []

    def start(names: str, *args: str) -> Activated:
        started.append(Activated(tmp_path, names, *args))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.end(signal.SIGKILL)


def test_systemds_sockets_are_told_apart_by_name(activated):
    server = activated("control:nbd")
    with Client(server.control) as client:
        client.call("create", name="a", table="0 8 zero")
    nbd = NbdClient(server.nbd)
    assert nbd.go("a") == 4096
    nbd.close()
    status, logged = server.end()
    assert status == 0
    assert f"serving the devices at unix:{server.nbd}" in logged
    assert f"serves {server.control}" in logged


def test_systemds_sockets_stay_when_the_server_stops(activated):
    """They are systemd's, which starts the next one."""
    server = activated("control:nbd")
    with Client(server.control) as client:
        client.call("version")
    assert server.end()[0] == 0
    assert os.path.exists(server.control)
    assert os.path.exists(server.nbd)


def test_a_connection_to_the_nbd_socket_starts_the_server_too(activated):
    server = activated("control:nbd", "--tables", "/dev/null")
    nbd = NbdClient(server.nbd)
    nbd.greet()
    with Client(server.control) as client:
        assert client.call("names") == []
    nbd.close()
    assert server.end()[0] == 0


def test_a_control_socket_from_systemd_goes_with_no_other(activated, tmp_path):
    server = activated("control:nbd", "--socket", f"{tmp_path}/other.sock")
    with pytest.raises((NotServed, CowOSError)), Client(server.control) as client:
        client.call("names")
    status, logged = server.end(None)
    assert status == 1
    assert "there is a control socket from systemd already" in logged


def test_two_control_sockets_are_refused(activated):
    server = activated("control:control")
    with pytest.raises((NotServed, CowOSError)), Client(server.control) as client:
        client.call("names")
    status, logged = server.end(None)
    assert status == 1
    assert "more than one control socket" in logged


# --- sockets that are none ------------------------------------------------------------------------


@pytest.fixture
def inherit(monkeypatch):
    """A function that puts descriptors where take_sockets() looks for them."""
    made = []

    def pass_on(*descriptors: int, count: str | None = None, names: str | None = None) -> None:
        monkeypatch.setattr(systemd, "FIRST", 900)
        for n, descriptor in enumerate(descriptors):
            made.append(os.dup2(descriptor, 900 + n))
        monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
        monkeypatch.setenv("LISTEN_FDS", str(len(descriptors)) if count is None else count)
        if names is not None:
            monkeypatch.setenv("LISTEN_FDNAMES", names)

    yield pass_on
    for each in made:
        with contextlib.suppress(OSError):
            os.close(each)


def listening(folder: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.bind(str(folder / f"{time.monotonic_ns()}.sock"))
    made.listen()
    return made


def test_sockets_are_taken_once_and_not_inherited(tmp_path, inherit):
    with listening(tmp_path) as first, listening(tmp_path) as second:
        inherit(first.fileno(), second.fileno(), names="nbd")
        (one, nbd), (other, unnamed) = systemd.take_sockets()
        assert (one, other) == ("nbd", "")
        assert nbd.getsockname() == first.getsockname()
        assert unnamed.getsockname() == second.getsockname()
        assert not os.get_inheritable(nbd.fileno())
        assert not {"LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"} & set(os.environ)
        assert systemd.take_sockets() == []
        nbd.close()
        unnamed.close()


def test_sockets_of_another_process_are_left_alone(tmp_path, inherit, monkeypatch):
    with listening(tmp_path) as each:
        inherit(each.fileno())
        monkeypatch.setenv("LISTEN_PID", "1")
        assert systemd.take_sockets() == []


@pytest.mark.parametrize("count", ["", "x", "-1"])
def test_a_number_of_sockets_that_is_none_is_refused(inherit, count):
    inherit(count=count)
    with pytest.raises(InvalidArgument, match="not a number of sockets"):
        systemd.take_sockets()


def test_a_descriptor_that_is_not_there_is_refused(inherit):
    inherit(count="1")
    with pytest.raises(InvalidArgument, match="Bad file descriptor"):
        systemd.take_sockets()


@pytest.mark.parametrize("kind", ["file", "connected", "datagram"])
def test_what_does_not_listen_is_refused(kind, tmp_path, inherit):
    if kind == "file":
        made = (tmp_path / "file").open("w")
    elif kind == "connected":
        made, other = socket.socketpair()
        other.close()
    else:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with made:
        inherit(made.fileno())
        with pytest.raises(InvalidArgument, match="LISTEN_FDS: 900"):
            systemd.take_sockets()


@pytest.mark.parametrize("kind", ["network", "abstract"])
def test_a_control_socket_is_one_with_a_path(kind):
    if kind == "network":
        made = socket.create_server(("127.0.0.1", 0))
    else:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made.bind(b"\0cow-test-%d" % os.getpid())
    with made, Mapper() as mapper, pytest.raises(InvalidArgument, match="with a path"):
        Server(mapper, listening=made)


# --- the options about TLS ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    need("openssl")
    return make_all(tmp_path_factory.mktemp("certificates"))


def refused(folder: Path, *args: str) -> str:
    """Run a `cow serve` that is expected to refuse its options; return its one line."""
    words = [*COW, "--socket", f"{folder}/run/control.sock", *args]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=SECONDS)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_a_network_address_without_tls_is_refused(tmp_path):
    assert "not a loopback address" in refused(tmp_path, "--nbd", "tcp:0.0.0.0:0")


def test_tls_needs_certificates(tmp_path):
    assert "--tls=require needs --tls-certificates" in refused(tmp_path, "--tls=require")
    assert "ca-cert.pem" not in refused(tmp_path, "--tls-certificates", str(tmp_path))
    assert "needs --tls-certificates" in refused(tmp_path, "--tls-verify-peer")


def is_ready(path: str) -> bool:
    """Whether a server answers; it does so last of all."""
    with contextlib.suppress(NotServed), Client(path) as client:
        client.call("version")
        return True
    return False


@pytest.mark.parametrize(
    ("args", "plain", "encrypted"),
    [
        ((), False, True),
        (("--tls=require",), False, True),
        (("--tls=on",), True, True),
        (("--tls=off",), True, False),
        (("--tls-verify-peer",), False, True),
    ],
)
def test_who_gets_in(args, plain, encrypted, certificates, tmp_path):
    need("nbdinfo")
    tables = tmp_path / "tables"
    tables.write_text("a,,,,0 8 zero\n")
    words = [*COW, "--socket", f"{tmp_path}/c.sock", "--nbd", f"unix:{tmp_path}/n.sock"]
    words += ["--tables", str(tables), "--tls-certificates", str(certificates), *args]
    server = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    try:
        poll(lambda: is_ready(f"{tmp_path}/c.sock"))
        where = f"localhost/a?socket={tmp_path}/n.sock"
        for uri, expected in (
            (f"nbd+unix://{where}", plain),
            (f"nbds+unix://{where}&tls-certificates={certificates}", encrypted),
        ):
            done = subprocess.run(
                ["nbdinfo", "--size", uri], capture_output=True, check=False, timeout=SECONDS
            )
            assert (done.returncode == 0) == expected
    finally:
        server.terminate()
        server.wait(SECONDS)
