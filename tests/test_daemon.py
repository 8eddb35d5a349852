"""`cow serve`: the process, its socket, and clients that behave badly."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from support.daemon import SECONDS, Daemon

from cow.cli import serve
from cow.daemon import protocol, systemd
from cow.daemon.client import Client, NotServed
from cow.daemon.protocol import ProtocolError
from cow.daemon.server import AlreadyServed, Server
from cow.errors import CowError, CowOSError, DeviceBusy, DeviceNotFound, TableError
from cow.mapper import Mapper

MIB = 1 << 20


@pytest.fixture
def daemon(tmp_path):
    """A function that starts a daemon in `tmp_path`; what still runs at the end is killed."""
    started = []

    def start(*args: str, **options) -> Daemon:
        started.append(Daemon(tmp_path, *args, **options))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
            each.end()


@pytest.fixture
def serving(tmp_path):
    """A function that makes a server in this process."""
    with contextlib.ExitStack() as stack:

        def start(**settings) -> Server:
            mapper = stack.enter_context(Mapper(durability="process"))
            server = Server(mapper, str(tmp_path / "s" / "control.sock"), **settings)
            server.start()
            stack.callback(server.stop)
            return server

        yield start


def raw(path: str) -> socket.socket:
    """Connect without a client's manners."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(SECONDS)
    connection.connect(path)
    return connection


def until_closed(connection: socket.socket) -> bytes:
    """Return what comes until the other side hangs up."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(1 << 16):
            received += data
    return received


def wait_until(condition) -> None:
    """Look until something is so; it may take a while, but not for ever."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def serve_here(*args: str, **options) -> subprocess.CompletedProcess[bytes]:
    """Run a `cow serve` that is expected to end by itself."""
    words = [sys.executable, "-P", "-m", "cow", "serve", *args]
    return subprocess.run(words, capture_output=True, check=False, timeout=SECONDS, **options)


# --- the process ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_cleanly(daemon, number):
    server = daemon()
    with server.client() as client:
        client.call("create", name="a", table="0 8 zero")
        server.process.send_signal(number)
        assert server.told() == "STOPPING=1"
        status, logged = server.end()
    assert status == 0
    assert f"process {server.process.pid} serves {server.path}" in logged
    assert "Traceback" not in logged
    assert not os.path.exists(server.path)
    with pytest.raises(NotServed):
        server.client()


def test_it_stops_though_a_device_is_suspended_and_clients_wait(daemon):
    server = daemon()
    with server.client() as client, server.client() as waiting, raw(server.path) as silent:
        client.call("create", name="a", table="0 8 zero")
        client.call("create", name="none")
        client.call("suspend", name="a")
        waiting.send(protocol.encode({"cow": 1, "verb": "wait", "args": {"name": "a"}}))
        assert server.stop()[0] == 0
        assert until_closed(silent) == b""


def test_a_stop_answers_what_was_asked(serving):
    server = serving()
    with Client(server.path) as client:
        client.call("create", name="a", table="0 8 zero")
        client.send(protocol.encode(request(verb="wait", args={"name": "a"})))
        wait_until(lambda: any(client.busy for client in server._clients))
        server.stop()
        assert client.receive()["error"]["text"] == "the server stops"


def test_what_was_written_is_there_after_a_stop(daemon, tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(b"\xaa" * 65536)
    (tmp_path / "snap.cow").write_bytes(bytes(MIB))
    server = daemon()
    with server.client() as client:
        client.call("create", name="base", table=f"0 128 linear {image} 0")
        client.call("create", name="o", table="0 128 snapshot-origin base")
        table = f"0 128 snapshot base {tmp_path}/snap.cow P 8"
        client.call("create", name="snap", table=table)
    assert server.stop()[0] == 0
    again = daemon()
    with again.client() as client:
        assert client.call("names") == []
        client.call("create", name="base", table=f"0 128 linear {image} 0")
        client.call("create", name="snap", table=table)
        assert client.call("status", name="snap") == "0 128 snapshot 16/2048 16"


def test_a_notification_may_go_to_an_abstract_socket(tmp_path, monkeypatch):
    name = f"cow-test-{os.getpid()}-{time.monotonic_ns()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.settimeout(SECONDS)
        notify.bind("\0" + name)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name)
        systemd.notify("READY=1")
        assert notify.recv(100) == b"READY=1"
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    systemd.notify("READY=1")


