"""A `cow serve` in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from cow.daemon.client import Client

SECONDS = 30
"""How long a daemon may take for anything."""


class Daemon:
    """A `cow serve` of its own, which told systemd's socket that it is ready."""

    def __init__(self, directory: Path, *args: str, **options) -> None:
        self.path = str(directory / "run" / "control.sock")
        notify = directory / f"notify-{time.monotonic_ns()}"
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.settimeout(SECONDS)
        self._notify.bind(str(notify))
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "cow", "serve", "--socket", self.path, *args],
            stderr=subprocess.PIPE,
            env={**os.environ, "NOTIFY_SOCKET": str(notify)},
            cwd=directory,
            **options,
        )
        try:
            assert self.told() == "READY=1"
        except BaseException:
            self.process.kill()
            self.end()
            raise

    def told(self) -> str:
        """Return what systemd is told next."""
        return self._notify.recv(100).decode()

    def client(self) -> Client:
        return Client(self.path)

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal; return the exit status and what was logged."""
        self.process.send_signal(number)
        return self.end()

    def end(self) -> tuple[int, str]:
        self._notify.close()
        _, logged = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, logged.decode()
