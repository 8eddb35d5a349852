"""Process 1 of the guest: does on the real device-mapper what the host asks, one job at a time.

A line "NAME" on the console names a job: NAME.json in the scratch folder of the host, with the
data of its writes in NAME.data. The answer goes to NAME.answer, then "@done NAME" to the console.
Runs on the host's Python, alone: the standard library only.

    guest.py SCRATCH        the folder of the host that jobs come from
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import re
import struct
import subprocess
import sys
import time
import traceback
import tty
import zlib
from collections.abc import Iterator
from typing import Any

SCRATCH = "/run/scratch"
MODULES = (
    *("dm-mod", "dm-bufio", "dm-snapshot", "dm-zero", "dm-flakey"),
    *("dm-log", "dm-region-hash", "dm-mirror", "dm-log-writes"),
)
FINIT_MODULE = 313
POWER_OFF = 0x4321FEDC
SECTOR = 512
BLKDISCARD, BLKZEROOUT = 0x1277, 0x127F
UBD_MAJOR = 98

# <linux/dm-ioctl.h>
HEADER = struct.Struct("=3I I I I i I I I Q 128s 129s 7x")
TARGET = struct.Struct("=Q Q i I 16s")
REMOVE_ALL, LIST_DEVICES, CREATE, REMOVE, RENAME, SUSPEND, STATUS = 1, 2, 3, 4, 5, 6, 7
LOAD, CLEAR, TABLE, MESSAGE = 9, 10, 12, 14
SUSPENDED, STATUS_TABLE, LIVE, INACTIVE, BUFFER_FULL = 2, 16, 32, 64, 256
QUERY_INACTIVE = 4096

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def mount(kind: str, folder: str, options: str = "") -> None:
    os.makedirs(folder, exist_ok=True)
    result = libc.mount(kind.encode(), folder.encode(), kind.encode(), 0, options.encode())
    check(result, f"mount {folder}")


def insert(module: str) -> None:
    folder = f"/usr/lib/uml/modules/{os.uname().release}/kernel/drivers/md"
    file = os.open(f"{folder}/{module}.ko", os.O_RDONLY)
    check(libc.syscall(FINIT_MODULE, file, b"", 0), f"insmod {module}")
    os.close(file)


# --- device-mapper, by its ioctls ---------------------------------------------------------------


class Info:
    """What every ioctl of device-mapper answers, and the data behind it."""

    def __init__(self, raw: bytes) -> None:
        fields = HEADER.unpack_from(raw)
        self.start, self.count, self.opens, self.flags, self.events = fields[4:9]
        self.dev = fields[10]
        self.data = raw[self.start : fields[3]]
        self.minor = (self.dev & 0xFF) | ((self.dev >> 12) & 0xFFF00)
        self.major = (self.dev >> 8) & 0xFFF


class Control:
    """/dev/mapper/control."""

    def __init__(self) -> None:
        self.file = os.open("/dev/mapper/control", os.O_RDWR)

    def call(
        self, command: int, name: str = "", *, flags: int = 0, count: int = 0, data: bytes = b""
    ) -> Info:
        size = HEADER.size + max(len(data), 65536)
        buffer = bytearray(size)
        HEADER.pack_into(
            buffer, 0, 4, 0, 0, size, HEADER.size, count, 0, flags, 0, 0, 0, name.encode(), b""
        )
        buffer[HEADER.size : HEADER.size + len(data)] = data
        fcntl.ioctl(self.file, 0xC000FD00 | HEADER.size << 16 | command, buffer)
        info = Info(bytes(buffer))
        assert not info.flags & BUFFER_FULL
        return info

    def names(self) -> list[str]:
        info = self.call(LIST_DEVICES)
        names, at = [], 0
        while info.data:
            _, step = struct.unpack_from("=QI", info.data, at)
            names.append(info.data[at + 12 : info.data.index(b"\0", at + 12)].decode())
            if not step:
                break
            at += step
        return sorted(names)

    def load(self, name: str, table: str) -> None:
        records = b""
        lines = [line.split(None, 3) for line in table.splitlines()]
        for start, length, kind, *words in lines:
            text = (words[0] if words else "").encode() + b"\0"
            text += bytes(-(TARGET.size + len(text)) % 8)
            step = TARGET.size + len(text)
            records += TARGET.pack(int(start), int(length), 0, step, kind.encode()) + text
        self.call(LOAD, name, count=len(lines), data=records)

    def lines(self, name: str, flags: int = 0) -> list[str]:
        info = self.call(TABLE, name, flags=flags)
        lines, at = [], 0
        for _ in range(info.count):
            start, length, _, step, kind = TARGET.unpack_from(info.data, at)
            end = info.data.index(b"\0", at + TARGET.size)
            text = info.data[at + TARGET.size : end].decode()
            name = kind.rstrip(bytes(1)).decode()
            if name == "flakey":  # Linux 6.3 and later end its line without a blank
                text = text.rstrip()
            lines.append(f"{start} {length} {name} {text}")
            at = step
        return lines

    def clean(self) -> None:
        """Remove every device, even one with inactive tables or suspended."""
        for name in self.names():
            self.call(CLEAR, name)
        self.call(REMOVE_ALL)
        assert not self.names(), self.names()


# --- the steps of a trace -----------------------------------------------------------------------


class Disk:
    """Direct reads and writes of a block device, through one aligned buffer."""

    buffer = mmap.mmap(-1, 4 << 20)

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> Disk:
        self.file = os.open(self.path, os.O_RDWR | os.O_DIRECT)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.file)

    def write(self, data: bytes, offset: int) -> int:
        """Write in one request, of at most 4 MiB, and flush."""
        self.buffer[: len(data)] = data
        with memoryview(self.buffer) as view, view[: len(data)] as part:
            count = os.pwritev(self.file, [part], offset)
        os.fsync(self.file)
        return count

    def read(self, length: int, offset: int) -> Iterator[bytes]:
        """Yield the bytes in pieces, up to the end of the device."""
        while length:
            with memoryview(self.buffer) as view, view[: min(length, 1 << 20)] as part:
                count = os.preadv(self.file, [part], offset)
            if not count:
                return
            yield self.buffer[:count]
            offset += count
            length -= count


class Machine:
    """The verbs of traces; `slots` says which ubd each image of the job is."""

    def __init__(self) -> None:
        self.control = Control()
        self.slots: dict[str, int] = {}
        self.data: bytes = b""
        self.held: list[int] = []

    def words(self, table: str) -> str:
        """Put MAJOR:MINOR where a table has @IMAGE or %NAME."""

        def image(match: re.Match[str]) -> str:
            return f"{UBD_MAJOR}:{16 * self.slots[match[1]]}"

        def device(match: re.Match[str]) -> str:
            if match[1] not in self.control.names():
                raise OSError(errno.ENOENT, "no such device")
            info = self.control.call(STATUS, match[1])
            return f"{info.major}:{info.minor}"

        return re.sub(r"%([\w-]+)", device, re.sub(r"@(\w+)", image, table))

    def numbered(self, line: str) -> str:
        """Put the numbers of the recorded traces in a line: 253 for images, 254 for devices."""

        def number(match: re.Match[str]) -> str:
            return f"{253 if int(match[1]) == UBD_MAJOR else 254}:{match[2]}"

        return re.sub(r"(?<!\S)(\d+):(\d+)(?!\S)", number, line)

    def path(self, name: str) -> str:
        if name.startswith("@"):
            return f"/dev/ubd{chr(ord('a') + self.slots[name[1:]])}"
        return f"/dev/dm-{self.control.call(STATUS, name).minor}"

    def step(self, verb: str, *args: Any) -> Any:
        try:
            answer = getattr(self, f"do_{verb}")(*args)
        except OSError as error:
            code = error.errno or errno.EIO
            if verb in ("r", "w"):
                return f"{verb} E{code}"
            return {"rc": 1, "out": [f"device-mapper: {verb} failed: {os.strerror(code)}"]}
        return answer if verb in ("r", "w") else {"rc": 0, "out": answer or []}

    def do_create(self, name: str, table: str) -> None:
        text = self.words(table)
        self.control.call(CREATE, name)
        try:
            self.control.load(name, text)
            self.control.call(SUSPEND, name)
        except OSError:
            self.control.call(REMOVE, name)
            raise

    def do_reload(self, name: str, table: str) -> None:
        self.control.load(name, self.words(table))

    def do_clear(self, name: str) -> None:
        self.control.call(CLEAR, name)

    def do_suspend(self, name: str) -> None:
        self.control.call(SUSPEND, name, flags=SUSPENDED)

    def do_resume(self, name: str) -> None:
        self.control.call(SUSPEND, name)

    def do_rename(self, name: str, new_name: str) -> None:
        self.control.call(RENAME, name, data=new_name.encode() + b"\0")

    def do_remove(self, name: str) -> None:
        self.control.call(REMOVE, name)

    def do_message(self, name: str, text: str) -> None:
        self.control.call(MESSAGE, name, data=struct.pack("=Q", 0) + text.encode() + b"\0")

    def do_w(self, name: str, offset: int, length: int, at: int) -> str:
        with Disk(self.path(name)) as disk:
            return f"w {disk.write(self.data[at : at + length], offset)}"

    def do_wipe(self, name: str) -> None:
        """Zero the first sector: the next store there starts afresh."""
        with Disk(self.path(name)) as disk:
            disk.write(bytes(SECTOR), 0)

    def do_r(self, name: str, offset: int, length: int) -> str:
        count = crc = 0
        with Disk(self.path(name)) as disk:
            for part in disk.read(length, offset):
                count, crc = count + len(part), zlib.crc32(part, crc)
        return f"r {count} {crc:08x}"

    def do_f(self, name: str) -> None:
        """Flush."""
        with Disk(self.path(name)) as disk:
            os.fsync(disk.file)

    def do_d(self, name: str, offset: int, length: int) -> None:
        with Disk(self.path(name)) as disk:
            fcntl.ioctl(disk.file, BLKDISCARD, struct.pack("QQ", offset, length))

    def everything(self, flags: int) -> list[str]:
        """Return lines as dmsetup prints them: one that is empty for a device without a table."""
        return [
            f"{name}: {self.numbered(line)}"
            for name in self.control.names()
            for line in self.control.lines(name, flags) or [""]
        ]

    def do_status(self) -> list[str]:
        return self.everything(0)

    def do_table(self) -> list[str]:
        return self.everything(STATUS_TABLE)

    def do_inactive(self) -> list[str]:
        return self.everything(STATUS_TABLE | QUERY_INACTIVE)

    def do_info(self, name: str) -> list[int]:
        info = self.control.call(STATUS, name)
        flags = [bool(info.flags & flag) for flag in (LIVE, INACTIVE, SUSPENDED)]
        return [info.minor, info.opens, info.events, info.count if flags[0] else 0, *flags]

    def do_waitmerge(self, name: str, seconds: float = 240) -> list[str]:
        end = time.monotonic() + seconds
        while True:
            line = self.control.lines(name)[0]
            if self.merge_is_over(name, line.split(" ")[3:]):
                return [self.numbered(line)]
            assert time.monotonic() < end, line
            time.sleep(0.001)

    def merge_is_over(self, name: str, status: list[str]) -> bool:
        """Tell whether all is merged; of a store that overflowed only its disk tells that.

        Its first record is the last to be zeroed.
        """
        if status != ["Overflow"]:
            ended = len(status) < 2 or status == ["Merge", "failed"]
            return ended or status[0].split("/")[0] == status[1]
        table = self.control.lines(name, STATUS_TABLE)[0].split(" ")[3:]
        major, minor = map(int, table[1].split(":"))
        chunk = int(table[3])
        ubd = f"/dev/ubd{chr(ord('a') + minor // 16)}"
        with Disk(ubd if major == UBD_MAJOR else f"/dev/dm-{minor}") as disk:
            return not any(b"".join(disk.read(SECTOR, chunk * SECTOR))[:16])

    def do_mergeto(self, name: str, left: int) -> None:
        """Wait until a merge has at most `left` sectors of its store, and say so on the console."""
        while int(self.control.lines(name)[0].split(" ")[3].split("/")[0]) > left:
            pass
        say("@merging")

    # beside traces

    def hold(self, slots: dict[str, int]) -> None:
        """Keep the disks open until the end, and let each find out if its file can zero ranges.

        Where it cannot (on tmpfs), the first try after an open fails, and later ones are spared.
        """
        self.slots = slots
        for name in slots:
            with Disk(self.path(f"@{name}")) as disk:
                self.held.append(os.dup(disk.file))
                first = b"".join(disk.read(SECTOR, 0))
                fcntl.ioctl(disk.file, BLKZEROOUT, struct.pack("QQ", 0, SECTOR))
                disk.write(first, 0)

    def clean(self) -> None:
        """Leave no device behind, and the disks free to be pulled out."""
        self.control.clean()
        while self.held:
            os.close(self.held.pop())

    def do_run(self, *command: str) -> list[str]:
        """Run a program; %NAME and @IMAGE in its words become paths."""
        words = [self.path(word.lstrip("%")) if word[0] in "%@" else word for word in command]
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        return [str(done.returncode), done.stdout, done.stderr]

    def do_dump(self, name: str, file: str) -> None:
        """Copy the bytes of a device to a new file in the scratch folder."""
        with Disk(self.path(name)) as disk, open(f"{SCRATCH}/{file}", "wb") as copy:
            for part in disk.read(1 << 40, 0):
                copy.write(part)

    def do_work(self, writes: list[list[Any]]) -> None:
        """Do many writes, and say on the console how many are done: first none, then each."""
        say("@did 0")
        for number, (name, offset, length, at) in enumerate(writes):
            with Disk(self.path(name)) as disk:
                disk.write(self.data[at : at + length], offset)
            say(f"@did {number + 1}")


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def run(machine: Machine, name: str) -> None:
    """Run the job NAME; what goes wrong in the agent itself is the answer, too."""
    with open(f"{SCRATCH}/{name}.json") as file:
        job = json.load(file)
    with open(f"{SCRATCH}/{name}.data", "rb") as file:
        machine.data = file.read()
    answers: list[Any] = []
    try:
        if "slots" in job:
            machine.hold(job["slots"])
        answers.extend(machine.step(*step) for step in job["steps"])
        if job["clean"]:
            machine.clean()
    except Exception:
        answers = [traceback.format_exc()]
        answers.insert(0, "broken")
    with open(f"{SCRATCH}/{name}.answer", "w") as file:
        json.dump(answers, file)


def main() -> None:
    os.environ["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    mount("proc", "/proc")
    mount("sysfs", "/sys")
    mount("tmpfs", "/run")
    mount("hostfs", SCRATCH, sys.argv[1])
    os.mkdir("/run/mnt")
    for module in MODULES:
        insert(module)
    # No program is to be started for every event of a device: that took most of the time.
    with open("/sys/kernel/uevent_helper", "w") as file:
        file.write("\n")
    tty.setraw(0)
    machine = Machine()
    say("@ready " + os.uname().release)
    for line in sys.stdin:
        name = line.strip()
        if name == "quit":
            break
        run(machine, name)
        say(f"@done {name}")
    libc.sync()
    libc.reboot(POWER_OFF)


if __name__ == "__main__":
    main()