def test_a_second_one_says_who_holds_the_socket(daemon):
    first = daemon()
    second = serve_here("--socket", first.path)
    assert second.returncode == 1
    expected = f"cow: {first.path}: served already, by process {first.process.pid}\n"
    assert second.stderr.decode() == expected
    with first.client() as client:
        assert client.call("names") == []


def test_after_kill_9_a_new_one_starts_without_being_told(daemon):
    first = daemon()
    with first.client() as client:
        client.call("create", name="a", table="0 8 zero")
    assert first.stop(signal.SIGKILL)[0] == -signal.SIGKILL
    assert os.path.exists(first.path)
    with pytest.raises(NotServed, match="cow serve"):
        first.client()
    second = daemon()
    with second.client() as client:
        assert client.call("version")["pid"] == second.process.pid
        assert client.call("names") == []


def test_tables_are_made_at_the_start(daemon, tmp_path):
    (tmp_path / "disk.img").write_bytes(bytes(MIB))
    tables = tmp_path / "tables"
    tables.write_text(
        "# what is served\n"
        "low,,,,0 8 linear disk.img 0,8 8 zero\n"
        "\n"
        "high,U1,7,ro,0 8 linear low 0;\n"
        "none,,,,\n"
    )
    server = daemon("--tables", str(tables))
    with server.client() as client:
        devices = {each["name"]: each for each in client.call("devices")}
        assert sorted(devices) == ["high", "low", "none"]
        assert client.call("table", name="low") == "0 8 linear disk.img 0\n8 8 zero "
    assert (devices["high"]["uuid"], devices["high"]["minor"]) == ("U1", 7)
    assert devices["high"]["readonly"]
    assert not devices["none"]["live"]


def test_tables_may_come_from_stdin(daemon):
    read, write = os.pipe()
    os.write(write, b"a,,,,0 8 zero\n")
    os.close(write)
    server = daemon("--tables", "-", stdin=read)
    os.close(read)
    with server.client() as client:
        assert client.call("names") == ["a"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"a,,,,0 8 bogus\n", "a: table line 1: bogus: unknown target type"),
        (b"a,,\n", "Incomplete entry: five comma-separated fields are required for each device"),
        (b"\xff\n", "not UTF-8 text"),
        (None, "No such file or directory"),
    ],
)
def test_tables_that_are_no_good_are_one_line(text, expected, tmp_path):
    if text is not None:
        (tmp_path / "tables").write_bytes(text)
    path = str(tmp_path / "s" / "control.sock")
    done = serve_here("--socket", path, "--tables", str(tmp_path / "tables"))
    assert done.returncode == 1
    assert done.stderr.decode().count("\n") == 1
    assert expected in done.stderr.decode()
    assert not os.path.exists(path)


def test_devices_are_exported_over_nbd_until_the_end(daemon, tmp_path):
    address = tmp_path / "nbd.sock"
    server = daemon("--nbd", f"unix:{address}", "--durability", "process")
    with server.client() as client:
        assert client.call("version")["durability"] == "process"
        client.call("create", name="a", table="0 8 zero")
    with raw(str(address)) as nbd:
        assert nbd.recv(16) == b"NBDMAGICIHAVEOPT"
        assert server.stop()[0] == 0
        until_closed(nbd)
    assert not address.exists()


def test_an_export_that_cannot_be_made_is_one_line(tmp_path):
    path = str(tmp_path / "s" / "control.sock")
    done = serve_here("--socket", path, "--nbd", "nonsense")
    assert done.returncode == 1
    assert done.stderr.decode().startswith("cow: nonsense: ")
    assert done.stderr.decode().count("\n") == 1


def test_an_export_that_is_not_there_is_said_plainly():
    with (
        Mapper() as mapper,
        pytest.raises(CowError, match=r"x: this version has no cow\.export\.no"),
    ):
        serve._export("cow.export.no", "NoServer", mapper, "x")


def test_an_export_says_which_module_it_lacks(monkeypatch):
    def lacking(name: str):
        raise ModuleNotFoundError("none", name="mfusepy")

    monkeypatch.setattr(serve.importlib, "import_module", lacking)
    with Mapper() as mapper, pytest.raises(CowError, match="x: needs the Python module mfusepy"):
        serve._export("cow.export.fuse", "FuseMount", mapper, "x")


