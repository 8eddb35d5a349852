"""The client of a control socket: what `cow dm` and other programs speak to `cow serve` with.

    with Client() as mapper:
        mapper.call("create", name="base", table="0 8 linear /images/disk.img 0")
        print(mapper.call("table", name="base"))

The verbs and their arguments stand in cow.daemon.protocol. A server has a working directory of its
own: give it absolute paths (`absolute_paths` makes them).
"""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from cow.daemon import protocol
from cow.errors import CowOSError

NOBODY = "nobody serves there; start a server with: cow serve"


class NotServed(CowOSError):
    """Nobody answers at the control socket."""

    code = errno.ECONNREFUSED


class Client:
    """A connection to a server, for one thread. `path` as for `cow serve --socket`."""

    def __init__(self, path: str | None = None) -> None:
        self.path = protocol.socket_path(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.described: dict[str, Any] = {}
        """The last error as the server described it."""
        self._received = bytearray()
        try:
            self._connect()
        except BaseException:
            self._socket.close()
            raise

    def _connect(self) -> None:
        try:
            with protocol.short_address(self.path) as address:
                self._socket.connect(address)
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError) as error:
            raise NotServed(f"{self.path}: {NOBODY}") from error
        except OSError as error:
            raise CowOSError(f"{self.path}: {error.strerror or error}", error.errno) from error
        uid = protocol.peer(self._socket)[1]
        if uid != os.geteuid():
            raise CowOSError(f"{self.path}: served by another user ({uid})", errno.EACCES)

    def call(self, verb: str, **args: Any) -> Any:  # noqa: ANN401
        """Run a verb and return its result; what it raises there is raised here."""
        self.send(protocol.encode({"cow": protocol.VERSION, "verb": verb, "args": args}))
        answer = self.receive()
        if "error" in answer:
            self.described = answer["error"]
            raise protocol.make_error(self.described)
        return answer.get("result")

    def lvm(
        self,
        argv: Sequence[str],
        directory: str,
        *,
        out: Callable[[str], None],
        err: Callable[[str], None],
        ask: Callable[[str], str | None],
        background: Callable[[str], None] = lambda text: None,
        devices: str | None = None,
        system_dir: str | None = None,
    ) -> int:
        """Run a command line of LVM's in the server and return its exit code.

        Relative paths in it start at `directory`; `devices` and `system_dir` stand for
        COW_LVM_DEVICES and LVM_SYSTEM_DIR. `background` gets what is to be said if the caller does
        not wait for the end.
        """
        args = {
            "argv": list(argv),
            "directory": directory,
            "devices": devices,
            "system_dir": system_dir,
        }
        self.send(protocol.encode({"cow": protocol.VERSION, "verb": "lvm", "args": args}))
        streams = {"out": out, "err": err, "background": background}
        while True:
            answer = self.receive()
            if "error" in answer:
                self.described = answer["error"]
                raise protocol.make_error(self.described)
            if "result" in answer:
                return int(answer["result"])
            for stream, write in streams.items():
                if stream in answer:
                    write(str(answer[stream]))
            if "prompt" in answer:
                line = ask(str(answer["prompt"]))
                self.send(protocol.encode({"answer": line}))

    def send(self, line: bytes) -> None:
        """Send one request as it goes over the socket."""
        try:
            self._socket.sendall(line)
        except (BrokenPipeError, ConnectionResetError) as error:
            # The server may have said why before it hung up.
            try:
                answer = self.receive()
            except NotServed:
                raise self._gone() from error
            raise protocol.make_error(answer.get("error", {})) from error

    def receive(self) -> dict[str, Any]:
        """Return the next answer."""
        while b"\n" not in self._received:
            try:
                data = self._socket.recv(1 << 16)
            except ConnectionResetError:
                data = b""
            if not data:
                raise self._gone()
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return protocol.decode(line)

    def _gone(self) -> NotServed:
        return NotServed(f"{self.path}: the server went away", errno.ECONNRESET)

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


DEVICE_ARGS: dict[str, slice] = {
    "delay": slice(0, None, 3),
    "flakey": slice(0, 1),
    "linear": slice(0, 1),
    "log-writes": slice(0, 2),
    "snapshot": slice(0, 2),
    "snapshot-merge": slice(0, 2),
    "snapshot-origin": slice(0, 1),
    "striped": slice(2, None, 2),
}
"""Which arguments of a target name devices; those of a mirror have no fixed place."""

WORD = re.compile(r"(?:\\[\s\\]|\S)+")


def absolute_paths(table: str, directory: str, is_device: Callable[[str], bool]) -> str:
    """Return a table in which every relative path starts at `directory`.

    A device's dm name is left alone, and so are MAJOR:MINOR and comments. Of a target that is not
    known here only words with a slash are paths.
    """
    return "\n".join(_absolute_line(line, directory, is_device) for line in table.split("\n"))


def _absolute_line(line: str, directory: str, is_device: Callable[[str], bool]) -> str:
    found = re.match(r"\s*[^\s#]\S*\s+\S+\s+(\S+)", line)
    if not found:
        return line
    comment = line.find("#", found.end())
    words = list(WORD.finditer(line, found.end(), len(line) if comment < 0 else comment))
    if found[1] in DEVICE_ARGS:
        words = words[DEVICE_ARGS[found[1]]]
    elif found[1] == "mirror":
        words = _mirror_devices(words)
    else:
        words = [word for word in words if "/" in word[0]]
    for word in reversed(words):
        name = re.sub(r"\\([\s\\])", r"\1", word[0])
        if os.path.isabs(name) or re.fullmatch(r"[0-9]+:[0-9]+", name) or is_device(name):
            continue
        path = re.sub(r"([\s\\])", r"\\\1", os.path.join(directory, name.removeprefix("./")))
        line = line[: word.start()] + path + line[word.end() :]
    return line


def _mirror_devices(words: list[re.Match[str]]) -> list[re.Match[str]]:
    """Return the log device and the legs among the arguments of a mirror."""
    numbers = [int(word[0]) if re.fullmatch("[0-9]{1,5}", word[0]) else 0 for word in words]
    legs = 2 + numbers[1] if len(words) > 1 else 0
    count = numbers[legs] if legs < len(words) else 0
    log = words[2:3] if words and words[0][0] == "disk" else []
    return [*log, *words[legs + 1 : legs + 1 + 2 * count : 2]]
