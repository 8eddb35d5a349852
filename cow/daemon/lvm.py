"""The verb lvm of the control socket: one command line of LVM's, on the devices of the server.

What a command writes is gathered, and sent only while it does not hold the lock that keeps commands
apart: a client that does not read, or leaves a question open, holds up nobody else.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from cow.lvm.command import Shell, run
from cow.mapper import Mapper

Send = Callable[[dict[str, Any]], bool]
Receive = Callable[[], dict[str, Any] | None]


class Session:
    """One command line. `devices` are shared by all of a server.

    `send` tells whether the message went out; `receive` returns None where the client is gone.
    """

    def __init__(
        self,
        mapper: Mapper,
        devices: list[str],
        *,
        send: Send,
        receive: Receive,
        alive: Callable[[], bool],
    ) -> None:
        self._mapper = mapper
        self._devices = devices
        self._send = send
        self._receive = receive
        self._alive = alive
        self._there = True
        self._pending: list[tuple[str, str]] = []

    def run(
        self, *, argv: list[str], directory: str, devices: str | None, system_dir: str | None
    ) -> int:
        """Run it and return its exit code; the client may be gone by then."""
        environ = {"COW_LVM_DEVICES": devices or ""}
        # Backups of metadata go to the state folder of the user, who is the same on both sides.
        environ |= {k: os.environ[k] for k in ("HOME", "XDG_STATE_HOME") if k in os.environ}
        if system_dir:
            environ["LVM_SYSTEM_DIR"] = os.path.join(directory, system_dir)
        shell = Shell(
            lambda text: self._pending.append(("out", text)),
            lambda text: self._pending.append(("err", text)),
            self._mapper,
            self._ask,
            directory=directory,
            environ=environ,
            devices=self._devices,
            # First, so that the client has it when it shows what has begun.
            background=lambda text: self._pending.insert(0, ("background", text)),
            flush=self._flush,
            alive=lambda: self._there and self._alive(),
        )
        return run(argv, shell)

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        while pending:
            stream, text = pending.pop(0)
            while pending and pending[0][0] == stream and stream != "background":
                text += pending.pop(0)[1]
            self._tell({stream: text})

    def _tell(self, message: dict[str, Any]) -> None:
        """Send a message, unless the client went away: what is being done goes on then."""
        self._there = self._there and self._send(message)

    def _ask(self, question: str) -> str | None:
        self._flush()
        self._tell({"prompt": question})
        answer = self._receive() if self._there else None
        if answer is None or not isinstance(answer.get("answer"), str | None):
            self._there = False
            return None
        line: str | None = answer.get("answer")
        return line