def test_a_device_that_cannot_be_flushed_at_the_end_is_told(daemon, tmp_path):
    server = daemon()
    (tmp_path / "bad.img").write_bytes(bytes(4096))
    with server.client() as client:
        client.call("create", name="bad", table=f"0 8 flakey {tmp_path}/bad.img 0 0 60")
        client.call("create", name="good", table="0 8 zero")
    status, logged = server.stop()
    assert status == 0
    assert "bad: flush: " in logged
    assert "good: flush" not in logged


def test_it_needs_nobody_to_be_told_that_it_is_ready(tmp_path):
    path = tmp_path / "run" / "control.sock"
    words = [sys.executable, "-P", "-m", "cow", "serve", "--socket", str(path)]
    env = {name: text for name, text in os.environ.items() if name != "NOTIFY_SOCKET"}
    with subprocess.Popen(words, stderr=subprocess.PIPE, env=env) as process:
        wait_until(path.is_socket)
        process.send_signal(signal.SIGTERM)
        _, logged = process.communicate(timeout=SECONDS)
    assert process.returncode == 0
    assert b"Traceback" not in logged


def test_exports_that_do_not_end_are_not_waited_for(monkeypatch, caplog):
    monkeypatch.setattr("cow.daemon.server.STOP_SECONDS", 0.05)
    over = threading.Event()

    class Stuck:
        def start(self):
            pass

        def stop(self):
            over.wait(SECONDS)

    class Broken(Stuck):
        def stop(self):
            raise ValueError("on purpose")

    serve._stop_exports([Stuck(), Broken()])
    over.set()
    assert "still waits" in caplog.text
    assert "did not stop cleanly" in caplog.text


def test_a_second_signal_ends_it_at_once(daemon, tmp_path):
    program = (
        "import os, signal\n"
        "from cow.cli import serve\n"
        "stopped = serve._stop_signals()\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "assert os.read(stopped, 1)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "raise AssertionError('still here')\n"
    )
    words = [sys.executable, "-P", "-c", program]
    done = subprocess.run(words, capture_output=True, check=False, timeout=SECONDS)
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, b"")


# --- who gets in ----------------------------------------------------------------------------------


def test_the_socket_is_private(serving):
    server = serving()
    directory = os.path.dirname(server.path)
    assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(server.path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(f"{server.path}.lock").st_mode) == 0o600


def test_another_user_is_turned_away():
    """By its uid, should the modes ever let it through; as root this is tried for real."""
    with tempfile.TemporaryDirectory() as directory, Mapper() as mapper:
        server = Server(mapper, f"{directory}/control.sock")
        server.start()
        try:
            os.chmod(directory, 0o755)
            os.chmod(server.path, 0o666)
            program = (
                "import os, socket, sys\n"
                "if os.geteuid() == 0: os.setgid(65534); os.setuid(65534)\n"
                "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
                "try:\n"
                ' s.sendall(b\'{"cow":1,"verb":"names"}\\n\')\n'
                " print(s.recv(100))\n"
                "except (BrokenPipeError, ConnectionResetError): print(b'')\n"
            )
            words = [sys.executable, "-P", "-c", program, server.path]
            done = subprocess.run(words, capture_output=True, check=True, timeout=SECONDS)
        finally:
            server.stop()
    expected = b"b''\n" if os.geteuid() == 0 else b"b'{\"result\":[]}\\n'\n"
    assert done.stdout == expected


def test_a_peer_of_another_uid_is_turned_away(serving, monkeypatch):
    server = serving()
    monkeypatch.setattr(protocol, "peer", lambda connection: (1, os.geteuid() + 1))
    with raw(server.path) as connection:
        assert until_closed(connection) == b""


def test_a_client_does_not_speak_to_another_users_server(serving, monkeypatch):
    server = serving()
    real = protocol.peer
    here = threading.get_ident()

    def peer(connection):
        pid, uid = real(connection)
        return pid, uid + (threading.get_ident() == here)

    monkeypatch.setattr(protocol, "peer", peer)
    with pytest.raises(CowOSError, match="served by another user"):
        Client(server.path)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_directory_where_others_may_write_is_refused(mode, tmp_path):
    directory = tmp_path / "open"
    directory.mkdir()
    directory.chmod(mode)
    with Mapper() as mapper, pytest.raises(CowOSError, match="others may write there"):
        Server(mapper, str(directory / "control.sock"))


