"""Sessions with lvm: the script of them, and what is the same in every run of one.

tests/data/lvm_sessions.txt is a list of sessions, each behind a line `== NAME DISKS…` with the
sizes of disk1.img, disk2.img, … in MiB, or the sample disks (support/lvm.py) they are copies of.
Then, one a line:

    VERB ARGS…              a command line of lvm; `< LINE…` at its end is what it reads from stdin
    !write DEVICE OFFSET LENGTH SEED
    !open DEVICE            somebody has the dm device open, until !close
    !close DEVICE
    !sh COMMAND             for the files of the session

tests/data/lvm.jsonl holds what the real lvm2 printed for them (tests/kernel/record_lvm.py): a line
{"session", "disks"}, then for each command {"args", "stdin", "stdout", "stderr", "status"}. Uuids
and times are not the same in every run and stand there as `Normal` writes them; the lists of all
fields that come before some errors are left out.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.lvm import write_disk

DATA = Path(__file__).resolve().parents[1] / "data"
SESSIONS = DATA / "lvm_sessions.txt"
RECORDS = DATA / "lvm.jsonl"

UUID = re.compile(r"\b[0-9A-Za-z]{6}(?:-[0-9A-Za-z]{4}){5}-[0-9A-Za-z]{6}\b")
TIME = re.compile(r"\b20\d\d-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}")
FIELD_HELP = re.compile(
    r"  (?:Logical Volume Fields|Selection oper)\w*\n.*\n"
    r"(?=  (?:dm_report: )?(?:Unrecog|Operator ))",
    re.DOTALL,
)
UNIX_TIME = re.compile(r"\b1[789]\d{8}\b")


@dataclass
class Session:
    """A list of steps on fresh disks."""

    name: str
    disks: dict[str, int | str]
    """Sizes in MiB, or the names of samples."""
    steps: list[dict[str, Any]] = field(default_factory=list)


class Normal:
    """Puts names in place of what differs from run to run; `names` are replaced as well."""

    def __init__(self, names: Mapping[str, str] | None = None) -> None:
        self._names = dict(names or {})
        self._uuids: dict[str, str] = {}

    def __call__(self, text: str) -> str:
        for name, shown in self._names.items():
            text = text.replace(name, shown)
        text = UUID.sub(self._uuid, text)
        text = FIELD_HELP.sub("", text)
        text = TIME.sub("2000-01-01 00:00:00 +0000", text)
        return UNIX_TIME.sub("1000000000", text)

    def _uuid(self, match: re.Match[str]) -> str:
        number = len(self._uuids) + 1
        return self._uuids.setdefault(match[0], f"uuid{number:02}-0000-0000-0000-0000-0000-000000")


def make_disk(path: Path, what: int | str) -> None:
    """Make an empty disk of so many MiB, or a copy of a sample."""
    if isinstance(what, str):
        write_disk(what, path)
    else:
        with open(path, "wb") as file:
            file.truncate(what << 20)


def read_sessions() -> Iterator[Session]:
    """Yield the sessions of the script."""
    session: Session | None = None
    for line in SESSIONS.read_text(encoding="utf-8").splitlines():
        if line.startswith("== "):
            if session is not None:
                yield session
            _, name, *sizes = line.split()
            disks: dict[str, int | str] = {
                f"disk{n}.img": int(size) if size.isdigit() else size
                for n, size in enumerate(sizes, 1)
            }
            session = Session(name, disks)
        elif line.strip() and not line.startswith("#"):
            assert session is not None, line
            session.steps.append(_step(line))
    if session is not None:
        yield session


def _step(line: str) -> dict[str, Any]:
    if line.startswith("!sh "):
        return {"shell": line[4:]}
    words = shlex.split(line)
    if words[0] == "!write":
        return {"write": [words[1], *map(int, words[2:])]}
    if words[0] in ("!open", "!close"):
        return {words[0][1:]: words[1]}
    stdin = ""
    if "<" in words:
        at = words.index("<")
        stdin = "".join(f"{word}\n" for word in words[at + 1 :])
        words = words[:at]
    return {"args": words, "stdin": stdin}
