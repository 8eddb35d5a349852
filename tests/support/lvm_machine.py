"""Image files, a mapper, and LVM's command line on them, in this process."""

from __future__ import annotations

import shlex
from pathlib import Path

from cow.lvm import VolumeGroup
from cow.lvm.command import Shell, run
from cow.mapper import Mapper

from . import fill

KIB = 1 << 10


class Machine:
    """Image files, a mapper, and LVM's command line on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mapper = Mapper(durability="process")
        self.environ = {"LVM_SYSTEM_DIR": str(folder)}
        self.devices: list[str] = []
        self.said = ""

    def disk(self, name: str, size: int) -> str:
        path = self.folder / name
        with path.open("wb") as file:
            file.truncate(size)
        self.devices.append(str(path))
        return str(path)

    def run(self, line: str) -> int:
        """Run a command line and return its exit code; `said` is what it printed."""
        return self.run_words(shlex.split(line))

    def run_words(self, words: list[str]) -> int:
        """The same for words with blanks in them."""
        said: list[str] = []
        shell = Shell(
            said.append,
            said.append,
            self.mapper,
            directory=str(self.folder),
            environ=self.environ,
            devices=self.devices,
        )
        status = run(words, shell)
        self.said = "".join(said)
        return status

    def __call__(self, line: str) -> str:
        """Run a command line that has to succeed."""
        status = self.run(line)
        assert status == 0, f"$ {line}\n{self.said}"
        return self.said

    def refused(self, line: str, status: int = 5) -> str:
        """Run a command line that has to fail and to change nothing; return what it said."""
        before = self.field("vg", "vg_seqno", "vgs")
        assert self.run(line) == status, f"$ {line}\n{self.said}"
        said = self.said
        assert self.field("vg", "vg_seqno", "vgs") == before
        return said

    def open(self, vg: str) -> VolumeGroup:
        """Open a VG as a program does."""
        return VolumeGroup.open(self.devices, vg, mapper=self.mapper)

    def field(self, what: str, field: str, verb: str = "lvs") -> str:
        """Return a field of a report, sizes in KiB."""
        return self(f"{verb} -a --noheadings --units k -o {field} {what}").strip()

    def names(self) -> list[str]:
        """Return the LVs that are shown, sorted."""
        return self.field("vg", "lv_name").split()

    def table(self, lv: str) -> str:
        return self.mapper.table(f"vg-{lv}")

    def write(self, lv: str, size: int, offset: int = 0, seed: int = 1) -> None:
        self.mapper.device(f"vg-{lv}").pwrite(fill(size, seed), offset)

    def read(self, lv: str, size: int | None = None, offset: int = 0) -> bytes:
        device = self.mapper.device(f"vg-{lv}")
        return device.pread(device.size if size is None else size, offset)