def test_a_directory_of_another_user_is_refused(tmp_path, monkeypatch):
    real = os.lstat(tmp_path)
    fields = list(real)
    fields[4] = os.geteuid() + 1
    monkeypatch.setattr(os, "lstat", lambda path: os.stat_result(fields))
    with pytest.raises(CowOSError, match="belongs to another user"):
        protocol.check_directory(str(tmp_path))


def test_a_sticky_directory_will_do(tmp_path):
    directory = tmp_path / "tmp"
    directory.mkdir()
    directory.chmod(0o1777)
    protocol.check_directory(str(directory))


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.mkdir()])
def test_what_is_no_socket_is_left_alone(make, tmp_path):
    path = tmp_path / "control.sock"
    make(path)
    with Mapper() as mapper, pytest.raises(CowOSError, match="is no socket"):
        Server(mapper, str(path))
    assert path.exists()


def test_a_lock_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "control.sock.lock").symlink_to(tmp_path / "elsewhere")
    with Mapper() as mapper, pytest.raises(CowOSError, match=r"control\.sock\.lock"):
        Server(mapper, str(tmp_path / "control.sock"))
    assert not (tmp_path / "elsewhere").exists()


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    with Mapper() as mapper, pytest.raises(CowOSError, match="No such file"):
        Server(mapper, str(tmp_path / "a" / "b" / "control.sock"))


def test_a_directory_that_may_not_be_made_is_refused(tmp_path, monkeypatch):
    def mkdir(path: str, mode: int) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "mkdir", mkdir)
    with Mapper() as mapper, pytest.raises(CowOSError, match="Permission denied"):
        Server(mapper, str(tmp_path / "a" / "control.sock"))


def test_what_is_no_directory_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CowOSError, match="not a directory"):
        protocol.check_directory(str(tmp_path / "file"))
    with pytest.raises(CowOSError, match="No such file"):
        protocol.check_directory(str(tmp_path / "none"))


