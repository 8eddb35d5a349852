"""What goes over the control socket: one JSON object a line, each way.

    {"cow": 1, "verb": "load", "args": {"name": "base", "table": "0 8 zero"}}
    {"result": null}
    {"error": {"type": "TableError", "errno": 22, "text": "…", "device": "base", "line": 1}}

The verb lvm runs a command line of LVM's and answers in a stream: {"out": text}, {"err": text},
{"background": text}, {"prompt": text}, which the client answers by {"answer": line or null}, and
{"result": exit code} at the end.

A request is answered before the next one is read. Unknown verbs and arguments are refused, so that
an old server never does half of what a new client means; `VERSION` goes up when a verb changes.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from cow import errors
from cow.errors import CowError, CowOSError, InvalidArgument, TableError

VERSION = 1
MAX_REQUEST = 16 << 20
"""Bytes of the longest request; a table of a quarter of a million lines fits."""

SOCKET = "control.sock"
LONGEST_ADDRESS = 107
"""Bytes of a path that fit in a Unix socket's address."""


class ProtocolError(CowOSError):
    """A request is no request; nothing was done."""


class Param(NamedTuple):
    """An argument of a verb: its type, and whether it may be absent (then it is None)."""

    type: type
    optional: bool = False


_NAME = Param(str)
_FLAG = Param(bool, optional=True)
_NUMBER = Param(int, optional=True)
_TEXT = Param(str, optional=True)
_WHICH = {"name": _TEXT, "uuid": _TEXT, "minor": _NUMBER}
"""A device: by one of these."""

_TEXTS = Param(list)
"""Strings, as they stand on a command line."""

_LINES = {**_WHICH, "inactive": _FLAG, "target": _TEXT, "numbers": _FLAG}

VERBS: dict[str, dict[str, Param]] = {
    "version": {},
    "targets": {},
    "names": {},
    "devices": _WHICH,
    "table": _LINES,
    "status": _LINES,
    "create": {
        "name": _NAME,
        "table": _TEXT,
        "uuid": _TEXT,
        "readonly": _FLAG,
        "minor": _NUMBER,
    },
    "load": {**_WHICH, "table": _NAME, "readonly": _FLAG},
    "clear": _WHICH,
    "suspend": {**_WHICH, "noflush": _FLAG, "nolockfs": _FLAG},
    "resume": _WHICH,
    "remove": {**_WHICH, "force": _FLAG, "deferred": _FLAG},
    "remove_all": {"deferred": _FLAG},
    "rename": {**_WHICH, "new_name": _NAME},
    "set_uuid": {**_WHICH, "new_uuid": _NAME},
    "message": {**_WHICH, "sector": Param(int), "text": _NAME},
    "lvm": {"argv": _TEXTS, "directory": _NAME, "devices": _TEXT, "system_dir": _TEXT},
    "wait": {**_WHICH, "event_nr": _NUMBER, "timeout": Param(float, optional=True)},
}


def encode(message: dict[str, Any]) -> bytes:
    """Return a message as its line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes | bytearray) -> dict[str, Any]:
    """Return the message of a line; ProtocolError if it is none."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not a line of JSON: {error}") from error
    if not isinstance(message, dict):
        raise ProtocolError(f"not a JSON object: {type(message).__name__}")
    return message


def parse_request(line: bytes | bytearray) -> tuple[str, dict[str, Any]]:
    """Return the verb and the arguments of a request; ProtocolError says what is wrong with it."""
    message = decode(line)
    if message.get("cow") != VERSION:
        raise ProtocolError(f"this server speaks version {VERSION}, not {message.get('cow')!r:.40}")
    verb = message.get("verb")
    args = message.get("args", {})
    if not isinstance(verb, str) or verb not in VERBS:
        raise ProtocolError(f"unknown verb {verb!r:.40}")
    if not isinstance(args, dict) or set(message) - {"cow", "verb", "args"}:
        raise ProtocolError(f"{verb}: a request is made of cow, verb and args")
    params = VERBS[verb]
    for name in args:
        if name not in params:
            raise ProtocolError(f"{verb}: unknown argument {name!r:.40}")
    return verb, {name: _argument(verb, name, param, args) for name, param in params.items()}


