"""Run sessions with lvm again, on image files, by cow.lvm.command in this process."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from cow.lvm.command import Shell, run
from cow.mapper import Mapper
from support import fill
from support.lvm_session import RECORDS, Normal, make_disk


def records(name: str) -> tuple[dict[str, int | str], list[dict[str, Any]]]:
    """Return the disks and the lines of a recorded session."""
    disks: dict[str, int | str] = {}
    lines: list[dict[str, Any]] = []
    found = False
    for text in RECORDS.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if "session" in line:
            found = line["session"] == name
            disks = line["disks"] if found else disks
        elif found:
            lines.append(line)
    return disks, lines


def names() -> list[str]:
    """Return the names of the recorded sessions."""
    lines = map(json.loads, RECORDS.read_text(encoding="utf-8").splitlines())
    return [line["session"] for line in lines if "session" in line]


HOST = "host.test"
"""The name of the machine on which the sessions were recorded."""


def _uname() -> os.uname_result:
    return os.uname_result(("Linux", HOST, "6.1", "", "x86_64"))


class Replay:
    """A machine of image files and one mapper, as the session had disks and a kernel."""

    def __init__(self, folder: Path, disks: dict[str, int | str]) -> None:
        self.folder = folder
        self.mapper = Mapper(durability="process")
        self.normal = Normal()
        self.opened: dict[str, Any] = {}
        for name, what in disks.items():
            make_disk(folder / name, what)
        self.devices = ",".join(disks)

    def close(self) -> None:
        for file in self.opened.values():
            file.close()
        self.mapper.close()

    def run(self, args: list[str], stdin: str = "") -> tuple[str, str, int]:
        """Run a command line; return what it printed, as the records have it, and its status."""
        out: list[str] = []
        err: list[str] = []
        answers = iter(stdin.splitlines())

        def ask(question: str) -> str | None:
            err.append(question)
            return next(answers, None)

        shell = Shell(
            out.append,
            err.append,
            self.mapper,
            ask,
            directory=str(self.folder),
            environ={"LVM_SYSTEM_DIR": str(self.folder / "etc"), "COW_LVM_DEVICES": self.devices},
        )
        with mock.patch("os.uname", _uname):
            status = run(args, shell)
        return self._shown(out), self._shown(err), status

    def _shown(self, lines: list[str]) -> str:
        return self.normal("".join(lines).replace(f"{self.folder}/", ""))

    def step(self, line: dict[str, Any]) -> None:
        """Do what is no command line."""
        if "write" in line:
            name, offset, length, seed = line["write"]
            self.mapper.device(name).pwrite(fill(length, seed), offset)
        elif "open" in line:
            self.opened[line["open"]] = self.mapper.device(line["open"]).open()
        elif "close" in line:
            self.opened.pop(line["close"]).close()

    def differences(self, lines: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Any]]:
        """Yield each recorded command line that has another answer here, with that answer."""
        for line in lines:
            if "args" not in line:
                self.step(line)
                continue
            answer = self.run(line["args"], line.get("stdin", ""))
            # What the two name first counts: uuids are numbered in the order they are met.
            if answer != (line["stdout"], line["stderr"], line["status"]):
                yield line, answer