def test_a_link_of_ours_to_a_directory_will_do(tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    protocol.check_directory(str(tmp_path / "link"))


def test_a_name_longer_than_an_address_is_refused(tmp_path):
    with Mapper() as mapper, pytest.raises(CowOSError, match="cannot listen"):
        Server(mapper, str(tmp_path / ("s" * 120))).start()


def test_a_socket_a_dead_server_left_is_replaced(tmp_path):
    path = str(tmp_path / "control.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(path)
    with Mapper() as mapper:
        server = Server(mapper, path)
        server.start()
        with Client(path) as client:
            assert client.call("names") == []
        server.stop()


def test_a_second_server_of_one_process_is_refused_too(serving):
    server = serving()
    with Mapper() as mapper, pytest.raises(AlreadyServed) as caught:
        Server(mapper, server.path)
    assert caught.value.pid == os.getpid()


def test_a_path_longer_than_an_address_will_do(tmp_path):
    directory = tmp_path / ("d" * 120)
    directory.mkdir()
    path = str(directory / "control.sock")
    with Mapper() as mapper:
        server = Server(mapper, path)
        server.start()
        with Client(path) as client:
            assert client.call("names") == []
        server.stop()
    assert not os.path.exists(path)


def test_the_directory_of_the_user_is_where_the_socket_is(monkeypatch):
    monkeypatch.delenv("COW_SOCKET", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(os.path, "isdir", lambda path: path == f"/run/user/{os.geteuid()}")
    assert protocol.socket_path() == f"/run/user/{os.geteuid()}/cow/control.sock"


def test_where_the_socket_is(monkeypatch, tmp_path):
    monkeypatch.setenv("COW_SOCKET", "/s")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert protocol.socket_path("/p") == "/p"
    assert protocol.socket_path() == "/s"
    monkeypatch.delenv("COW_SOCKET")
    assert protocol.socket_path() == f"{tmp_path}/cow/control.sock"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "relative")
    assert protocol.socket_path() in (
        f"/run/user/{os.geteuid()}/cow/control.sock",
        f"/tmp/cow-{os.geteuid()}/control.sock",
    )


# --- bad requests ---------------------------------------------------------------------------------


def request(**changes) -> dict:
    return {"cow": 1, "verb": "names", "args": {}} | changes


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"", "not a line of JSON"),
        (b"GET / HTTP/1.1\r", "not a line of JSON"),
        (bytes(range(1, 10)), "not a line of JSON"),
        (b"\xff\xfe", "not a line of JSON"),
        (b"[" * 200000, "not a line of JSON"),
        (b"9" * 10000, "not a line of JSON"),
        (b"[]", "not a JSON object: list"),
        (b"{}", "this server speaks version 1, not None"),
        (request(cow=2), "this server speaks version 1, not 2"),
        (request(verb="no"), "unknown verb 'no'"),
        (request(verb=["names"]), "unknown verb"),
        (request(args=[]), "a request is made of"),
        (request(more=1), "a request is made of"),
        (request(args={"x": 1}), "names: unknown argument 'x'"),
        (request(verb="create"), "create: no argument name"),
        (request(verb="create", args={"name": 1}), "create: name is no str"),
        (request(verb="create", args={"name": "a", "minor": True}), "minor is no int"),
        (request(verb="create", args={"name": "a", "minor": -1}), "minor is out of range"),
        (request(verb="create", args={"name": "a", "readonly": 1}), "readonly is no bool"),
        (request(verb="create", args={"name": "a\0"}), "name holds a zero byte"),
        (request(verb="create", args={"name": "\udc80"}), "name is no text"),
        (request(verb="load", args={"name": "a", "table": "\ud800"}), "table is no text"),
        (request(verb="suspend", args={}), "a device is given by"),
        (request(verb="suspend", args={"name": "a", "uuid": "b"}), "a device is given by"),
        (request(verb="wait", args={"name": "a", "timeout": "x"}), "timeout is no float"),
        (request(verb="message", args={"name": "a", "text": "x", "sector": 2**64}), "range"),
    ],
)
def test_a_bad_request_is_answered_and_the_connection_lives(line, text, serving):
    server = serving()
    with Client(server.path) as client:
        client.send((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n")
        error = client.receive()["error"]
        assert error["type"] == "ProtocolError"
        assert text in error["text"]
        assert client.call("names") == []


def test_errors_arrive_as_what_they_were(serving):
    with Client(serving().path) as client:
        with pytest.raises(TableError) as refused:
            client.call("create", name="a", table="0 8 zero\n8 8 bogus")
        assert (refused.value.device, refused.value.line) == ("a", 2)
        assert str(refused.value) == "a: table line 2: bogus: unknown target type (EINVAL)"
        assert client.described["minor"] == 0
        with pytest.raises(DeviceNotFound, match="b: no such device"):
            client.call("suspend", name="b")
        client.call("create", name="a")
        with pytest.raises(DeviceBusy):
            client.call("create", name="a")
        with pytest.raises(TimeoutError):
            client.call("wait", name="a", timeout=0)
        with pytest.raises(ProtocolError):
            client.call("names", x=1)


def test_a_bug_costs_one_request(serving, monkeypatch, caplog):
    def broken(mapper):
        raise ZeroDivisionError("on purpose")

    monkeypatch.setitem(sys.modules["cow.daemon.server"]._VERBS, "targets", broken)
    with Client(serving().path) as client:
        with pytest.raises(CowError, match="ZeroDivisionError: on purpose"):
            client.call("targets")
        assert client.call("names") == []
    assert "on purpose" in caplog.text


def test_a_request_that_is_too_long_ends_the_connection(serving, monkeypatch):
    monkeypatch.setattr("cow.daemon.server.MAX_REQUEST", MIB)
    server = serving()
    with raw(server.path) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(b"x" * (4 * MIB))
        answer = until_closed(connection)
    assert b"more than 1048576 bytes" in answer or answer == b""
    with Client(server.path) as client:
        assert client.call("names") == []


def test_requests_may_come_in_pieces_and_in_bundles(serving):
    with Client(serving().path) as client:
        line = protocol.encode(request())
        for byte in line:
            client.send(bytes([byte]))
        client.send(line * 3)
        assert [client.receive() for _ in range(4)] == [{"result": []}] * 4


# --- clients that hang ----------------------------------------------------------------------------


def test_a_request_that_never_ends_is_given_up(serving):
    server = serving(request_seconds=0.1)
    with raw(server.path) as connection:
        connection.sendall(b'{"cow"')
        assert b"a request took longer than 0.1 s" in until_closed(connection)


def test_a_client_that_says_nothing_may_stay(serving):
    server = serving(request_seconds=0.05)
    with Client(server.path) as client, raw(server.path) as hanging:
        hanging.sendall(b"x")
        until_closed(hanging)  # so long were the 0.05 s
        assert client.call("names") == []


def test_silent_clients_make_room_for_one_that_speaks(serving):
    server = serving(max_clients=3)
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(raw(server.path)) for _ in range(3)]
        for _ in range(5):
            with Client(server.path) as client:
                assert client.call("names") == []
        assert until_closed(silent[0]) == b""


def test_busy_clients_are_not_hung_up_on(serving):
    server = serving(max_clients=2)
    waiting = protocol.encode(request(verb="wait", args={"name": "a"}))
    with Client(server.path) as first, Client(server.path) as second:
        first.call("create", name="a", table="0 8 zero")
        first.send(waiting)
        second.send(waiting)
        wait_until(lambda: [client.busy for client in server._clients] == [True, True])
        with Client(server.path) as third, pytest.raises((DeviceBusy, NotServed)):
            third.call("names")
        server.mapper.rename("a", "b")
        assert first.receive() == second.receive() == {"result": 1}


def test_a_client_that_takes_no_answers_is_hung_up_on(serving):
    server = serving(request_seconds=0.1)
    with raw(server.path) as connection:
        connection.settimeout(0.5)
        with contextlib.suppress(OSError):
            while True:
                connection.send(protocol.encode(request(verb="targets")) * 100)
        with Client(server.path) as client:
            assert client.call("names") == []
        wait_until(lambda: not server._clients)


# --- waiting --------------------------------------------------------------------------------------


def test_a_wait_blocks_nobody_and_ends_with_the_event(serving):
    server = serving()
    with Client(server.path) as waiting, Client(server.path) as other:
        other.call("create", name="a", table="0 8 zero")
        waiting.send(protocol.encode(request(verb="wait", args={"name": "a"})))
        wait_until(lambda: any(client.busy for client in server._clients))
        assert other.call("names") == ["a"]
        other.call("rename", name="a", new_name="b")
        assert waiting.receive() == {"result": 1}


def test_a_wait_ends_when_the_device_goes(serving):
    server = serving()
    with Client(server.path) as waiting, Client(server.path) as other:
        other.call("create", name="a", table="0 8 zero")
        waiting.send(protocol.encode(request(verb="wait", args={"name": "a"})))
        wait_until(lambda: any(client.busy for client in server._clients))
        other.call("remove", name="a")
        assert waiting.receive()["error"]["type"] == "DeviceNotFound"


def test_a_wait_ends_when_its_client_goes(serving):
    server = serving()
    with Client(server.path) as other:
        other.call("create", name="a", table="0 8 zero")
        with Client(server.path) as waiting:
            waiting.send(protocol.encode(request(verb="wait", args={"name": "a"})))
            wait_until(lambda: any(client.busy for client in server._clients))
        wait_until(lambda: len(server._clients) == 1)


def test_a_wait_ends_when_its_client_goes_without_having_read_its_answers(serving):
    """What it leaves unread resets the connection."""
    server = serving()
    with Client(server.path) as other:
        other.call("create", name="a", table="0 8 zero")
        with Client(server.path) as waiting:
            waiting.send(protocol.encode(request(verb="names")))
            waiting.send(protocol.encode(request(verb="wait", args={"name": "a"})))
            assert waiting._socket.recv(1, socket.MSG_PEEK)
            wait_until(lambda: any(client.busy for client in server._clients))
        wait_until(lambda: len(server._clients) == 1)


def test_a_command_that_waits_can_be_interrupted(serving):
    server = serving()
    with Client(server.path) as client:
        client.call("create", name="a", table="0 8 zero")
    # Who runs the tests in the background may have ignored the signal for all that it starts.
    words = ["env", "--default-signal=INT", sys.executable]
    words += ["-P", "-m", "cow", "dm", "--socket", server.path, "wait", "a"]
    with subprocess.Popen(words, stderr=subprocess.PIPE) as process:
        wait_until(lambda: any(client.busy for client in server._clients))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, err) == (130, b"")
    wait_until(lambda: not server._clients)