def _argument(verb: str, name: str, param: Param, args: dict[str, Any]) -> Any:  # noqa: ANN401
    value = args.get(name)
    if value is None:
        if not param.optional:
            raise ProtocolError(f"{verb}: no argument {name}")
        return None
    if param.type is float and type(value) is int:
        value = float(value)
    if type(value) is not param.type:
        raise ProtocolError(f"{verb}: {name} is no {param.type.__name__}")
    if isinstance(value, list):
        for each in value:
            if not isinstance(each, str):
                raise ProtocolError(f"{verb}: {name} is no list of texts")
            _check_text(verb, name, each)
    elif isinstance(value, str):
        _check_text(verb, name, value)
    elif isinstance(value, int | float) and not 0 <= value < 2**64:
        raise ProtocolError(f"{verb}: {name} is out of range")
    return value


def _check_text(verb: str, name: str, value: str) -> None:
    escapes = name == "table" or verb == "lvm"  # they hold paths
    try:
        value.encode("utf-8", "surrogateescape" if escapes else "strict")
    except UnicodeEncodeError as error:
        raise ProtocolError(f"{verb}: {name} is no text") from error
    if "\0" in value:
        raise ProtocolError(f"{verb}: {name} holds a zero byte")


# ---- errors


def describe_error(error: BaseException) -> dict[str, Any]:
    """Return an exception as it goes over the socket."""
    described: dict[str, Any] = {"type": type(error).__name__, "text": str(error)}
    if isinstance(error, OSError):
        described["errno"] = error.errno
        described["text"] = error.strerror or str(error)
    if isinstance(error, TableError):
        described |= {"text": error.text, "device": error.device, "line": error.line}
    return described


def make_error(described: dict[str, Any]) -> Exception:
    """Return the exception that a server described: of the same class where this side knows it."""
    text, code = str(described.get("text", "")), described.get("errno")
    kind = described.get("type")
    if kind == "TimeoutError":
        return TimeoutError(text)
    found = getattr(errors, str(kind), ProtocolError if kind == "ProtocolError" else None)
    if not isinstance(found, type) or not issubclass(found, CowOSError):
        return CowOSError(text, code) if code else CowError(f"{kind}: {text}")
    if issubclass(found, TableError):
        return found(text, code, device=described.get("device"), line=described.get("line"))
    error = found(text)
    error.errno = code
    return error


# ---- where the socket is, and who is at the other end


def socket_path(path: str | None = None) -> str:
    """Return the path of the control socket: `path`, else COW_SOCKET, else the user's own."""
    return path or os.environ.get("COW_SOCKET") or os.path.join(_home(), SOCKET)


def _home() -> str:
    """Return the directory of the user's socket; a client and a server agree on it."""
    uid = os.geteuid()
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isabs(runtime):
        return os.path.join(runtime, "cow")
    if os.path.isdir(f"/run/user/{uid}"):
        return f"/run/user/{uid}/cow"
    return f"/tmp/cow-{uid}"  # checked by check_directory


def check_directory(directory: str) -> None:
    """Refuse a directory in which somebody else could put another socket."""
    try:
        status = os.lstat(directory)
        if stat.S_ISLNK(status.st_mode) and status.st_uid in (0, os.geteuid()):
            status = os.stat(directory)
    except OSError as error:
        raise InvalidArgument(f"{directory}: {error.strerror}", error.errno) from error
    if not stat.S_ISDIR(status.st_mode):
        raise InvalidArgument(f"{directory}: not a directory")
    if status.st_uid not in (0, os.geteuid()):
        raise InvalidArgument(f"{directory}: belongs to another user ({status.st_uid})")
    if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
        raise InvalidArgument(
            f"{directory}: others may write there (mode {status.st_mode & 0o7777:04o})"
        )


@contextlib.contextmanager
def short_address(path: str) -> Iterator[str]:
    """Yield a name of `path` that fits in a socket's address, however deep it lies."""
    if len(os.fsencode(path)) <= LONGEST_ADDRESS:
        yield path
        return
    directory, name = os.path.split(os.path.abspath(path))
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{name}"
    finally:
        os.close(descriptor)


def peer(connection: socket.socket) -> tuple[int, int]:
    """Return the process and the user at the other end."""
    size = struct.calcsize("3i")
    pid, uid, _ = struct.unpack(
        "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    )
    return pid, uid