# --- many -----------------------------------------------------------------------------------------


def test_many_clients_at_once(serving):
    server = serving()
    failed = []

    def work(number: int) -> None:
        try:
            with Client(server.path) as client:
                for _ in range(20):
                    client.call("create", name=f"d{number}", table="0 8 zero")
                    assert client.call("table", name=f"d{number}") == "0 8 zero "
                    assert f"d{number}" in [each["name"] for each in client.call("devices")]
                    client.call("remove", name=f"d{number}")
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert server.mapper.names() == []


def test_a_server_that_dies_in_the_middle_is_no_traceback(tmp_path):
    path = str(tmp_path / "control.sock")
    words = [sys.executable, "-P", "-m", "cow", "dm", "--socket", path, "wait", "a"]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.settimeout(SECONDS)
        listener.bind(path)
        listener.listen()
        with subprocess.Popen(words, stderr=subprocess.PIPE) as waiting:
            with listener.accept()[0] as connection:
                assert b"wait" in connection.recv(1 << 16)
            _, err = waiting.communicate(timeout=SECONDS)
    assert waiting.returncode == 1
    assert err.decode() == f"cow: {path}: the server went away\n"


def test_a_socket_of_another_kind_is_an_error(tmp_path):
    path = str(tmp_path / "control.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(path)
        with pytest.raises(CowOSError, match="wrong type") as caught:
            Client(path)
    assert caught.value.errno == errno.EPROTOTYPE


@pytest.mark.parametrize("size", [100, 1 << 22])
def test_a_server_that_goes_before_it_has_read_is_gone(tmp_path, size):
    """What it leaves unread resets the connection; so much that sending it all must wait."""
    path = str(tmp_path / "control.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with Client(path) as client:
            accepted = listener.accept()[0]
            closer = threading.Thread(target=lambda: (accepted.recv(10), accepted.close()))
            closer.start()
            with pytest.raises(NotServed, match="the server went away"):
                client.call("names", filler="x" * size)
            closer.join()


def test_what_a_server_said_before_it_hung_up_is_not_lost(tmp_path):
    path = str(tmp_path / "control.sock")

    def refuse(accepted: socket.socket) -> None:
        accepted.recv(10)
        accepted.sendall(protocol.encode({"error": protocol.describe_error(DeviceBusy("full"))}))
        accepted.close()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with Client(path) as client:
            refuses = threading.Thread(target=refuse, args=listener.accept()[:1])
            refuses.start()
            with pytest.raises(DeviceBusy, match="full"):
                client.call("names", filler="x" * (1 << 22))
            refuses.join()


def test_a_server_without_descriptors_goes_on_when_there_are_some(serving, monkeypatch, caplog):
    server = serving()
    real, failures = server._listener, iter(range(2))

    class Listener:
        def accept(self):
            if next(failures, None) is not None:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            server._listener = real
            return real.accept()

    with Client(server.path) as client:
        assert client.call("names") == []
        monkeypatch.setattr(server, "_listener", Listener())
        with Client(server.path) as wakes:
            # This one was accepted before; those after it meet the failures.
            assert wakes.call("names") == []
            with Client(server.path) as other:
                assert other.call("names") == []
    assert caplog.text.count("accept: Too many open files") == 2


def test_a_server_without_threads_refuses_a_client_and_goes_on(serving, monkeypatch):
    server = serving()
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name == "cow-client":
            raise RuntimeError("can't start new thread")
        real(thread)

    with Client(server.path) as client:
        assert client.call("names") == []
        monkeypatch.setattr(threading.Thread, "start", start)
        with pytest.raises(DeviceBusy, match="no thread"), Client(server.path) as other:
            other.call("names")
        monkeypatch.undo()
        with Client(server.path) as other:
            assert other.call("names") == []


def test_the_arguments_of_the_command():
    parser = argparse.ArgumentParser()
    serve.VERB.add_arguments(parser)
    options = parser.parse_args(["--nbd", "unix:a", "--nbd", "tcp:b:1", "--mount", "c"])
    assert options.nbd == ["unix:a", "tcp:b:1"]
    assert options.mount == ["c"]
    assert options.durability == "power"
